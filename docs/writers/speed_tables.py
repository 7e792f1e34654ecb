"""Tables of speed and memory, from results of benchmarks/."""

from collections.abc import Sequence

from results import Row, results, table

WIDTHS = ("4/4", "3/3", "2/2", "4/2", "3/2")


def _times(pair: Sequence[float]) -> str:
    return f"{pair[0]:.1f} ({pair[1]:.2f}x)"


def attention() -> str:
    """Microseconds of decode attention, one line a shape."""
    headers = ("B", "query heads", "KV heads", "head_dim", "tokens", "bf16", *WIDTHS)
    shape = ("batch", "query_heads", "kv_heads", "head_dim", "tokens")
    rows = results("attention")["rows"]
    return table(
        headers,
        (
            [*(str(row[n]) for n in shape), f"{row['bf16_us']:.1f}", *(_times(row[w]) for w in WIDTHS)]
            for row in rows
        ),
    )


def readme_shape() -> list[Row]:
    """Rows of attention at batch 1, 32 query heads and head_dim 128, long contexts first."""
    wanted = {"batch": 1, "query_heads": 32, "head_dim": 128}
    return [row for row in reversed(results("attention")["rows"]) if wanted.items() <= row.items()]


def attention_short() -> str:
    """The README's shape alone."""
    rows = (
        [str(row["tokens"]), f"{row['bf16_us']:.1f}", *(_times(row[w]) for w in WIDTHS)]
        for row in readme_shape()
    )
    return table(("tokens", "bf16", "4/4 bits", *WIDTHS[1:]), rows)


def packing() -> str:
    """Microseconds of encoding and decoding."""
    headers = ("bits K/V", "keys us", "values us", "of a copy", "decode us", "codes at ties, of 2.1 M")
    lines = []
    for row in results("encode")["rows"]:
        copy = f"{100 * row['of_copy']:.0f} % ({row['terabytes_per_s']:.2f} TB/s)"
        micros = [str(row[name]) for name in ("key_us", "value_us", "decode_us")]
        lines.append([row["bits"], *micros[:2], copy, micros[2], str(row["ties"])])
    return table(headers, lines)


def peers() -> str:
    """Attention of other packages."""
    lengths = ("131072", "32768")
    headers = (
        "alternative",
        "K/V bits",
        *(f"{n} tokens" for n in lengths),
        "timing",
        "bytes",
        "error",
        "own",
    )
    lines = []
    for row in results("peers")["rows"]:
        own = "" if row["own"] is None else f"{row['own']:.1e}"
        times = [_long_times(*row[n]) for n in lengths]
        lines.append(
            [row["name"], row["bits"], *times, row["timing"], str(row["bytes"]), f"{row['error']:.3f}", own]
        )
    return table(headers, lines)


def _long_times(micros: float, ratio: float) -> str:
    """Two significant digits of a ratio below 1."""
    shown = f"{ratio:.2f}" if ratio >= 0.095 else f"{ratio:.3f}"
    return f"{micros:.{0 if micros >= 1000 else 1}f} ({shown}x)"


def generation() -> str:
    """Tokens a second of generation."""
    plain, *_ = rows = results("generation")["decoding"]
    lines = []
    for row in rows:
        speed, peak = f"{row['tokens_per_s']:.1f}", f"{row['decode_peak_gb']:.2f} GB"
        if row is not plain:
            speed += f" ({row['times']:.1f}x)"
            peak += f" ({row['decode_peak_gb'] / plain['cache_gb']:.2f}x the bf16 cache)"
        lines.append(
            [row["cache"], speed, f"{row['first_token_s']:.2f} s", peak, f"{row['cache_gb']:.2f} GB"]
        )
    headers = ("cache", "tokens/s", "time to first token", "decode peak over the weights", "cache")
    return table(headers, lines)


def reading() -> str:
    """Memory and seconds of reading a context."""
    rows = results("generation")["reading"]
    return table(
        ("reading", "peak", "work space", "seconds"),
        (
            [row["reading"], f"{row['peak_gb']} GB", f"{row['work_gb']} GB", str(row["seconds"])]
            for row in rows
        ),
    )
