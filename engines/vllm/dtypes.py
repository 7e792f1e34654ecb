"""The KV-cache dtypes of the plugin: a name, and the codecs of keys and values that it stands for."""

from collections.abc import Callable

import torch

from quantpress.cache.engine_memory import WIDTHS, engine_widths
from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.scalar import ScalarPages
from quantpress.quantization.spec import CodecSpec

MakeCodecs = Callable[[int, int, torch.dtype], tuple[PageCodec, PageCodec]]
"""(head_dim of keys, of values, dtype of the model) -> codecs of keys and of values."""

_OTHERS: dict[str, MakeCodecs] = {}


def dtype_names() -> list[str]:
    """Every name, for instance "quantpress_3bit" and "quantpress_k4v2"."""
    pairs = [f"quantpress_k{keys}v{values}" for keys in WIDTHS for values in WIDTHS]
    return [f"quantpress_{bits}bit" for bits in WIDTHS] + pairs + list(_OTHERS)


def is_ours(name: str) -> bool:
    """Whether a `--kv-cache-dtype` is one of the plugin's."""
    return name in dtype_names()


def codecs_of(
    name: str, head_dim: int, value_dim: int, dtype: torch.dtype, widths: tuple[int, int] | None = None
) -> tuple[PageCodec, PageCodec]:
    """The codecs of keys and of values.

    Args:
        name: the dtype's name.
        head_dim: dimension of the keys.
        value_dim: dimension of the values.
        dtype: of the model.
        widths: bits of keys and of values that a plan has for the layer; None: those of the name.

    Raises:
        InvalidInputError: the name is not one of `dtype_names`.
    """
    if name in _OTHERS:
        return _OTHERS[name](head_dim, value_dim, dtype)
    keys, values = widths or engine_widths(name)
    return (
        ScalarPages(CodecSpec(head_dim, keys, "key", scale_dtype="float16", page_keys=True)),
        ScalarPages(CodecSpec(value_dim, values, "value", scale_dtype="float16")),
    )


def register_dtype(name: str, codecs: MakeCodecs) -> None:
    """Add a KV-cache dtype of other codecs, in this process.

    Args:
        name: for `--kv-cache-dtype`.
        codecs: makes the codecs of keys and of values.
    """
    _OTHERS[name] = codecs
    announce(name)


def announce(name: str) -> None:
    """Make a name known to vLLM."""
    from vllm.config.cache import is_known_kv_cache_dtype, register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    if is_known_kv_cache_dtype(name):
        return

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    register_kv_cache_dtype(name)(Handler)
