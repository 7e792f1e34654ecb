"""What tests need where transformers, or what it works with, is newer or older than they were written for."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.utils.peft_utils import check_peft_version

from quantpress.presses.base import PressMixin
from quantpress.presses.models.attention import attention_modules, decoder_of
from quantpress.presses.models.old_names import old_names


def _no_adapters() -> str:
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except (ImportError, ValueError) as error:
        return f"{error}; transformers adds no adapters here"
    return ""


LATENT_CACHE = hasattr(DeepseekV3Attention, "expand_kv")
"""Whether DeepSeek and its kin cache latents, not keys and values."""

NO_ADAPTERS = _no_adapters()
"""Why transformers cannot add adapters to a model with the peft that is installed; empty where it can."""


def kvpress_pipeline(**parts: Any) -> Any:
    """kvpress's own pipeline, as a reference; its presses find the names that they read."""
    from kvpress import KVPressTextGenerationPipeline

    class Pipeline(KVPressTextGenerationPipeline):
        def _forward(self, input_tensors: Any, *args: Any, press: Any = None, **kwargs: Any) -> Any:
            with kvpress_names(self.model, press):
                return super()._forward(input_tensors, *args, press=press, **kwargs)

    return Pipeline(**parts)


def kvpress_names(model: PreTrainedModel, press: Any) -> AbstractContextManager[None]:
    """Enter before the context of a press that is not ours, so that it finds the names that kvpress reads."""
    if press is None or isinstance(press, PressMixin):
        return nullcontext()
    return old_names(decoder_of(model), attention_modules(model))
