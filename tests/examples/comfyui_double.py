"""The part of ComfyUI that an attention node meets, in a few lines: models, clones, sampling, attention."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **options: Any) -> Tensor:
    """q, k, v [B, T, H * D], or [B, H, T, D] with skip_reshape; an override gets the call, if any."""
    override = (options.get("transformer_options") or {}).get("optimized_attention_override")
    if override is not None and "_inside_attn_wrapper" not in options:
        return override(attention, q, k, v, heads, mask, **{**options, "_inside_attn_wrapper": True})
    if not options.get("skip_reshape"):
        q, k, v = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(-2)


class Diffusion(nn.Module):
    """One attention layer in each layout."""

    def __init__(self, channels: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        options = {"transformer_options": transformer_options}
        x = x + attention(*self.qkv(x).chunk(3, -1), heads=self.heads, **options)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        return x + attention(*split, self.heads, skip_reshape=True, **options)


class Patcher:
    """A model and what nodes have put on it; clones share the model and copy the rest."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Callable[..., Any]]]] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> "Patcher":
        other = Patcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        for kind, keys in self.wrappers.items():
            other.wrappers[kind] = {key: list(wrappers) for key, wrappers in keys.items()}
        for key, attached in self.attachments.items():
            renew = getattr(attached, "on_model_patcher_clone", None)
            other.attachments[key] = attached if renew is None else renew()
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, attached: Any) -> None:
        self.attachments[key] = attached


class Guider:
    """Samples: the wrappers around a few runs of the model."""

    def __init__(self, patcher: Patcher) -> None:
        self.model_patcher = patcher

    def sample(self, x: Tensor, steps: int = 2) -> Tensor:
        wrappers = [w for ws in self.model_patcher.wrappers.get("outer_sample", {}).values() for w in ws]
        return _Executor(self, self._sample, wrappers)(x, steps)

    def _sample(self, x: Tensor, steps: int) -> Tensor:
        options = self.model_patcher.model_options["transformer_options"]
        with torch.inference_mode():
            for _ in range(steps):
                x = self.model_patcher.model(x, transformer_options=dict(options))
        return x


class _Executor:
    """What a wrapper is called with, and calls to go on."""

    def __init__(self, class_obj: Guider, original: Callable[..., Any], wrappers: list[Any]) -> None:
        self.class_obj, self.original, self.wrappers = class_obj, original, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = _Executor(self.class_obj, self.original, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)
