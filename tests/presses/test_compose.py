"""What `Compose` refuses when it is made, and what it makes of what it is given."""

from dataclasses import dataclass
from typing import Any

import kvpress
import pytest

from quantpress.cache import WidthPlan
from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses import (
    CAM,
    DMS,
    AdaKV,
    Block,
    Compose,
    CompressionRatioDecoding,
    Decoding,
    DuoAttention,
    Finch,
    KeyRerotation,
    Knorm,
    KVCompose,
    KVzip,
    LeverageScore,
    PrefillDecoding,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    ThinK,
    TurboQuant,
)
from quantpress.presses.traits import traits_of

SNAP = SnapKV()


def decoding() -> Any:
    return Decoding(kvpress.KnormPress())


REFUSED = {
    "empty": (list, "empty list"),
    "no list": (lambda: SnapKV(), r"list of presses, got SnapKV"),
    "a class": (lambda: SnapKV, "list of presses, got .*SnapKV"),
    "a string": (lambda: "SnapKV", "list of presses, got 'SnapKV'"),
    "no press": (lambda: [SnapKV(), "TurboQuant"], "'TurboQuant' is not a press"),
    "another class": (lambda: [dict], "dict'> is not a press"),
    "twice": (lambda: [SNAP, Knorm(), SNAP], "SnapKV is given twice; make a second instance"),
    "a union": (lambda: SnapKV | TurboQuant, r"list of presses, got .*write Compose\(\[\.\.\.\]\)"),
    "a union with None": (lambda: [SnapKV | None], "NoneType'> is not a press"),
    "no defaults": (
        lambda: [kvpress.KeyRerotationPress],
        "KeyRerotationPress has no defaults .*give an instance",
    ),
    "two quantizers": (
        lambda: [TurboQuant(), TurboQuant(3)],
        r"more than one quantizer \(TurboQuant, TurboQuant\)",
    ),
    "quantizer first": (lambda: [TurboQuant(), SnapKV()], "TurboQuant comes before SnapKV: evict first"),
    "nested order": (lambda: [Compose([Knorm(), TurboQuant()]), SnapKV()], "TurboQuant comes before SnapKV"),
    "wrapped quantizer": (
        lambda: [PrefillDecoding(prefilling_press=TurboQuant(), decoding_press=decoding())],
        "PrefillDecodingPress wraps a quantizer",
    ),
    "merging while decoding": (
        lambda: [CAM(kvpress.KnormPress()), TurboQuant()],
        "CAMPress merges values while decoding.*without TurboQuant, or DecodingPress",
    ),
    "merging while decoding, inside": (
        lambda: [PrefillDecoding(SnapKV(), CAM(kvpress.KnormPress())), TurboQuant()],
        "CAMPress merges values while decoding",
    ),
    "head-wise, then decoding": (
        lambda: [PrefillDecoding(AdaKV(), decoding()), TurboQuant()],
        "AdaKV names slots of the cache, and DecodingPress would move them while decoding",
    ),
    "decoding, then head-wise": (
        lambda: [decoding(), AdaKV(), TurboQuant()],
        "AdaKV names slots of the cache, and DecodingPress would move them",
    ),
    "dms decoding, detected sinks": (
        lambda: [DMS(Knorm(), decoding=True), TurboQuant(detect_sinks=4)],
        "DMSPress counts slots on while decoding.*detect_sinks=0",
    ),
    "at exit": (lambda: [SnapKV(), KVzip()], "KVzip acts on the complete cache.*only evictor"),
    "at exit first": (lambda: [KVCompose(), SnapKV(), TurboQuant()], "KVCompose acts on the complete cache"),
    "head-wise first": (lambda: [AdaKV(), Knorm()], "AdaKV names slots of the cache, and Knorm behind it"),
    "base class": (lambda: [kvpress.BasePress()], "BasePress has no compress of its own"),
    "base scorer": (lambda: [kvpress.ScorerPress(0.5), TurboQuant()], "ScorerPress has no score of its own"),
    "base scorer inside": (lambda: [AdaKV(kvpress.ScorerPress(0.5))], "ScorerPress has no score of its own"),
    "whole context": (
        lambda: [SnapKV(), LeverageScore(), TurboQuant()],
        "LeverageScore scores each key with .*SnapKV before it evicts.*put LeverageScore first",
    ),
    "whole context inside": (lambda: [Knorm(), AdaKV(kvpress.KVzapPress())], "KVzapPress scores each key"),
    "blocks": (lambda: [Knorm(), Block()], "Block scores each key"),
    "head-wise, widths by head": (
        lambda: [AdaKV(), TurboQuant(plan=WidthPlan("", {}, {0: ((2, 3), 2)}))],
        "AdaKV evicts other tokens from each head, and TurboQuant has a plan of widths by head.*--by layer",
    ),
    "two head-wise": (lambda: [AdaKV(), DuoAttention()], "AdaKV names slots of the cache, and DuoAttention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case: str) -> None:
    presses, message = REFUSED[case]
    with pytest.raises(CompositionError, match=message):
        Compose(presses())


def test_presses_as_separate_arguments_are_told_of_the_list() -> None:
    with pytest.raises(InvalidInputError, match=r"write Compose\(\[SnapKV, TurboQuant\(3\)\]\)"):
        Compose(SnapKV, TurboQuant(3))  # type: ignore[call-arg]


def test_a_bad_setting_of_a_class_is_not_hidden() -> None:
    @dataclass
    class Broken(SnapKV):
        compression_ratio: float = 3

    with pytest.raises(InvalidInputError, match="compression_ratio is 3"):
        Compose([Broken])


def test_kvpress_class_that_evicts_nothing_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="SnapKVPress by default has compression_ratio 0"):
        Compose([kvpress.SnapKVPress, TurboQuant])


def test_classes_mean_their_defaults() -> None:
    press = Compose([StreamingLLM, TurboQuant])
    assert press.evictors == (StreamingLLM(),) and press.quantizer == TurboQuant()
    assert [type(member) for member in press] == [StreamingLLM, TurboQuant] and len(press) == 2


def test_instances_are_kept() -> None:
    snap, quantizer = SnapKV(0.25), TurboQuant(3)
    press = Compose((snap, quantizer))
    assert press.evictors[0] is snap and press.quantizer is quantizer


def test_nested_compositions_are_flattened() -> None:
    chained = kvpress.ComposedPress([kvpress.KnormPress(0.2), kvpress.ThinKPress(0.5)])
    press = Compose([Compose([SnapKV(0.1)]), chained, Compose([Compose([TurboQuant(2)])])])
    assert [type(member).__name__ for member in press] == ["SnapKV", "KnormPress", "ThinKPress", "TurboQuant"]


def test_a_press_that_needs_the_whole_context_may_follow_one_that_evicts_nothing() -> None:
    for first in (ThinK(), decoding()):
        assert len(Compose([first, LeverageScore(), SnapKV()])) == 3


@pytest.mark.parametrize(
    "press",
    [
        decoding(),
        PrefillDecoding(SnapKV(), decoding()),
        PrefillDecoding(AdaKV(), Decoding(AdaKV())),
        CompressionRatioDecoding(kvpress.KnormPress()),
        DMS(Knorm(), decoding=True),
    ],
    ids=lambda press: repr(press)[:40],
)
def test_what_evicts_while_decoding_stacks(press: Any) -> None:
    assert Compose([press, TurboQuant()]).evictors == (press,)


def test_a_score_may_be_given_to_an_instance() -> None:
    press = kvpress.ScorerPress(0.5)
    press.score = lambda module, hidden_states, keys, *rest: keys.norm(dim=-1)
    assert Compose([press, TurboQuant()]).evictors == (press,)


def test_two_presses_of_one_class_may_follow_each_other() -> None:
    assert Compose([SnapKV, SnapKV]).compression_ratio == 0.75


def test_without_quantizer() -> None:
    press = Compose([SnapKV, decoding()])
    assert press.quantizer is None and len(press.evictors) == 2


@pytest.mark.parametrize(
    ("press", "text"),
    [
        (Compose([SnapKV(0.5), TurboQuant(4)]), "Compose(SnapKV(0.5) | TurboQuant(4))"),
        (Compose([StreamingLLM(0.25, n_sink=8)]), "Compose(StreamingLLM(0.25, n_sink=8))"),
        (
            Compose([KeyRerotation, TurboQuant(3, seed=1)]),
            "Compose(KeyRerotation(StreamingLLM(0.5)) | TurboQuant(3, seed=1))",
        ),
    ],
    ids=["plain", "options", "wrapped"],
)
def test_repr_is_short(press: Compose, text: str) -> None:
    assert repr(press) == text


@pytest.mark.parametrize(
    "piped",
    [
        lambda: SnapKV(0.5) | TurboQuant(4),
        lambda: kvpress.SnapKVPress(0.5) | TurboQuant(4),
        lambda: SnapKV(0.5) | TurboQuant,
        lambda: SnapKV(0.5) | Compose([TurboQuant(4)]),
        lambda: SnapKV | Knorm | TurboQuant(4),
        lambda: Compose([SnapKV | Knorm, TurboQuant]),
    ],
    ids=["ours", "kvpress left", "class right", "composed", "classes left", "classes in a list"],
)
def test_pipe(piped: Any) -> None:
    press = piped()
    assert isinstance(press, Compose) and press.quantizer == TurboQuant(4)
    assert press.evictors[0].compression_ratio == 0.5


def test_pipe_with_something_else() -> None:
    with pytest.raises(TypeError):
        SnapKV() | 3


def test_contains_looks_inside() -> None:
    press = Compose([KeyRerotation(StreamingLLM()), TurboQuant()])
    assert press.contains(kvpress.KeyRerotationPress) and press.contains(kvpress.StreamingLLMPress)
    assert press.contains((kvpress.SnapKVPress, TurboQuant)) and not press.contains(kvpress.SnapKVPress)
    assert Compose([PrefillDecoding(SnapKV(), decoding())]).contains(kvpress.SnapKVPress)


def test_compression_ratio_is_that_of_all_evictors_together() -> None:
    assert Compose([TurboQuant]).compression_ratio == 0
    assert Compose([SnapKV(0.3), TurboQuant]).compression_ratio == pytest.approx(0.3)
    assert Compose([SnapKV(0.5), Knorm(0.2), ThinK(0.5), TurboQuant]).compression_ratio == pytest.approx(0.6)


def test_setting_the_ratio_shares_it_among_the_evictors() -> None:
    press = Compose([SnapKV, Knorm, ThinK, TurboQuant])
    press.compression_ratio = 0.75
    snap, knorm, think = press.evictors
    assert snap.compression_ratio == knorm.compression_ratio == pytest.approx(0.5)
    assert think.key_channel_compression_ratio == 0.5
    assert press.compression_ratio == pytest.approx(0.75)


@pytest.mark.parametrize("ratio", [1, -0.5, "x"])
def test_setting_a_bad_ratio(ratio: Any) -> None:
    press = Compose([SnapKV, TurboQuant])
    with pytest.raises(InvalidInputError, match="0 <= compression_ratio < 1"):
        press.compression_ratio = ratio
    assert press.compression_ratio == 0.5


def test_a_ratio_that_cannot_be_set() -> None:
    with pytest.raises(AttributeError, match="no evictor"):
        Compose([TurboQuant]).compression_ratio = 0.5
    press = Compose([SnapKV, SimLayerKV, TurboQuant])
    with pytest.raises(AttributeError, match="SimLayerKV follows from its other settings"):
        press.compression_ratio = 0.25
    assert press.evictors[0].compression_ratio == 0.5
    with pytest.raises(InvalidInputError, match="SimLayerKV is known only after a prefill"):
        _ = press.compression_ratio


def test_what_presses_do_to_positions_and_slots() -> None:
    finch = Finch()
    assert all(traits_of(press).rerotates for press in (KeyRerotation(), finch))
    assert not traits_of(SnapKV()).rerotates
    finch.rerotate_keys = False
    assert not traits_of(finch).rerotates
    assert all(traits_of(press).masks_heads for press in (AdaKV(), KVCompose(structured=False)))
    assert not traits_of(KVCompose()).masks_heads
    assert all(traits_of(press).decodes for press in (decoding(), DMS(Knorm(), decoding=True)))
    assert not traits_of(DMS(Knorm())).decodes
