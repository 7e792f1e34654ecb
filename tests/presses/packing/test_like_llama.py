"""Models whose queries or keys kvpress would compute otherwise: those presses are refused there."""

from typing import Any

import pytest
import torch
from transformers import CohereConfig, DynamicCache, GraniteConfig, Olmo2Config, SmolLM3Config

from quantpress.errors import UnsupportedModelError
from quantpress.presses import (
    AdaKV,
    BasePress,
    Compose,
    Decoding,
    ExpectedAttention,
    KeyRerotation,
    Knorm,
    LeverageScore,
    SnapKV,
    ThinK,
    TurboQuant,
)
from tests.presses.packing.test_queries import GROUPED, OTHERS, build
from tests.tiny_models import prompt

TOKENS = 150
REFUSED = "does not work with .*Attention: kvpress does not compute its queries and keys as the model does"
SNAP = SnapKV(0.5, window_size=8)

NEIGHBOURS: Any = (CohereConfig, GROUPED)  # rotates pairs of neighbouring channels
ALL_HEADS: Any = (Olmo2Config, GROUPED)  # norms the queries of all heads together
SOME_ROTATE: Any = (SmolLM3Config, {**GROUPED, "no_rope_layers": [1, 0]})
SOME_CHANNELS: Any = OTHERS["partial rotation inside (Phi3)"]  # a class that kvpress names as supported
PLAIN: Any = (GraniteConfig, GROUPED)  # unknown to kvpress, and computes as Llama does


def kept(family: Any, press: BasePress, attention: str = "sdpa") -> torch.Tensor:
    """The values that the first layer keeps."""
    model, cache = build(*family, attention), DynamicCache()
    with torch.inference_mode(), press(model):
        model(prompt(TOKENS), past_key_values=cache)
    layer: Any = cache.layers[0]
    states: torch.Tensor = layer.values
    return states


@pytest.mark.parametrize(
    ("family", "press"),
    [
        (NEIGHBOURS, SNAP),
        (NEIGHBOURS, AdaKV(SNAP)),
        (NEIGHBOURS, KeyRerotation(Knorm(0.5))),
        (NEIGHBOURS, Decoding(SNAP, compression_interval=8, target_size=64)),
        (ALL_HEADS, SNAP),
        (ALL_HEADS, ExpectedAttention(0.5)),
        (ALL_HEADS, LeverageScore(0.5)),
        (ALL_HEADS, [Knorm(0.2), SNAP]),
        (SOME_ROTATE, ThinK(0.5)),
        (SOME_CHANNELS, SNAP),
        (SOME_CHANNELS, KeyRerotation(Knorm(0.5))),
        (SOME_ROTATE, KeyRerotation(Knorm(0.5))),
    ],
)
@pytest.mark.parametrize("around", [None, "Compose", "with TurboQuant"])
def test_refused(family: Any, press: Any, around: str | None) -> None:
    presses = press if isinstance(press, list) else [press]
    if around is not None:
        press = Compose([*presses, TurboQuant] if around == "with TurboQuant" else presses)
    elif isinstance(press, (Decoding, list)):
        pytest.skip("kvpress's own classes in contexts of their own do what they always did")
    with pytest.raises(UnsupportedModelError, match=REFUSED):
        kept(family, press)


@pytest.mark.parametrize(
    ("family", "press"),
    [
        (NEIGHBOURS, Knorm(0.5)),
        (SOME_CHANNELS, Knorm(0.5)),
        (ALL_HEADS, KeyRerotation(Knorm(0.5))),  # turns the cache's own keys
        (PLAIN, SNAP),
        (PLAIN, ExpectedAttention(0.5)),
        (PLAIN, KeyRerotation(Knorm(0.5))),
    ],
)
def test_applied_where_it_is_right(family: Any, press: Any) -> None:
    assert kept(family, press).shape[2] == TOKENS // 2


@pytest.mark.parametrize("family", [NEIGHBOURS, ALL_HEADS])
def test_the_model_s_own_weights_need_no_queries(family: Any) -> None:
    assert kept(family, SNAP, "eager").shape[2] == TOKENS // 2
    with pytest.raises(UnsupportedModelError, match=r'loaded with attn_implementation="eager"'):
        kept(family, SNAP)
