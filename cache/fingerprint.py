"""What tells one model from another: its configuration, names and shapes of its weights, a sample of them.

Keys and values mean something to the model that made them only. Taken are the fields of the text
configuration that keys and values may depend on, and SAMPLE numbers of every weight, evenly spaced. A model
trained further differs in these; one in which single numbers were changed by hand may not.
"""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from quantpress.errors import UnsupportedModelError

SAMPLE = 64

# How a model is run, loaded or talked to; neither changes what its keys and values are.
_OTHER_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "transformers_version",
        "use_cache",
    }
)


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Plain values that only the same model has.

    Args:
        model: its weights in memory, on any device, or where accelerate keeps those of a `device_map`, which
            are then read once more.

    Returns:
        "config", the fields that count, "weights" and "dtype"; and "name", where it was loaded from, which
        does not count.

    Raises:
        UnsupportedModelError: a weight is nowhere.
    """
    config: Any = getattr(model, "config", None)
    fields = {} if config is None else config.get_text_config(decoder=True).to_dict()
    kept = {name: value for name, value in fields.items() if name not in _OTHER_FIELDS}
    parameters = dict(model.named_parameters())
    return {
        "config": json.loads(json.dumps(kept, sort_keys=True, default=str)),
        "name": str(getattr(config, "name_or_path", "")) or None,
        "dtype": str(next(iter(parameters.values())).dtype).removeprefix("torch.") if parameters else None,
        "weights": _weights_digest(model, parameters),
    }


def difference(saved: dict[str, Any], here: dict[str, Any]) -> str | None:
    """In what two fingerprints differ, in words; None when they are the same."""
    if saved.get("dtype") != here.get("dtype"):
        return f"its weights were {saved.get('dtype')}, they are {here.get('dtype')} here"
    before, now = saved.get("config") or {}, here.get("config") or {}
    ordered = sorted({*before, *now}, key=lambda name: (name != "model_type", name))
    names = [name for name in ordered if before.get(name) != now.get(name)]
    if names:
        shown = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:3])
        return f"{shown}{' and more' if len(names) > 3 else ''}"
    return None if saved.get("weights") == here.get("weights") else "it has the same form, but other weights"


def _weights_digest(model: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        weight = _offloaded(model, name) if parameter.is_meta else parameter
        if weight is None:
            raise UnsupportedModelError(
                f"{name} was never loaded (it is on the meta device): the model cannot be told from others; "
                "load its weights to read a context once and ask it again"
            )
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _offloaded(model: nn.Module, name: str) -> torch.Tensor | None:
    """A weight that accelerate keeps in memory or on disk until its module, or one around it, is called."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:cut])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several may share a module
            kept, own = getattr(one, "weights_map", None) or {}, ".".join(parts[cut:])
            if own in kept:
                weight: torch.Tensor = kept[own]
                return weight
    return None
