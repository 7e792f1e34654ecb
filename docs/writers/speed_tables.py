"""The tables of docs/speed.md: what each GPU does, the newest GPU first.

What was measured on a GPU is docs/results/NAME_GPU.json, such as attention_h200.json. The tables have every
such file.
"""

from collections.abc import Callable, Iterator

from results import DOCS, Nothing, Row, Times, formatted, results

WIDTHS = ("4/4", "3/3", "2/2", "4/2", "3/2")
SHAPE = {
    "B": "{batch}",
    "query heads": "{query_heads}",
    "KV heads": "{kv_heads}",
    "head_dim": "{head_dim}",
    "tokens": "{tokens}",
}
USUAL = {"query_heads": 32, "kv_heads": 8, "head_dim": 128}
"""The shape of the short table, of any number of sequences but one between them."""

PACKING = {
    "GPU": "{gpu}",
    "bits K/V": "{bits}",
    "keys us": "{key_us}",
    "values us": "{value_us}",
    "of a copy": "{of_copy_percent} % ({terabytes_per_s:.2f} TB/s)",
    "decode us": "{decode_us}",
    "codes at ties, of 2.1 M": "{ties}",
}
PEERS = {
    "GPU": "{gpu}",
    "alternative": "{name}",
    "K/V bits": "{bits}",
    "131072 tokens": "{at_131072}",
    "32768 tokens": "{at_32768}",
    "timing": "{timing}",
    "bytes": "{bytes}",
    "error": "{error:.3f}",
    "own": "{own:.1e}",
}
GENERATION = {
    "GPU": "{gpu}",
    "tokens": "{tokens}",
    "cache": "{cache}",
    "tokens/s": "{tokens_per_s:.1f}{faster}",
    "time to first token": "{first_token_s:.2f} s",
    "decode peak over the weights": "{decode_peak_gb:.2f} GB{share}",
    "bytes of the cache": "{cache_gb:.2f} GB",
}
GENERATION_SHARED = {
    "GPUs": "{gpus}",
    "cache": "{cache}",
    "tokens/s": "{tokens_per_s:.1f} ({times:.1f}x)",
    "time to first token": "{first_token_s:.2f} s",
    "cache of one GPU": "{cache_gb:.2f} GB",
    "most on one GPU while decoding": "{peak_gb:.2f} GB, weights {weights_gb:.2f}",
}
READING = {
    "GPU": "{gpu}",
    "reading": "{reading}",
    "peak": "{peak_gb} GB",
    "work space": "{work_gb} GB",
    "seconds": "{seconds}",
}


def by_gpu(name: str) -> dict[str, Row]:
    """What the files NAME_GPU.json hold, the newest GPU first."""
    files = sorted((DOCS / "results").glob(f"{name}_h[0-9]*.json"), reverse=True)
    return {path.stem.rpartition("_")[2].upper(): results(path.stem) for path in files}


def rows_of(name: str, columns: dict[str, str], group: str = "rows") -> Callable[[], str]:
    """A writer of the rows of every GPU in one table; a file may lack the group."""
    return lambda: formatted(
        ({**row, "gpu": gpu} for gpu, found in by_gpu(name).items() for row in found.get(group, ())), columns
    )


def _attended(found: Row) -> Iterator[Row]:
    """Rows of attention with pages in a row; times are set beside bfloat16 and, if there, FP8."""
    for row in found["rows"]:
        if row.get("layout", "contiguous") != "contiguous":
            continue
        line, fp8 = {**row, "fp8": Nothing(), "fp8_by": ""}, row.get("fp8_us")
        cells = {width: f"{row[width]}" for width in WIDTHS}
        if fp8 is not None:
            line |= {"fp8": Times(fp8, row["bf16_us"] / fp8), "fp8_by": row["fp8_way"].split(",")[0]}
            cells = {width: f"{cell[:-1]}, {fp8 / row[width].us:.2f}x)" for width, cell in cells.items()}
        yield {**line, "cells": cells}


def _columns(first: dict[str, str], rows: list[Row], by: bool = False) -> dict[str, str]:
    """Columns of a table of attention; those of FP8 where a row has it."""
    columns = {**first, "bf16": "{bf16_us:.1f}"}
    if any(not isinstance(row["fp8"], Nothing) for row in rows):
        columns |= {"fp8": "{fp8}"} | ({"fp8 by": "{fp8_by}"} if by else {})
    return columns | {width: f"{{cells[{width}]}}" for width in WIDTHS}


def attention_short() -> str:
    """One shape on every GPU: one sequence, long contexts first, then many sequences."""
    rows = [
        {**row, "gpu": gpu}
        for gpu, found in by_gpu("attention").items()
        for row in sorted(_attended(found), key=lambda row: (row["batch"], -row["tokens"]))
        if USUAL.items() <= row.items() and row["batch"] != 8
    ]
    columns = _columns({"GPU": "{gpu}", "sequences": "{batch}", "tokens": "{tokens}"}, rows)
    return formatted(rows, {header.replace("4/4", "4/4 bits"): cell for header, cell in columns.items()})


def attention_full() -> str:
    """Every shape: a table for each GPU."""
    parts = []
    for gpu, found in by_gpu("attention").items():
        rows = list(_attended(found))
        lines = [f"On the {gpu} ({_when(found)}), {_least(rows)}."]
        lines += [f"fp8 is {text}." for text in _ways(rows)]
        parts.append(" ".join(lines) + "\n\n" + formatted(rows, _columns(SHAPE, rows, by=True)))
    return "\n".join(parts)


def _when(found: Row) -> str:
    """The date of a run and its versions, without what follows a plus sign."""
    versions = (f"{name} {one.split('+')[0]}" for name, one in found["versions"].items())
    return ", ".join([found["date"], *versions])


def _least(rows: list[Row]) -> str:
    """The smallest ratio to each baseline, and the largest error where the file has errors."""
    text = f"the least ratio to bfloat16 is {min(row[width].ratio for row in rows for width in WIDTHS):.2f}x"
    if ratios := [row["fp8_us"] / row[width].us for row in rows if "fp8_us" in row for width in WIDTHS]:
        text += f", and to fp8 {min(ratios):.2f}x"
    if errors := [one for row in rows for one in row.get("errors", {}).values()]:
        text += f"; the largest relative error is {max(errors):.1e}"
    return text


def _ways(rows: list[Row]) -> Iterator[str]:
    """What attended FP8, how often, and its largest error."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        if "fp8_us" in row:
            errors.setdefault(row["fp8_way"].split(",")[0], []).append(row["fp8_error"])
    for way, those in errors.items():
        yield f"{way} in {len(those)} of {len(rows)} rows, with a relative error of at most {max(those):.1e}"


def generation() -> str:
    """Tokens a second and memory of generation on one GPU; a plain row comes before those set beside it."""
    rows = []
    for gpu, found in by_gpu("generation").items():
        for row in found["decoding"]:
            row = {"tokens": 131072, **row, "gpu": gpu}
            if row["cache"].startswith("DynamicCache"):
                plain = row
                rows.append({**row, "faster": "", "share": ""})
                continue
            share = row["decode_peak_gb"] / plain["cache_gb"]
            times = row.get("times", row["tokens_per_s"] / plain["tokens_per_s"])
            texts = {"faster": f" ({times:.1f}x)", "share": f" ({share:.2f}x the bf16 cache)"}
            rows.append({**row, **texts})
    return formatted(rows, GENERATION)


def _in_gb(row: Row) -> dict[str, float]:
    """Bytes as GB; the peak while decoding without the weights, too."""
    sizes = {"cache_gb": "cache_bytes", "peak_gb": "decode_peak_bytes", "weights_gb": "weights_bytes"}
    found = {name: row[field] / 1e9 for name, field in sizes.items()}
    return {**found, "decode_peak_gb": found["peak_gb"] - found["weights_gb"]}


def generation_shared() -> str:
    """The same on one GPU and on two that share the model, bytes of one GPU each."""
    rows = []
    for row in results("generation_two_gpus")["rows"]:
        if row["cache"].startswith("DynamicCache"):
            plain = row
        rows.append({**row, **_in_gb(row), "times": row["tokens_per_s"] / plain["tokens_per_s"]})
    return formatted(rows, GENERATION_SHARED)


TABLES: dict[str, Callable[[], str]] = {
    "attention-short": attention_short,
    "attention": attention_full,
    "generation": generation,
    "generation-two-gpus": generation_shared,
    "reading": rows_of("generation", READING, "reading"),
    "packing": rows_of("encode", PACKING),
    "peers": rows_of("peers", PEERS),
}
