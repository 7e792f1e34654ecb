"""Writes docs/presses.md: which of kvpress's presses go with TurboQuant, and their memory.

`FOOTER` says how the memory is measured. It is what the cache's tensors take, as a share of the whole context
in 16 bits.
"""

import functools
import importlib.metadata
import logging
import re
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import kvpress
import torch
from catalogue import CATALOGUE, DELIMITER_ID, FINCH_WINDOW, Entry, exported
from results import DOCS
from tokenizers import Tokenizer, models
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from quantpress import presses as short_names
from quantpress.cache import cache_memory
from quantpress.cache.host import TESTED
from quantpress.errors import CompositionError
from quantpress.presses import Compose, TurboQuant
from quantpress.presses.models.attention import attention_modules

PAGE = DOCS / "presses.md"
TOKENS, LAYERS, KV_HEADS, HEAD_DIM = 2048, 2, 2, 64
BITS = 4
PERCENT = re.compile(r"(\d+) %")
TOLERANCE = 2

HEADER = """# Presses

This page lists every press of kvpress {version}. It says whether `Compose` takes the press in front of
`TurboQuant`, and how much memory the cache then takes. {stacks} presses stack, {refused} are refused.

```python
from quantpress import Compose, SnapKV, TurboQuant

press = Compose([SnapKV(0.5), TurboQuant(bits=4)])
```

| column | meaning |
|---|---|
| press | the class in kvpress |
| here | its name in `quantpress` |
| kind | what it does with the tokens |
| with TurboQuant | "stacks", or the message with which `Compose` refuses the press |
| seen | share of (head, token) entries that attention still sees |
| newest transformers | whether it works on {newest} too ([how to install kvpress there](versions.md)) |
| alone | memory of the cache under the press alone |
| with TurboQuant({bits}) | memory of the cache with `TurboQuant({bits})` behind the press |

Memory is a share of the same context in 16 bits. `TurboQuant({bits})` without any press leaves {alone}.

- **Hiding is not freeing.** kvpress keeps in memory what it hides head by head. A packed layer does not.
- **More than 100 %**: slices keep a larger tensor alive.

## The table

| press | here | kind | with TurboQuant | newest transformers | seen | alone | with TurboQuant({bits}) |
|---|---|---|---|---|---|---|---|
"""

FOOTER = """
## How it was measured

`python docs/build.py presses` writes this page. It measures the tensors of a cache after reading {tokens}
tokens with a random Llama in bfloat16: {layers} layers, {heads} KV heads, head_dim {dim}. Half of the tokens
are evicted where a ratio can be set. `TurboQuant({bits})` keeps 4 sinks and at least 128 recent tokens in 16
bits.

A test makes every press answer with a codec that loses nothing, and compares with kvpress's own pipeline
(`tests/presses/test_matrix.py`). It also runs on the newest transformers (`make test-newest`).
"""


@dataclass(frozen=True)
class Measured:
    """A cache after the prefill: shares of (head, token) entries seen, and of the 16-bit bytes kept."""

    seen: float
    bytes: float


@functools.cache
def model_of(attention: str, adapted: bool) -> PreTrainedModel:
    """A random Llama; an `adapted` one is a second model, whose layers may be changed."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.config._name_or_path = _tokenizer_folder()
    return model


@functools.cache
def _tokenizer_folder() -> str:
    """KVzip loads the tokenizer that has its model's name."""
    folder = tempfile.mkdtemp()
    vocabulary = {f"w{index}": index for index in range(256)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(folder)
    return folder


def context() -> torch.Tensor:
    """[1, T] random ids, with Finch's delimiter where Finch looks for it."""
    ids = torch.randint(DELIMITER_ID + 1, 256, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[0, -FINCH_WINDOW - 1] = DELIMITER_ID
    return ids


def measure(model: PreTrainedModel, press: Any) -> Measured:
    """Read the context under a press."""
    cache = DynamicCache()
    torch.manual_seed(0)
    with torch.no_grad(), nullcontext() if press is None else press(model):
        model.model(input_ids=context(), past_key_values=cache)
    hidden = 0
    for module in attention_modules(model):
        masked = vars(module).pop("masked_key_indices", None)
        hidden += 0 if masked is None else len(masked[0])
    entries = KV_HEADS * sum(layer.get_seq_length() for layer in cache.layers)
    full = TOKENS * LAYERS * KV_HEADS
    memory = cache_memory(cache)
    return Measured((entries - hidden) / full, memory.total_bytes / (full * HEAD_DIM * 2 * 2))


def refusal(entry: Entry, model: PreTrainedModel) -> str:
    """Why `Compose` refuses a press in front of TurboQuant; empty when it does not."""
    try:
        Compose([entry.make(model), TurboQuant(BITS)])
    except CompositionError as error:
        return str(error)
    return ""


def short_name(press_class: type) -> str:
    """What the press is called in quantpress; empty when it has no name of its own there."""
    if press_class in (kvpress.BasePress, kvpress.ComposedPress):
        return "`Compose`" if press_class is kvpress.ComposedPress else ""
    for name in short_names.__all__:
        ours = getattr(short_names, name)
        if ours is press_class or (ours.__name__ == name and press_class in ours.__bases__[1:]):
            return f"`{name}`"
    return ""


def row(name: str, press_class: type) -> str:
    """One line of the table."""
    entry = CATALOGUE[name]
    model = model_of(entry.attention, adapted=name == "RestoreKVPress")
    reason = refusal(entry, model)
    cells = [f"`{name}`", short_name(press_class), entry.kind]
    if reason:
        cells += [f"refused: {reason}", "", "", "", ""]
    else:
        plain = measure(model, entry.make(model))
        packed = measure(model, Compose([entry.make(model), TurboQuant(BITS)]))
        cells += ["stacks", entry.newest, _percent(plain.seen), _percent(plain.bytes), _percent(packed.bytes)]
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def table() -> str:
    """The whole of docs/presses.md."""
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row(name, press_class) for name, press_class in exported().items()]
        alone = measure(model_of("sdpa", adapted=False), TurboQuant(BITS))
    refused = sum("| refused: " in line for line in rows)
    figures = {
        "version": importlib.metadata.version("kvpress"),
        "newest": TESTED[-1],
        "stacks": len(rows) - refused,
        "refused": refused,
        "tokens": TOKENS,
        "layers": LAYERS,
        "heads": KV_HEADS,
        "dim": HEAD_DIM,
        "bits": BITS,
        "alone": _percent(alone.bytes),
    }
    return HEADER.format(**figures) + "\n".join(rows) + "\n" + FOOTER.format(**figures)


def differences(old: str, new: str) -> list[str]:
    """The new lines that say something else; percentages may move a little between machines."""
    lines = list(zip_longest(old.splitlines(), new.splitlines(), fillvalue=""))
    return [after for before, after in lines if not _same(before, after)]


def _same(before: str, after: str) -> bool:
    texts = [PERCENT.sub("% ", line) for line in (before, after)]
    shares = [[int(share) for share in PERCENT.findall(line)] for line in (before, after)]
    return texts[0] == texts[1] and all(abs(a - b) <= TOLERANCE for a, b in zip(*shares, strict=True))


def write() -> None:
    """Measure, and write docs/presses.md."""
    PAGE.write_text(table(), encoding="utf-8")


def stale() -> list[str]:
    """Lines of docs/presses.md that are not what would be written."""
    return differences(PAGE.read_text(encoding="utf-8"), table())
