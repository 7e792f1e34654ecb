"""The default model as transformers' pipeline registry wants it: fetched when asked for, not before."""

import os

from quantpress.pipelines.default_model.quick_dtype import forced_name
from quantpress.pipelines.default_model.store import ensure_default_model

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "main"


class DefaultFolder(str):
    """The default model's folder where no model was named: it is loaded in the dtype that is quick here."""

    __slots__ = ()


class LazyDefault(dict[str, tuple[str, str]]):
    """`default=` of `PIPELINE_REGISTRY.register_pipeline`: reading its "model" fetches the default model.

    transformers reads `default["model"]`, a pair (model, revision), only when `pipeline(...)` gets no model.
    The answer is then the local folder. Whatever looks without asking (`in`, iterating, copies, JSON) sees
    the model's name on the hub and fetches nothing.

    Args:
        cache_dir: as `ensure_default_model` takes it.

    Raises (when "model" is read):
        ModelFilesError: the default model could not be fetched.
        InvalidInputError: `QUANTPRESS_DTYPE` names no dtype. It is read here, since transformers tries other
            ways when loading fails.

    >>> default = LazyDefault()
    >>> "model" in default, dict(default)
    (True, {'model': ('HuggingFaceTB/SmolLM2-135M-Instruct', 'main')})
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        super().__init__(model=(HUB_NAME, REVISION))
        self.cache_dir = cache_dir

    def __getitem__(self, key: str) -> tuple[str, str]:
        name, revision = super().__getitem__(key)
        if key != "model":
            return name, revision
        forced_name()
        return DefaultFolder(ensure_default_model(self.cache_dir)), revision

    def copy(self) -> "LazyDefault":
        """Another one of the same; nothing is fetched."""
        return LazyDefault(self.cache_dir)
