"""Turn the llama GGUF into a transformers folder: tied bf16 safetensors, configs, tokenizer.

Each quantized matrix is dequantized once, in float32, and rounded to bf16. llama.cpp stores the rows of the
query and key projections in the order of its own rotary embedding (pairs 2j, 2j + 1), while transformers
rotates pairs j, j + D/2. Those rows are moved back, head by head.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tqdm import tqdm

from quantpress.errors import ModelFilesError
from quantpress.pipelines.default_model.tokenizer import metadata, write_tokenizer

OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, folder: Path, progress: bool = True) -> None:
    """Write the model of a llama GGUF file with tied embeddings into `folder`, as transformers reads it.

    Args:
        gguf: the file to read.
        folder: an existing folder, to hold model.safetensors, config.json, generation_config.json,
            tokenizer.json and tokenizer_config.json.
        progress: show a bar on a terminal.

    Raises:
        ModelFilesError: the file is not a llama model of the expected form.
    """
    try:
        reader = GGUFReader(gguf)
    except ValueError as error:
        raise ModelFilesError(f"{gguf.name} is not a GGUF file ({error}).") from error
    config = model_config(reader)
    write_tokenizer(reader, folder)
    weights: dict[str, torch.Tensor] = {}
    bar = tqdm(reader.tensors, desc="converting to bf16", unit="tensor", disable=None if progress else True)
    for tensor in bar:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weight = rotary_rows(weight, config["num_attention_heads"])
        if ".attn_k." in tensor.name:
            weight = rotary_rows(weight, config["num_key_value_heads"])
        weights[transformers_name(tensor.name)] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, fields in (("config.json", config), ("generation_config.json", generation)):
        text = json.dumps({**fields, "transformers_version": transformers.__version__}, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors writes 0600


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """The fields of config.json, from the file's metadata.

    Raises:
        ModelFilesError: the file holds a model of another architecture than llama.
    """
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise ModelFilesError(f"the GGUF file holds a {architecture!r} model; only 'llama' can be converted.")
    epsilon = metadata(reader, "llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": metadata(reader, "llama.vocab_size"),
        "hidden_size": metadata(reader, "llama.embedding_length"),
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_attention_heads": metadata(reader, "llama.attention.head_count"),
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv"),
        "head_dim": metadata(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "rope_theta": metadata(reader, "llama.rope.freq_base"),
        "rms_norm_eps": float(f"{epsilon:.6g}"),  # 1e-05, which the file holds as the float32 9.999999747e-06
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
    }


def rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Move the rows of a query or key projection from llama.cpp's rotary order to transformers'.

    Args:
        weight: [heads * D, hidden]; within a head, row 2j + s belongs to half s, pair j.
        heads: number of heads of this projection.

    Returns:
        [heads * D, hidden]; within a head, row s * D/2 + j.

    >>> rotary_rows(np.arange(4)[:, None], heads=1).ravel().tolist()
    [0, 2, 1, 3]
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def transformers_name(name: str) -> str:
    """The name that transformers gives to a GGUF tensor of a llama model.

    Raises:
        ModelFilesError: a llama model with tied embeddings has no such tensor.

    >>> transformers_name("blk.7.ffn_down.weight")
    'model.layers.7.mlp.down_proj.weight'
    """
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = rest.removesuffix(".weight")
    if not block.isdigit() or part not in LAYER_NAMES:
        raise ModelFilesError(f"the GGUF file holds a tensor {name!r} that a tied llama model does not have.")
    return f"model.layers.{block}.{LAYER_NAMES[part]}.weight"
