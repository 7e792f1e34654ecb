"""On a CUDA device a captured decode step gives the tokens of the same step without a graph."""

import contextlib
import copy
import functools
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from quantpress.cache import WidthPlan, continue_inputs
from quantpress.codecs.raw import RawPages
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.capture.captured_steps import WARM_STEPS, CapturedDecoding
from quantpress.pipelines.enabling.enable import enable
from quantpress.presses import AdaKV, Compose, Demote, PyramidKV, SnapKV, TurboQuant
from tests.gpu.gpu_state import no_synchronization
from tests.pipelines.enabling.enabled import noted_steps
from tests.pipelines.words import ours, text
from tests.tiny_models import VOCABULARY, prompt, tiny_model

pytestmark = pytest.mark.gpu
NEW_TOKENS = 300  # several flushes
EXACT: dict[str, Any] = {"join_kernels": "exact"}  # where tokens are those of steps without a graph


@functools.cache
def model_on_cuda(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Four layers with wide random weights, so that tokens depend on the cache."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=8192,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to("cuda", dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def read(model: PreTrainedModel, press: Any, tokens: int = 1000) -> DynamicCache:
    cache = DynamicCache()
    ids = prompt(tokens).cuda()
    with torch.no_grad():
        if press is None:
            model.model(input_ids=ids, past_key_values=cache)
        else:
            with press(model):
                model.model(input_ids=ids, past_key_values=cache)
    return cache


def answer(model: PreTrainedModel, cache: DynamicCache, **arguments: Any) -> Any:
    torch.manual_seed(5)
    inputs = continue_inputs(cache, prompt(7, seed=3).cuda())
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **arguments}
    return model.generate(**inputs, past_key_values=cache, **arguments)


def lossless(head_dim: int, role: str, layer_idx: int) -> RawPages:
    return RawPages(head_dim)


TRELLIS_WIDTHS = {0: (3, 1), 1: (1, 1), 2: (2, 2), 3: (1, 4)}
PRESSES: dict[str, Callable[[], Any]] = {
    "4_bits": lambda: TurboQuant(bits=4),
    "3_bits": lambda: TurboQuant(bits=3),
    "half_bits": lambda: TurboQuant(bits=2.5),
    "evicted": lambda: Compose([SnapKV(0.5), TurboQuant(bits=2)]),
    "head_wise": lambda: Compose([AdaKV(SnapKV(0.5)), TurboQuant(bits=3)]),
    "demoted": lambda: Compose([Demote(SnapKV(0.5), bits=2), TurboQuant(bits=4)]),
    "unequal": lambda: Compose([PyramidKV(0.3), TurboQuant(bits=4)]),
    "by_head": lambda: TurboQuant(plan=WidthPlan("", {}, dict.fromkeys(range(4), ((4, 2), (3, 2))))),
    "trellis": lambda: TurboQuant(key_bits=3, value_bits=2, codebook="trellis"),
    "trellis_plan": lambda: TurboQuant(plan=WidthPlan("", {}, TRELLIS_WIDTHS), codebook="trellis"),
    "lossless": lambda: TurboQuant(codec=lossless),
}


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("name", PRESSES)
def test_graph_tokens_are_eager_tokens(name: str, head_dim: int) -> None:
    model = model_on_cuda(head_dim)
    with captured_decoding(model, cuda_graph=False, new_tokens=NEW_TOKENS) as eager:
        expected = answer(model, read(model, PRESSES[name]()))
    with captured_decoding(model, cuda_graph=True, new_tokens=NEW_TOKENS, **EXACT) as steps:
        got = answer(model, read(model, PRESSES[name]()))
    assert torch.equal(got, expected) and got.unique().numel() > 20
    assert eager.eager_steps == NEW_TOKENS - 1 and eager.replays == 0
    assert (steps.captures, steps.eager_steps) == (1, WARM_STEPS)
    assert steps.replays == NEW_TOKENS - 1 - WARM_STEPS
    assert "forward" not in vars(model)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lossless_is_dynamic_cache(head_dim: int) -> None:
    model = model_on_cuda(head_dim, torch.float32)
    expected = answer(model, read(model, None))
    with captured_decoding(model, cuda_graph=True):
        got = answer(model, read(model, PRESSES["lossless"]()))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sampling_and_batches(attention: str) -> None:
    model = copy.deepcopy(model_on_cuda())
    model.set_attn_implementation(attention)
    tokens = []
    for graph in (False, True):
        cache, ids = DynamicCache(), prompt(500, batch=3).cuda()
        with torch.no_grad(), TurboQuant(bits=4)(model):
            model.model(input_ids=ids, past_key_values=cache)
        inputs = continue_inputs(cache, prompt(5, batch=3, seed=1).cuda())
        torch.manual_seed(11)
        with captured_decoding(model, cuda_graph=graph, **EXACT) as steps:
            tokens.append(
                model.generate(**inputs, past_key_values=cache, max_new_tokens=200, do_sample=True, top_k=20)
            )
    assert torch.equal(*tokens) and steps.replays == 197


def test_several_questions_use_one_graph() -> None:
    model = model_on_cuda()
    cache = read(model, TurboQuant(bits=3))
    for layer in cache.layers:
        layer.reserve(2 * NEW_TOKENS)
    scored = {"return_dict_in_generate": True, "output_logits": True}
    expected = answer(model, copy.deepcopy(cache), **scored)
    with captured_decoding(model, new_tokens=2 * NEW_TOKENS, **EXACT) as steps:
        answers, logits = [], []
        for _ in range(3):
            snapshots = [layer.snapshot() for layer in cache.layers]
            got = answer(model, cache, **scored)
            answers.append(got.sequences)
            logits.append(got.logits)
            for layer, snapshot in zip(cache.layers, snapshots, strict=True):
                layer.restore(snapshot)
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
        assert steps.captures == 1 and steps.replays == 3 * (NEW_TOKENS - 1) - WARM_STEPS
    apart = (answers[0] != expected.sequences)[0, -NEW_TOKENS:].int()
    same = int(apart.argmax()) + 1 if apart.any() else NEW_TOKENS  # steps that saw the same tokens
    assert same > 10
    for one, other in zip(logits[0][:same], expected.logits[:same], strict=True):
        assert (one - other).norm() < 0.05 * other.norm()  # another split of the sums, rounded to bfloat16


def test_a_compiled_step_is_captured_too() -> None:
    model = model_on_cuda(128, torch.float32)
    with captured_decoding(model, cuda_graph=False, new_tokens=NEW_TOKENS):
        expected = answer(model, read(model, TurboQuant(bits=4)))
    with captured_decoding(model, compile=True, new_tokens=NEW_TOKENS) as steps:
        got = answer(model, read(model, TurboQuant(bits=4)))
    assert (steps.captures, steps.replays) == (1, NEW_TOKENS - 1 - WARM_STEPS)
    assert (got == expected).float().mean() > 0.5  # fused kernels round otherwise: tokens part in the end
    assert torch.equal(got[:, :20], expected[:, :20])


def test_a_cache_that_outgrows_its_room_is_captured_again() -> None:
    model = model_on_cuda()
    with captured_decoding(model, cuda_graph=False, new_tokens=0):
        expected = answer(model, read(model, TurboQuant(bits=4)))
    with captured_decoding(model, new_tokens=0, **EXACT) as steps:
        got = answer(model, read(model, TurboQuant(bits=4)))
    assert torch.equal(got, expected) and steps.captures > 1
    assert steps.replays > NEW_TOKENS - 10


def test_replays_take_no_memory() -> None:
    model, token = model_on_cuda(), prompt(1, seed=2).cuda()
    cache = read(model, TurboQuant(bits=4))
    sizes = []
    with torch.no_grad(), captured_decoding(model, new_tokens=1000) as steps:
        for number in range(600):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            if number in (150, 599):
                torch.cuda.synchronize()
                sizes.append(torch.cuda.memory_allocated())
    assert steps.replays == 598 and sizes[0] == sizes[1]


def test_steps_do_not_wait_for_the_device() -> None:
    """Only a flush does, once in 128 tokens; the first is 28 tokens away."""
    model, token = model_on_cuda(), prompt(1, seed=2).cuda()
    cache = read(model, TurboQuant(bits=4))
    with torch.no_grad(), captured_decoding(model, new_tokens=1000) as steps:
        for _ in range(5):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        with no_synchronization():
            for _ in range(15):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert steps.replays == 18


def test_an_exception_restores_everything() -> None:
    model = model_on_cuda()
    cache = read(model, TurboQuant(bits=4))

    class StopError(Exception):
        pass

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 60:
            raise StopError
        return scores

    with pytest.raises(StopError), captured_decoding(model):
        answer(model, cache, logits_processor=[stop])
    assert "forward" not in vars(model) and all(layer.fixed is None for layer in cache.layers)
    assert cache.get_seq_length() == 1000 + 60
    assert answer(model, cache).shape[1] == NEW_TOKENS + 7


def test_a_model_that_cannot_be_captured_goes_on_with_a_warning() -> None:
    model = copy.deepcopy(model_on_cuda())
    whole = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: whole(x) if float(x.float().sum()) < 1e30 else x
    expected = answer(model, read(model, TurboQuant(bits=4)), max_new_tokens=100)
    with captured_decoding(model) as steps, pytest.warns(UserWarning, match="cannot be captured"):
        got = answer(model, read(model, TurboQuant(bits=4)), max_new_tokens=100)
    assert steps.captures == steps.replays == 0
    assert (got == expected).float().mean() > 0.5
    good = model_on_cuda()
    with captured_decoding(good) as steps:
        answer(good, read(good, TurboQuant(bits=4)), max_new_tokens=100)
    assert steps.replays == 97


@pytest.mark.parametrize("press", [TurboQuant(bits=4), Compose([SnapKV(0.5), TurboQuant(bits=4)])])
def test_the_pipeline_captures_once_for_all_questions(press: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CapturedDecoding] = []
    start = CapturedDecoding.__init__

    def note(self: CapturedDecoding, *arguments: Any) -> None:
        start(self, *arguments)
        made.append(self)

    monkeypatch.setattr(CapturedDecoding, "__init__", note)
    pipe = ours()
    pipe.model = copy.deepcopy(pipe.model).cuda()
    pipe.device = pipe.model.device
    arguments = {"press": press, "questions": [text(5, seed=1), text(9, seed=2), text(1, seed=3)]}
    answers = [
        pipe(text(900), max_new_tokens=200, cuda_graph=graph, report=True, **arguments)
        for graph in (False, None, True)
    ]
    assert answers[1]["answers"] == answers[2]["answers"]
    assert [steps.captures for steps in made] == [1, 1]
    assert all(steps.replays == 3 * 199 - WARM_STEPS for steps in made)
    print([one["report"] for one in answers])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[CapturedDecoding]:
    """The steps of each call of an enabled model."""
    return noted_steps(monkeypatch)


@pytest.mark.parametrize("name", ["4_bits", "evicted", "head_wise"])
def test_an_enabled_model_captures_by_itself(name: str, made: list[CapturedDecoding]) -> None:
    """Two turns, a graph each, the tokens of the same steps without one."""
    model, ids = copy.deepcopy(model_on_cuda()), prompt(1000).cuda()
    options = {"max_new_tokens": 200, "do_sample": False, "return_dict_in_generate": True}
    answers = []
    for graph in (False, None):
        with enable(model, PRESSES[name](), cuda_graph=graph, **EXACT):
            steps = (  # the cache grows again between the turns, as it does behind a call of its own
                functools.partial(captured_decoding, model, cuda_graph=False)
                if graph is False
                else contextlib.nullcontext
            )
            with steps():
                first = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            turn = torch.cat([first.sequences, prompt(20, seed=4).cuda()], dim=1)
            seen = torch.ones_like(turn)  # the padding token may be among those generated
            with steps():
                second = model.generate(
                    turn, attention_mask=seen, past_key_values=first.past_key_values, **options
                )
            answers.append(second.sequences)
    assert torch.equal(*answers) and answers[0].unique().numel() > 20
    assert [(steps.captures, steps.replays) for steps in made] == [(1, 199 - WARM_STEPS)] * 2
    assert "forward" not in vars(model)


def test_calls_of_an_enabled_model_leave_no_memory(made: list[CapturedDecoding]) -> None:
    model, ids, sizes = copy.deepcopy(model_on_cuda()), prompt(2000).cuda(), []
    with enable(model, 4, cuda_graph=True):
        for _ in range(6):
            model.generate(ids, max_new_tokens=20, do_sample=False)
            assert made.pop().captures == 1
            gc.collect()
            torch.cuda.empty_cache()
            sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert sizes[1] == sizes[-1], sizes


def test_threads_share_a_pipeline_of_an_enabled_model(made: list[CapturedDecoding]) -> None:
    """Calls of the pipeline wait for each other, those of `generate` take turns; all replay graphs."""
    pipe = ours()
    pipe.model = model = copy.deepcopy(model_on_cuda())
    pipe.device = model.device
    prompts = [prompt(900 + 50 * index, seed=index).cuda() for index in range(2)]
    texts = [text(900, seed=index) for index in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}

    def generate(index: int) -> Any:
        return model.generate(prompts[index], **options).tolist()

    def ask(index: int) -> Any:
        press = [TurboQuant(bits=3), SnapKV(0.5)][index]
        return pipe(texts[index], question="w5", press=press, **options)["answer"]

    jobs = [(work, index) for work in (generate, ask) for index in range(2)]
    with enable(model, 4, **EXACT):
        alone = [work(index) for work, index in jobs]
        made.clear()
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(work, index) for _ in range(2) for work, index in jobs]
            assert [one.result() for one in found] == alone * 2
    assert sum(steps.replays for steps in made) > 0
    assert "forward" not in vars(model)


def test_an_enabled_model_captures_in_other_threads(made: list[CapturedDecoding]) -> None:
    model, prompts = copy.deepcopy(model_on_cuda()), [prompt(500, seed=seed).cuda() for seed in range(3)]
    options = {"max_new_tokens": 60, "do_sample": False}
    answers: dict[int, torch.Tensor] = {}
    with enable(model, 4, cuda_graph=True):
        expected = [model.generate(ids, **options) for ids in prompts]
        made.clear()

        def answer(index: int) -> None:
            sampling = {"do_sample": True} if index == 3 else {}
            answers[index] = model.generate(prompts[index % 3], **{**options, **sampling})

        threads = [threading.Thread(target=answer, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers[3].shape[1] == 560 and len(made) == 4
    same = [(answers[index] == expected[index]).float().mean() for index in range(3)]
    assert min(same) > 0.9  # the 500 of the prompt among them; a graph's sums may be split otherwise


def test_the_pipeline_compiles() -> None:
    pipe = ours()
    pipe.model = copy.deepcopy(pipe.model).cuda()
    pipe.device = pipe.model.device
    arguments = {"press": TurboQuant(bits=4), "question": text(5, seed=1), "max_new_tokens": 20}
    assert pipe(text(900), compile=True, **arguments) == pipe(text(900), **arguments)


@pytest.mark.parametrize("configured", [True, False], ids=["sliding_layers", "plain_layers"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "qwen2_sliding", "mistral_sliding"])
def test_layers_that_nothing_packs_are_captured(family: str, packed: bool, configured: bool) -> None:
    """Windows of 64 tokens go round; tokens of the eager step, and of plain layers in float32."""
    if packed and family == "mistral_sliding":
        pytest.skip("no layer to pack")
    model, ids = copy.deepcopy(tiny_model(family)).cuda(), prompt(300).cuda()
    options = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": 0}

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config) if configured else DynamicCache()
        with torch.no_grad(), TurboQuant(codec=lossless)(model) if packed else contextlib.nullcontext():
            model(ids[:, :-1], past_key_values=cache)
        return cache

    with captured_decoding(model, cuda_graph=False):
        eager = model.generate(ids, past_key_values=filled(), **options)
    with captured_decoding(model, cuda_graph=True) as steps:
        got = model.generate(ids, past_key_values=filled(), **options)
    assert torch.equal(got, eager) and got.unique().numel() > 20
    assert (steps.captures, steps.replays) == (1, 150 - WARM_STEPS)
    assert torch.equal(got, model.generate(ids, past_key_values=filled(), **options))


def test_sliding_layers_do_not_wait_for_the_device() -> None:
    model, token = copy.deepcopy(tiny_model("gemma3")).cuda().bfloat16(), prompt(1, seed=2).cuda()
    cache, sizes = DynamicCache(config=model.config), []
    with torch.no_grad(), captured_decoding(model, new_tokens=300) as steps:
        model(prompt(40).cuda(), past_key_values=cache)
        for number in range(120):  # the window fills after 24
            with no_synchronization() if number > 5 else contextlib.nullcontext():
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            sizes.append(torch.cuda.memory_allocated())
    assert steps.replays == 120 - WARM_STEPS and sizes[10] == sizes[-1]


def test_an_evicted_cache_is_captured() -> None:
    model = model_on_cuda()
    press = Compose([SnapKV(0.5)])
    with captured_decoding(model, cuda_graph=False, new_tokens=NEW_TOKENS):
        expected = answer(model, read(model, press))
    with captured_decoding(model, cuda_graph=True, new_tokens=NEW_TOKENS, **EXACT) as steps:
        got = answer(model, read(model, press))
    assert torch.equal(got, expected) and steps.replays == NEW_TOKENS - 1 - WARM_STEPS


def test_a_plain_cache_that_outgrows_its_room_is_captured_again() -> None:
    model = model_on_cuda()
    with captured_decoding(model, cuda_graph=False, new_tokens=10):
        expected = answer(model, read(model, None), max_new_tokens=60)
    with captured_decoding(model, cuda_graph=True, new_tokens=10, **EXACT) as steps:
        got = answer(model, read(model, None), max_new_tokens=60)
    assert torch.equal(got, expected) and steps.captures == 2


@pytest.mark.parametrize(
    "options",
    [{"bits": 3}, {"bits": 3.5}, {"bits": 4, "estimator": "prod"}, {"preset": "paper"}],
    ids=lambda options: "_".join(map(str, options.values())),
)
@pytest.mark.parametrize("hidden", [(0, 0), (300, 20)], ids=str)
def test_padded_batches_and_every_codec_are_replayed(
    hidden: tuple[int, int], options: dict[str, Any]
) -> None:
    """The tokens of steps without a graph, in a batch with padding on the left or without any."""
    model, ids = model_on_cuda(), prompt(600, batch=2).cuda()
    mask = torch.stack([(torch.arange(600) >= count).long() for count in hidden]).cuda()
    name = options.get("preset")
    press = TurboQuant(**options) if name is None else TurboQuant.preset(name)

    def generated(**chosen: Any) -> tuple[torch.Tensor, int]:
        cache = DynamicCache()
        with torch.no_grad(), press(model):
            model.model(input_ids=ids * mask, attention_mask=mask, past_key_values=cache)
        with captured_decoding(model, **EXACT, **chosen) as steps:
            tokens = model.generate(
                torch.cat((ids * mask, ids[:, :1]), 1),
                attention_mask=torch.cat((mask, mask[:, -1:]), 1),
                past_key_values=cache,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        return tokens, steps.replays

    expected, none = generated(cuda_graph=False)
    got, replays = generated()
    assert none == 0 and replays > NEW_TOKENS - 10
    assert torch.equal(got, expected)
