"""The default model as transformers' pipeline registry wants it: fetched when asked for, not before."""

import os

from quantpress.pipelines.default_model.store import ensure_default_model

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "main"


class LazyDefault(dict[str, tuple[str, str]]):
    """`default=` of `PIPELINE_REGISTRY.register_pipeline`: reading its "model" fetches the default model.

    transformers reads `default["model"]`, a pair (model, revision), only when `pipeline(...)` gets no model.
    The answer is then the local folder. Whatever looks without asking (`in`, iterating, copies, JSON) sees
    the model's name on the hub and fetches nothing.

    Args:
        cache_dir: as `ensure_default_model` takes it.

    >>> default = LazyDefault()
    >>> "model" in default, dict(default)
    (True, {'model': ('HuggingFaceTB/SmolLM2-135M-Instruct', 'main')})
    """

    def __init__(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        super().__init__(model=(HUB_NAME, REVISION))
        self.cache_dir = cache_dir

    def __getitem__(self, key: str) -> tuple[str, str]:
        name, revision = super().__getitem__(key)
        return (str(ensure_default_model(self.cache_dir)), revision) if key == "model" else (name, revision)

    def copy(self) -> "LazyDefault":
        """Another one of the same; nothing is fetched."""
        return LazyDefault(self.cache_dir)
