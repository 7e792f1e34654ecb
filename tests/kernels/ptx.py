"""The few instructions of PTX that the kernels' assembly uses, in numpy."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def run_ptx(text: str, inputs: list[Words], outputs: int) -> list[Words]:
    """Run inline assembly: bits of 32-bit registers in, bits of the first `outputs` ones out."""
    registers = {f"${outputs + i}": word for i, word in enumerate(inputs)}
    shape = np.broadcast_shapes(*(word.shape for word in inputs))

    def read(name: str) -> Words:
        return registers[name] if name in registers else _number(name, len(shape))

    for name, target, sources in _steps(text):
        if target.startswith("{"):  # the halves of a word
            word = read(sources[1])
            registers[target[1:]] = word & np.uint32(0xFFFF)
            registers[sources[0][:-1]] = word >> np.uint32(16)
            continue
        registers[target] = _step(name, [read(source) for source in sources])
    results = [registers[f"${i}"] for i in range(outputs)]
    return [word if word.shape == shape else np.broadcast_to(word, shape).copy() for word in results]


@functools.cache
def _steps(text: str) -> list[tuple[str, str, list[str]]]:
    """Each line's instruction, target and sources."""
    body, found = text[text.index("\n") : text.rindex("}")], []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, rest = line.split(None, 1)
        target, *sources = (part.strip() for part in rest.split(","))
        found.append((name, target, sources))
    return found


@functools.cache
def _number(name: str, axes: int) -> Words:
    """One of the text, as an array of one element."""
    number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
    return np.full((1,) * axes, number & 0xFFFFFFFF, np.uint32)


def _step(name: str, words: list[Words]) -> Words:
    if name == "cvt.rn.f16x2.f32":
        return _packed(*words)
    if name == "cvt.rz.f16x2.f32":
        return _packed(*(_cut(word) for word in words))
    if name == "shfl.sync.idx.b32":
        return _from_lane(*words[:2])
    if name in ("fma.rn.f16x2", "fma.rn.sat.f16x2"):
        x = [_pair(word, np.float16).astype(np.float64) for word in words]
        exact = x[0] * x[1] + x[2]
        return _word(np.float16(exact.clip(0, 1) if ".sat" in name else exact))
    if ".f32" in name:
        return _floating(name, [word.view(np.float32) for word in words]).view(np.uint32)
    first, *others = words
    if name == "mov.b32":
        return first
    if name == "cvt.rn.f16x2.e4m3x2":
        return _halves(first)
    if name == "lop3.b32":
        return _table(int(others[2].flat[0]), first, *others[:2])
    if name == "prmt.b32":
        return _permuted(first, *others)
    if name == "movmatrix.sync.aligned.m8n8.trans.b16":
        return _transposed(first)
    if name == "dp4a.u32.u32":
        return others[1] + sum((_byte(first, k) * _byte(others[0], k) for k in range(4)), np.uint32(0))
    if name.startswith("dp2a.") and name.endswith(".u32.u32"):
        start = 2 * (name[5:7] == "hi")
        return others[1] + sum(
            (
                (first >> np.uint32(16 * k) & np.uint32(0xFFFF)) * _byte(others[0], start + k)
                for k in range(2)
            ),
            np.uint32(0),
        )
    if name == "abs.f16x2":
        return first & np.uint32(0x7FFF7FFF)
    if name in (
        "add.u16x2",
        "min.u16x2",
        "min.f16x2",
    ):  # float16 numbers above 0 are in the order of their bits
        halves = (_pair(word, np.uint16) for word in (first, others[0]))
        return _word((np.add if name[0] == "a" else np.minimum)(*halves))
    if name == "mul.hi.u32":
        return (first.astype(np.uint64) * others[0] >> np.uint64(32)).astype(np.uint32)
    if name == "mad.lo.u32":
        return first * others[0] + others[1]
    two = {"add.u32": np.add, "and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor}
    two |= {"shl.b32": np.left_shift, "shr.u32": np.right_shift}
    return np.asarray(two[name](first, others[0]), np.uint32)


def _pair(word: Words, kind: type[Any]) -> NDArray[Any]:
    """Two numbers of 16 bits a word, along a new axis."""
    return np.ascontiguousarray(word)[..., None].view(kind)


def _word(pair: NDArray[Any]) -> Words:
    return np.ascontiguousarray(pair).view(np.uint32)[..., 0]


def _floating(name: str, x: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    if name == "abs.f32":
        return np.abs(x[0])
    if name == "rcp.approx.ftz.f32":
        with np.errstate(divide="ignore"):
            return np.asarray(1 / x[0], np.float32)
    if name == "fma.rz.f32":  # exact in float64 but for the last bits
        return _toward_zero(x[0].astype(np.float64) * x[1] + x[2])
    if name.startswith("fma"):
        exact = x[0].astype(np.float64) * x[1] + x[2]
        return np.asarray(exact.clip(0, 1) if ".sat" in name else exact, np.float32)
    if name == "mul.rz.f32":
        return _toward_zero(x[0].astype(np.float64) * x[1])
    if name == "mul.rn.sat.f32":
        return np.asarray(np.multiply(*x).clip(0, 1), np.float32)
    two = {"mul.f32": np.multiply, "mul.rn.f32": np.multiply, "add.f32": np.add, "add.rn.f32": np.add}
    return np.asarray(two[name](*x), np.float32)


def _toward_zero(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    nearest = np.float32(exact)
    return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)


def _transposed(word: Words) -> Words:
    """8 x 8 numbers of 16 bits of each 32 lanes: lane 4 * row + n holds columns 2 n and 2 n + 1."""
    numbers = np.ascontiguousarray(word).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(numbers.transpose(0, 2, 1)).reshape(-1).view(np.uint32)


def _packed(high: Words, low: Words) -> Words:
    """Two float32 numbers as float16, to nearest."""
    halves = (np.float16(word.view(np.float32)).view(np.uint16).astype(np.uint32) for word in (high, low))
    return np.asarray(next(halves) << np.uint32(16) | next(halves), np.uint32)


def _cut(word: Words) -> Words:
    """float32 numbers that float16 holds, rounded towards 0."""
    x = word.view(np.float32)
    nearest = np.float16(x)
    cut = np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float16(0)), nearest)
    return np.float32(cut).view(np.uint32)


def _from_lane(word: Words, lane: Words) -> Words:
    """The word of another of 32 lanes: 32 numbers in a row, or 4 * g + t of an array [w, g, o, t]."""
    lanes = np.asarray(lane & np.uint32(31), np.int64)
    if word.ndim == 1:
        return np.take_along_axis(word.reshape(-1, 32), lanes.reshape(-1, 32), 1).reshape(-1)
    w, _, o, _ = np.indices(word.shape)
    return word[w, lanes // 4, o, lanes % 4]


def _byte(word: Words, k: int) -> Words:
    return word >> np.uint32(8 * k) & np.uint32(255)


def _table(wanted: int, a: Words, b: Words, c: Words) -> Words:
    """Any function of three bits: bit 4 a + 2 b + c of `wanted`."""
    out = np.zeros_like(a)
    for k in range(8):
        if wanted >> k & 1:
            out = out | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def _halves(word: Words) -> Words:
    """Two e4m3 numbers as float16: its bias is 8 less, and both keep numbers without a leading one."""
    both = np.zeros_like(word)
    for k in range(2):
        byte = word >> np.uint32(8 * k) & np.uint32(255)
        bits = (byte & np.uint32(128)) << np.uint32(8) | (byte & np.uint32(127)) << np.uint32(7)
        half = bits.astype(np.uint16).view(np.float16) * np.float16(256)
        half = np.where((byte & np.uint32(127)) == 127, np.float16(np.nan), half)
        both = both | half.view(np.uint16).astype(np.uint32) << np.uint32(16 * k)
    return both


def _permuted(a: Words, b: Words, selector: Words) -> Words:
    """Byte k of the result is the one that nibble k selects; where its upper bit is set, that one's sign."""
    if selector.size == 1:  # the same bytes of every pair
        return _chosen(a, b, int(selector.flat[0]))
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(selector)
    for k in range(4):
        nibble = selector >> np.uint32(4 * k) & np.uint32(15)
        byte = (both >> ((nibble & 7) * 8).astype(np.uint64)).astype(np.uint32) & 255
        if (nibble & 8).any():
            byte = np.where(nibble & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        out = out | byte << np.uint32(8 * k)
    return out


def _chosen(a: Words, b: Words, selector: int) -> Words:
    shape = np.broadcast_shapes(a.shape, b.shape)
    pair = np.empty((*shape, 2), np.uint32)
    pair[..., 0], pair[..., 1] = a, b
    nibbles = [selector >> 4 * k & 15 for k in range(4)]
    found = pair.view(np.uint8)[..., [nibble & 7 for nibble in nibbles]]
    for k, nibble in enumerate(nibbles):
        if nibble & 8:
            found[..., k] = np.where(found[..., k] & 128, 255, 0)
    return np.ascontiguousarray(found).view(np.uint32)[..., 0]
