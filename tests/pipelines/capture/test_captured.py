"""`captured_decoding` on the CPU: steps without a graph give the same tokens as a growing cache."""

import functools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, GptOssConfig, PreTrainedModel

from quantpress.cache import continue_inputs
from quantpress.codecs.raw import RawPages
from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture import eligibility
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.presses import AdaKV, Compose, PyramidKV, SnapKV, TurboQuant
from tests.cache.caches import lossless, packed_cache, scalar
from tests.pipelines.cases import CONTEXT, DECODING, PACKED, QUESTIONS
from tests.pipelines.words import ours, text
from tests.tiny_models import _COMMON, HEAD_DIM, prompt, tiny_model

CONTEXT_TOKENS = 396  # 4 sinks, 2 pages, 16 recent tokens at least: the next page is full after 8 tokens
NEW_TOKENS = 16
FULL = ["full_attention"] * 3
OTHERS: dict[str, Any] = {
    "gemma2": Gemma2Config(
        **_COMMON,
        head_dim=HEAD_DIM,
        layer_types=FULL,
        query_pre_attn_scalar=HEAD_DIM,
        attn_logit_softcapping=3.0,
    ),
    "gpt_oss": GptOssConfig(
        **_COMMON, head_dim=HEAD_DIM, layer_types=FULL, num_local_experts=2, num_experts_per_tok=1
    ),
}


@functools.cache
def model_of(family: str, attention: str = "sdpa") -> PreTrainedModel:
    if family not in OTHERS:
        return tiny_model(family, attention)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[family], attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter.data, std=2.0)
    model.generation_config.eos_token_id = None
    return model.eval()


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, **arguments: Any
) -> torch.Tensor:
    torch.manual_seed(7)
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **arguments}
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    tokens: torch.Tensor = model.generate(ids, past_key_values=cache, **arguments)
    return tokens


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("llama", 16),
        ("llama", 3),
        ("qwen3", 4),
        ("gemma2", 16),
        ("gemma2", 3),
        ("gpt_oss", 16),
    ],
)
def test_tokens_of_a_growing_cache(family: str, bits: int) -> None:
    model, ids = model_of(family), prompt(CONTEXT_TOKENS)
    settings = lossless(recent_tokens=16) if bits == 16 else scalar(bits=bits, recent_tokens=16)
    expected = generate(model, ids, packed_cache(model, settings))
    cache = packed_cache(model, settings)
    with captured_decoding(model) as steps:
        got = generate(model, ids, cache)
    assert torch.equal(got, expected)
    assert steps.eager_steps == NEW_TOKENS - 1 and steps.replays == steps.captures == 0
    assert all(layer.packed_tokens == 3 * 128 for layer in cache.layers)
    if bits == 16:
        assert torch.equal(got, generate(model, ids, DynamicCache()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=["sampling", "processor", "logits"],
)
def test_generate_around_it_is_untouched(arguments: dict[str, Any]) -> None:
    model, ids = tiny_model("llama"), prompt(CONTEXT_TOKENS, batch=2)
    expected = generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), **arguments)
    with captured_decoding(model, new_tokens=NEW_TOKENS) as steps:
        got = generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), **arguments)
    assert steps.eager_steps == NEW_TOKENS - 1
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert torch.equal(got.sequences, expected.sequences)
        for one, two in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 4},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=["beams", "prompt_lookup", "attention_weights"],
)
@pytest.mark.filterwarnings("ignore:decoding runs without")
def test_other_ways_of_decoding_are_still_right(arguments: dict[str, Any]) -> None:
    model, ids = tiny_model("llama", "eager"), prompt(100).repeat(1, 3)
    arguments = {"eos_token_id": 0, **arguments}
    expected = generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), **arguments)
    with captured_decoding(model):
        got = generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), **arguments)
    assert torch.equal(getattr(got, "sequences", got), getattr(expected, "sequences", expected))


@pytest.mark.parametrize(("bits", "hidden"), [(16, (370, 3)), (3.5, (0, 140))], ids=str)
def test_padded_batches_are_steps(bits: float, hidden: tuple[int, int]) -> None:
    """Padding ends in sinks, in pages or in recent tokens, of which a page is made meanwhile."""
    model, ids = tiny_model("llama"), prompt(CONTEXT_TOKENS, batch=2)
    settings = lossless(recent_tokens=16) if bits == 16 else scalar(bits=bits, recent_tokens=16)
    mask = torch.stack([(torch.arange(CONTEXT_TOKENS) >= count).long() for count in hidden])
    options: dict[str, Any] = {"attention_mask": mask}
    expected = generate(model, ids * mask, packed_cache(model, settings), **options)
    with captured_decoding(model) as steps:
        got = generate(model, ids * mask, packed_cache(model, settings), **options)
        assert torch.equal(got, expected) and steps.eager_steps == NEW_TOKENS - 1
        plain = generate(model, ids, packed_cache(model, settings))
    assert torch.equal(plain, generate(model, ids, packed_cache(model, settings)))
    assert steps.eager_steps == 2 * (NEW_TOKENS - 1)


@pytest.mark.parametrize("way", ["another cache", "sequences change places"])
def test_a_mask_one_token_wider_may_hide_others(way: str) -> None:
    """It is looked at again if it belongs to another cache, or the cache was changed since the last step."""
    model, settings = tiny_model("llama"), lossless(recent_tokens=16)
    masks = [torch.ones(2, tokens, dtype=torch.long) for tokens in (301, 302)]
    masks[1][1, :200] = 0
    if way != "another cache":
        masks[0][0, :200] = 0

    def read(mask: torch.Tensor) -> Any:
        ids, cache = prompt(mask.shape[1] - 1, batch=2), packed_cache(model, settings)
        model(ids * mask[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        return cache

    def step(mask: torch.Tensor, cache: Any) -> torch.Tensor:
        at = mask.sum(-1, keepdim=True) - 1
        found = model(prompt(1, batch=2), attention_mask=mask, position_ids=at, past_key_values=cache)
        logits: torch.Tensor = found.logits
        return logits

    def steps(first: Any, other: Any) -> list[torch.Tensor]:
        before = step(masks[0], first)
        if way != "another cache":
            first.reorder_cache(torch.tensor([1, 0]))
            other = first
        return [before, step(masks[1], other)]

    with torch.inference_mode():
        expected, caches = steps(*map(read, masks)), [*map(read, masks)]
        with captured_decoding(model) as decoding:
            got = steps(*caches)
    assert decoding.eager_steps == 2
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_other_masks_and_padded_plain_layers_are_decoded_as_always() -> None:
    model, ids = tiny_model("llama"), prompt(300, batch=2)
    hole, front = torch.ones_like(ids), torch.ones_like(ids)
    hole[1, 20:40] = front[1, :40] = 0
    settings = lossless(recent_tokens=16)
    for mask, cache in ((hole, lambda: packed_cache(model, settings)), (front, DynamicCache)):
        expected = generate(model, ids, cache(), attention_mask=mask)
        with captured_decoding(model) as steps:
            got = generate(model, ids, cache(), attention_mask=mask)
        assert torch.equal(got, expected) and steps.eager_steps == 0


def test_a_short_context_is_fixed_once_it_is_packed() -> None:
    model, ids = tiny_model("llama"), prompt(120)  # the first page is full after 28 tokens
    expected = generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), max_new_tokens=60)
    with captured_decoding(model) as steps:
        got = generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), max_new_tokens=60)
    assert torch.equal(got, expected)
    assert 20 < steps.eager_steps < 40


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_compiles_as_one_graph(
    family: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """torch.compile(fullgraph=True) compiles the whole step, once for all caches of a shape."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    request.addfinalizer(torch._dynamo.reset)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, settings = model_of(family), scalar(bits=3, recent_tokens=16)
    for seed in (0, 1):
        ids = prompt(CONTEXT_TOKENS, seed=seed)
        expected = generate(model, ids, packed_cache(model, settings))
        with captured_decoding(model, compile=True) as steps:
            assert torch.equal(generate(model, ids, packed_cache(model, settings)), expected)
        assert steps.eager_steps == NEW_TOKENS - 1
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


PRESSES: dict[str, Any] = {
    "turboquant": lambda: TurboQuant(bits=3, recent_tokens=16),
    "snapkv": lambda: Compose([SnapKV(0.4, window_size=16), TurboQuant(bits=4, recent_tokens=16)]),
    "pyramidkv": lambda: Compose([PyramidKV(0.4, window_size=16), TurboQuant(bits=4, recent_tokens=16)]),
    "adakv": lambda: Compose([AdaKV(SnapKV(0.4, window_size=16)), TurboQuant(bits=4, recent_tokens=16)]),
    "lossless": lambda: Compose(
        [SnapKV(0.4, window_size=16), TurboQuant(codec=lambda dim, *_: RawPages(dim))]
    ),
}


def read(model: PreTrainedModel, press: Any, tokens: int = 660) -> DynamicCache:
    """With 0.4 evicted, 396 of 660 tokens are kept: the next page is full 8 tokens later."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=prompt(tokens), past_key_values=cache)
    return cache


@pytest.mark.parametrize("press", PRESSES)
def test_after_eviction(press: str) -> None:
    model, question = tiny_model("llama"), prompt(7, seed=3)
    outputs = []
    for captured in (False, True):
        cache = read(model, PRESSES[press]())
        inputs = continue_inputs(cache, question)
        if captured:
            with captured_decoding(model) as steps:
                outputs.append(generate(model, cache=cache, ids=inputs.pop("input_ids"), **inputs))
            assert steps.eager_steps == NEW_TOKENS - 1
        else:
            outputs.append(generate(model, cache=cache, ids=inputs.pop("input_ids"), **inputs))
    assert torch.equal(*outputs)


def test_a_loop_of_ones_own() -> None:
    """Plain forwards over one token, without positions."""
    model, ids = tiny_model("llama"), prompt(CONTEXT_TOKENS + 1)

    def run() -> torch.Tensor:
        cache = packed_cache(model, scalar(recent_tokens=16))
        with torch.inference_mode():
            token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            said = [token]
            for _ in range(NEW_TOKENS):
                said.append(model(said[-1], past_key_values=cache, logits_to_keep=1).logits.argmax(-1))
        return torch.cat(said, 1)

    expected = run()
    with captured_decoding(model) as steps:
        assert torch.equal(run(), expected)
    assert steps.eager_steps == NEW_TOKENS


def test_the_model_is_restored_also_after_an_exception() -> None:
    model, ids = tiny_model("llama"), prompt(300)
    cache = packed_cache(model, lossless(recent_tokens=16))

    class StopError(Exception):
        pass

    def stop(number: int, scores: torch.Tensor) -> torch.Tensor:
        if number.shape[1] == 310:
            raise StopError
        return scores

    with pytest.raises(StopError), captured_decoding(model):
        assert "forward" in vars(model)
        generate(model, ids, cache, logits_processor=[stop])
    assert "forward" not in vars(model)
    assert all(layer.fixed is None for layer in cache.layers) and cache.get_seq_length() == 310


def test_an_exception_in_a_step_leaves_a_growing_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), prompt(300)
    cache, token = packed_cache(model, lossless(recent_tokens=16)), prompt(1, seed=2)
    with torch.no_grad(), captured_decoding(model) as steps:
        model(ids, past_key_values=cache)
        model(token, past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(token, past_key_values=cache)
        assert all(layer.fixed is None for layer in cache.layers)
        lengths = [layer.get_seq_length() for layer in cache.layers]
        assert lengths == [302, 302, 301]  # as in a growing cache: layers before the error have the token
    assert steps.eager_steps == 2


def test_warnings_name_the_reason() -> None:
    model, ids = tiny_model("llama"), prompt(300)

    def hook(*_: Any) -> None:
        return None

    handle = model.model.layers[1].self_attn.register_forward_hook(hook)
    try:
        with (
            captured_decoding(model),
            pytest.warns(UserWarning, match="layers.1.self_attn has a forward hook") as seen,
        ):
            generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), max_new_tokens=10)
        assert len([one for one in seen if one.category is UserWarning]) == 1
    finally:
        handle.remove()
    with captured_decoding(model), pytest.warns(UserWarning, match="beam search"):
        generate(model, ids, packed_cache(model, lossless(recent_tokens=16)), max_new_tokens=10, num_beams=2)
    bloom = tiny_model("bloom", "eager")
    with captured_decoding(bloom), pytest.warns(UserWarning, match="does not call attention through"):
        generate(bloom, ids, DynamicCache(), max_new_tokens=5)


def test_wrong_arguments() -> None:
    with (
        pytest.raises(InvalidInputError, match="cuda_graph=True, but the model is on cpu"),
        captured_decoding(tiny_model("llama"), cuda_graph=True),
    ):
        pass
    with (
        pytest.raises(InvalidInputError, match="new_tokens is -1"),
        captured_decoding(tiny_model("llama"), new_tokens=-1),
    ):
        pass


@pytest.mark.parametrize("name", ["evict_and_pack", "unequal_and_packed"])
def test_several_questions_of_the_pipeline(name: str) -> None:
    """Every answer is that of a growing cache, and leaves the context unchanged."""
    questions = QUESTIONS[:2]
    pipe, arguments = ours(), {"questions": questions, "press": PACKED[name](), "max_new_tokens": 40}
    context = text(999)  # whole or halved, a page becomes full within an answer
    expected = pipe(context, **arguments)
    cache = DynamicCache()
    with captured_decoding(pipe.model, new_tokens=200) as steps:
        assert pipe(context, cache=cache, **arguments) == expected
    assert steps.eager_steps == len(questions) * 39
    plain = DynamicCache()
    pipe(context, cache=plain, **{**arguments, "max_new_tokens": 1})
    for one, two in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(one.keys + 0, two.keys + 0) and torch.equal(one.values + 0, two.values + 0)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule about the device does not apply."""
    monkeypatch.setitem(eligibility.RULES, "device", ())


@pytest.mark.usefixtures("on_cuda")
def test_the_pipeline_hands_compile_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile is called once for all questions, with the model's own forward, and its result runs."""
    asked: list[dict[str, Any]] = []
    ran: list[int] = []

    def compiled(forward: Any, **options: Any) -> Any:
        asked.append(options)

        def step(**arguments: Any) -> Any:
            ran.append(arguments["input_ids"].shape[1])
            return forward(**arguments)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    pipe, arguments = (
        ours(),
        {"questions": QUESTIONS[:2], "press": PACKED["turboquant"](), "max_new_tokens": 9},
    )
    expected = pipe(text(900), **arguments)
    assert not asked
    assert pipe(text(900), compile=True, **arguments) == expected
    assert asked == [{"fullgraph": True, "dynamic": False}]
    assert ran == [1] * 2 * 8


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "compile=True, but the model is on cpu; leave compile out"),
        ({"cuda_graph": False}, "compile=True, but cuda_graph=False"),
        ({"cuda_graph": True}, "cuda_graph=True, but the model is on cpu"),
        ({"compile": "reduce-overhead"}, "compile is 'reduce-overhead'"),
    ],
    ids=str,
)
def test_what_rules_compile_out_is_named(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        ours()(CONTEXT, question="w1", press=TurboQuant, **{"compile": True, **arguments})


@pytest.mark.parametrize("asked", ["cuda_graph", "compile"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_beams": 2}, "beams reorder"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"press": DECODING["decoding"]()}, "DecodingPress acts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.usefixtures("on_cuda")
def test_what_rules_a_graph_out_is_named(arguments: dict[str, Any], reason: str, asked: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{asked}=True, but {reason}.*; leave {asked} out"):
        ours()(CONTEXT, question="w1", **{"press": TurboQuant, asked: True, **arguments})
