"""Which devices a pipeline's model is on, and what they are called."""

from collections import Counter

import torch
from transformers import Pipeline


def devices_of(pipe: Pipeline) -> list[torch.device]:
    """Where the weights of a pipeline's model are; `pipe.device` may be "cuda" without a number."""
    held = (weight.device for weight in pipe.model.parameters() if not weight.is_meta)
    return list(dict.fromkeys(held)) or [pipe.device]


def device_names(pipe: Pipeline) -> str:
    """The GPUs that a model is on, such as "2 x NVIDIA H200"; else the type of its device."""
    names = Counter(torch.cuda.get_device_name(one) for one in devices_of(pipe) if one.type == "cuda")
    return " + ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items()) or (
        pipe.device.type
    )
