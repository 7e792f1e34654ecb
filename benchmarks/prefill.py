"""Reading a context whole and in chunks, with and without TurboQuant, in one run, with random weights.

    python benchmarks/prefill.py              Llama-3.1-8B's shape, 131072 tokens, 3/3 bits
    python benchmarks/prefill.py --tokens 32768 --chunk 4096 --repeats 3
    python benchmarks/prefill.py --json out.json

Each side reads the same random ids with `read_context`, without chunks by `chunk_tokens=0`. The first side,
whole into a `DynamicCache` without a press, is the baseline. Peak memory is
`torch.cuda.max_memory_allocated`; work space is the peak less the weights and the cache, and is shown beside
what `quantpress memory` expects. A short context of three chunks is read first, so that kernels are compiled;
but cuDNN prepares every new length of keys in the first reading: see `--repeats`.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quantpress.cache import cache_memory
from quantpress.evaluation.sizing.memory_plan import Planner
from quantpress.evaluation.sizing.model_outline import ModelOutline
from quantpress.pipelines.reading.chunk_sizes import DEFAULT_CHUNK_TOKENS, QUERY_CHUNKS
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TurboQuant

GB = 1e9


@dataclass(frozen=True)
class Result:
    """What one side took.

    Args:
        name: name of the side.
        first_s: seconds of the first reading.
        best_s: seconds of the fastest reading.
        peak_bytes: peak of allocated memory, weights included.
        cache_bytes: bytes of the cache.
        work_bytes: the peak less weights and cache.
        expected_bytes: work space that `quantpress memory` expects; None where the context is not read in the
            default way.
    """

    name: str
    first_s: float
    best_s: float
    peak_bytes: int
    cache_bytes: int
    work_bytes: int
    expected_bytes: int | None


def build(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model with random weights, made on the GPU."""
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        max_position_embeddings=arguments.tokens,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def measure(
    name: str, model: PreTrainedModel, ids: torch.Tensor, press: TurboQuant | None, chunk: int, repeats: int
) -> Result:
    """Read a context several times."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peak, cache_bytes, seconds = 0, 0, []
    for _ in range(repeats):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start, cache = time.perf_counter(), DynamicCache()
        with torch.no_grad():
            read_context(model, ids, cache, press, chunk_tokens=chunk, progress=False)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        peak, cache_bytes = torch.cuda.max_memory_allocated(), cache_memory(cache).total_bytes
        del cache
    plan = Planner(ModelOutline.of(name, model), press).plan(ids.shape[1])
    expected = plan.activation_bytes if chunk == DEFAULT_CHUNK_TOKENS else None
    work = peak - weights - cache_bytes
    return Result(name, seconds[0], min(seconds), peak, cache_bytes, work, expected)


def show(arguments: argparse.Namespace, results: Sequence[Result]) -> None:
    """Print the table."""
    plain = results[0]
    table = Table(
        title=f"reading {arguments.tokens} tokens; weights are random",
        caption=f"{torch.cuda.get_device_properties(0).name}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; GB are 10^9 bytes",
    )
    for column in ("side", "first s", "best s", "", "peak GB", "", "cache GB", "work space GB", "expected"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for one in results:
        table.add_row(
            one.name,
            f"{one.first_s:.2f}",
            f"{one.best_s:.2f}",
            f"{one.best_s / plain.best_s:.3f}x",
            f"{one.peak_bytes / GB:.2f}",
            f"{one.peak_bytes / plain.peak_bytes:.3f}x",
            f"{one.cache_bytes / GB:.2f}",
            f"{one.work_bytes / GB:.2f}",
            "" if one.expected_bytes is None else f"{one.expected_bytes / GB:.2f}",
        )
    Console(width=130).print(table)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shape = {"layers": 32, "hidden": 4096, "heads": 32, "kv-heads": 8, "head-dim": 128}
    for name, default in {**shape, "intermediate": 14336, "vocab": 128256}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default}")
    parser.add_argument("--tokens", type=int, default=131072, help="of context")
    parser.add_argument("--chunk", type=int, default=DEFAULT_CHUNK_TOKENS, help="tokens in a chunk")
    parser.add_argument("--bits", type=float, nargs=2, default=(3, 3), metavar=("KEY", "VALUE"))
    parser.add_argument("--repeats", type=int, default=1, help="readings of each side")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/prefill.py needs a CUDA device; there is none here")
    torch.manual_seed(0)
    model = build(arguments)
    ids = torch.randint(arguments.vocab, (1, arguments.tokens), device="cuda")
    packed = TurboQuant(key_bits=arguments.bits[0], value_bits=arguments.bits[1])
    short = min(arguments.tokens, 3 * QUERY_CHUNKS * arguments.chunk)
    sides = {"DynamicCache": None, f"TurboQuant {arguments.bits[0]:g}/{arguments.bits[1]:g}": packed}
    results: list[Result] = []
    for cache, press in sides.items():
        for chunk in (0, arguments.chunk):
            measure("short", model, ids[:, :short], press, chunk, 1)
            name = f"{cache}, {f'chunks of {chunk}' if chunk else 'whole'}"
            results.append(measure(name, model, ids, press, chunk, arguments.repeats))
            show(arguments, results)
    if arguments.json:
        rows = {"arguments": vars(arguments), "results": [asdict(one) for one in results]}
        arguments.json.write_text(json.dumps(rows, indent=1, default=str))


if __name__ == "__main__":
    main()
