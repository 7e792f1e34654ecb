"""The class that transformers' pipeline loads models of our task with."""

import os
from typing import Any

import transformers

from quantpress.pipelines.default_model.lazy import DefaultFolder
from quantpress.pipelines.default_model.quick_dtype import quick_dtype


class AutoModelForCausalLM(transformers.AutoModelForCausalLM):
    """transformers' own, but for the default model, which comes in the dtype that is quick here.

    It keeps the name, by which transformers loads a saved pipeline, and a repository's own code.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """The model. A dtype that was asked for is left alone: `pipeline` hands on "auto" where none was."""
        named = "torch_dtype" in kwargs or kwargs.get("dtype", "auto") != "auto"
        if isinstance(pretrained_model_name_or_path, DefaultFolder) and not named:
            kwargs["dtype"] = quick_dtype()
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
