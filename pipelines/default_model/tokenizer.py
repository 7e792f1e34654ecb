"""Rebuild the tokenizer that the model was trained with from the metadata of its GGUF file.

It is byte-level BPE with single digits (the GGUF calls this form "smollm"). transformers' own GGUF path takes
it for a Llama tokenizer: it prepends `<|im_start|>`, ends on another token, and adds five tokens that the
model has no embeddings for.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers  # type: ignore[import-untyped]
from tokenizers.models import BPE  # type: ignore[import-untyped]

from quantpress.errors import ModelFilesError

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
CHAT_MARKS = ["<|im_start|>", "<|im_end|>"]


def metadata(reader: GGUFReader, key: str) -> Any:
    """The value of a key in the file's metadata: a number, a string or a list of them.

    Raises:
        ModelFilesError: the file has no such key.
    """
    field = reader.get_field(key)
    if field is None:
        raise ModelFilesError(f"the GGUF file's metadata has no {key!r}: it is not the expected model.")
    return field.contents()


def write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers into `folder`.

    Args:
        reader: an open GGUF file with a "gpt2" tokenizer of the "smollm" form.
        folder: an existing folder.

    Raises:
        ModelFilesError: the file has a tokenizer of another form.
    """
    form = (metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre"))
    if form != ("gpt2", "smollm"):
        raise ModelFilesError(f"the GGUF file's tokenizer is {form}; only ('gpt2', 'smollm') can be rebuilt.")
    tokens: list[str] = metadata(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = metadata(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **{key: tokens[metadata(reader, f"tokenizer.ggml.{name}_token_id")] for key, name in special.items()},
        "additional_special_tokens": CHAT_MARKS,
        "chat_template": metadata(reader, "tokenizer.chat_template"),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
