"""Decoding in vLLM over its own caches and those of quantpress, in one run: an 8B Llama with random weights.

    python benchmarks/vllm_decode.py                       every cache and load, on this machine's GPU
    python benchmarks/vllm_decode.py --only quantpress_4bit --loads 131072x1,8192x8 --json out.json
    python benchmarks/vllm_decode.py --ranks 2 --loads 131072x8           tensor parallelism over two GPUs

A load is tokens x sequences; each sequence has a random prompt of its own. `fit` is how many tokens vLLM says
its cache holds, beside the weights and what else each cache needs for 64 sequences. `first` is seconds until
every prompt was read and had its first token. `step` is milliseconds of a decode step, which is the time per
token of a sequence: the mean over 128 steps, in which every sequence fills one block of 128 tokens.
Ratios are to bf16. A load that does not fit has no times.

With `--read`, only the prompts of these loads are read: those of the others are given blocks, but the model
is not run over them, and their keys and values stay as they were. A decode step takes as long, whatever they
are; `first` is left out. Long loads are then minutes shorter.

Every cache runs in a process of its own. `--json` adds to the file after each load and keeps what is there
so that a run can be cut into several; the table shows all of the file. vLLM runs without torch.compile and
with full CUDA graphs of decode steps.
"""

import argparse
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

os.environ.update(
    VLLM_WORKER_MULTIPROC_METHOD="spawn",  # CUDA is in use in this process
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_DEEP_GEMM="0",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    HF_HUB_OFFLINE="1",
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

OWN = "QUANTPRESS"
CACHES = {  # --kv-cache-dtype and --attention-backend
    "bf16": ("auto", "FLASH_ATTN"),
    "fp8": ("fp8", "FLASH_ATTN"),
    "turboquant": ("turboquant_4bit_nc", None),
    "quantpress_4bit": ("quantpress_4bit", OWN),
    "quantpress_3bit": ("quantpress_3bit", OWN),
    "quantpress_2bit": ("quantpress_2bit", OWN),
}
TOKENS, SEQUENCES = (8192, 32768, 131072), (1, 8, 64)
BEFORE, STEPS = 8, 128
PIECE = 1024  # tokens of a step from which it is a piece of a prompt
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 140000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@dataclass(frozen=True)
class Row:
    """One cache under one load."""

    cache: str
    tokens: int
    sequences: int
    fit: int
    first_s: float | None = None
    step_ms: float | None = None

    @property
    def load(self) -> tuple[int, int]:
        return self.tokens, self.sequences


def start(cache: str, folder: Path, memory: float, ranks: int) -> Any:
    """vLLM's `LLM`, in this process; with several ranks each has a process of its own."""
    from vllm import LLM

    dtype, backend = CACHES[cache]
    if backend == OWN:  # also where quantpress lies on the path and was never installed
        from quantpress.engines.vllm import register

        register()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        kv_cache_dtype=dtype,
        attention_backend=backend,
        max_model_len=max(TOKENS) + 2 * (BEFORE + STEPS),
        max_num_seqs=max(SEQUENCES),
        max_num_batched_tokens=16384,
        gpu_memory_utilization=memory,
        tensor_parallel_size=ranks,
        disable_log_stats=True,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64],
        },
    )


def seconds(llm: Any, prompts: list[list[int]], new: int) -> float:
    """Time until every prompt has `new` tokens."""
    import torch
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    llm.generate(asked, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def prompt(tokens: int) -> list[int]:
    """Random tokens."""
    return [random.randrange(1000, 120000) for _ in range(tokens)]


class Unread:
    """Runs the model over few tokens only; longer pieces of prompts get zeros, and store nothing.

    Args:
        llm: vLLM's `LLM`, in this process.
    """

    def __init__(self, llm: Any) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.model = core.model_executor.driver_worker.worker.model_runner.model
        self.whole = self.model.forward

    def __enter__(self) -> None:
        import torch

        def forward(input_ids: Any, positions: Any, *others: Any, **named: Any) -> Any:
            if len(input_ids) < PIECE:
                return self.whole(input_ids, positions, *others, **named)
            shape = (len(input_ids), MODEL["hidden_size"])
            return torch.zeros(shape, dtype=torch.bfloat16, device=input_ids.device)

        self.model.forward = forward

    def __exit__(self, *error: object) -> None:
        self.model.forward = self.whole


def measure(llm: Any, cache: str, tokens: int, sequences: int, read: bool) -> Row:
    """One load, if it fits."""
    config = llm.llm_engine.vllm_config.cache_config
    row = Row(cache, tokens, sequences, config.num_gpu_blocks * config.block_size)
    if sequences * (tokens + 2 * (BEFORE + STEPS)) > row.fit:
        return row
    prompts = [prompt(tokens) for _ in range(sequences)]
    with nullcontext() if read else Unread(llm):
        first = seconds(llm, prompts, 1)
        seconds(llm, prompts, 4)
        few, many = (seconds(llm, prompts, new) for new in (BEFORE, BEFORE + STEPS))
    llm.reset_prefix_cache()
    return Row(cache, tokens, sequences, row.fit, first if read else None, (many - few) / STEPS * 1e3)


def saved(path: Path) -> list[Row]:
    """The rows in a file; none where there is no file."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def add(path: Path, row: Row) -> None:
    """Put a row into the file, in the place of one of the same cache and load."""
    import torch

    before = json.loads(path.read_text()) if path.exists() else {}
    rows = [one for one in saved(path) if (one.cache, one.load) != (row.cache, row.load)]
    rows = sorted([*rows, row], key=lambda one: (one.load, list(CACHES).index(one.cache)))
    versions = {name: importlib.metadata.version(name) for name in ("vllm", "torch", "triton")}
    found = {
        "command": "python benchmarks/vllm_decode.py",
        **before,
        "date": f"{date.today()}",
        "device": torch.cuda.get_device_name(0),
        "versions": versions,
        "rows": [asdict(one) for one in rows],
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


def cells(row: Row, base: Row | None) -> list[str]:
    """A line of the table."""

    def cell(name: str, digits: int) -> str:
        value, other = getattr(row, name), getattr(base, name, None)
        if value is None:
            return "-"
        return f"{value:.{digits}f}" + (f" ({value / other:.2f}x)" if other else "")

    speed = f"{row.sequences / row.step_ms * 1e3:.0f}" if row.step_ms else "-"
    return [
        f"{row.tokens} x {row.sequences}",
        row.cache,
        cell("fit", 0),
        cell("first_s", 2),
        cell("step_ms", 2),
        speed,
    ]


def show(path: Path) -> None:
    """Print what is in the file."""
    found, rows = json.loads(path.read_text()), saved(path)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    table = Table(title=f"{found['device']}, {versions}")
    for name in ("load", "cache", "fit, tokens", "first, s", "step, ms", "tokens/s"):
        table.add_column(name, justify="right")
    base = {row.load: row for row in rows if row.cache == "bf16"}
    for row in rows:
        table.add_row(*cells(row, base.get(row.load)))
    Console(width=120).print(table)


def loads(text: str) -> list[tuple[int, int]]:
    """Loads such as 131072x1,8192x8."""
    found = []
    for one in text.split(","):
        tokens, _, sequences = one.partition("x")
        if not (tokens.isdigit() and sequences.isdigit()):
            raise argparse.ArgumentTypeError(f"{one!r} is no load; write tokens x sequences, such as 8192x8")
        found.append((int(tokens), int(sequences)))
        if int(tokens) > max(TOKENS) or int(sequences) > max(SEQUENCES):
            raise argparse.ArgumentTypeError(
                f"{one!r} is above {max(TOKENS)}x{max(SEQUENCES)}, the most there is"
            )
    return found


def main() -> None:
    """Parse arguments; measure here with --only, and in a process for each cache without."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ",".join(f"{tokens}x{sequences}" for tokens in TOKENS for sequences in SEQUENCES)
    parser.add_argument("--only", choices=CACHES, help="one cache, in this process")
    parser.add_argument("--loads", type=loads, default=loads(every), help=f"default: {every}")
    parser.add_argument("--read", type=loads, help="loads whose prompts are read; default: all")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share the model; reads all prompts")
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory; default 0.85")
    parser.add_argument("--json", type=Path, help="the file to add to")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/vllm_decode.py needs a CUDA device; there is none here")
    with tempfile.TemporaryDirectory() as temporary:
        path = arguments.json or Path(temporary) / "rows.json"
        if arguments.only:
            random.seed(0)
            llm = start(arguments.only, Path(temporary), arguments.memory, arguments.ranks)
            seconds(llm, [prompt(20000)], BEFORE + STEPS)  # kernels are compiled here
            for tokens, sequences in arguments.loads:
                read = arguments.ranks > 1 or arguments.read is None or (tokens, sequences) in arguments.read
                add(path, row := measure(llm, arguments.only, tokens, sequences, read))
                print(row, flush=True)
            show(path)
            return
        wanted = ",".join(f"{tokens}x{sequences}" for tokens, sequences in arguments.loads)
        for cache in CACHES:
            options = [
                "--only",
                cache,
                "--loads",
                wanted,
                "--memory",
                str(arguments.memory),
                "--ranks",
                str(arguments.ranks),
                "--json",
                str(path),
            ]
            if arguments.read:
                options += ["--read", ",".join(f"{tokens}x{n}" for tokens, n in arguments.read)]
            if subprocess.run([sys.executable, __file__, *options]).returncode:
                print(f"{cache} failed; the others go on", file=sys.stderr)


if __name__ == "__main__":
    main()
