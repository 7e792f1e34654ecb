"""What every alternative is made into, and the two that need no package: bfloat16 and quantpress."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import attention as ours
import torch
from torch.nn.attention import sdpa_kernel

from quantpress.codecs.scalar import ScalarPages
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Visibility, attend
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics


@dataclass(frozen=True)
class Attention:
    """One alternative over one context.

    Attributes:
        calls: the ways of doing it by name; the fastest counts. Each gives Hq * D numbers.
        held: whatever holds the tensors that stay between calls.
        appends: a call adds a token, the first one of the context again, so that it cannot be replayed.
        finish: what is left to do to an output, for an alternative that folds it into another product.
        decoded: its own keys and values [1, Hkv, T, D], if it decodes.
    """

    calls: Mapping[str, Callable[[], torch.Tensor]]
    held: object
    appends: bool = False
    finish: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda output: output)
    decoded: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None


def tensors(held: object, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor with memory of its own in lists and dictionaries, and in tensors made of tensors, once."""
    seen = set() if seen is None else seen
    if isinstance(held, torch.Tensor) and not hasattr(held, "__tensor_flatten__"):
        if held.untyped_storage().data_ptr() not in seen and held.numel():
            seen.add(held.untyped_storage().data_ptr())
            yield held
    elif isinstance(held, Mapping):
        yield from (one for part in held.values() for one in tensors(part, seen))
    elif isinstance(held, (list, tuple)):
        yield from (one for part in held for one in tensors(part, seen))
    elif hasattr(held, "__tensor_flatten__"):
        yield from (
            one for name in held.__tensor_flatten__()[0] for one in tensors(getattr(held, name), seen)
        )


def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Torch's attention, as transformers calls it."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, enable_gqa=query.shape[1] > keys.shape[1]
    )


def dense(share: float, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """bfloat16 by each of torch's backends; of an eviction, what is left is attended just so."""
    kept = int(keys.shape[2] * share)
    held = (keys[:, :, :kept].contiguous(), values[:, :, :kept].contiguous())

    def call(backend: Any) -> torch.Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return sdpa(query, *held)

    ways = {"default": None, **{backend.name: backend for backend in ours.BACKENDS}}
    return Attention({name: partial(call, way) for name, way in ways.items()}, held, decoded=lambda: held)


def quantpress(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """`TurboQuant(bits)` with its windows: sinks and recent tokens in 16 bits, pages between."""
    shape = ours.Shape(1, keys.shape[1], query.shape[1] // keys.shape[1], keys.shape[2], keys.shape[3])
    begin, end = ours.SINKS, ours.SINKS + ours.page_count(shape) * 128
    sides = []
    for role, states in (("key", keys), ("value", values)):
        codec = ScalarPages(CodecSpec(head_dim=shape.head_dim, bits=bits, role=role))
        packed = states[:, :, begin:end].contiguous()
        moment = torch.ones(1, shape.kv_heads, shape.head_dim, device=keys.device)
        transform = key_statistics(packed, moment, codec.groups) if role == "key" else ChannelTransform()
        sides.append(PackedSide(codec, codec.encode(packed, transform), transform))
    ends = [
        [part.contiguous() for part in (keys[:, :, at], values[:, :, at])]
        for at in (slice(0, begin), slice(end, None))
    ]
    segments = [DenseSegment(*ends[0]), PackedSegment(*sides), DenseSegment(*ends[1])]
    call = partial(attend, query, segments, Visibility(1, shape.tokens), scaling=shape.head_dim**-0.5)

    def decoded() -> tuple[torch.Tensor, torch.Tensor]:
        middle = [side.codec.decode(side.planes, side.transform, torch.float32) for side in sides]
        whole = [torch.cat([ends[0][i].float(), middle[i], ends[1][i].float()], 2) for i in (0, 1)]
        return whole[0], whole[1]

    return Attention({"": call}, ([side.planes for side in sides], ends), decoded=decoded)
