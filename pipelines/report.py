"""What a compressed context costs, measured from storage and clock, never computed from a nominal width."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.hooks import RemovableHandle

from quantpress.cache import CacheMemory
from quantpress.presses.models.attention import attention_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Report:
    """The cost of one context and its answers.

    Args:
        tokens_seen: tokens of the context.
        tokens_kept: tokens stored, the mean over layers and heads. Head-wise kvpress presses without a
            quantizer only mask tokens, which are stored all the same.
        bits_per_value: true bits per stored number, including codes, scales, sinks and recent tokens.
        resident_bytes: bytes of all tensors that the cache keeps once the context is read.
        uncompressed_bytes: bytes of all tokens seen, uncompressed in the model's own dtype.
        prefill_s: seconds of reading the context, without the presses.
        compress_s: seconds in the hooks and exits of presses.
        decode_s: seconds of all answers, including their questions.
        new_tokens: tokens of all answers.
    """

    tokens_seen: int
    tokens_kept: float
    bits_per_value: float
    resident_bytes: int
    uncompressed_bytes: int
    prefill_s: float
    compress_s: float
    decode_s: float
    new_tokens: int

    @classmethod
    def measured(
        cls, memory: CacheMemory, tokens_seen: int, seconds: dict[str, float], new_tokens: int
    ) -> "Report":
        """A report of what was measured.

        Args:
            memory: the memory of the cache after reading, before any question.
            tokens_seen: tokens of the context.
            seconds: "prefill", "compress" and "decode", as a `Stopwatch` sums them.
            new_tokens: tokens of all answers.
        """
        filled = [layer for layer in memory.layers if layer.tokens]
        return cls(
            tokens_seen=tokens_seen,
            tokens_kept=sum(layer.tokens_kept for layer in filled) / max(1, len(filled)),
            bits_per_value=memory.bits_per_value,
            resident_bytes=memory.total_bytes,
            uncompressed_bytes=sum(layer.token_bytes * tokens_seen for layer in filled),
            prefill_s=seconds["prefill"],
            compress_s=seconds["compress"],
            decode_s=seconds["decode"],
            new_tokens=new_tokens,
        )

    @property
    def ratio(self) -> float:
        """Uncompressed bytes divided by resident bytes; 1.0 if nothing is stored."""
        return self.uncompressed_bytes / self.resident_bytes if self.resident_bytes else 1.0

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second, including the time to read the questions."""
        return self.new_tokens / self.decode_s if self.decode_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The numbers as a dict, for JSON."""
        return {**asdict(self), "ratio": self.ratio, "tokens_per_s": self.tokens_per_s}

    def __rich__(self) -> Table:
        table = Table(title="Context", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_row("tokens seen", f"{self.tokens_seen:,}")
        table.add_row("tokens kept", f"{self.tokens_kept:,.0f}")
        table.add_row("bits per value", f"{self.bits_per_value:.2f}")
        table.add_row("resident", format_bytes(self.resident_bytes))
        table.add_row("uncompressed", format_bytes(self.uncompressed_bytes))
        table.add_row("ratio", f"{self.ratio:.2f}x")
        table.add_row("prefill", f"{self.prefill_s:.2f} s")
        table.add_row("compress", f"{self.compress_s:.2f} s")
        table.add_row("decode", f"{self.decode_s:.2f} s")
        table.add_row("new tokens", f"{self.new_tokens:,} ({self.tokens_per_s:.1f} a second)")
        return table

    def __str__(self) -> str:
        console = Console(width=60, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


class Stopwatch:
    """Sums seconds by name: reading, compressing and answering, although presses work inside the forward.

    Every reading waits for the accelerator, so use it on request only.

    Args:
        device: the device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"prefill": 0.0, "compress": 0.0, "decode": 0.0}
        self._since: float | None = None

    def now(self) -> float:
        """Seconds, once the device has finished all its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`, without the time between `start` and `stop`, which is "compress"."""
        begin, compressed = self.now(), self.seconds["compress"]
        try:
            yield
        finally:
            within = self.seconds["compress"] - compressed
            self.seconds[name] += self.now() - begin - within

    def start(self, *_: Any) -> None:
        """Presses begin. A forward hook on attention modules, registered before theirs."""
        self._since = self.now()

    def stop(self, *_: Any) -> None:
        """Presses are done. A forward hook on attention modules, registered after theirs."""
        if self._since is not None:
            self.seconds["compress"] += self.now() - self._since
            self._since = None

    def hook(self, model: "PreTrainedModel", at: str) -> list[RemovableHandle]:
        """Register `start` or `stop` on every attention module."""
        call = getattr(self, at)
        return [module.register_forward_hook(call) for module in attention_modules(model)]


def format_bytes(count: int) -> str:
    """A number of bytes with its unit, for people.

    Example:
        >>> format_bytes(2048), format_bytes(3 * 2**20)
        ('2.0 KiB', '3.0 MiB')
    """
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def ratio_note(dtype: str) -> str:
    """A line to stand below a table: what its ratios are measured against.

    Args:
        dtype: name of the model's dtype, such as "bfloat16".
    """
    bits, halved = (32, "; against 16 bits it is half as large") if dtype == "float32" else (16, "")
    return f"Ratio: to all tokens read, uncompressed in {dtype} ({bits} bits a value){halved}."
