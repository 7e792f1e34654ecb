"""The default model in transformers' pipeline registry: fetched on request, in the dtype that is fast."""

import os
from typing import Any

import transformers

from quantpress.errors import InvalidInputError, QuantPressError
from quantpress.pipelines.default_model.quick_dtype import check_dtype, forced_name, quick_dtype
from quantpress.pipelines.default_model.store import ensure_default_model

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
REVISION = "main"


class DefaultFolder(str):
    """The folder of the default model, if no model was named: it is loaded in the dtype that is fast here."""

    __slots__ = ()


class LazyDefault(dict[str, tuple[str, str]]):
    """`default=` of `PIPELINE_REGISTRY.register_pipeline`: reading its "model" fetches the default model.

    transformers reads `default["model"]`, a pair (model, revision), only if `pipeline(...)` is given no
    model. The answer is then the local folder. Anything else (`in`, iterating, copies, JSON) sees the model's
    name on the hub and fetches nothing.

    Args:
        cache_dir: as for `ensure_default_model`.

    Raises (when "model" is read):
        ModelFilesError: the default model could not be fetched.
        InvalidInputError: `QUANTPRESS_DTYPE` does not name a dtype. It is checked here because transformers
            tries other ways when loading fails.

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
        """Another one with the same folder; nothing is fetched."""
        return LazyDefault(self.cache_dir)


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """transformers' own class, but the default model comes in the dtype that is fast here.

    It keeps the name, by which transformers loads a saved pipeline and a repository's own code.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """The model. A dtype that was asked for is kept; `pipeline` passes "auto" if there was none.

        Raises:
            QuantPressError: there is no such dtype. (After a ValueError `pipeline` would load float32.)
        """
        try:
            check_dtype(kwargs.get("torch_dtype"))
            check_dtype(kwargs.get("dtype"))
        except InvalidInputError as error:
            raise QuantPressError(str(error)) from None
        named = "torch_dtype" in kwargs or kwargs.get("dtype", "auto") != "auto"
        if isinstance(pretrained_model_name_or_path, DefaultFolder) and not named:
            kwargs["dtype"] = quick_dtype()
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
