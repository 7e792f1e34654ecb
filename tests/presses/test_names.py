"""The short names are kvpress's presses, with defaults that do something and errors that say something."""

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass

import kvpress
import pytest

import quantpress.presses as presses
from quantpress.errors import InvalidInputError
from quantpress.presses import LUKV, AdaKV, ChunkKV, CriticalKV, Knorm, SnapKV, StreamingLLM, ThinK
from quantpress.presses.base import EvictingPress, WrappingPress
from tests.grids import covering

OURS = {"Compose", "Demote", "TurboQuant"}
WITH_RATIO = [
    name for name in presses.__all__ if name not in OURS and issubclass(getattr(presses, name), EvictingPress)
]
WRAPPING = [
    name for name in presses.__all__ if name not in OURS and issubclass(getattr(presses, name), WrappingPress)
]


def upstream(name: str) -> type:
    found: type = getattr(kvpress, name + "Press")
    return found


def test_every_press_of_kvpress_has_a_short_name() -> None:
    general = {"BasePress", "ScorerPress", "ComposedPress"}
    expected = {name.removesuffix("Press") for name in kvpress.__all__ if name.endswith("Press")} - {
        name.removesuffix("Press") for name in general
    }
    assert set(presses.__all__) - OURS == expected
    assert list(presses.__all__) == sorted(presses.__all__)


@pytest.mark.parametrize("name", sorted(set(presses.__all__) - OURS))
def test_is_a_class_of_kvpress_with_its_arguments(name: str) -> None:
    short, original = getattr(presses, name), upstream(name)
    assert issubclass(short, original)
    assert list(inspect.signature(short).parameters) == list(inspect.signature(original).parameters)


@pytest.mark.parametrize("name", WITH_RATIO)
def test_default_evicts(name: str) -> None:
    press = getattr(presses, name)()
    assert isinstance(press, upstream(name))
    assert 0 < getattr(press, press.ratio_name) < 1
    if press.ratio_name == "compression_ratio":
        assert press.compression_ratio == 0.5


@pytest.mark.parametrize(
    ("name", "ratio"),
    covering(WITH_RATIO, [1, 1.5, -0.1, float("nan"), "half", True, None], strength=1),
)
def test_a_bad_ratio_is_named(name: str, ratio: object) -> None:
    press = getattr(presses, name)
    with pytest.raises(InvalidInputError) as caught:
        press(**{press.ratio_name: ratio})
    assert name in str(caught.value) and repr(ratio) in str(caught.value)


@pytest.mark.parametrize("name", WRAPPING)
def test_wrapping_presses_have_a_scorer_by_default(name: str) -> None:
    if name == "LUKV":
        assert LUKV().press.epsilon == 2e-2
    press = getattr(presses, name)()
    assert isinstance(press, upstream(name)) and isinstance(press.press, kvpress.ScorerPress)
    assert press.compression_ratio == 0.5
    assert getattr(presses, name)(press=Knorm).press == Knorm()
    with pytest.raises(InvalidInputError, match="scores tokens"):
        getattr(presses, name)(press=ThinK())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(0.5, window_size="64"), "SnapKV: window_size is '64'; give a whole number"),
        (lambda: LUKV(sink=True), "LUKV: sink is True; give a whole number"),
        (lambda: SnapKV(0.5, window_size=0), "SnapKV: window_size is 0; give a whole number, 1 or more"),
        (lambda: SnapKV(0.5, kernel_size=4), "SnapKV: kernel_size is 4; give an odd whole number, 1 or more"),
        (lambda: StreamingLLM(0.5, n_sink=-1), "StreamingLLM: n_sink is -1; give a whole number, 0 or more"),
        (lambda: ChunkKV(chunk_length=0), "ChunkKV: chunk_length is 0; give a whole number, 1 or more"),
        (lambda: AdaKV(alpha_safeguard=2), "AdaKV: alpha_safeguard should be in"),
        (lambda: SnapKV(ratio=0.3), "SnapKV has no argument 'ratio'; did you mean 'compression_ratio'"),
        (lambda: SnapKV(bits=4), r"SnapKV has no argument 'bits'; .* TurboQuant\(bits="),
        (lambda: AdaKV(compression_ratio=0.3), r"AdaKV has no argument .* AdaKV\(SnapKV\(compression_ratio"),
        (lambda: Knorm(0.3, 64), r"Knorm\(0.3, 64\) has 2 arguments; its arguments are compression_ratio"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()


def test_presses_made_of_two_defaults_share_nothing() -> None:
    assert AdaKV().press is not AdaKV().press


def test_positional_arguments() -> None:
    press = StreamingLLM(0.25, n_sink=8)
    assert (press.compression_ratio, press.n_sink) == (0.25, 8)
    assert SnapKV(0.3, 32).window_size == 32


def test_critical_kv() -> None:
    assert CriticalKV().press == SnapKV()
    assert CriticalKV(Knorm(0.2), epsilon=0.1).compression_ratio == 0.2
    with pytest.raises(InvalidInputError, match="scores tokens"):
        CriticalKV(ThinK())


def test_lukv_checks_its_ratio() -> None:
    with pytest.raises(InvalidInputError, match="compression_ratio is 2"):
        LUKV(compression_ratio=2)


def test_fields_are_those_of_kvpress() -> None:
    """A copy that went out of step would differ here."""
    for name in WITH_RATIO + WRAPPING:
        short, original = getattr(presses, name), upstream(name)
        if is_dataclass(original):
            assert [field.name for field in fields(short)] == [field.name for field in fields(original)], name
