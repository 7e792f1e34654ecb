"""Loads the model that a command is given."""

from typing import Any

import torch
import transformers

from quantpress.cli.arguments import AUTO
from quantpress.errors import InvalidInputError
from quantpress.evaluation.measuring import model_name as model_name
from quantpress.pipelines import TASK, register
from quantpress.pipelines.default_model import (
    DEFAULT_MODEL_NAME,
    check_dtype,
    ensure_default_model,
    quick_dtype,
)
from quantpress.pipelines.text_generation import TextGenerationPipeline


def load_pipeline(
    model: str | None, device: str | None = None, dtype: str | None = None
) -> TextGenerationPipeline:
    """Load our pipeline with a model.

    Args:
        model: id on the hub or folder; None for the default model.
        device: such as "cuda:1" or "cpu"; None for a GPU where there is one; "auto" to let accelerate spread
            the model over all GPUs, and over memory where they are too small.
        dtype: such as "bfloat16"; None for the model's own dtype. The default model then has the dtype of
            `QUANTPRESS_DTYPE`, or else the faster one.

    Raises:
        InvalidInputError: the model, device or dtype cannot be used.
        ModelFilesError: the default model could not be fetched.
    """
    check_dtype(dtype)
    kind = None if dtype in (None, AUTO) else getattr(torch, dtype)
    try:
        if model in (None, DEFAULT_MODEL_NAME):
            pipe = _default_pipeline(kind)
            if device not in (None, AUTO):
                pipe.device = torch.device(device)
                pipe.model.to(pipe.device)
            return pipe
        register()
        make: Any = transformers.pipeline
        where = {"device": device or ("cuda" if torch.cuda.is_available() else "cpu")}
        if device == AUTO:
            where = {"device_map": AUTO}
        loaded: TextGenerationPipeline = make(TASK, model=model, dtype=kind or "auto", **where)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{model or DEFAULT_MODEL_NAME} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return loaded


def _default_pipeline(dtype: torch.dtype | None) -> TextGenerationPipeline:
    """Our pipeline of the default model, in the dtype that `quick_dtype` chooses unless one is given."""
    register()
    folder = ensure_default_model()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        make: Any = transformers.pipeline
        pipe: TextGenerationPipeline = make(TASK, model=str(folder), dtype=dtype or quick_dtype())
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return pipe
