"""Divergences are those of the compressed cache: checked against plain forwards and step-by-step decoding."""

import copy

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.evaluation.divergence.documents import Document, Pieces, make_documents, make_unread_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.divergence.reference import attend
from quantpress.evaluation.divergence.teacher_forcing import float32_logits, kl_divergence, score_continuation
from quantpress.presses import AdaKV, Compose, KeyRerotation, Knorm, PyramidKV, SnapKV, TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.presses.reading import lossless, read
from tests.tiny_models import prompt, tiny_model

CONTEXT, NEW = 400, 20
SMALL = {"sink_tokens": 4, "recent_tokens": 16}


def documents(count=1, context=CONTEXT):
    return [Document(f"{i}", prompt(context + NEW, seed=i)[0], context) for i in range(count)]


def model():
    return tiny_model("llama")


def whole(ids):
    """Log-probabilities of one forward of everything, as every textbook has them: [N - 1, V]."""
    with torch.inference_mode():
        return model()(input_ids=ids[None]).logits[0, CONTEXT:-1].log_softmax(-1)


def step_by_step(press, ids):
    """Log-probabilities over the cache that a press leaves, one token at a time: [N - 1, V]."""
    cache, found = read(model(), press, ids[None, :CONTEXT], DynamicCache()), []
    position = cache.get_seq_length() if isinstance(press, KeyRerotation) else CONTEXT
    for place, token in enumerate(ids[CONTEXT:-1].tolist()):
        with torch.inference_mode():
            step = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[position + place]])}
            found.append(model()(**step, past_key_values=cache).logits[0, -1].log_softmax(-1))
    return torch.stack(found)


@pytest.mark.parametrize("press", [None, lossless()], ids=["uncompressed", "lossless"])
def test_nothing_lost_is_no_divergence(press):
    (document,) = documents()
    (found,) = DivergenceProbe(model(), [document], queries=4).over(press)
    targets = document.ids[CONTEXT + 1 :]
    expected = functional.cross_entropy(whole(document.ids), targets, reduction="none")
    assert max(found.kl) < 1e-4
    assert all(found.agree)
    assert found.nll == pytest.approx(expected.tolist(), abs=2e-3)
    assert found.reference_nll == pytest.approx(expected.tolist(), abs=1e-4)
    assert torch.tensor(found.attention.output).max() < 1e-4
    assert torch.tensor(found.attention.divergence).max() < 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: Knorm(0.5),
        lambda: TurboQuant(bits=2, **SMALL),
        lambda: Compose([Knorm(0.3), TurboQuant(bits=3, **SMALL)]),
        lambda: KeyRerotation(Knorm(0.4)),
    ],
    ids=["evicted", "packed", "both", "rerotated"],
)
def test_figures_are_those_of_step_by_step_decoding(make):
    (document,) = documents()
    (found,) = DivergenceProbe(model(), [document], chunk_tokens=1).over(make())
    exact, other = whole(document.ids), step_by_step(make(), document.ids)
    kl = functional.kl_div(other, exact, reduction="none", log_target=True).sum(-1)
    targets = document.ids[CONTEXT + 1 :]
    assert found.kl == pytest.approx(kl.tolist(), abs=2e-3)
    assert found.nll == pytest.approx((-other.gather(1, targets[:, None])[:, 0]).tolist(), abs=5e-3)
    assert max(found.kl) > 0.05  # the cache was read: what it lost shows


def test_chunks_change_nothing_where_nothing_is_packed_anew():
    (document,) = documents()
    probes = [DivergenceProbe(model(), [document], chunk_tokens=n) for n in (1, 7, 64)]
    one, seven, all_at_once = (probe.over(Knorm(0.5))[0].nll for probe in probes)
    assert one == pytest.approx(seven, abs=2e-3)
    assert one == pytest.approx(all_at_once, abs=2e-3)


@pytest.mark.parametrize(
    "make", [lambda: TurboQuant(bits=3, **SMALL), lambda: PyramidKV(0.3, window_size=16)]
)
def test_a_batch_is_its_documents(make):
    both = DivergenceProbe(model(), documents(2), queries=3).over(make())
    for document, found in zip(documents(2), both, strict=True):
        (alone,) = DivergenceProbe(model(), [document], queries=3).over(make())
        assert found.kl == pytest.approx(alone.kl, abs=1e-3)
        assert found.nll == pytest.approx(alone.nll, abs=1e-3)
        assert found.resident_bytes == alone.resident_bytes
        assert torch.tensor(found.attention.output) == pytest.approx(
            torch.tensor(alone.attention.output), abs=1e-3
        )


def test_fewer_bits_are_further_away():
    probe = DivergenceProbe(model(), documents(), queries=8)
    found = [probe.over(TurboQuant(bits=bits, **SMALL))[0] for bits in (8, 4, 2)]
    kl = [sum(one.kl) for one in found]
    error = [float(torch.tensor(one.attention.output).mean()) for one in found]
    size = [one.resident_bytes for one in found]
    assert kl == sorted(kl)
    assert error == sorted(error)
    assert size == sorted(size, reverse=True)


def test_attention_errors_are_those_of_plain_attention():
    """Per head, against torch's own attention over the decoded keys and values."""
    probe = DivergenceProbe(model(), documents(), queries=5)
    (found,) = probe.over(TurboQuant(bits=2, **SMALL))
    cache = read(model(), TurboQuant(bits=2, **SMALL), probe.ids[:, :CONTEXT], DynamicCache())
    for row, (layer, call) in enumerate(probe.reference.attention.items()):
        assert call.query.shape[2] == 5
        exact = functional.scaled_dot_product_attention(call.query, call.keys, call.values, enable_gqa=True)
        keys, values = cache.layers[layer].keys.dense(), cache.layers[layer].values.dense()
        other = functional.scaled_dot_product_attention(call.query, keys, values, enable_gqa=True)
        error = (other - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))
        assert found.attention.output[row] == pytest.approx(error[0].tolist(), rel=1e-3)
        weights = [
            (call.query @ k.repeat_interleave(2, 1).mT / call.query.shape[-1] ** 0.5).log_softmax(-1)
            for k in (call.keys, keys)
        ]
        kl = functional.kl_div(weights[1], weights[0], reduction="none", log_target=True).sum(-1).mean(-1)
        assert found.attention.divergence[row] == pytest.approx(kl[0].tolist(), rel=1e-2, abs=1e-5)


def test_queries_are_the_models_own():
    """Attention of the recorded queries over the whole text is what the model's own layers compute."""
    probe, seen = DivergenceProbe(model(), documents(), queries=3), []
    first = model().model.layers[0].self_attn.o_proj
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model()(input_ids=probe.ids[:, : CONTEXT + 1])
        handle.remove()
        call = probe.reference.attention[0]
        longer = read(model(), None, probe.ids[:, : CONTEXT + 1], DynamicCache()).layers[0]
        output = attend(model(), call, longer.keys, longer.values)
    assert torch.allclose(output[:, 0].flatten(1), seen[0][:, CONTEXT], atol=1e-5)


def test_weights_are_not_compared_where_tokens_are_gone():
    probe = DivergenceProbe(model(), documents(), queries=3)
    assert probe.over(Knorm(0.5))[0].attention.divergence is None
    headwise = probe.over(Compose([AdaKV(SnapKV(0.5, window_size=16)), lossless()]))[0]
    assert headwise.attention.divergence is None
    assert max(headwise.kl) > 0.01
    moved = probe.over(lossless(detect_sinks=4))[0].attention
    assert moved.divergence is None and torch.tensor(moved.output).max() < 1e-4


def test_heads_that_keep_different_tokens_are_measured_as_kvpress_masks_them():
    """A few queries at once, for which kvpress finds keys that hide what a head has evicted."""
    (masked,) = DivergenceProbe(model(), documents(), queries=3, chunk_tokens=2).over(
        AdaKV(SnapKV(0.5, window_size=16))
    )
    (packed,) = DivergenceProbe(model(), documents(), queries=3, chunk_tokens=2).over(
        Compose([AdaKV(SnapKV(0.5, window_size=16)), lossless()])
    )
    assert packed.kl == pytest.approx(masked.kl, abs=2e-3)
    assert torch.tensor(packed.attention.output) == pytest.approx(
        torch.tensor(masked.attention.output), abs=1e-3
    )
    assert packed.resident_bytes < 0.8 * masked.resident_bytes


def test_heads_that_kvpress_cannot_mask_are_named():
    long = Document("long", prompt(CONTEXT + 70)[0], CONTEXT)
    with pytest.raises(InvalidInputError, match=r"AdaKV.*TurboQuant behind it"):
        DivergenceProbe(model(), [long]).over(AdaKV(SnapKV(0.5, window_size=16)))


def test_sliding_layers_are_left_out_of_attention():
    gemma = tiny_model("gemma3")
    (found,) = DivergenceProbe(gemma, documents(), queries=3).over(TurboQuant(bits=4, **SMALL))
    assert found.attention.layers == [1, 2]


def test_the_model_is_left_as_it_was():
    before = {name: dict(vars(module)) for name, module in model().named_modules()}
    probe = DivergenceProbe(model(), documents(), queries=2)
    probe.over(Compose([AdaKV(Knorm(0.5)), lossless()]))
    (broken,) = documents(context=40)
    with pytest.raises(InvalidInputError, match="SnapKV"):
        DivergenceProbe(model(), [broken]).over(SnapKV(0.5))
    for name, module in model().named_modules():
        assert vars(module).keys() == before[name].keys(), name


def test_logits_are_float32_and_the_head_comes_back():
    half = copy.deepcopy(model()).bfloat16()
    with pytest.raises(RuntimeError, match="stop"), float32_logits(half):
        logits = half(input_ids=prompt(5)).logits
        raise RuntimeError("stop")
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    assert half(input_ids=prompt(5)).logits.dtype == torch.bfloat16


def test_infinite_logits_are_an_error():
    broken = copy.deepcopy(model())
    probe = DivergenceProbe(broken, documents())
    broken.lm_head.weight.data[0] = float("inf")
    with pytest.raises(NonFiniteError, match="not finite"):
        probe.over(None)


def test_divergence_is_torchs(seed):
    left, right = torch.randn(2, 7, 50).log_softmax(-1)
    expected = functional.kl_div(right, left, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(kl_divergence(left, right), expected, atol=1e-6)
    assert kl_divergence(left, left).eq(0).all()


@pytest.mark.parametrize(("new", "chunk"), [(1, 64), (0, 64), (5, 0)])
def test_a_continuation_of_no_token_is_refused(new, chunk):
    with pytest.raises(InvalidInputError, match="continuation"):
        next(score_continuation(model(), DynamicCache(), prompt(9)[:, :new], 0, chunk))


@pytest.mark.parametrize("chat", [False, True])
def test_documents_are_pieces_of_the_text_that_do_not_overlap(chat):
    tokenizer, words = word_tokenizer(chat), text(500)
    found = make_documents(tokenizer, words, 3, 100, 20)
    front = 2 if chat else 1  # <s> <user>, or <s>
    ids = tokenizer.encode(words, add_special_tokens=False)
    for i, document in enumerate(found):
        assert len(document.ids) == 120
        assert tokenizer.decode(document.ids[:front]).split() == ["<s>", "<user>"][:front]
        start = i * (500 // 3)
        assert document.ids[front:].tolist() == ids[start : start + 120 - front]
    assert len({document.name for document in found}) == 3


@pytest.mark.parametrize("chat", [False, True])
def test_unread_documents_overlap_nothing_that_was_read(chat):
    tokenizer, words, front = word_tokenizer(chat), text(900), 2 if chat else 1
    ids = tokenizer.encode(words, add_special_tokens=False)
    read = [Pieces(3, 100, 20), Pieces(2, 40, 10)]
    unread = make_unread_documents(tokenizer, words, Pieces(6, 50, 5), read)
    assert len(unread) == 6 and {len(one.ids) for one in unread} == {55}
    spans = []
    for documents in (unread, *(make_documents(tokenizer, words, *_sizes(one)) for one in read)):
        for one in documents:
            own = one.ids[front:].tolist()
            spans.append(
                next({i + j for j in range(len(own))} for i in range(900) if ids[i : i + len(own)] == own)
            )
    for i, span in enumerate(spans[:6]):
        assert not any(span & other for other in spans[i + 1 :])
    with pytest.raises(InvalidInputError, match=r"room for \d unread documents"):
        make_unread_documents(tokenizer, words, Pieces(20, 50, 5), read)


def _sizes(pieces):
    return pieces.count, pieces.context, pieces.continuation


@pytest.mark.parametrize(("count", "context", "new"), [(5, 100, 20), (0, 100, 20), (1, 1, 20), (1, 100, 1)])
def test_too_little_text_is_refused(count, context, new):
    with pytest.raises(InvalidInputError):
        make_documents(word_tokenizer(), text(500), count, context, new)
