"""Which pieces of a step are joined, and that nothing is left of it. The kernels are their references."""

import copy
import itertools
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.joined import pieces
from quantpress.pipelines.joined.piece import MANY_ROWS
from quantpress.pipelines.joined.seams import Named, replaced_here
from quantpress.pipelines.joined.step import JoinedStep, joined_reading
from quantpress.pipelines.reading.read_context import read_context
from tests.pipelines.joined.steps import LAYERS, joined, step
from tests.pipelines.words import ours, text
from tests.tiny_models import prompt, tiny_model

BOTH = {"norms": 2 * LAYERS + 1, "activations": LAYERS, "rotary positions": 1}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", BOTH),
        ("qwen2", BOTH),
        ("qwen3", {**BOTH, "norms": 4 * LAYERS + 1}),
        ("gemma3", {"norms": 6 * LAYERS + 1, "rotary positions": 1}),  # its gate is no SiLU
        ("phi3", BOTH),  # one projection for gate and up
        ("gpt_oss", {"norms": 2 * LAYERS + 1}),  # experts; positions rotated otherwise
        ("gpt2", {}),
    ],
)
def test_what_is_joined(family: str, expected: dict[str, int], launched: list[str]) -> None:
    model = tiny_model(family, "eager" if family == "gpt_oss" else "sdpa")
    logits, found = joined(model)
    assert torch.equal(logits, step(model))
    assert found == expected
    launched.clear()
    step(model, JoinedStep(model, model.forward).joining())
    per_step = {"rms_norm": expected.get("norms", 0), "silu_product": expected.get("activations", 0)}
    assert {name: launched.count(name) for name in per_step} == per_step
    assert launched.count("rotary") == (LAYERS if "rotary positions" in expected else 0)


@pytest.mark.parametrize("name", ["rms_norm", "rotary", "silu_product"])
def test_a_kernel_that_differs_in_one_bit_is_not_used(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = getattr(pieces, name)

    def off_by_a_bit(*args: Any) -> Any:
        output = kernel(*args)
        first = output[0] if name == "rotary" else output
        first.view(torch.int32).view(-1)[0] ^= 1
        return output

    monkeypatch.setattr(pieces, name, off_by_a_bit)
    model = tiny_model("llama")
    logits, found = joined(model)
    kind = {"rms_norm": "norms", "rotary": "rotary positions", "silu_product": "activations"}[name]
    assert found == {other: count for other, count in BOTH.items() if other != kind}
    assert torch.equal(logits, step(model))


def test_a_norm_that_differs_in_few_rows_is_not_used(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that adds in another order."""
    kernel, calls = pieces.rms_norm, itertools.count(1)

    def seldom_off(*args: Any) -> Any:
        output = kernel(*args)
        output.view(torch.int32).view(-1)[0] ^= next(calls) % 50 == 0
        return output

    monkeypatch.setattr(pieces, "rms_norm", seldom_off)
    assert "norms" not in joined(tiny_model("llama"))[1]


def test_a_kernel_that_fails_is_not_used(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "rms_norm", lambda *args: 1 / 0)
    assert "norms" not in joined(tiny_model("llama"))[1]


def test_modules_that_were_changed_stay_as_they_are(launched: list[str]) -> None:
    model = tiny_model("llama")
    layer: Any = model.model.layers[0]
    hook = layer.input_layernorm.register_forward_hook(lambda *args: None)
    layer.mlp.forward = layer.mlp.forward
    try:
        joins = JoinedStep(model, model.forward)
        step(model, joins.watching())
        step(model, joins.joining())
        assert joins.joined == {**BOTH, "norms": BOTH["norms"] - 1, "activations": LAYERS - 1}
        assert "forward" in vars(layer.mlp)
    finally:
        hook.remove()
        del layer.mlp.forward


def test_autocast_and_compiled_modules_are_left_alone(launched: list[str]) -> None:
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert joined(model)[1] == {}

    def compiled(*args: Any) -> None: ...

    vars(compiled)["_torchdynamo_orig_callable"] = model.forward  # as torch.compile does
    joins = JoinedStep(model, compiled)
    with joins.joining():
        pass
    assert joins.joined == {} and launched == []


def test_nothing_is_left_after_an_error(launched: list[str]) -> None:
    model, own = tiny_model("llama"), modeling_llama.apply_rotary_pos_emb
    joined(model)
    with pytest.raises(ZeroDivisionError), JoinedStep(model, model.forward).joining():
        assert modeling_llama.apply_rotary_pos_emb is not own
        raise ZeroDivisionError
    assert modeling_llama.apply_rotary_pos_emb is own
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_other_threads_call_the_function_itself() -> None:
    """The first thread to replace it is not the last to put it back."""
    norm = nn.Linear(2, 2)
    named = Named(vars(norm), "forward", norm.forward)
    first_left, second_came = threading.Event(), threading.Event()
    calls: list[str] = []

    def run(name: str, x: Any) -> str:
        with replaced_here([(named, lambda own, x: name)]):
            if name == "second":
                second_came.set()
                first_left.wait(10)
            return str(norm(x))

    with torch.no_grad():
        second = threading.Thread(target=lambda: calls.append(run("second", torch.ones(2))))
        with replaced_here([(named, lambda own, x: "first")]):
            second.start()
            second_came.wait(10)
            other = threading.Thread(target=lambda: calls.append(str(type(norm(torch.ones(2))).__name__)))
            other.start()
            other.join()
            calls.append(str(norm(torch.ones(2))))
        assert torch.is_tensor(norm(torch.ones(2)))
        first_left.set()
        second.join()
    assert calls == ["Tensor", "first", "second"] and "forward" not in vars(norm)


def test_a_name_that_was_replaced_meanwhile_stays() -> None:
    namespace: dict[str, Any] = {"f": abs}
    with replaced_here([(Named(namespace, "f", abs), lambda own, x: 7)]):
        assert namespace["f"](-3) == 7
        namespace["f"] = len
    assert namespace["f"] is len


def test_wrong_choice() -> None:
    wrong: Any = "no"
    with (
        pytest.raises(InvalidInputError, match="join_kernels is 'no'"),
        captured_decoding(tiny_model("llama"), join_kernels=wrong),
    ):
        pass


def read(model: Any, tokens: int, batch: int = 1, inside: AbstractContextManager[None] | None = None) -> Any:
    with torch.no_grad(), inside or nullcontext():
        return model(prompt(tokens, batch=batch), past_key_values=DynamicCache()).logits


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", BOTH),
        ("qwen3", {**BOTH, "norms": 4 * LAYERS + 1}),
        ("phi3", {**BOTH, "rotary positions": 0}),  # lie otherwise in memory
        ("gpt2", {}),
    ],
)
def test_a_reading_is_joined_once_it_is_proven(
    family: str, expected: dict[str, int], launched: list[str]
) -> None:
    """The first reading proves; later ones of other lengths need no proof. Few tokens are left alone."""
    model = tiny_model(family)
    right = [read(model, tokens) for tokens in (600, 700)]
    assert torch.equal(read(model, 600, inside=joined_reading(model)), right[0])
    launched.clear()
    assert torch.equal(read(model, 700, inside=joined_reading(model)), right[1])
    calls = {"rms_norm": expected.get("norms", 0), "silu_product": expected.get("activations", 0)}
    calls["rotary"] = LAYERS * expected.get("rotary positions", 0)
    assert {name: launched.count(name) for name in calls} == calls
    assert sum(calls.values()) == len(launched)
    launched.clear()
    read(model, MANY_ROWS - 1, inside=joined_reading(model))
    assert launched == ["rms_norm"] * (2 * LAYERS if family == "qwen3" else 0)  # heads are rows of these
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_a_reading_in_chunks_is_joined(launched: list[str]) -> None:
    model, caches = tiny_model("llama"), [DynamicCache() for _ in range(3)]
    for cache, join in zip(caches, (False, True, True), strict=True):
        launched.clear()
        with torch.no_grad():
            read_context(model, prompt(1800), cache, chunk_tokens=600, progress=False, join_kernels=join)
        for layer, plain in zip(cache.layers, caches[0].layers, strict=True):
            assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)
    assert launched.count("rms_norm") == 3 * (3 * LAYERS + 1)  # before attention twice: `layer_in_chunks`
    assert launched.count("rotary") == LAYERS


@pytest.mark.parametrize("name", ["rms_norm", "rotary", "silu_product"])
def test_a_kernel_that_differs_in_one_bit_of_a_reading_is_not_used(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = getattr(pieces, name)

    def off_by_a_bit(*args: Any) -> Any:
        output = kernel(*args)
        last = output[1] if name == "rotary" else output
        end = last[(-1,) * last.dim()]
        end.copy_(torch.nextafter(end, torch.full_like(end, 9.0)))
        return output

    monkeypatch.setattr(pieces, name, off_by_a_bit)
    model = tiny_model("llama")
    right = read(model, 600)
    for _ in range(2):
        launched.clear()
        assert torch.equal(read(model, 600, inside=joined_reading(model)), right)
    assert name not in launched and launched


def test_a_reading_with_gradients_is_left_alone(launched: list[str]) -> None:
    model = tiny_model("llama")
    with joined_reading(model):
        model(prompt(600))
    assert launched == []


def test_the_pipeline_joins_its_reading_unless_told_not_to(launched: list[str]) -> None:
    pipe, context = ours(), text(700)
    answers = []
    for join in (True, True, "exact", False):
        launched.clear()
        answers.append(pipe(context, question="w1 w2", max_new_tokens=3, join_kernels=join)["answer"])
        assert bool(launched) == bool(join)
    assert len(set(answers)) == 1


def test_a_gate_that_clamps_is_not_joined(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the first context does not show."""
    model = tiny_model("llama")

    def clamps(self: Any, x: Any) -> Any:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=7.0)
        return self.down_proj(gate * self.up_proj(x).clamp(-7.0, 7.0))

    kind = type("Clamping", (type(model.model.layers[0].mlp),), {"forward": clamps})
    for layer in model.model.layers:
        other = copy.copy(layer.mlp)
        other.__class__ = kind
        monkeypatch.setitem(layer._modules, "mlp", other)
    for _ in range(2):
        launched.clear()
        assert torch.equal(read(model, 600, inside=joined_reading(model)), read(model, 600))
    assert "silu_product" not in launched and "rms_norm" in launched


def test_a_proof_ends_with_the_code_that_it_was_for(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook on the activation; another forward of its class, or of the norms'."""
    model = tiny_model("llama")
    read(model, 600, inside=joined_reading(model))
    act = model.model.layers[0].mlp.act_fn
    hook = act.register_forward_hook(lambda module, args, output: output * 2)
    try:
        assert torch.equal(read(model, 600, inside=joined_reading(model)), read(model, 600))
    finally:
        hook.remove()
    for kind in (type(act), type(model.model.norm)):
        own = kind.forward

        def doubled(self: Any, x: Any, own: Any = own) -> Any:
            return own(self, x) * 2

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", doubled)
            assert torch.equal(read(model, 600, inside=joined_reading(model)), read(model, 600))
    launched.clear()
    read(model, 600, inside=joined_reading(model))
    assert launched.count("silu_product") == LAYERS, "the first proof still holds"


def test_proofs_of_a_reading_are_none_of_a_step(launched: list[str]) -> None:
    model = tiny_model("llama")
    read(model, 600, inside=joined_reading(model))
    joins = JoinedStep(model, model.forward)
    with joins.joining():
        pass
    assert joins.joined == {}


def test_a_reading_that_cannot_be_joined_is_left_alone(launched: list[str]) -> None:
    """Under autocast; of a model with a compiled part; of a compiled forward, behind captured steps too."""
    model = tiny_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        read(model, 600, inside=joined_reading(model))
    whole = model.model
    model.model = torch.compile(whole, backend="eager")
    try:
        with torch.no_grad(), joined_reading(model):
            assert "forward" not in vars(whole.norm)
    finally:
        model.model = whole

    def compiled(*args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs)

    vars(compiled)["_torchdynamo_orig_callable"] = model.forward
    model.forward = compiled
    try:
        with captured_decoding(model):
            read(model, 600)
            read(model, 600, inside=joined_reading(model))
    finally:
        del model.forward
    assert launched == []


@pytest.mark.parametrize(("join", "joined"), [(True, True), ("exact", True), (False, False)])
def test_prompts_of_captured_decoding_are_joined(join: Any, joined: bool, launched: list[str]) -> None:
    """With a graph, or without one as here."""
    model = tiny_model("llama")
    right = read(model, 600)
    with captured_decoding(model, join_kernels=join):
        for _ in range(2):
            launched.clear()
            assert torch.equal(read(model, 600), right)
        assert bool(launched) == joined
        launched.clear()
        read(model, MANY_ROWS - 1)
    assert launched == []
