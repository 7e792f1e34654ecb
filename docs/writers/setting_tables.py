"""Tables of caches and settings, which take their figures from several results."""

from evaluation_tables import interval
from results import Row, results, table
from speed_tables import readme_shape

# A setting, bits of a number in a page at head_dim 128, its arm in the evaluation, and a note.
SETTINGS = (
    (
        '`TurboQuant.preset("quality")`: keys 8, values 4',
        "6.125",
        "preset quality",
        "no attention kernel for 8 bits: slower on a GPU",
    ),
    ('`TurboQuant.preset("balanced")`', "4.125", "preset balanced", ""),
    ('`TurboQuant.preset("small", key_bits=4)`', "3.625", "preset small, keys 4 bits", "keys 4, values 3"),
    (
        '`TurboQuant.preset("small")`',
        "3.125",
        "preset small",
        "attention at 131072 tokens is faster than with 4 bits (README)",
    ),
    ('`TurboQuant.preset("small", bits=2)`', "2.125", "preset small, 2 bits", ""),
    ("`TurboQuant()`", "4.125", "TurboQuant 4/4", "the default: 128 recent tokens, no detected sinks"),
    ("`TurboQuant(bits=3)`", "3.125", "TurboQuant 3/3", ""),
)

# A cache of the README's first table: its label, its arm, and what the benchmarks of attention call it.
CACHES = (
    ("uncompressed", "uncompressed", "bf16"),
    ('`TurboQuant.preset("balanced")`, 4 bits', "preset balanced", "4/4"),
    ('`TurboQuant.preset("small")`, 3 bits', "preset small", "3/3"),
    ("TurboQuant as published, 3 bits", "as published 3/3", "turbo-attn 0.70.1"),
    ("KIVI, 4 bits", "KIVI 4 bits", ""),
    ("plain integers, 4 bits", "int4 per token", ""),
    ("kvpress's SnapKV(0.5)", "SnapKV(0.5)", "kvpress's SnapKV(0.5)"),
    ('`SnapKV(0.5) | TurboQuant.preset("small")`', "SnapKV(0.5) | preset small", ""),
)


def changed_settings(context: int) -> str:
    """One setting of a preset changed at a time."""
    rows = results("defaults")[f"at_{context}"]
    headers = ("setting", f"bits, all of {context} tokens", "KL, nats", "ratio")
    return table(
        headers,
        (
            [
                row["setting"],
                f"{row['bits_per_value']:.2f}",
                interval(row["kl"], 5),
                interval(row["ratio"], 2),
            ]
            for row in rows
        ),
    )


def sinks() -> str:
    """KL with and without detected sinks."""
    rows = results("defaults")["sinks"]
    return table(("kept in 16 bits in each head", "2 bits", "3 bits"), ([*row.values()] for row in rows))


def _arms() -> dict[str, Row]:
    """Rows of the quick suite, by arm."""
    return {row["arm"]: row for row in results("evaluation_quick")["fidelity"]}


def settings() -> str:
    """Settings with their bits and their divergence in the quick suite."""
    arms, lines = _arms(), []
    for setting, page_bits, arm, note in SETTINGS:
        row = arms[arm]
        lines.append([setting, page_bits, f"{row['bits_per_value']:.2f}", f"{row['kl']['value']:.4f}", note])
    headers = ("setting", "bits a number in a page, head_dim 128", "in all, 1024 tokens", "KL, nats", "notes")
    return table(headers, lines)


def first() -> str:
    """The README's first table: quality, memory and speed."""
    arms, longest = _arms(), readme_shape()[0]
    others = {(row["name"], row["bits"]): row["131072"] for row in results("peers")["rows"]}
    sizes = {row["arm"]: f"{row['gib']:.1f} GiB" for row in results("memory")["rows"]}
    lines = []
    for label, arm, side in CACHES:
        row = arms[arm]
        kl = f"{row['kl']['value']:.4f}" + (" (rounding)" if arm == "uncompressed" else "")
        speed = f"{longest['bf16_us']:.0f} us" if side == "bf16" else ""
        timed = longest.get(side) or others.get((side, "3/3")) or others.get((side, "16/16"))
        if timed:
            speed = f"{timed[0]:.0f} us ({timed[1]:.2f}x)" + (", in turbo-attn" if "turbo" in side else "")
        same = f"{100 * row['agreement']['value']:.1f} %"
        lines.append([label, kl, same, f"{row['bits_per_value']:.2f}", sizes.get(arm, ""), speed])
    headers = ("cache", "KL, nats", "same next token", "bits a value", "131072 tokens", "attention there")
    return table(headers, lines)
