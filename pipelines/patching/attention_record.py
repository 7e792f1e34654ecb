"""What a live attention patch did: one entry for each call, and their sums."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AttentionCall:
    """One attention call whose keys and values were compressed and restored.

    Errors are |x - x^|^2 / |x|^2 over the whole tensor.

    Args:
        name: class of the attention module, or "scaled_dot_product_attention".
        query_shape, key_shape, value_shape: shapes that the call was given, [..., heads, tokens, channels].
        values: how many numbers keys and values have.
        dense_bytes: bytes of keys and values as they came.
        packed_bytes: bytes that their packed form took: codes, scales, padding of the last page, means and
            weights.
        key_error, value_error: of the restored keys and values.
        output_error: of the output, against the same call on the keys and values as they came; None when it
            was not measured.
    """

    name: str
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    values: int
    dense_bytes: int
    packed_bytes: int
    key_error: float
    value_error: float
    output_error: float | None

    @property
    def bits_per_value(self) -> float:
        """True bits of a stored number, everything counted."""
        return 8 * self.packed_bytes / self.values


@dataclass
class AttentionRecord:
    """Every call since the last reset.

    Args:
        calls: those that were compressed, in order.
        skipped: those that were seen and left alone, counted by reason.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> int:
        """Attention calls intercepted, skipped ones too."""
        return len(self.calls) + self.skipped.total()

    @property
    def bits_per_value(self) -> float:
        """True bits of a stored number over all calls; NaN without any."""
        values = sum(call.values for call in self.calls)
        return 8 * sum(call.packed_bytes for call in self.calls) / values if values else float("nan")

    @property
    def key_error(self) -> float:
        """Mean relative squared error of restored keys; NaN without any call."""
        return _mean([call.key_error for call in self.calls])

    @property
    def value_error(self) -> float:
        """Mean relative squared error of restored values; NaN without any call."""
        return _mean([call.value_error for call in self.calls])

    @property
    def output_error(self) -> float:
        """Mean relative squared error of attention outputs; NaN where none was measured."""
        return _mean([call.output_error for call in self.calls if call.output_error is not None])

    @property
    def potential_bytes_saved(self) -> int:
        """Bytes that packed keys and values would save, summed over calls. The patch itself saves none.

        Keys and values that stay from one call to the next, as a cache's do, count in each.
        """
        return sum(call.dense_bytes - call.packed_bytes for call in self.calls)

    def clear(self) -> None:
        """Forget every call."""
        self.calls.clear()
        self.skipped.clear()

    def __str__(self) -> str:
        if not self.calls:
            return f"no attention call compressed, {self.skipped.total()} skipped"
        return (
            f"{len(self.calls)} attention calls at {self.bits_per_value:.2f} true bits a value, "
            f"{self.skipped.total()} skipped; relative squared error of keys {self.key_error:.2e}, of values "
            f"{self.value_error:.2e}, of outputs {self.output_error:.2e}; potential saving "
            f"{self.potential_bytes_saved / 2**20:.1f} MiB"
        )


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else float("nan")
