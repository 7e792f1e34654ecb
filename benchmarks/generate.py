"""Generation end to end with a packed cache against DynamicCache and sdpa, in one run, with random weights.

    python benchmarks/generate.py             Llama-3.1-8B's shape, 131072 tokens of context, 3/3 bits
    python benchmarks/generate.py --tokens 32768 --bits 4 4 --new-tokens 128
    python benchmarks/generate.py --tokens 32768 --batch 8      eight sequences; tokens a second of all
    python benchmarks/generate.py --json out.json
    torchrun --nproc-per-node 2 benchmarks/generate.py    the same model shared by two GPUs

Both sides read the same random ids (`read_context`: one exact forward, feed-forwards in chunks), once without
a press into a DynamicCache, through PyTorch's kernels alone, and once under TurboQuant, as the pipeline does:
kernels of ours stand in for norms, gates and rotary positions, to the last bit. Time to first token runs from
there to the first id on the host, prefill, packing and the first forward of the question included. Then
`model.generate` decodes greedily; tokens a second count from the id after `--skip` to the last, peak memory
is `torch.cuda.max_memory_allocated` over the whole decode phase, weights included. A short run of each side
goes before, so that kernels are compiled. The weights are random: the text means nothing, the times do.

Under torchrun both sides run under the same tensor parallelism of transformers. Bytes are those of the GPU
that has most; times are those of the first process, which alone prints and writes.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quantpress.cache import PackedLayer, cache_memory, continue_inputs
from quantpress.cache.ranks import ranks_of
from quantpress.evaluation.measuring import TokenClock
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TurboQuant

GB = 1e9
QUESTION = 16  # tokens after the context
WARM_UP = 8192  # tokens of context of the short run


@dataclass(frozen=True)
class Result:
    """What one side took.

    Args:
        name: the side.
        first_token_s: seconds from nothing to the first new id.
        tokens_per_s: of all sequences, after the first `skip` new ids of each.
        all_tokens_per_s: of all new ids after the first of each, capturing included.
        decode_peak_bytes: most memory allocated while decoding, on one GPU.
        prefill_peak_bytes: most while reading.
        cache_bytes: of the cache after reading, on one GPU.
        replays: decode steps that were one launch of a graph.
    """

    name: str
    first_token_s: float
    tokens_per_s: float
    all_tokens_per_s: float
    decode_peak_bytes: int
    prefill_peak_bytes: int
    cache_bytes: int
    replays: int


def build(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model with random weights, made on the GPU, or on those of all processes of torchrun."""
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=max(arguments.tokens, WARM_UP) + arguments.new_tokens + QUESTION,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.path.insert(
            0, str(Path(__file__).parent)
        )  # a Python with PYTHONSAFEPATH does not look beside a script
        from random_shards import shared_model

        model = shared_model(config, torch.bfloat16)
    else:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def measure(
    name: str,
    model: PreTrainedModel,
    ids: torch.Tensor,
    press: TurboQuant | None,
    new_tokens: int,
    skip: int,
    **options: Any,
) -> Result:
    """Read a context and generate after it, once; `options` are those of `captured_decoding`."""
    _settle()
    clock = TokenClock()
    context, question = ids[:, :-QUESTION], ids[:, -QUESTION:]
    start = time.perf_counter()
    cache = DynamicCache()
    with torch.no_grad():
        joins = press is not None and options.get("join_kernels", True) is not False
        position = read_context(model, context, cache, press, progress=False, join_kernels=joins)
    prefill_peak = torch.cuda.max_memory_allocated()
    total = QUESTION + new_tokens
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            layer.reserve(total)
    cache_bytes = cache_memory(cache).total_bytes
    inputs = continue_inputs(cache, question, tokens_seen=position)
    torch.cuda.reset_peak_memory_stats()
    captured = captured_decoding(model, new_tokens=total, **options)
    with nullcontext() if press is None else captured as steps:
        model.generate(
            **inputs, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, streamer=clock
        )
    (times,) = clock.times
    own = Result(
        name=name,
        first_token_s=times[0] - start,
        tokens_per_s=(len(times) - 1 - skip) / (times[-1] - times[skip]) * len(ids),
        all_tokens_per_s=(len(times) - 1) / (times[-1] - times[0]) * len(ids),
        decode_peak_bytes=torch.cuda.max_memory_allocated(),
        prefill_peak_bytes=prefill_peak,
        cache_bytes=cache_bytes,
        replays=0 if steps is None else steps.replays,
    )
    ranks = ranks_of(model)
    if ranks is None:
        return own
    sizes = ("decode_peak_bytes", "prefill_peak_bytes", "cache_bytes")
    each = ranks.each({name: getattr(own, name) for name in sizes})
    return replace(own, **{name: max(one[name] for one in each) for name in sizes})


def _settle() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def show(arguments: argparse.Namespace, weights: int, results: Sequence[Result], gpus: int = 1) -> None:
    """Print the table."""
    plain = results[0]
    of_each = f" of each of {gpus} GPUs" if gpus > 1 else ""
    device = torch.cuda.get_device_properties(0)
    table = Table(
        title=f"{arguments.batch} x {arguments.tokens} tokens of context, {arguments.new_tokens} new; "
        "weights are random: the text means nothing",
        caption=f"{device.name}, Python {platform.python_version()}, torch {torch.__version__}, triton "
        f"{triton.__version__}, transformers {transformers.__version__}; weights {weights / GB:.2f} GB "
        f"(10^9 bytes){of_each}",
    )
    names = (
        "cache",
        "tokens/s",
        "",
        "first token s",
        "",
        "decode peak GB",
        "over weights",
        "cache GB",
        "replays",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "cache" else "right")
    for one in results:
        over = one.decode_peak_bytes - weights
        table.add_row(
            one.name,
            f"{one.tokens_per_s:.1f}",
            f"{one.tokens_per_s / plain.tokens_per_s:.2f}x",
            f"{one.first_token_s:.2f}",
            f"{one.first_token_s / plain.first_token_s:.3f}x",
            f"{one.decode_peak_bytes / GB:.2f}",
            f"{over / GB:.2f} = {over / plain.cache_bytes:.3f} x bf16 cache",
            f"{one.cache_bytes / GB:.2f} = 1/{plain.cache_bytes / one.cache_bytes:.2f}",
            str(one.replays),
        )
    Console(width=150).print(table)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = {
        "layers": 32,
        "hidden": 4096,
        "heads": 32,
        "kv-heads": 8,
        "head-dim": 128,
        "intermediate": 14336,
        "vocab": 128256,
    }
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default}")
    parser.add_argument("--tokens", type=int, default=131072, help="of context, question included")
    parser.add_argument("--batch", type=int, default=1, help="sequences of as many tokens each")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--skip", type=int, default=8, help="new tokens before counting")
    parser.add_argument("--bits", type=float, nargs=2, default=(3, 3), metavar=("KEY", "VALUE"))
    parser.add_argument("--compile", action="store_true", help="one more side: steps through torch.compile")
    parser.add_argument(
        "--join", action="store_true", help='two more sides: join_kernels="exact", join_kernels=False'
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/generate.py needs a CUDA device; there is none here")
    torch.manual_seed(0)
    model = build(arguments)
    ranks = ranks_of(model)
    first, gpus = (True, 1) if ranks is None else (ranks.first, ranks.count)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.randint(arguments.vocab, (arguments.batch, arguments.tokens), device=model.device)
    press = TurboQuant(key_bits=arguments.bits[0], value_bits=arguments.bits[1])
    packed = f"TurboQuant {arguments.bits[0]:g}/{arguments.bits[1]:g}"
    sides: list[tuple[str, TurboQuant | None, dict[str, Any]]] = [
        ("DynamicCache, sdpa", None, {}),
        (packed, press, {}),
    ]
    if arguments.compile:
        sides.append((f"{packed}, compiled", press, {"compile": True}))
    if arguments.join:
        sides.append((f"{packed}, exact kernels joined", press, {"join_kernels": "exact"}))
        sides.append((f"{packed}, PyTorch's kernels", press, {"join_kernels": False}))
    results = []
    for name, one, options in sides:
        measure(name, model, ids[:, :WARM_UP], one, 12, 4, **options)
        results.append(measure(name, model, ids, one, arguments.new_tokens, arguments.skip, **options))
        if first:
            show(arguments, weights, results, gpus)
    if arguments.json and first:
        rows = {
            "gpus": gpus,
            "weights_bytes": weights,
            "arguments": vars(arguments),
            "results": [asdict(one) for one in results],
        }
        arguments.json.write_text(json.dumps(rows, indent=1, default=str))
    if ranks is not None:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
