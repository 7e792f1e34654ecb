"""The measured parts of docs/vllm.md, with their headings; nothing where there is no file of results yet.

The files are those of benchmarks/vllm_decode.py and benchmarks/vllm_quality.py, with the date, the machine
and the source that every file of docs/results/ has.
"""

import re
from collections.abc import Callable, Iterable

from results import Nothing, Row, measured, results

from quantpress.evaluation.results.markdown import table

_CACHES = ("bf16", "fp8", "turboquant", "quantpress_4bit", "quantpress_3bit", "quantpress_2bit")

SPEED = """
## Speed

`{command}` on {machine} ({date}; {versions}):
an 8B Llama with random weights in bfloat16, full CUDA graphs of decode steps, no torch.compile. Each sequence
has a random prompt of its own. Times in brackets are divided by those of bfloat16: below 1.00x is faster.
"Does not fit": the cache has not that many tokens.

**A decode step**, in milliseconds. That is the time per token of each sequence, the mean over steps in which
every sequence fills one block. For the tokens a second of all sequences together, divide 1000 times their
number by it.
{unread}
{steps}
**The first token**, in seconds until every prompt is read:

{firsts}
**Tokens that fit**, by vLLM's own count, beside the weights and all that each cache needs for 64 sequences:

{fits}"""

UNREAD = """\
Where the table of first tokens has no line, the prompts were not read, to save time: their blocks hold other
tokens, and a step over them takes as long.
"""

QUALITY = """
## Quality

`{command}` on {machine} ({date}; {versions}):
KL divergence in nats with its 95 % interval, {model}, {documents} pieces of a novel, each a prompt of
{context} tokens and {scored_tokens} tokens that are scored. vLLM with the plugin is compared with vLLM over
its own cache, and transformers with its uncompressed cache.

- **profile**: statistics of keys from `quantpress calibrate`, over other texts.
- **first chunk**: statistics from the first prompt of the engine, another piece of the novel.
- **prefix hit**: the same prompts again. They read packed blocks, and their recent pages are gone.
- **of TurboQuant(b)**: KL divided by that of `TurboQuant(b)` in transformers, which keeps as many tokens in
  16 bits and has statistics of each prompt, but no page keys.
- **of the preset**: KL divided by that of the preset of as many bits, which also keeps 8 detected sinks.

{table}"""


def speed() -> str:
    """Times and capacity of every cache under every load."""
    found = measured("vllm_decode")
    if found is None:
        return ""
    rows = found["rows"]
    read = {_load(row) for row in rows if not isinstance(row["first_s"], Nothing)}
    firsts = [row for row in rows if _load(row) in read]
    unread = any(_load(row) not in read and not isinstance(row["step_ms"], Nothing) for row in rows)
    return SPEED.format(
        **_about(found),
        steps=_loads(rows, _time("step_ms")),
        unread=UNREAD if unread else "",
        firsts=_loads(firsts, _time("first_s")),
        fits=_fits(rows),
    )


def two_gpus() -> str:
    """One load under tensor parallelism: a line for each cache."""
    rows = results("vllm_decode_two_gpus")["rows"]
    plain = rows[0]
    cells = [
        [
            row["cache"],
            _time("step_ms")(row, plain),
            f"{row['sequences'] / row['step_ms'] * 1e3:.0f}",
            _time("first_s")(row, plain),
            f"{row['fit']:,} ({row['fit'] / plain['fit']:.2f}x)",
        ]
        for row in rows
    ]
    return table(["cache", "a step, ms", "tokens/s", "first tokens, s", "tokens that fit"], cells) + "\n"


def _load(row: Row) -> tuple[int, int]:
    return row["tokens"], row["sequences"]


def _loads(rows: list[Row], cell: Callable[[Row, Row | None], str]) -> str:
    """A line for each load, a column for each cache."""
    caches = _caches(rows)
    by_load = {(row["tokens"], row["sequences"], row["cache"]): row for row in rows}
    lines = []
    for tokens, sequences in _unique(_load(row) for row in rows):
        those = [by_load.get((tokens, sequences, cache)) for cache in caches]
        base = by_load.get((tokens, sequences, "bf16"))
        cells = ["not run" if row is None else cell(row, base) for row in those]
        lines.append([f"{tokens} x {sequences}", *cells])
    return table(["tokens x sequences", *caches], lines) + "\n"


def _time(field: str) -> Callable[[Row, Row | None], str]:
    def cell(row: Row, base: Row | None) -> str:
        if isinstance(row[field], Nothing):
            return "does not fit"
        plain = None if base is None or base is row else base[field]
        ratio = "" if plain is None or isinstance(plain, Nothing) else f" ({row[field] / plain:.2f}x)"
        return f"{row[field]:.2f}{ratio}"

    return cell


def _fits(rows: list[Row]) -> str:
    """One line; where a cache was measured in several runs, the fewest tokens."""
    caches = _caches(rows)
    fits = {cache: min(row["fit"] for row in rows if row["cache"] == cache) for cache in caches}
    base = fits.get("bf16")
    cells = [f"{fit:,}" + (f" ({fit / base:.2f}x)" if base and fit != base else "") for fit in fits.values()]
    return table([*fits], [cells]) + "\n"


def quality() -> str:
    """KL of every arm, in each dtype."""
    found = measured("vllm_quality")
    if found is None:
        return ""
    rows, dtypes = found["rows"], _unique(row["dtype"] for row in found["rows"])
    by_arm = {(row["arm"], row["dtype"]): row for row in rows}
    arms = sorted(_unique(row["arm"] for row in rows), key=lambda arm: -_bits(rows, arm))
    columns = [
        f"{title}, {dtype}" for dtype in dtypes for title in ("KL", "of TurboQuant(b)", "of the preset")
    ]
    lines = [[arm, *(one for dtype in dtypes for one in _cells(by_arm.get((arm, dtype))))] for arm in arms]
    return QUALITY.format(**_about(found), table=table(["cache", *columns], lines) + "\n")


def _bits(rows: list[Row], arm: str) -> int:
    return int(next(row["bits"] for row in rows if row["arm"] == arm))


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * 3
    return [f"{row['kl']:.5f}", f"{row['ratio']:.2f}", f"{row['to_preset']:.2f}"]


def _about(found: Row) -> Row:
    versions = ", ".join(f"{name} {re.sub('[+].*', '', one)}" for name, one in found["versions"].items())
    return {**found, "versions": versions}


def _caches(rows: list[Row]) -> list[str]:
    """The caches, most bits first."""
    return sorted({row["cache"] for row in rows}, key=_CACHES.index)


def _unique(some: Iterable[object]) -> list:
    return list(dict.fromkeys(some))
