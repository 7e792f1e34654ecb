"""Paged attention against torch's attention over the tokens of each sequence."""

import random
from typing import Any

import pytest
import torch

from quantpress.cache import LayerSettings, PackedLayer, PagedAttention
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import (
    InvalidInputError,
    NonFiniteError,
    PoolFullError,
    UnsupportedBitsError,
    UnsupportedHeadDimError,
)
from quantpress.quantization.spec import CodecSpec
from tests.cache.paged.paging import (
    KV_HEADS,
    QUERY_HEADS,
    dense,
    exact,
    lossless,
    random_states,
    relative_error,
    small,
)

LENGTHS = (700, 5, 261, 260, 389, 1)  # with and without pages, one before and one behind the first page
TOLERANCE = 1e-5  # float32 arithmetic over 700 tokens, relative to the output's norm


def check(paged: PagedAttention, query: torch.Tensor, sequence: int) -> None:
    """One sequence against torch's attention."""
    got = paged.attend(query, [sequence])[0]
    assert relative_error(got, exact(query[0], *dense(paged, sequence))) < TOLERANCE


def query_for(paged: PagedAttention, batch: int, queries: int = 1) -> torch.Tensor:
    dim = paged.pool.keys.codec.head_dim
    return torch.randn(batch, paged.query_heads, queries, dim, device=paged.device)


# Attention


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("bits", [1, 2, 2.5, 3, 3.5, 4, 8, (4, 2), (8, 2.5)], ids=str)
def test_every_width(bits: Any, queries: int) -> None:
    paged = small(bits=bits)
    sequences = [paged.add(*random_states(paged, tokens=tokens)) for tokens in LENGTHS]
    assert [len(paged.blocks(s)) for s in sequences] == [4, 0, 1, 0, 2, 0]
    order = random.sample(sequences, len(sequences))
    query = query_for(paged, len(order), queries)
    got = paged.attend(query, order)
    for row, sequence in enumerate(order):
        if paged.length(sequence) >= queries:
            expected = exact(query[row], *dense(paged, sequence))
            assert relative_error(got[row], expected) < TOLERANCE


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (6, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (24, 80)])
def test_groups_and_other_value_dims(head_dim: int, value_dim: int, query_heads: int, kv_heads: int) -> None:
    paged = small(head_dim, value_dim, query_heads=query_heads, kv_heads=kv_heads, bits=3)
    sequences = [paged.add(*random_states(paged, tokens=tokens)) for tokens in (400, 17)]
    query = query_for(paged, 2, 3)
    got = paged.attend(query, sequences)
    assert got.shape == (2, query_heads, 3, value_dim)
    for row, sequence in enumerate(sequences):
        assert relative_error(got[row], exact(query[row], *dense(paged, sequence))) < TOLERANCE


@pytest.mark.parametrize(
    "options", [{"scaling": 0.7}, {"softcap": 1.5}, {"sinks": torch.linspace(-1, 2, QUERY_HEADS)}], ids=str
)
def test_options_of_attention(options: dict[str, Any]) -> None:
    paged = small(bits=4)
    sequences = [paged.add(*random_states(paged, tokens=tokens)) for tokens in (300, 20)]
    query = query_for(paged, 2, 2)
    got = paged.attend(query, sequences, **options)
    for row, sequence in enumerate(sequences):
        assert relative_error(got[row], exact(query[row], *dense(paged, sequence), **options)) < TOLERANCE


def test_rows_without_a_sequence_are_zero() -> None:
    paged = lossless()
    kept, freed = (paged.add(*random_states(paged, tokens=300)) for _ in range(2))
    paged.free(freed)
    query = query_for(paged, 6)
    got = paged.attend(query)
    assert relative_error(got[kept], exact(query[kept], *dense(paged, kept))) < TOLERANCE
    assert (got[[row for row in range(6) if row != kept]] == 0).all()


def test_a_sequence_may_be_asked_twice_in_a_call() -> None:
    paged = lossless()
    one, other = (paged.add(*random_states(paged, tokens=300)) for _ in range(2))
    query = query_for(paged, 3)
    got = paged.attend(query, [other, one, other])
    for row, sequence in enumerate((other, one, other)):
        assert relative_error(got[row], exact(query[row], *dense(paged, sequence))) < TOLERANCE


@pytest.mark.parametrize("queries", [1, 3, 6])
def test_more_queries_than_the_window_holds_are_refused(queries: int) -> None:
    """The kernels count hidden tokens in the window, so the answer would depend on the device."""
    paged = lossless(recent_tokens=5)
    sequence = paged.add(*random_states(paged, tokens=4 + 128 + 6))
    query = query_for(paged, 1, queries)
    assert (
        relative_error(paged.attend(query, [sequence])[0], exact(query[0], *dense(paged, sequence)))
        < TOLERANCE
    )
    paged.crop(sequence, 4 + 128 + queries - 1)
    assert (
        relative_error(paged.attend(query, [sequence])[0], exact(query[0], *dense(paged, sequence)))
        < TOLERANCE
    )
    if queries > 1:
        paged.crop(sequence, 4 + 128 + queries - 2)
        with pytest.raises(InvalidInputError, match=f"{queries} query tokens .* at most {queries - 1}"):
            paged.attend(query, [sequence])


# Random operations


class Model:
    """The same as `PagedAttention`, as lists of dense tensors."""

    def __init__(self) -> None:
        self.tokens: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, sequence: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        old = self.tokens[sequence]
        self.tokens[sequence] = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)

    def pages(self, paged: PagedAttention) -> int:
        """Blocks that are held, each counted once."""
        return len({block for s in self.tokens for block in paged.blocks(s)})


@pytest.mark.parametrize(("sinks", "recent"), [(4, 40), (0, 0), (3, 200)], ids=["some", "none", "many"])
def test_random_operations(sinks: int, recent: int) -> None:
    """Add, append, fork, crop and free in any order; every sequence stays what a list of tensors says."""
    paged = lossless(layers=2, sink_tokens=sinks, recent_tokens=recent, num_blocks=14, max_sequences=4)
    model = Model()
    for _ in range(60):
        live = paged.sequences
        act = random.choice(["add", "append", "append", "append", "fork", "free", "crop"])
        try:
            if act == "add" or not live:
                states = random_states(paged, 2, tokens=random.choice([0, 1, 100, 260, 400, 600]))
                model.tokens[paged.add(*states)] = states
            elif act == "append":
                chosen = random.sample(live, random.randint(1, len(live)))
                states = random_states(paged, 2, len(chosen), tokens=random.choice([1, 1, 7, 41, 150]))
                paged.append(chosen, *states)
                for row, sequence in enumerate(chosen):
                    model.append(sequence, *(s[:, row] for s in states))
            elif act == "fork":
                source = random.choice(live)
                model.tokens[paged.fork(source)] = model.tokens[source]
            elif act == "free":
                sequence = random.choice(live)
                paged.free(sequence)
                del model.tokens[sequence]
            else:
                sequence = random.choice(live)
                pages = len(paged.blocks(sequence))
                least = sinks + 128 * pages if pages else 0
                kept = random.randint(least, paged.length(sequence))
                paged.crop(sequence, kept)
                keys, values = model.tokens[sequence]
                model.tokens[sequence] = keys[:, :, :kept], values[:, :, :kept]
        except PoolFullError:
            gone = random.choice(paged.sequences)
            paged.free(gone)
            del model.tokens[gone]
        assert paged.sequences == sorted(model.tokens)
        assert paged.free_blocks == 14 - model.pages(paged)
        for sequence, (keys, values) in model.tokens.items():
            assert paged.length(sequence) == keys.shape[2]
            for layer in range(2):
                got = paged.decode(sequence, layer=layer)
                assert torch.equal(got[0], keys[layer]) and torch.equal(got[1], values[layer])
        filled = [s for s in model.tokens if model.tokens[s][0].shape[2]]
        if filled:
            order, layer = random.sample(filled, len(filled)), random.randrange(2)
            query = query_for(paged, len(order))
            got = paged.attend(query, order, layer=layer)
            for row, sequence in enumerate(order):
                expected = exact(query[row], *(states[layer] for states in model.tokens[sequence]))
                assert relative_error(got[row], expected) < TOLERANCE


# Storage


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("bits", [3, 2.5])
@pytest.mark.parametrize("tokens", [700, 200])
def test_same_codes_as_a_packed_layer(tokens: int, bits: float, balance: bool) -> None:
    """Prompt and later tokens are packed as the cache of a model packs them, bit by bit."""
    paged = small(bits=bits)
    codecs = (ScalarPages(CodecSpec(32, bits, role)) for role in ("key", "value"))
    moment = torch.rand(KV_HEADS, 32) + 0.1 if balance else None
    keys, values = random_states(paged, tokens=tokens + 300)
    sequence = paged.add(keys[:, :tokens], values[:, :tokens], query_moment=moment)
    layer = PackedLayer.from_states(
        keys[None, :, :tokens],
        values[None, :, :tokens],
        LayerSettings(*codecs),
        query_moment=None if moment is None else moment[None],
    )
    for at in range(tokens, tokens + 300, 50):
        new = [states[None, :, at : at + 50] for states in (keys, values)]
        paged.append([sequence], *new)
        layer.update(*new)
    assert len(paged.blocks(sequence)) * 128 == layer.packed_tokens
    got = paged.decode(sequence)
    assert torch.equal(got[0], layer.keys[0] + 0) and torch.equal(got[1], layer.values[0] + 0)
    assert relative_error(got[0], keys.double()) > 0.01


def test_written_pages_never_change() -> None:
    paged = small(bits=3, max_sequences=6)
    sequence = paged.add(*random_states(paged, tokens=700))

    def pages(blocks: list[int]) -> list[torch.Tensor]:
        at = paged.pool.size.rows(torch.tensor([blocks])).flatten()
        return [plane[:, at].clone() for plane in paged.pool.packed_tensors()]

    blocks = paged.blocks(sequence)
    before, addresses = pages(blocks), [t.data_ptr() for t in paged.pool.packed_tensors()]
    forks = [paged.fork(sequence) for _ in range(3)]
    assert paged.free_blocks == 40 - len(blocks)
    for _ in range(4):
        paged.append([sequence, *forks], *random_states(paged, 4, tokens=77))
    paged.free(sequence)
    assert all(torch.equal(a, b) for a, b in zip(before, pages(blocks), strict=True))
    assert [paged.blocks(fork)[:4] for fork in forks] == [blocks] * 3
    assert len({block for fork in forks for block in paged.blocks(fork)[4:]}) == 6
    for fork in forks:
        paged.free(fork)
    assert paged.free_blocks == 40 and addresses == [t.data_ptr() for t in paged.pool.packed_tensors()]
    again = paged.add(*random_states(paged, tokens=1024))  # blocks are used again
    check(paged, query_for(paged, 1), again)


@pytest.mark.parametrize("tokens", [700, 200], ids=["with_pages", "before_the_first"])
def test_a_fork_packs_as_its_source_does(tokens: int) -> None:
    """The same mean keys, weights and orders, also if they depend on queries given after the fork."""
    paged = small(bits=2.5, layers=2)
    paged.free(paged.add(*random_states(paged, 2, tokens=900)))  # leaves its own transforms in the buffers
    states = random_states(paged, 2, tokens=tokens + 300)
    start = [s[:, :, :tokens] for s in states]
    source = paged.add(*start, query_moment=torch.rand(2, KV_HEADS, 32))
    others = [paged.fork(source) for _ in range(5)]
    assert sorted([source, *others]) == list(range(6))
    for sequence in (others[2], source, *others[3:], *others[:2]):
        paged.append([sequence], *(s[:, None, :, tokens:] for s in states))
    for layer in range(2):
        expected = paged.decode(source, layer=layer)
        assert relative_error(expected[0], states[0][layer].double()) > 0.01
        for other in others:
            for got, wanted in zip(paged.decode(other, layer=layer), expected, strict=True):
                assert torch.equal(got, wanted)


def test_what_waits_for_a_first_page_is_let_go() -> None:
    paged = small(bits=4, layers=2)
    base, moment = paged.nbytes, torch.rand(2, KV_HEADS, 32)
    packed = paged.add(*random_states(paged, 2, tokens=300), query_moment=moment)
    assert paged.nbytes == base
    waiting = paged.add(*random_states(paged, 2, tokens=200), query_moment=moment)
    assert paged.nbytes == base + moment.nbytes
    paged.append([packed, waiting], *random_states(paged, 2, 2, tokens=100))
    assert paged.nbytes == base
    paged.free(paged.add(*random_states(paged, 2, tokens=5), query_moment=moment))
    assert paged.nbytes == base


@pytest.mark.parametrize(
    ("bits", "dtype"), [(3, torch.bfloat16), (2.5, torch.float16), ((4, 2), torch.float32)], ids=str
)
def test_bytes_are_those_of_the_tensors(bits: Any, dtype: torch.dtype) -> None:
    shape = {"query_heads": 8, "kv_heads": 2, "head_dim": 64, "value_dim": 32, "layers": 5}
    paged = PagedAttention(50, 3, **shape, bits=bits, recent_tokens=100, dtype=dtype)
    memory, sides = paged.memory(), (paged.pool.keys, paged.pool.values)
    true_bits = sum(side.codec.bits_per_value * side.codec.head_dim for side in sides)
    assert memory.bytes_per_token == 5 * 2 * true_bits / 8
    assert memory.packed_bytes == memory.bytes_per_token * 50 * 128
    assert memory.dense_bytes == 3 * 5 * 2 * (64 + 32) * dtype.itemsize * (4 + 4 + 100 + 128)
    owners = [vars(side) for side in sides] + [vars(paged)]
    owners += [value for owner in owners for value in owner.values() if isinstance(value, dict)]
    tensors = {id(v): v for owner in owners for v in owner.values() if isinstance(v, torch.Tensor)}
    assert paged.nbytes == memory.total_bytes == sum(t.untyped_storage().nbytes() for t in tensors.values())
    assert memory.uncompressed_bytes_per_token == 5 * 2 * (64 + 32) * dtype.itemsize
    capacity = (50 * 128 + 3 * (4 + 100 + 128)) * memory.uncompressed_bytes_per_token
    assert 1 < memory.ratio == capacity / memory.total_bytes < 8 * dtype.itemsize


# Steps of an engine


def test_steps_layer_by_layer_are_appends() -> None:
    one, other = (lossless(layers=3, max_sequences=3, recent_tokens=10) for _ in range(2))
    for tokens in (400, 3, 141):
        states = random_states(one, 3, tokens=tokens)
        opened = other.open(tokens)
        assert opened == one.add(*states)
        for layer in range(3):
            other.fill(opened, states[0][layer], states[1][layer], layer=layer)
    for new in (1, 11, 2, 1, *[11] * 12):
        states = random_states(one, 3, 3, tokens=new)
        query = query_for(one, 3, new)
        one.append([0, 1, 2], *states)
        other.extend(tokens=new)
        plan = other.plan()
        for layer in range(3):
            other.write(states[0][layer], states[1][layer], plan, layer=layer)
            got = other.attend(query, plan, layer=layer)
            torch.testing.assert_close(got, one.attend(query, [0, 1, 2], layer=layer), rtol=1e-5, atol=1e-6)
    assert torch.equal(one.context_lens, other.context_lens)
    assert [len(one.blocks(s)) for s in (0, 1, 2)] == [4, 1, 2] == other.page_counts.tolist()


def test_own_block_tables() -> None:
    """An engine with blocks of its own: tables, lengths and sequences as tensors, in any order."""
    paged = small(bits=4)
    pool = paged.pool
    lengths, blocks, sequences = (700, 260, 389), ([7, 3, 30, 11], [], [5, 6]), (4, 1, 0)
    kept = [random_states(paged, tokens=tokens) for tokens in lengths]
    for states, held, sequence in zip(kept, blocks, sequences, strict=True):
        assert len(held) == pool.pages_of(states[0].shape[1])
        pool.fill(*states, sequence, held)
    tables = torch.randint(0, 40, (3, 6), dtype=torch.int32)
    for row, held in enumerate(blocks):
        tables[row, : len(held)] = torch.tensor(held, dtype=torch.int32)
    counts = torch.tensor([len(held) for held in blocks], dtype=torch.int32)
    plan = pool.plan(tables, torch.tensor(lengths, dtype=torch.int32), counts, torch.tensor(sequences))
    query = query_for(paged, 3, 2)
    got = pool.attend(query, plan)
    for row, (sequence, held, tokens) in enumerate(zip(sequences, blocks, lengths, strict=True)):
        decoded = pool.decode(sequence, held, tokens)
        assert relative_error(decoded[0], kept[row][0].double()) < 0.2
        assert relative_error(got[row], exact(query[row], *decoded)) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("block_tables", torch.zeros(2, 3)),
        ("context_lens", torch.zeros(3, dtype=torch.int32)),
        ("page_counts", torch.zeros(2, dtype=torch.int64)),
        ("sequences", torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_bad_tables_are_refused(name: str, bad: torch.Tensor) -> None:
    good = {
        "block_tables": torch.zeros(2, 3, dtype=torch.int32),
        "context_lens": torch.zeros(2, dtype=torch.int32),
        "page_counts": torch.zeros(2, dtype=torch.int32),
        "sequences": torch.zeros(2, dtype=torch.int64),
    }
    pool = lossless().pool
    assert pool.plan(**good).batch == 2
    with pytest.raises(InvalidInputError, match=name):
        pool.plan(**{**good, name: bad})
    with pytest.raises(InvalidInputError, match="2 rows for 6 sequences"):
        pool.plan(**{**good, "sequences": None})


# What it refuses


def state_of(paged: PagedAttention) -> list[Any]:
    tables = [paged.block_tables, paged.context_lens, paged.page_counts]
    tokens = [paged.decode(s) for s in paged.sequences]
    return (
        [t.tolist() for t in tables] + [[t.tolist() for t in pair] for pair in tokens] + [paged.free_blocks]
    )


def test_out_of_blocks_changes_nothing() -> None:
    paged = lossless(num_blocks=5, recent_tokens=0, max_sequences=2)
    one, other = (paged.add(*random_states(paged, tokens=tokens)) for tokens in (400, 4 + 128))
    paged.append([other], *random_states(paged, 1, tokens=128))
    assert paged.free_blocks == 1 and paged.blocks_for(4 + 128 + 129) == 2
    before = state_of(paged)
    with pytest.raises(PoolFullError, match="2 more blocks are needed, and 1 of 5 are free"):
        paged.append([other, one], *random_states(paged, 2, tokens=128))
    with pytest.raises(PoolFullError, match="there are 2 sequences"):
        paged.add(*random_states(paged, tokens=3))
    with pytest.raises(PoolFullError, match="there are 2 sequences"):
        paged.fork(one)
    assert state_of(paged) == before
    paged.free(one)
    assert paged.free_blocks == 4
    with pytest.raises(PoolFullError, match="5 more blocks are needed, and 4 of 5 are free"):
        paged.add(*random_states(paged, tokens=4 + 5 * 128 + 1))
    assert paged.sequences == [other]
    paged.add(*random_states(paged, tokens=4 + 4 * 128 + 1))
    assert paged.free_blocks == 0


def test_nan_changes_nothing() -> None:
    paged = small(bits=4, recent_tokens=20)
    sequence = paged.add(*random_states(paged, tokens=145))
    keys, values = random_states(paged, tokens=300)
    values[0, 50] = float("nan")
    with pytest.raises(NonFiniteError):
        paged.add(keys, values)
    assert paged.sequences == [sequence] and paged.free_blocks == 40
    before = state_of(paged)
    with pytest.raises(NonFiniteError):
        paged.append([sequence], keys[None], values[None])
    assert state_of(paged) == before
    paged.append([sequence], keys[None, :, 50:51], values[None, :, 50:51])  # seen when it is to be packed
    paged.append([sequence], *random_states(paged, 1, tokens=6))
    paged.append([sequence], *random_states(paged, 1, tokens=18))
    held, length = paged.blocks(sequence), paged.length(sequence)
    with pytest.raises(NonFiniteError):
        paged.append([sequence], *random_states(paged, 1, tokens=200))
    assert paged.length(sequence) == length and paged.blocks(sequence)[: len(held)] == held
    paged.free(sequence)
    assert paged.free_blocks == 40


def test_unknown_sequences_and_wrong_shapes_are_refused() -> None:
    paged = lossless(layers=2, max_tokens=500)
    sequence = paged.add(*random_states(paged, 2, tokens=300))
    keys, values = random_states(paged, 2, 1, tokens=3)
    before = state_of(paged)
    more = random_states(paged, 2, 1, tokens=201)
    calls: list[tuple[str, Any]] = [
        ("no sequence 3", lambda: paged.attend(query_for(paged, 1), [3])),
        ("no sequence 3", lambda: paged.append([3], keys, values)),
        ("no sequence -1", lambda: paged.free(-1)),
        ("no sequence 5", lambda: paged.fork(5)),
        ("no sequence is named", lambda: paged.attend(query_for(paged, 0), [])),
        ("named twice", lambda: paged.extend([sequence, sequence])),
        ("1 to 129 new tokens, got 130", lambda: paged.extend([sequence], 130)),
        ("1 to 129 new tokens, got 0", lambda: paged.extend([sequence], 0)),
        ("2 layers in front", lambda: paged.append([sequence], keys[0], values[0])),
        ("keys are", lambda: paged.append([sequence], keys[..., :4], values)),
        ("values are", lambda: paged.append([sequence], keys, values[:, :, :1])),
        ("keys are torch.int64", lambda: paged.append([sequence], keys.long(), values)),
        (
            "501 tokens.*at most 500",
            lambda: paged.append([sequence], *more),
        ),
        ("600 tokens.*at most 500", lambda: paged.add(*random_states(paged, 2, tokens=600))),
        ("3 heads, not 4", lambda: paged.attend(query_for(paged, 1)[:, :3], [sequence])),
        ("query must be", lambda: paged.attend(query_for(paged, 2), [sequence])),
        ("opened for 300 tokens, got 3", lambda: paged.fill(sequence, keys[0, 0], values[0, 0])),
        ("cannot keep 131 .* first 132", lambda: paged.crop(sequence, 131)),
        ("cannot keep 301", lambda: paged.crop(sequence, 301)),
    ]
    for message, call in calls:
        with pytest.raises(InvalidInputError, match=message):
            call()
    assert state_of(paged) == before
    paged.free(sequence)
    with pytest.raises(InvalidInputError, match="no sequence 0; there are \\[\\]"):
        paged.free(sequence)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 5}, UnsupportedBitsError, "5"),
        ({"head_dim": 30}, UnsupportedHeadDimError, "30"),
        ({"query_heads": 5}, InvalidInputError, "5 query heads are not a multiple of 2"),
        ({"num_blocks": 0}, InvalidInputError, "blocks is 0"),
        ({"max_sequences": 0}, InvalidInputError, "sequences is 0"),
        ({"layers": 1.5}, InvalidInputError, "layers is 1.5"),
        ({"recent_tokens": -1}, InvalidInputError, "recent_tokens is -1"),
        ({"max_tokens": 0}, InvalidInputError, "max_tokens is 0"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small(**options)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_grad_mode(mode: Any) -> None:
    paged = lossless(recent_tokens=5)
    with torch.inference_mode():
        sequence = paged.add(*random_states(paged, tokens=200))
    with mode():
        for _ in range(3):
            keys, values = (states.clone() for states in random_states(paged, 1, tokens=60))
            if mode is torch.enable_grad:
                keys.requires_grad_()
            paged.append([sequence], keys, values)
        query = query_for(paged, 1)
        got = paged.attend(query, [sequence])
    assert not got.requires_grad and not any(t.requires_grad for t in paged.pool.dense_tensors())
    assert relative_error(got[0], exact(query[0], *dense(paged, sequence))) < TOLERANCE
