"""`enable` decodes by the steps of `captured_decoding`; here they run eagerly, on the CPU."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture import eligibility
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.capture.captured_steps import CapturedDecoding
from quantpress.pipelines.enabling.enable import disable, enable
from quantpress.presses import Compose, Decoding, KeyRerotation, Knorm, StreamingLLM
from tests.pipelines.enabling.enabled import FULL, GREEDY, IDS, NEXT, NO_END, SNAP, TOKENS, noted_steps, state
from tests.presses.reading import lossless
from tests.tiny_models import prompt, tiny_model


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[CapturedDecoding]:
    """The steps of every call; the rule about the device does not apply."""
    monkeypatch.setitem(eligibility.RULES, "device", ())
    return noted_steps(monkeypatch)


@pytest.mark.parametrize(
    "press",
    [lossless(), Compose([SNAP, lossless()]), SNAP, Compose([KeyRerotation(StreamingLLM(0.3)), lossless()])],
    ids=["packed", "evicted_and_packed", "evicted", "rerotated"],
)
def test_turns_of_a_chat(press: Any, made: list[CapturedDecoding]) -> None:
    """Each call has steps of its own, and leaves a cache that grows and can be continued."""
    model = tiny_model("llama")
    before, answers = state(model), []
    for cuda_graph in (False, None):
        with enable(model, press, cuda_graph=cuda_graph):
            first = model.generate(IDS, **FULL)
            conversation = torch.cat([first.sequences, NEXT], dim=1)
            second = model.generate(conversation, past_key_values=first.past_key_values, **FULL)
            assert all(getattr(la, "fixed", None) is None for la in second.past_key_values.layers)
            assert second.past_key_values.get_seq_length() == TOKENS + 10 + 20 + 9
            answers.append(second.sequences)
    assert torch.equal(*answers)
    assert [(steps.eager_steps, steps.captures) for steps in made] == [(9, 0), (9, 0)]
    assert state(model) == before


def test_sampling_and_batches(made: list[CapturedDecoding]) -> None:
    model, ids, answers = tiny_model("llama"), prompt(300, batch=2), []
    for cuda_graph in (False, None):
        torch.manual_seed(2)
        with enable(model, lossless(), cuda_graph=cuda_graph):
            answers.append(model.generate(ids, do_sample=True, max_new_tokens=10, num_return_sequences=2))
    assert torch.equal(*answers) and answers[0].shape[0] == 4
    assert [steps.eager_steps for steps in made] == [9]


@pytest.mark.parametrize(
    ("press", "options"),
    [
        (lossless(), {"num_beams": 2}),
        (lossless(), {"prompt_lookup_num_tokens": 3, **NO_END}),
        (Decoding(Knorm()), {}),
        (Compose([Decoding(Knorm()), lossless()]), {}),
    ],
    ids=["beams", "guesses", "decoding", "decoding_packed"],
)
def test_what_rules_steps_out_by_its_nature_does_so_silently(
    press: Any, options: dict[str, Any], made: list[CapturedDecoding]
) -> None:
    model = tiny_model("llama")
    with enable(model, press):
        model.generate(IDS, **GREEDY, **options)
    assert not made
    with pytest.raises(InvalidInputError, match="cuda_graph=True, but"):  # noqa: SIM117
        with enable(model, press, cuda_graph=True):
            model.generate(IDS, **GREEDY, **options)
    assert "forward" not in vars(model)


def test_a_prompt_too_short_to_pack_decodes_as_always(made: list[CapturedDecoding]) -> None:
    with enable(model := tiny_model("llama"), lossless(), cuda_graph=True):
        model.generate(prompt(30), **GREEDY)
    assert [steps.eager_steps for steps in made] == [0]


def test_a_padded_batch_decodes_in_steps(made: list[CapturedDecoding]) -> None:
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=2, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    with enable(model, lossless(), cuda_graph=True):
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert [steps.eager_steps for steps in made] == [GREEDY["max_new_tokens"] - 1]


def test_one_warning_for_all_calls(made: list[CapturedDecoding]) -> None:
    model = tiny_model("llama")
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    try:
        with enable(model, lossless()):
            with pytest.warns(UserWarning, match=r"layers.1.mlp has a forward hook"):
                model.generate(IDS, **GREEDY)
            model.generate(IDS, **GREEDY)  # warnings are errors here
        with (
            enable(model, lossless(), cuda_graph=True),
            pytest.raises(InvalidInputError, match=r"cuda_graph=True, but .* has a forward hook"),
        ):
            model.generate(IDS, **GREEDY)
    finally:
        handle.remove()
    assert [steps.eager_steps for steps in made] == [0, 0, 0]


def test_nothing_of_a_call_is_left(made: list[CapturedDecoding]) -> None:
    """Graphs and their memory belong to the steps, which are freed with the call, also after an exception."""
    model = tiny_model("llama")

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == TOKENS + 5:
            raise RuntimeError("on purpose")
        return scores

    with enable(model, lossless()):
        for options in ({}, {"logits_processor": [stop]}):
            if options:
                with pytest.raises(RuntimeError, match="on purpose"):
                    model.generate(IDS, **GREEDY, **options)
            else:
                model.generate(IDS, **GREEDY)
            steps = made.pop()
            assert steps.eager_steps > 3
            assert steps._cache is None and steps._graph is None and steps._static is None
            gone = weakref.ref(steps)
            del steps
            gc.collect()
            assert gone() is None


def test_threads_step_under_the_lock_of_the_model(
    made: list[CapturedDecoding], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny_model("llama"), [prompt(300, seed=seed) for seed in range(3)]
    answers: dict[int, torch.Tensor] = {}
    held: list[bool] = []
    run = CapturedDecoding._run

    def noted(self: CapturedDecoding, step: Any) -> Any:
        held.append(handle.lock.held)
        return run(self, step)

    monkeypatch.setattr(CapturedDecoding, "_run", noted)
    expected = [model.generate(ids, **GREEDY) for ids in prompts]
    with enable(model, lossless()) as handle:

        def answer(index: int) -> None:
            answers[index] = model.generate(prompts[index], **GREEDY)

        threads = [threading.Thread(target=answer, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(answers[index], expected[index]) for index in range(3))
    assert [steps.eager_steps for steps in made] == [9, 9, 9]
    assert len(held) == 27 and all(held)


def test_no_graph_is_made_while_another_call_samples(
    made: list[CapturedDecoding], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's generator refuses draws during a capture. Calls that do not draw do not prevent one."""
    model, asked = tiny_model("llama"), threading.local()
    first, second, stepped = threading.Event(), threading.Event(), threading.Event()
    allowed: dict[str, list[bool]] = {"sampled": [], "greedy": []}
    run = CapturedDecoding._run

    def noted(self: CapturedDecoding, step: Any) -> Any:
        allowed[asked.name].append(self.may_capture())
        if asked.name == "greedy":
            stepped.set()
        return run(self, step)

    monkeypatch.setattr(CapturedDecoding, "_run", noted)
    with enable(model, lossless()):

        def answer(name: str, own: threading.Event, other: threading.Event) -> None:
            asked.name = name

            def meet(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                own.set()  # in the middle of both calls
                assert other.wait(30) and (name == "greedy" or ids.shape[1] == TOKENS or stepped.wait(30))
                return scores

            options = {**GREEDY, "do_sample": name == "sampled", "logits_processor": [meet]}
            model.generate(IDS, **options)

        threads = [
            threading.Thread(target=answer, args=("sampled", first, second)),
            threading.Thread(target=answer, args=("greedy", second, first)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(allowed["sampled"]) and not allowed["greedy"][0]
        asked.name = "greedy"
        allowed["greedy"].clear()
        model.generate(IDS, **GREEDY)
    assert all(allowed["greedy"]) and len(allowed["greedy"]) == 9


def test_steps_run_without_a_graph_until_one_may_be_made() -> None:
    """On the CPU a capture fails, with a warning."""
    model = tiny_model("llama")
    with enable(model, lossless()), captured_decoding(model) as steps:
        steps._capture, steps.may_capture = True, lambda: False
        model.generate(IDS, **GREEDY)
        assert steps.eager_steps == 9
        steps.may_capture = lambda: True
        with pytest.warns(UserWarning, match="cannot be captured"):
            model.generate(IDS, **GREEDY)


def test_captured_decoding_around_takes_their_place(made: list[CapturedDecoding]) -> None:
    model = tiny_model("llama")
    with enable(model, lossless()):
        expected = model.generate(IDS, **GREEDY)
        with captured_decoding(model) as outer:
            assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert [steps.eager_steps for steps in (*made, outer)] == [9, 0, 9]


def test_the_choice_is_checked() -> None:
    model = tiny_model("llama")
    with pytest.raises(InvalidInputError, match="cuda_graph=True, but the model is on cpu"):
        enable(model, 4, cuda_graph=True)
    with pytest.raises(InvalidInputError, match="cuda_graph is 'yes'"):
        enable(model, 4, cuda_graph="yes")  # type: ignore[arg-type]
    disable(model)
    assert "forward" not in vars(model)


def test_a_compiled_step_does_not_count_positions() -> None:
    """A press that numbers positions anew rules compiling out, and the model stays as it was."""
    model = tiny_model("llama")
    with enable(model, KeyRerotation(StreamingLLM(0.5))):
        before = state(model)
        with (
            pytest.raises(
                InvalidInputError, match=r"compile=True, but the model is enabled with .*KeyRerotation"
            ),
            captured_decoding(model, compile=True),
        ):
            pytest.fail("entered")
        assert state(model) == before
        with captured_decoding(model):
            pass
    with enable(model, SNAP), captured_decoding(model, compile=True):
        pass
