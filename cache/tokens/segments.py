"""Small operations on tokens kept as they are."""

import torch

from quantpress.kernels.attend import DenseSegment


def first(segment: DenseSegment, tokens: int) -> DenseSegment:
    """The first `tokens` tokens, as views."""
    return DenseSegment(segment.keys[:, :, :tokens], segment.values[:, :, :tokens])


def after(segment: DenseSegment, tokens: int) -> DenseSegment:
    """What follows the first `tokens` tokens, as views."""
    return DenseSegment(segment.keys[:, :, tokens:], segment.values[:, :, tokens:])


def join(segment: DenseSegment, more: DenseSegment) -> DenseSegment:
    """Both, one behind the other; the other one itself when one is empty."""
    if not segment.tokens or not more.tokens:
        return more if not segment.tokens else segment
    return DenseSegment(
        torch.cat([segment.keys, more.keys], dim=2), torch.cat([segment.values, more.values], dim=2)
    )


def take(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens of [B, Hkv, T, D] at places [B, Hkv, N]: [B, Hkv, N, D]."""
    return states.gather(2, places.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def compact(segment: DenseSegment) -> DenseSegment:
    """The same tokens in memory of their own, unless they have that already."""
    return DenseSegment(_compact(segment.keys), _compact(segment.values))


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    needed = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == needed:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
