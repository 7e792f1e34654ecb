"""Every press has a row of traits, and a press of one line is composed, refused and accepted by it."""

import pickle
from dataclasses import dataclass, fields, replace
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import PackedLayer
from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses import (
    AdaKV,
    Compose,
    Decoding,
    Demote,
    Knorm,
    SnapKV,
    StreamingLLM,
    TurboQuant,
    names,
)
from quantpress.presses.base import EvictingPress, WrappingPress
from quantpress.presses.rules import RULES, why_not
from quantpress.presses.traits import TRAITS, Traits, describe, traits_of, with_inner
from tests.presses.matrix import catalogue
from tests.presses.reading import lossless, read
from tests.tiny_models import prompt, tiny_model


@dataclass
class OldestPress(kvpress.ScorerPress):
    """What a later kvpress might bring along: keeps `n_first` tokens, then the newest."""

    n_first: int = 2

    def score(self, module: Any, hidden_states: Any, keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        slots = torch.arange(keys.shape[2], dtype=torch.float32)
        return slots.masked_fill(slots < self.n_first, torch.inf).expand(keys.shape[:3])


@dataclass
class ScalingPress(kvpress.BasePress):
    """One that works through another."""

    press: kvpress.ScorerPress
    compression_ratio: float = 0.0

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, *rest: Any) -> Any:
        return keys, values


# The lines that the two cost here.
class Oldest(EvictingPress, OldestPress, whole_context=True, sink_tokens=lambda press: press.n_first): ...


class Scaling(WrappingPress, EvictingPress, ScalingPress, inner=Oldest, masks_heads=True): ...


def test_every_press_of_kvpress_has_a_row() -> None:
    assert not [name for name, press_class in catalogue.exported().items() if press_class not in TRAITS]


def test_rows_state_known_traits() -> None:
    known = {field.name for field in fields(Traits)}
    assert all(row.keys() <= known for row in TRAITS.values())
    stated = {name for row in TRAITS.values() for name in row}
    assert stated == known, "a trait that no press has"
    with pytest.raises(InvalidInputError, match="Oldest: there is no trait decode; the traits are at_exit"):
        describe(Oldest, decode=True)


def test_one_line_makes_a_press() -> None:
    press = Oldest()
    assert issubclass(Oldest, OldestPress) and press.compression_ratio == 0.5 and press.n_first == 2
    assert repr(Oldest(0.25, n_first=4)) == "Oldest(compression_ratio=0.25, n_first=4)"
    assert pickle.loads(pickle.dumps(press)) == press
    assert Scaling().press == press and Scaling(Knorm).press == Knorm()
    with pytest.raises(InvalidInputError, match="Oldest: compression_ratio is 1"):
        Oldest(1)
    with pytest.raises(InvalidInputError, match="Scaling: press is 3; give one that scores tokens"):
        Scaling(3)


def test_one_line_is_composed() -> None:
    press = Compose([Oldest(0.5, n_first=6), lossless(sink_tokens=1)])
    assert repr(press).startswith("Compose(Oldest(0.5, n_first=6) | TurboQuant(")
    cache = read(tiny_model("llama"), press, prompt(400), DynamicCache())
    for layer in cache.layers:
        assert isinstance(layer, PackedLayer) and layer.get_seq_length() == 200
        assert layer.settings.sink_tokens == 6


def test_one_line_is_refused() -> None:
    with pytest.raises(
        CompositionError, match=r"Oldest scores each key .*SnapKV before it evicts.*Oldest first"
    ):
        SnapKV() | Oldest() | TurboQuant()
    with pytest.raises(CompositionError, match="Scaling names slots of the cache, and Knorm behind it"):
        Compose([Scaling(Knorm), Knorm(), TurboQuant])


def test_the_class_that_is_named_has_the_traits_too() -> None:
    assert traits_of(OldestPress(0.5, n_first=3)) == Traits(whole_context=True, sink_tokens=3)
    assert traits_of(ScalingPress(Knorm())).masks_heads


def test_subclasses_inherit_and_override() -> None:
    class Newest(Oldest, sink_tokens=0): ...

    assert traits_of(Newest()) == Traits(whole_context=True)
    kvzip = Traits(at_exit=True, masks_heads=True, needs_all_heads=True)
    assert traits_of(names.KVgrad()) == kvzip
    assert traits_of(names.KVzip()) == replace(kvzip, like_llama=True)
    assert traits_of(names.CAM(Knorm())).merges_while_decoding and traits_of(names.CAM(Knorm())).decodes
    assert not traits_of(Decoding(AdaKV())).moves_slots and traits_of(Decoding(Knorm())).moves_slots


def test_a_second_name_describes_itself_only() -> None:
    class Again(EvictingPress, kvpress.SnapKVPress, decodes=True): ...

    assert traits_of(Again()).decodes and not traits_of(SnapKV()).decodes


def test_inner_presses_at_the_prefill() -> None:
    press = names.PrefillDecoding(AdaKV(Knorm()), Decoding(StreamingLLM()))
    inner = [type(one).__name__ for one in with_inner(press)]
    assert inner == ["PrefillDecodingPress", "AdaKV", "Knorm", "DecodingPress", "StreamingLLM"]
    assert [type(one).__name__ for one in with_inner(press, at_prefill=True)] == inner[:3]


def test_every_reason_is_given() -> None:
    reasons = why_not([TurboQuant(detect_sinks=1), AdaKV(), names.KVzip(), Oldest()])
    assert [reason.split(" ")[0] for reason in reasons] == ["TurboQuant", "KVzip", "Oldest", "KVzip", "AdaKV"]
    assert why_not([]) == ["Compose got an empty list; give at least one press, or press=None for none"]
    assert why_not([SnapKV(), Demote(), TurboQuant()]) == [] and len(RULES) == 17
