"""Compose KV-cache presses: evict with any kvpress press, then pack what is left in 2 to 4 bits a value.

>>> from quantpress import Compose, SnapKV, TurboQuant
>>> press = Compose([SnapKV, TurboQuant])

Importing quantpress is light: torch, transformers and kvpress are imported when a name that needs them is
first used. Every press of `quantpress.presses` can be imported from here too. From the import on
`transformers.pipeline("kv-press-text-generation")` makes our pipeline, whether kvpress is imported before,
after or never (`quantpress.task`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantpress.errors import (
    CacheFileError,
    CompositionError,
    ContextTooLongError,
    EmptyContextError,
    InvalidInputError,
    MissingPackageError,
    ModelFilesError,
    NonFiniteError,
    NotAppliedError,
    PoolFullError,
    QuantPressError,
    UnsupportedBitsError,
    UnsupportedHeadDimError,
    UnsupportedModelError,
    unknown_name,
)
from quantpress.task import watch_imports
from quantpress.version import __version__ as __version__

if TYPE_CHECKING:
    from quantpress.cache import PackedLayer, PagedAttention, cache_memory, continue_inputs
    from quantpress.codecs.turboquant import TurboQuantCodec
    from quantpress.evaluation.attention_fidelity import attention_fidelity
    from quantpress.pipelines.capture.captured import captured_decoding
    from quantpress.pipelines.contexts.cached_context import CachedContext
    from quantpress.pipelines.contexts.store import ContextStore
    from quantpress.pipelines.enabling.enable import disable, enable
    from quantpress.pipelines.patching.live_patch import patch_attention
    from quantpress.pipelines.text_generation import TextGenerationPipeline
    from quantpress.presses import *  # noqa: F403
    from quantpress.presses import Compose, TurboQuant

__all__ = [
    "CacheFileError",
    "CachedContext",
    "Compose",
    "CompositionError",
    "ContextStore",
    "ContextTooLongError",
    "EmptyContextError",
    "InvalidInputError",
    "MissingPackageError",
    "ModelFilesError",
    "NonFiniteError",
    "NotAppliedError",
    "PackedLayer",
    "PagedAttention",
    "PoolFullError",
    "QuantPressError",
    "TextGenerationPipeline",
    "TurboQuant",
    "TurboQuantCodec",
    "UnsupportedBitsError",
    "UnsupportedHeadDimError",
    "UnsupportedModelError",
    "attention_fidelity",
    "cache_memory",
    "captured_decoding",
    "continue_inputs",
    "disable",
    "enable",
    "patch_attention",
]

_FOLDERS = frozenset({"cache", "codecs", "evaluation", "kernels", "pipelines", "presses", "quantization"})
_LAZY = {
    "CachedContext": "quantpress.pipelines.contexts.cached_context",
    "Compose": "quantpress.presses",
    "ContextStore": "quantpress.pipelines.contexts.store",
    "PackedLayer": "quantpress.cache",
    "PagedAttention": "quantpress.cache",
    "TextGenerationPipeline": "quantpress.pipelines.text_generation",
    "TurboQuant": "quantpress.presses",
    "TurboQuantCodec": "quantpress.codecs.turboquant",
    "attention_fidelity": "quantpress.evaluation.attention_fidelity",
    "cache_memory": "quantpress.cache",
    "captured_decoding": "quantpress.pipelines.capture.captured",
    "continue_inputs": "quantpress.cache",
    "disable": "quantpress.pipelines.enabling.enable",
    "enable": "quantpress.pipelines.enabling.enable",
    "patch_attention": "quantpress.pipelines.patching.live_patch",
}


watch_imports()


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"quantpress.{name}")
    home = _LAZY.get(name)
    # Press names are class names; any other unknown name is answered without importing anything.
    unknown_class = home is None and name[:1].isupper()
    presses = import_module("quantpress.presses").__all__ if unknown_class else []
    if name in presses:
        home = "quantpress.presses"
    if home is None:
        raise unknown_name(__name__, name, {*__all__, *_FOLDERS, *presses})
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    presses = import_module("quantpress.presses").__all__
    return sorted({*globals(), *__all__, *_FOLDERS, *presses})
