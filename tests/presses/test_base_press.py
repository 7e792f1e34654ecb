"""Our own base of a press: kvpress's presses meet it, and a press can be written without kvpress."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress import presses
from quantpress.cache import host
from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses import BasePress, Compose, Knorm, ScorerPress, TurboQuant, names
from tests.forked import run_forked
from tests.tiny_models import prompt, tiny_model
from tests.versions import kvpress_names

THEIRS = [getattr(kvpress, name) for name in kvpress.__all__ if isinstance(getattr(kvpress, name), type)]


@pytest.mark.parametrize("theirs", THEIRS, ids=lambda one: one.__name__)
def test_classes_of_kvpress_count_as_they_do_there(theirs: type) -> None:
    assert issubclass(theirs, BasePress) == issubclass(theirs, kvpress.BasePress)
    assert issubclass(theirs, ScorerPress) == issubclass(theirs, kvpress.ScorerPress)


def test_what_is_no_press() -> None:
    for other in (object(), "SnapKV", TurboQuant, torch.nn.Linear(1, 1)):
        assert not isinstance(other, BasePress)
    assert isinstance(TurboQuant(), BasePress) and not isinstance(TurboQuant(), ScorerPress)
    assert issubclass(Compose, BasePress) and not issubclass(presses.SnapKV, TurboQuant)


def test_the_names_of_kvpress_s_presses_are_all_there() -> None:
    assert {*presses.OF_KVPRESS} == {*names.__all__} - {"Compose", "Demote", "TurboQuant"}


@dataclass
class Norms(ScorerPress):
    """kvpress's KnormPress, by our base."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):  # type: ignore[no-untyped-def]
        return -keys.norm(dim=-1)


def kept(press: object) -> list[torch.Tensor]:
    model, cache = tiny_model("llama"), DynamicCache()
    with torch.no_grad(), kvpress_names(model, press), press(model):  # type: ignore[operator]
        model.model(input_ids=prompt(90), past_key_values=cache)
    return [layer.keys.sort(dim=2).values for layer in cache.layers]


def test_a_scorer_keeps_what_kvpress_keeps() -> None:
    for ours, theirs in zip(kept(Norms(0.4)), kept(kvpress.KnormPress(0.4)), strict=True):
        assert ours.shape[2] == 54 and torch.equal(ours, theirs)
    assert kept(Norms(0.0))[0].shape[2] == 90


def test_a_press_of_one_s_own_stacks() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    with torch.no_grad(), Compose([Norms(0.5), TurboQuant])(model):
        model.model(input_ids=prompt(900), past_key_values=cache)
    assert all(layer.packed_tokens for layer in cache.layers)
    assert cache.get_seq_length() == 450


def test_the_quantizer_behind_a_bar_may_be_a_class() -> None:
    """Behind a press of kvpress's own, too; two classes stay Python's union."""
    for made in (kvpress.KnormPress(0.4) | TurboQuant, kvpress.KnormPress(0.4) | TurboQuant()):
        assert repr(made) == "Compose(KnormPress(0.4) | TurboQuant(4))"
    assert isinstance(Knorm | TurboQuant, UnionType) and isinstance(None | TurboQuant, UnionType)
    with pytest.raises(TypeError, match="unsupported operand"):
        4 | TurboQuant  # type: ignore[operator]


def test_what_is_missing_is_named() -> None:
    for ratio in (1.5, "half", True):
        with pytest.raises(
            InvalidInputError, match=f"Norms: compression_ratio is {ratio!r}; give the fraction"
        ):
            Norms(ratio)  # type: ignore[arg-type]
    for base, missing in ((BasePress, "compress"), (ScorerPress, "score")):
        incomplete = type("Empty", (base,), {})
        with pytest.raises(CompositionError, match=f"Empty has no {missing} of its own"):
            Compose([incomplete(), TurboQuant])
        with pytest.raises(NotImplementedError, match=f"Empty has no {missing} of its own"):
            getattr(incomplete(), missing)(*[None] * 6)


WITHOUT_KVPRESS = """
import importlib.abc, sys, warnings
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kvpress":
            raise ModuleNotFoundError("No module named 'kvpress'", name="kvpress")
sys.meta_path.insert(0, Hidden())
import torch, quantpress
from quantpress import CachedContext, Compose, PagedAttention, TurboQuant, disable, enable, patch_attention
from quantpress.presses.expression import parse_press
from transformers import DynamicCache, pipeline
from tests.pipelines.words import word_tokenizer
from tests.tiny_models import prompt, tiny_model
model = tiny_model("llama")
pipe = pipeline("kv-press-text-generation", model=model, tokenizer=word_tokenizer(), press=TurboQuant(bits=4))
text = "w1 w2 w3 " * 150
context = pipe.read(text, press="TurboQuant(bits=4)")
context.save(FILE)
again = CachedContext.load(FILE, model)
answers = {pipe(one, question="w2", max_new_tokens=3)["answer"] for one in (text, context, again)}
assert len(answers) == 1, answers
for compress in (enable, patch_attention):
    with compress(model, 4):
        assert model.generate(prompt(400), max_new_tokens=2).shape[1] == 402
cache = DynamicCache()
with torch.no_grad(), Compose([TurboQuant])(model):
    model.model(input_ids=prompt(400), past_key_values=cache)
assert all(layer.packed_tokens for layer in cache.layers)
for use in (lambda: quantpress.SnapKV, lambda: parse_press("SnapKV | TurboQuant"), quantpress.Demote):
    try:
        use()
        print("no error")
    except ImportError as error:
        print(error)
try:
    from quantpress import SnapKV
except quantpress.QuantPressError as error:
    print(error)
print(sorted(name for name in sys.modules if name.startswith("kvpress")))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_the_core_needs_no_kvpress(tmp_path: Path) -> None:
    done = run_forked(WITHOUT_KVPRESS.replace("FILE", repr(str(tmp_path / "text.safetensors"))))
    assert done.returncode == 0, done.stderr
    *errors, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert len(errors) == 4 and len(set(errors)) == 1
    expected = "SnapKV needs kvpress, which cannot be imported (No module named 'kvpress'); pip install "
    assert errors[0].startswith(f'{expected}".[kvpress]" in a checkout of quantpress')
    assert ("docs/versions.md" in errors[0]) != host.CALLS_TAKE_PLACES


KVPRESS_LATER = """
import torch
from quantpress import Compose, TurboQuant
from transformers import DynamicCache
from tests.tiny_models import prompt, tiny_model
def packed(press):
    model, cache = tiny_model("llama"), DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=prompt(400), past_key_values=cache)
    return model, cache
held = packed(TurboQuant())  # our attention is in place from here on
import kvpress
model, cache = packed(Compose([kvpress.AdaKVPress(kvpress.KnormPress(0.5)), TurboQuant()]))
step = model(prompt(401)[:, -3:], past_key_values=cache).logits
plain, hidden = packed(Compose([kvpress.AdaKVPress(kvpress.KnormPress(0.5))]))
masked = plain(prompt(401)[:, -3:], past_key_values=hidden).logits
whole, all_of_it = packed(Compose([kvpress.KnormPress(0.0)]))
full = whole(prompt(401)[:, -3:], past_key_values=all_of_it).logits
print(bool((step - masked).norm() < 0.5 * (step - full).norm()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_kvpress_may_come_after_our_attention() -> None:
    done = run_forked(KVPRESS_LATER)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
