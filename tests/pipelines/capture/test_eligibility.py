"""Every rule about decode steps gives its reason, and gives it alone."""

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import GenerationMode

from quantpress.cache import PackedLayer
from quantpress.cache.text_cache import TextCache
from quantpress.cache.tokens.evicted_slots import MASKS
from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture.eligibility import MOST_CHANGES, RULES, check_choice, refuse, why_not
from quantpress.presses import Decoding, KeyRerotation, Knorm, StreamingLLM, TurboQuant
from tests.cache.caches import lossless
from tests.presses.test_ranks import shared
from tests.tiny_models import prompt, tiny_model


def model_with(change: Callable[[Any], object]) -> PreTrainedModel:
    model = copy.deepcopy(tiny_model("llama"))
    change(model)
    return model


def cache_with(change: Callable[[Any], object], kind: type[DynamicCache] = DynamicCache) -> DynamicCache:
    """A cache of one plain layer with tokens."""
    cache = kind()
    cache.update(torch.zeros(1, 2, 5, 32), torch.zeros(1, 2, 5, 32), 0)
    change(cache)
    return cache


def short_cache() -> DynamicCache:
    layer = PackedLayer(lossless())
    layer.update(torch.zeros(1, 2, 5, 32), torch.zeros(1, 2, 5, 32))
    return cache_with(lambda cache: cache.layers.append(layer))


def uneven_cache() -> DynamicCache:
    keys, hidden = torch.zeros(1, 2, 300, 32), torch.zeros(1, 2, 300, dtype=torch.bool)
    hidden[:, 0, 50:60] = True
    layer = PackedLayer.from_states(keys, keys, lossless(), hidden=hidden)
    return cache_with(lambda cache: cache.layers.append(layer))


@pytest.fixture(autouse=True)
def talk_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_backend", lambda group: "gloo")


def masked(model: Any) -> None:
    setattr(model.model.layers[1].self_attn, MASKS, [torch.zeros(1, dtype=torch.int64)] * 3)


CASES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "the model is on {device}": ("device", lambda: torch.device("cpu"), "the model is on cpu"),
    "{press} acts": ("press", lambda: Decoding(Knorm()), "DecodingPress acts during decoding"),
    "beams": ("mode", lambda: GenerationMode.BEAM_SAMPLE, "beams reorder the cache between tokens"),
    "assisted": (
        "mode",
        lambda: GenerationMode.ASSISTED_GENERATION,
        "assisted decoding checks several tokens at once",
    ),
    "{mode}": (
        "mode",
        lambda: GenerationMode.CONTRASTIVE_SEARCH,
        "contrastive_search does not decode one token after the other",
    ),
    "the model is spread": (
        "model",
        lambda: model_with(lambda model: setattr(model, "hf_device_map", {"model": 0, "lm_head": 1})),
        "the model is spread over several devices, or offloaded",
    ),
    "processes share the model": (
        "model",
        lambda: shared(2),
        "processes share the model (tp_plan) over gloo, and a graph holds collectives of NCCL only",
    ),
    "heads keep different": (
        "shared",
        lambda: (shared(2), uneven_cache()),
        "heads keep different numbers of tokens, and processes that share the model would capture different "
        "steps",
    ),
    "the model is in training": (
        "model",
        lambda: model_with(lambda model: model.train()),
        "the model is in training mode",
    ),
    "{what keeps attention": (
        "model",
        lambda: tiny_model("bloom", "eager"),
        "BloomAttention does not call attention through transformers' ALL_ATTENTION_FUNCTIONS",
    ),
    "attention looks back": (
        "model",
        lambda: model_with(lambda model: setattr(model.config, "layer_types", ["chunked_attention"] * 3)),
        "attention looks back over chunks",
    ),
    "{module} has a forward hook": (
        "model",
        lambda: model_with(lambda model: model.model.layers[1].mlp.register_forward_hook(print)),
        "model.layers.1.mlp has a forward hook, which a replay would not run",
    ),
    "config.{option} asks for tensors": (
        "model",
        lambda: model_with(lambda model: setattr(model.config, "output_hidden_states", True)),
        "config.output_hidden_states asks for tensors of every layer",
    ),
    "a head-wise press masks tokens in": (
        "model",
        lambda: model_with(masked),
        "a head-wise press masks tokens instead of removing them",
    ),
    "the cache has no layers": ("cache", DynamicCache, "the cache has no layers"),
    "the cache is offloaded": (
        "cache",
        lambda: cache_with(lambda cache: setattr(cache, "offloading", True)),
        "the cache is offloaded",
    ),
    "a head-wise press masks tokens of": (
        "cache",
        lambda: cache_with(lambda cache: cache.masked.update({0: "slots"}), TextCache),
        "a head-wise press masks tokens of the cache instead of removing them",
    ),
    "layers {layers}": (
        "cache",
        lambda: cache_with(lambda cache: cache.layers.extend(StaticLayer(9) for _ in range(10))),
        "layers 1, 2, 3, 4, 5, 6, 7, 8, ... of the cache are StaticLayers",
    ),
    "layer {layer} of the cache has too few": (
        "cache",
        short_cache,
        "layer 1 of the cache has too few tokens to pack any",
    ),
    "layer {layer} of the cache has no": (
        "cache",
        lambda: DynamicCache(config=tiny_model("llama").config),
        "layer 0 of the cache has no tokens",
    ),
    "the cache is changed": (
        "changes",
        lambda: MOST_CHANGES,
        "the cache is changed between tokens, as beam search does",
    ),
    "the model is enabled with {press}": (
        "compiled_under",
        lambda: KeyRerotation(StreamingLLM(0.5)),
        "the model is enabled with KeyRerotation(press=StreamingLLM(compression_ratio=0.5, n_sink=4)), which "
        "numbers positions anew, and a compiled step would not see them (call disable(model) and read under "
        "the press instead)",
    ),
    "the attention mask": (
        "mask",
        lambda: torch.tensor([[1, 0, 1]]),
        "the attention mask hides more than padding on the left",
    ),
    "the batch is padded": (
        "padded",
        lambda: (torch.tensor([[0, 1, 1]]), cache_with(lambda _: None)),
        "the batch is padded, and layer 0 of the cache is not packed, was evicted from, or holds demoted "
        "tokens",
    ),
    "gradients": ("gradients", lambda: True, "gradients are recorded"),
    "another thread's call": ("others_sample", lambda: True, "another thread's call of generate samples"),
}
"""By the beginning of a rule's message: the argument it looks at, a value that breaks it, and the reason."""

ALLOWED: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("cuda"),
    "press": TurboQuant,
    "mode": lambda: GenerationMode.SAMPLE,
    "model": lambda: tiny_model("llama"),
    "cache": lambda: cache_with(lambda _: None),
    "changes": lambda: MOST_CHANGES - 1,
    "compiled_under": TurboQuant,
    "shared": lambda: (tiny_model("llama"), uneven_cache()),
    "mask": lambda: torch.tensor([[0, 1, 1], [1, 1, 1]]),
    "padded": lambda: (torch.tensor([[0, 1, 1, 1, 1, 1]]), DynamicCache()),
    "gradients": lambda: False,
    "others_sample": lambda: False,
}


@pytest.mark.parametrize(
    ("name", "message", "lasting"),
    [(name, rule.message, rule.lasting) for name, rules in RULES.items() for rule in rules],
    ids=[rule.message[:40] for rules in RULES.values() for rule in rules],
)
def test_every_rule_gives_its_reason(name: str, message: str, lasting: bool) -> None:
    (case,) = [case for beginning, case in CASES.items() if message.startswith(beginning)]
    argument, value, reason = case
    given = {argument: value()}
    assert argument == name
    assert why_not(**given) == [reason]
    assert why_not(**given, lasting=True) == [reason] * lasting


@pytest.mark.parametrize("name", RULES)
def test_what_breaks_no_rule_has_no_reason(name: str) -> None:
    assert why_not(**{name: ALLOWED[name]()}) == []


def test_all_reasons_are_given_and_what_is_not_known_is_not_judged() -> None:
    assert why_not() == []
    given: dict[str, Any] = {"device": torch.device("cpu"), "mode": GenerationMode.BEAM_SEARCH}
    model = shared(2).train()
    reasons = why_not(**given, model=model)
    assert len(reasons) == 4
    with pytest.raises(
        InvalidInputError, match=re.escape(f"compile=True, but {', and '.join(reasons)}; leave compile out")
    ):
        refuse(reasons, None, compile=True)
    refuse(reasons, None)
    refuse([], True, True)


@pytest.mark.parametrize("choice", [(1, False), (None, 1), ("auto", True)])
def test_a_choice_is_true_false_or_none(choice: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"(cuda_graph|compile) is"):
        check_choice(*choice)


def test_hooks_of_ours_do_not_count() -> None:
    ours = SimpleNamespace(__module__="quantpress.presses.guard")
    model = model_with(lambda model: model.model.layers[0].register_forward_hook(ours))
    assert why_not(model=model) == []


def test_collectives_over_nccl_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = pytest.importorskip("transformers.integrations.tensor_parallel")
    monkeypatch.setattr("torch.distributed.get_backend", lambda group: "nccl")
    model = shared(2)
    assert not why_not(model=model) and not why_not(shared=(model, cache_with(lambda _: None)))
    if hasattr(parallel, "distribute_module"):  # transformers 5.2
        parallel.distribute_module(
            model.model.layers[0].mlp.down_proj, None, lambda *_: None, lambda *_: None
        )
        assert not why_not(model=model)


def test_hooks_that_transformers_leaves_are_idle() -> None:
    """It puts them on a model for good when hidden states are asked for the first time."""
    model = model_with(lambda model: model(prompt(5), output_hidden_states=True))
    assert any(module._forward_hooks for module in model.modules()) and not why_not(model=model)
