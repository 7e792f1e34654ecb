"""Keys and values of an attention call compressed, restored, and measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantpress.codecs.turboquant import TurboQuantCodec
from quantpress.errors import InvalidInputError, NonFiniteError, UnsupportedHeadDimError
from quantpress.pipelines.patching.attention_record import AttentionCall, AttentionRecord
from quantpress.quantization.transform import key_statistics, value_statistics

Attention = Callable[[Tensor, Tensor], Any]


class RoundTrip:
    """Attention on keys and values that were packed and restored just before; nothing is kept.

    Each call packs all its keys and values as `TurboQuant` packs pages: the mean key is removed, and channels
    are balanced against the call's own queries. No token stays in 16 bits. A call that cannot be packed
    (because of its head_dim, or NaN) runs as it is and counts as skipped.

    Args:
        bits: code width of keys and values.
        key_bits, value_bits: code widths where the two differ.
        mean_key, balance: as for `TurboQuant`.
        measure: run each call a second time on the keys and values as they came, for the error of the output.
        **codec: other fields of `CodecSpec`: rotation, seed, scale, codebook, estimator.

    Attributes:
        record: what was done.

    Raises:
        UnsupportedBitsError: a code width is not supported.
        InvalidInputError: another argument cannot be used.

    Example:
        >>> trip = RoundTrip(bits=4)
        >>> q, k, v = torch.randn(3, 1, 2, 256, 64)
        >>> attention = torch.nn.functional.scaled_dot_product_attention
        >>> trip.attend(q, k, v, lambda keys, values: attention(q, keys, values)).shape
        torch.Size([1, 2, 256, 64])
        >>> round(trip.record.bits_per_value, 2), trip.record.output_error < 0.02
        (4.38, True)
    """

    def __init__(
        self,
        bits: float = 4,
        *,
        key_bits: float | None = None,
        value_bits: float | None = None,
        mean_key: bool = True,
        balance: bool = True,
        measure: bool = True,
        **codec: Any,
    ) -> None:
        self.key_bits = bits if key_bits is None else key_bits
        self.value_bits = bits if value_bits is None else value_bits
        self.mean_key, self.balance, self.measure, self._options = mean_key, balance, measure, codec
        self.record = AttentionRecord()
        self._known: dict[tuple[int, str], TurboQuantCodec] = {}
        try:
            for role in ("key", "value"):
                self._codec(128, role)
        except TypeError as error:
            raise InvalidInputError(f"{', '.join(codec)}: {error}; give fields of CodecSpec") from error

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, attention: Attention, name: str = "attention"
    ) -> Any:
        """Run one attention call on restored keys and values, and record it.

        Args:
            query: [..., Hq, Tq, D].
            keys: [..., Hkv, T, D]; Hq is a multiple of Hkv.
            values: [..., Hkv, T, Dv].
            attention: the call itself, as a function of keys and values.
            name: name of the call in the record.

        Returns:
            What `attention` returns.
        """
        try:
            with torch.no_grad():
                restored_keys, restored_values, packed_bytes = self._restored(query, keys, values)
        except (NonFiniteError, UnsupportedHeadDimError) as reason:
            self.record.skipped[str(reason)] += 1
            return attention(keys, values)
        output = attention(restored_keys, restored_values)
        exact = attention(keys, values) if self.measure else None
        self.record.calls.append(
            AttentionCall(
                name,
                tuple(query.shape),
                tuple(keys.shape),
                tuple(values.shape),
                keys.numel() + values.numel(),
                _bytes(keys) + _bytes(values),
                packed_bytes,
                _error(keys, restored_keys),
                _error(values, restored_values),
                None if exact is None else _error(_first(exact), _first(output)),
            )
        )
        return output

    def _restored(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
        key_codec, value_codec = self._codec(keys.shape[-1], "key"), self._codec(values.shape[-1], "value")
        k, v = _heads(keys), _heads(values)
        moment = None
        if self.balance:
            q = _heads(query)
            q = q.reshape(*k.shape[:2], -1, q.shape[-1]) if q.shape[:2] != k.shape[:2] else q
            moment = q.float().square().mean(dim=2)
            moment = None if not bool(moment.isfinite().all()) else moment
        key_transform = key_statistics(k, moment, key_codec.spec.groups, self.mean_key, self.balance)
        packed_keys = key_codec.encode(k, key_transform)
        packed_values = value_codec.encode(v, value_statistics(v, value_codec.spec.groups))
        return (
            key_codec.decode(packed_keys, keys.dtype).view(keys.shape),
            value_codec.decode(packed_values, values.dtype).view(values.shape),
            packed_keys.nbytes + packed_values.nbytes,
        )

    def _codec(self, head_dim: int, role: str) -> TurboQuantCodec:
        codec = self._known.get((head_dim, role))
        if codec is None:
            bits = self.key_bits if role == "key" else self.value_bits
            codec = self._known[head_dim, role] = TurboQuantCodec(head_dim, bits, role, **self._options)
        return codec


def _heads(states: Tensor) -> Tensor:
    """States [..., H, T, D] with any leading dimensions, or [T, D], as [B, H, T, D]."""
    if states.dim() == 4:
        return states
    return states.reshape(-1, 1, *states.shape[-2:]) if states.dim() < 4 else states.flatten(0, -4)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _first(output: Any) -> Tensor:
    """transformers' attention functions return (output, weights)."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _error(exact: Tensor, got: Tensor) -> float:
    exact = exact.detach().float()
    energy = exact.square().sum()
    return float((exact - got.detach().float()).square().sum() / energy) if bool(energy > 0) else 0.0
