"""`quantpress memory --engine vllm`: what fits when vLLM holds the cache."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from quantpress.cli.output import Outcome, new_table
from quantpress.errors import InvalidInputError

if TYPE_CHECKING:
    from quantpress.evaluation.sizing.engine_plan import EngineAsked, EnginePlan
    from quantpress.evaluation.sizing.model_outline import ModelOutline


MAX_NUM_SEQS = 64
"""Sequences at a time, unless the command is told otherwise."""


def check_options(
    engine: str | None,
    press: list[str] | None,
    dtypes: list[str] | None,
    max_num_seqs: int | None,
    plan: str | None,
) -> None:
    """Refuse options of an engine without one, and presses with one."""
    if engine is None and dtypes:
        raise InvalidInputError("--kv-cache-dtype is for --engine vllm; without an engine give --press")
    if engine is None and max_num_seqs:
        raise InvalidInputError("--max-num-seqs is for --engine vllm; without an engine give --batch")
    if engine is None and plan:
        raise InvalidInputError(
            f"--plan is for --engine vllm; without an engine give --press \"TurboQuant(plan='{plan}')\""
        )
    if engine is not None and press:
        raise InvalidInputError(f"{engine} evicts nothing, so it takes no --press; give --kv-cache-dtype")


@dataclass(frozen=True)
class EngineSized(Outcome):
    """Plans for one model inside vLLM, its own 16-bit cache first.

    Args:
        model: outline of the model.
        asked: what was asked about.
        plans: one for each KV-cache dtype.
    """

    model: "ModelOutline"
    asked: "EngineAsked"
    plans: "tuple[EnginePlan, ...]"

    @classmethod
    def of(
        cls, model: "ModelOutline", asked: "EngineAsked", dtypes: list[str] | None, plan: str | None
    ) -> "EngineSized":
        """Plan for these KV-cache dtypes, or 4, 3 and 2 bits, and for a file of `quantpress fit`."""
        from quantpress.cache.saved.width_plan import WidthPlan
        from quantpress.evaluation.sizing.engine_plan import DEFAULT_DTYPES, engine_plans

        widths = None if plan is None else WidthPlan.load(plan)
        return cls(model, asked, engine_plans(model, tuple(dtypes or DEFAULT_DTYPES), asked, widths))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        from quantpress.cache.engine_memory import sink_entries
        from quantpress.evaluation.sizing.engine_plan import as_dict

        return {
            "engine": "vllm",
            "model": {
                "name": self.model.name,
                "repository": self.model.repository,
                "attention_layers": len(self.model.layers),
                "weights_bytes": self.model.weights_bytes,
            },
            "gpu_bytes": self.asked.available,
            "context": self.asked.context,
            "batch": self.asked.batch,
            "max_num_seqs": self.asked.requests,
            "sink_entries": sink_entries(self.asked.requests),
            "kv_cache_dtypes": [as_dict(plan, self.plans[0]) for plan in self.plans],
        }

    def __rich__(self) -> RenderableType:
        from quantpress.pipelines.report import format_bytes

        fits = self.asked.available is not None
        sequences = "" if self.asked.batch == 1 else f"{self.asked.batch} x "
        names = ["KV-cache dtype", "bytes a\ntoken", "", "blocks", "recent", "sinks", "statistics", "in all"]
        names += ["tokens\nthat fit", ""] if fits else []
        table = new_table(
            f"{self.model.name} in vLLM: {sequences}{self.asked.context:,} tokens", names, names[:1]
        )
        own = self.plans[0]
        for plan in self.plans:
            beside = (plan.recent_bytes, plan.sink_bytes, plan.statistics_bytes)
            row = [f"{plan.token_bytes:,.0f}", f"{own.block_bytes / plan.block_bytes:.2f}x"]
            row += [format_bytes(plan.pages_bytes), *(format_bytes(one) if one else "" for one in beside)]
            row.append(format_bytes(plan.total_bytes))
            if plan.tokens is not None:
                ratio = f"{plan.tokens / own.tokens:.2f}x" if own.tokens else ""
                row += [f"{plan.tokens:,}", ratio]
            table.add_row(plan.dtype, *row)
        return Group(table, *(Text(line, "dim") for line in self._notes()))

    def _notes(self) -> list[str]:
        from quantpress.cache.engine_memory import sink_entries
        from quantpress.pipelines.report import format_bytes

        requests, own = self.asked.requests, self.plans[0].dtype
        notes = [
            f"Recent and sinks stay in {own} beside vLLM's blocks, for --max-num-seqs {requests}: recent "
            f"takes {format_bytes(self.plans[-1].request_bytes)} a sequence, sinks are those of "
            f"{sink_entries(requests):,} prompts. vLLM's own default is 256, and 1024 on large GPUs: "
            "start it with the same number."
        ]
        if self.asked.available is not None:
            notes.append(
                f"What fits in {self.asked.available / 1e9:,.1f} GB beside "
                f"{format_bytes(self.model.weights_bytes or 0)} of weights. Activations and CUDA graphs are "
                "not counted: give --gpu the share that vLLM takes (--gpu-memory-utilization), less those."
            )
            if self.model.quantized:
                notes.append("The checkpoint is quantized and weighs less: say how much with --weights.")
        notes.append("1 GB is 10^9 bytes, 1 GiB is 2^30 bytes (1.07 GB).")
        return notes
