"""Decode attention of one token by the alternatives, each through its own decode path, in one run.

    python benchmarks/peers.py                          what is installed, on this machine's GPU
    python benchmarks/peers.py --sites DIR              packages in DIR/NAME, by `pip install --target`
    python benchmarks/peers.py --check --tokens 512     errors and bytes only, no times: runs on a CPU too
    python benchmarks/peers.py --json rows.json

Batch 1, 32 query heads, 8 KV heads, head_dim 128, bfloat16. `us` is a whole call, of a CUDA graph's replays
("graph") or, for what cannot be captured, of calls back to back between two CUDA events ("stream"). `bytes`
are what stays in memory, for one token and KV head, keys and values together (512 in bfloat16). `error` is
relative to float32 attention on the original keys and values, random ones; `own` to the same on what the
alternative decodes itself, if it decodes.

Every alternative runs in its own process, so that a crash stays there. All compile at once, on few tokens;
then they are timed one at a time, those that compile for long last. aither-kvcache and turboquant both
install a package called `turboquant`: give each a folder in --sites.
"""

import argparse
import gc
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a Python with PYTHONSAFEPATH does not look beside a script

from alternatives.calls import Attention, tensors
from alternatives.processes import run
from alternatives.registry import ALTERNATIVES, Alternative
from alternatives.table import COLUMNS, Row, show, with_ratios
from graph_times import microseconds

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CALLS = 20
"""Calls between two events."""


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """float32 attention [Hq, D]."""
    grouped = query[0, :, 0].float().unflatten(0, (keys.shape[1], -1))  # [Hkv, G, D]
    scores = grouped @ keys[0].float().mT * query.shape[-1] ** -0.5
    return (torch.softmax(scores, -1) @ values[0].float()).flatten(0, 1)


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of an output of Hq * D numbers."""
    return float((output.float().reshape(expected.shape) - expected).norm() / expected.norm())


def back_to_back(call: Callable[[], object]) -> float:
    """Microseconds of one of several calls between two CUDA events."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000 / CALLS


def fastest(attention: Attention) -> tuple[float, str, str]:
    """Microseconds, how they were timed, and which call was the fastest."""
    found, failure = [], RuntimeError("no way of calling it")
    for name, call in attention.calls.items():
        try:
            if attention.appends:
                found.append((back_to_back(call), "stream", name))
                continue
            try:
                found.append((microseconds(call), "graph", name))
            except RuntimeError:  # it can be neither captured nor called
                found.append((back_to_back(call), "stream", name))
        except RuntimeError as error:
            failure = error
    if not found:
        raise failure
    return min(found)


def measure(alternative: Alternative, bits: str, tokens: int, device: str, timed: bool) -> Row:
    """One alternative over one context: errors and bytes, then time."""
    generator = torch.Generator(device).manual_seed(0)
    query, keys, values = (
        torch.randn(1, heads, count, HEAD_DIM, device=device, dtype=torch.bfloat16, generator=generator)
        for heads, count in ((QUERY_HEADS, 1), (KV_HEADS, tokens), (KV_HEADS, tokens))
    )
    attention = alternative.make(alternative.settings[bits], keys, values, query)
    size = sum(one.numel() * one.element_size() for one in tensors(attention.held))
    output = attention.finish(next(iter(attention.calls.values()))())
    if attention.appends:
        keys, values = (torch.cat([states, states[:, :, :1]], dim=2) for states in (keys, values))
    row = Row(
        alternative.name,
        installed(alternative),
        bits,
        tokens,
        bytes=size / tokens / KV_HEADS,
        error=relative(output, reference(query, keys, values)),
        own_error=relative(output, reference(query, *attention.decoded())) if attention.decoded else None,
    )
    if not timed:
        return row
    try:
        us, timing, note = fastest(attention)
    except Exception as error:  # keep what was found so far
        traceback.print_exc()
        return replace(row, note=said(error))
    return replace(row, us=us, timing=timing, note=note)


def said(error: Exception) -> str:
    """The class and first line of an error."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]


def installed(alternative: Alternative) -> str:
    """The installed version, or an empty string."""
    if not alternative.package:
        return ""
    found = importlib.metadata.distributions(name=alternative.package)
    return next((one.version for one in found), "")


def child(alternative: Alternative, arguments: argparse.Namespace) -> None:
    """Measure one alternative once a line arrives on standard input; write a line of --json for each row."""
    if not sys.stdin.readline():  # whoever started this is gone
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with arguments.json.open("a") as file:
        for tokens in arguments.tokens:
            for bits in alternative.settings:
                try:
                    with torch.inference_mode():
                        row = measure(alternative, bits, tokens, device, not arguments.check)
                except Exception as error:  # whatever another package raises is its row
                    traceback.print_exc()
                    row = Row(alternative.name, installed(alternative), bits, tokens, note=said(error))
                print(json.dumps(asdict(row)), file=file, flush=True)
                gc.collect()
                torch.cuda.empty_cache()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[32768, 131072], help="multiples of 128 from 512 on"
    )
    names = [one.name for one in ALTERNATIVES]
    parser.add_argument("--only", nargs="+", default=names, help=f"some of: {'; '.join(names)}")
    parser.add_argument("--sites", type=Path, help="a folder with a folder for each package")
    parser.add_argument("--check", action="store_true", help="no times")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one alternative")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    unknown = set(arguments.only) - set(names)
    if unknown:
        parser.error(f"no alternative called {', '.join(sorted(unknown))}; the names are in --help")
    if any(tokens < 512 or tokens % 128 for tokens in arguments.tokens):
        parser.error(f"--tokens takes multiples of 128 from 512 on, not {arguments.tokens}")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Find out what is installed, run it, print."""
    arguments = parse(words)
    names: dict[str, Any] = {one.name: one for one in ALTERNATIVES}
    if arguments.child:
        alternative = names[arguments.child]
        if arguments.sites and alternative.package:
            sys.path.insert(0, str(arguments.sites / alternative.package))
        child(alternative, arguments)
        return
    if not (arguments.check or torch.cuda.is_available()):
        raise SystemExit("benchmarks/peers.py needs a CUDA device; there is none here (--check does without)")
    chosen = []
    for one in (names[name] for name in arguments.only):
        folders = [str(arguments.sites / one.package)] if arguments.sites else []
        if not one.package or any(
            importlib.metadata.distributions(name=one.package, path=[*folders, *sys.path])
        ):
            chosen.append(one)
        else:
            print(f"{one.name}: not installed: pip install {one.package}=={one.version}")
    rows: list[Row] = []
    for row in run(chosen, arguments):
        rows = with_ratios([*rows, row])
        print(" ".join(cell(rows[-1]) for cell in COLUMNS.values()), file=sys.stderr)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(one) for one in rows], indent=1))
    show(rows)


if __name__ == "__main__":
    main()
