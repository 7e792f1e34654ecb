"""A ComfyUI node: what TurboQuant does to an image or a video, live inside attention.

Link this folder into ComfyUI's `custom_nodes`, and install quantpress in ComfyUI's environment. The node
compresses keys and values inside every attention call of the model and restores them before they are used. It
saves no memory by itself; the log, and `model.attachments["turboquant"].record`, say what packing could save
and what it costs in accuracy.

Attention is reached through `transformer_options["optimized_attention_override"]`, which ComfyUI calls as
`override(function, q, k, v, heads, ...)`. q, k and v are [B, T, H * D], or [B, H, T, D] with skip_reshape.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from quantpress.errors import UnsupportedModelError
from quantpress.pipelines.patching.attention_record import AttentionRecord
from quantpress.pipelines.patching.live_patch import check_applied
from quantpress.pipelines.patching.round_trip import RoundTrip

OVERRIDE = "optimized_attention_override"
OUTER_SAMPLE = "outer_sample"  # comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
KEY = "turboquant"

Override = Callable[..., torch.Tensor]


class TurboQuantPatch:
    """The node. Its output is a clone of the model; the input stays as it is."""

    CATEGORY = "model_patches/attention"
    DESCRIPTION = "Compresses and restores keys and values inside every attention call (TurboQuant)."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The inputs of the node."""
        return {
            "required": {
                "model": ("MODEL",),
                "enabled": ("BOOLEAN", {"default": True}),
                "bits": (["4", "3.5", "3", "2.5", "2", "8"], {"default": "4"}),
            }
        }

    def patch(self, model: Any, enabled: bool, bits: str | float) -> tuple[Any]:
        """The node's function.

        Raises:
            UnsupportedModelError: the model does not come from a ComfyUI in which attention can be
                overridden.
        """
        if not enabled:
            return (model,)
        RoundTrip(float(bits))  # a wrong width raises here, not in the middle of sampling
        if not hasattr(model, "add_wrapper_with_key") or "transformer_options" not in getattr(
            model, "model_options", {}
        ):
            raise UnsupportedModelError(
                f"model incompatible: a {type(model).__name__} takes no attention override; update ComfyUI, "
                "and connect a MODEL"
            )
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        before = options.get(OVERRIDE)
        run = _Run(float(bits))
        options[OVERRIDE] = _override(run, getattr(before, "before_turboquant", before))
        patched.remove_wrappers_with_key(OUTER_SAMPLE, KEY)
        patched.add_wrapper_with_key(OUTER_SAMPLE, KEY, _outer_sample(run))
        patched.set_attachments(KEY, Statistics())
        return (patched,)


class Statistics:
    """The record of the last sampling run of one clone.

    Attributes:
        record: record of that run; empty before the first run.
    """

    def __init__(self) -> None:
        self.record = AttentionRecord()

    def on_model_patcher_clone(self) -> "Statistics":
        """Called by ComfyUI, so that every clone has its own statistics."""
        return Statistics()


class _Run:
    """The settings of one patch, and the round trip of the current run."""

    def __init__(self, bits: float) -> None:
        self.bits = bits
        self.trip: RoundTrip | None = None


# Functions, not methods: ComfyUI copies model options deeply with every clone, and functions stay the same.


def _override(run: _Run, before: Override | None) -> Override:
    """What ComfyUI calls instead of attention; `before` is another node's override, which still runs."""

    def override(
        function: Override,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        *rest: Any,
        **options: Any,
    ) -> torch.Tensor:
        attention = function if before is None else functools.partial(before, function)
        if run.trip is None:  # outside of sampling
            return attention(q, k, v, heads, *rest, **options)
        split = functools.partial(_split, dim=q.shape[-1] if q.dim() == 4 else q.shape[-1] // heads)

        def on(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return attention(q, _like(keys, k), _like(values, v), heads, *rest, **options)

        output: torch.Tensor = run.trip.attend(
            split(q), split(k), split(v), on, getattr(function, "__name__", "attention")
        )
        return output

    override.before_turboquant = before  # type: ignore[attr-defined]
    return override


def _outer_sample(run: _Run) -> Callable[..., Any]:
    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Statistics start at zero, and a run in which nothing was compressed is an error."""
        patcher, run.trip = executor.class_obj.model_patcher, RoundTrip(run.bits)
        patcher.attachments[KEY].record = record = run.trip.record
        try:
            output = executor(*args, **kwargs)
        finally:
            run.trip = None
        check_applied(record, type(patcher.model).__name__)
        logging.info("TurboQuant: %s", record)
        return output

    return outer_sample


def _split(states: torch.Tensor, dim: int) -> torch.Tensor:
    """[B, T, H * D] or [B, H, T, D] as [B, H, T, D]."""
    return states if states.dim() == 4 else states.unflatten(-1, (-1, dim)).transpose(1, 2)


def _like(states: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] in the layout in which it was given."""
    return states if given.dim() == 4 else states.transpose(1, 2).flatten(-2)


NODE_CLASS_MAPPINGS = {"TurboQuantPatch": TurboQuantPatch}
NODE_DISPLAY_NAME_MAPPINGS = {"TurboQuantPatch": "TurboQuant attention patch"}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
