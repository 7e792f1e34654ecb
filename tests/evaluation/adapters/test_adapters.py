"""Other projects' benchmarks over our presses."""

import sys
import types
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from quantpress.errors import ContextTooLongError, InvalidInputError
from quantpress.evaluation.adapters import kvpress_evaluation
from quantpress.evaluation.adapters.lm_eval_model import PressedModel, lm_eval_model
from quantpress.presses import Compose, Knorm, SnapKV, TurboQuant
from tests.pipelines.words import WORDS, ours, text, word_tokenizer
from tests.presses.reading import lossless
from tests.tiny_models import prompt, tiny_model

IDS = prompt(330)[0].tolist()
CONTEXT, NEXT = IDS[:300], IDS[300:]


def plain_log_likelihood(context, continuation):
    with torch.inference_mode():
        logits = tiny_model("llama")(input_ids=torch.tensor([context + continuation])).logits[0]
    scored = logits[len(context) - 1 : -1]
    return -float(functional.cross_entropy(scored, torch.tensor(continuation), reduction="sum"))


@pytest.mark.parametrize("press", [None, lossless()], ids=["uncompressed", "lossless"])
@pytest.mark.parametrize(("context", "new"), [(300, 30), (300, 1), (1, 5)])
def test_likelihood_is_that_of_a_plain_forward(press, context, new):
    found, _ = PressedModel(ours(), press).log_likelihood(IDS[:context], IDS[context : context + new])
    assert found == pytest.approx(plain_log_likelihood(IDS[:context], IDS[context : context + new]), abs=0.01)


def test_likelihood_reads_the_compressed_cache():
    exact = plain_log_likelihood(CONTEXT, NEXT)
    far, near = (
        PressedModel(ours(), TurboQuant(bits=bits, recent_tokens=16)).log_likelihood(CONTEXT, NEXT)[0]
        for bits in (2, 8)
    )
    assert abs(near - exact) < abs(far - exact)
    assert abs(far - exact) > 0.5


def test_what_greedy_decoding_says_is_greedy():
    model, ids = tiny_model("llama"), list(CONTEXT)
    with torch.inference_mode():
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[300:]
    pressed = PressedModel(ours(), lossless())
    assert pressed.log_likelihood(CONTEXT, said)[1] is True
    assert pressed.log_likelihood(CONTEXT, [*said[:-1], (said[-1] + 1) % 200])[1] is False
    answer = pressed.generate(CONTEXT, max_new_tokens=4)
    assert answer == word_tokenizer().decode(said, skip_special_tokens=True)
    stop = answer.split()[2]
    assert pressed.generate(CONTEXT, [stop], max_new_tokens=4) == answer[: answer.index(stop)]
    assert pressed.generate(CONTEXT, ["not said"], max_new_tokens=4) == answer


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], [])])
def test_nothing_to_score_is_refused(context, continuation):
    with pytest.raises(InvalidInputError, match="0"):
        PressedModel(ours(), None).log_likelihood(context, continuation)


def test_too_long_a_text_is_refused():
    with pytest.raises(ContextTooLongError):
        PressedModel(ours(), None).log_likelihood([5] * 4000, [5] * 200)
    with pytest.raises(InvalidInputError, match="0 tokens"):
        PressedModel(ours(), None).generate([])


class TemplateLM:
    """What lm_eval.api.model.TemplateLM promises of `loglikelihood`, in short."""

    def loglikelihood(self, requests, disable_tqdm=False):
        pairs = [request.args for request in requests]
        encoded = [
            (
                pair,
                self.tok_encode(pair[0]),
                self.tok_encode(pair[0] + pair[1])[len(self.tok_encode(pair[0])) :],
            )
            for pair in pairs
        ]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)


@pytest.fixture(params=["double", "lm_eval"])
def harness(request, monkeypatch):
    """A double of the harness; the harness itself where it is installed."""
    if request.param == "lm_eval":
        if find_spec("lm_eval") is None:
            pytest.skip("lm_eval is not installed")
        return
    package, api, module = (
        types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    )
    module.TemplateLM = TemplateLM
    for one in (package, api, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)


def test_the_harness_gets_likelihoods_and_answers(harness):
    model = lm_eval_model(ours(), Compose([Knorm(0.3), lossless()]))
    context, continuation = text(300), f" {WORDS[3]} {WORDS[4]}"
    tokenizer = word_tokenizer()
    ((found, greedy),) = model.loglikelihood([SimpleNamespace(args=(context, continuation))])
    ids = tokenizer.encode(context, add_special_tokens=False)
    expected = PressedModel(ours(), Compose([Knorm(0.3), lossless()])).log_likelihood(
        ids, tokenizer.encode(continuation, add_special_tokens=False)
    )
    assert (found, greedy) == pytest.approx(expected)
    request = SimpleNamespace(args=(context, {"until": ["w7 "], "max_gen_toks": 5, "temperature": 0.0}))
    (answer,) = model.generate_until([request])
    assert 0 < len(answer.split()) <= 5
    with pytest.raises(InvalidInputError, match="context to compress"):
        model.loglikelihood_rolling([])
    assert model.eot_token_id == tokenizer.eos_token_id
    assert model.max_gen_toks > 0
    assert model.tokenizer_name == tokenizer.name_or_path


def test_without_the_harness_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InvalidInputError, match="pip install"):
        lm_eval_model(ours())


EVALUATE = """
from evaluate_registry import PRESS_REGISTRY

class EvaluationRunner:
    def __init__(self, config):
        self.config, self.press, self.pipeline = config, None, None

    def _setup_press(self):
        self.press = PRESS_REGISTRY[self.config.press_name]
        if self.press is not None:
            self.press.compression_ratio = self.config.compression_ratio

    def _setup_model_pipeline(self):
        self.pipeline = self.config.make_pipeline()

    def run_evaluation(self):
        self._setup_press()
        self._setup_model_pipeline()
        self.pipeline.model.eval()
        return self.pipeline(self.config.context, questions=["w1"], press=self.press, max_new_tokens=3,
                             report=True)

class CliEntryPoint:
    def __call__(self, press_name, compression_ratio):
        return press_name, compression_ratio

def Fire(entry, command):
    return calls.append((entry.__name__, command))

calls = []
"""
REGISTRY = """
from kvpress import KnormPress, SnapKVPress
PRESS_REGISTRY = {"knorm": KnormPress(), "snapkv": SnapKVPress(window_size=16), "no_press": None}
"""


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """A folder shaped as kvpress's evaluation is: a registry, a runner, a command line."""
    (tmp_path / "evaluate.py").write_text(EVALUATE)
    (tmp_path / "evaluate_registry.py").write_text(REGISTRY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("evaluate", "evaluate_registry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("evaluate", "evaluate_registry"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["knorm", "snapkv+turboquant3", "no_press+turboquant2", "knorm+turboquant4"])
def test_a_name_with_a_plus_is_packed(evaluation, name):
    kvpress_evaluation.load_evaluation(evaluation)
    module = kvpress_evaluation.load_evaluation(evaluation)  # once more changes nothing
    config = SimpleNamespace(
        press_name=name, compression_ratio=0.5, context=text(700), make_pipeline=ours, press_init_command=""
    )
    report = module.EvaluationRunner(config).run_evaluation()["report"]
    evicts, packs = not name.startswith("no_press"), "+" in name
    assert report.tokens_kept == report.tokens_seen // (2 if evicts else 1)
    assert (report.bits_per_value < 32) == packs  # the tiny model is float32
    assert ("TurboQuant" in config.press_init_command) == packs


def test_the_command_line_is_theirs(evaluation):
    kvpress_evaluation.main([str(evaluation), "--press_name", "knorm+turboquant3"])
    assert sys.modules["evaluate"].calls == [("CliEntryPoint", ["--press_name", "knorm+turboquant3"])]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda folder: kvpress_evaluation.main([]), "give the folder"),
        (lambda folder: kvpress_evaluation.main([str(folder / "none")]), "no evaluate.py"),
        (lambda folder: kvpress_evaluation.quantizer_of("knorm+int4"), "'int4'"),
    ],
)
def test_wrong_use_is_named(evaluation, run, message):
    with pytest.raises(InvalidInputError, match=message):
        run(evaluation)


def test_a_package_that_it_needs_is_named(evaluation):
    (evaluation / "evaluate.py").write_text("import no_such_scorer")
    with pytest.raises(InvalidInputError, match="no_such_scorer"):
        kvpress_evaluation.load_evaluation(evaluation)


def test_a_press_of_ours_keeps_its_own_class_in_front():
    """The evaluation looks at the class of its press; the quantizer is added only when the pipe is called."""
    seen = []
    pipe = SimpleNamespace(model="m")
    packing = kvpress_evaluation.PackingPipeline(pipe, TurboQuant())
    packing.pipe = lambda *args, press, **kwargs: seen.append(press)
    packing("context", press=SnapKV())
    assert [type(one).__name__ for one in seen[0]] == ["SnapKV", "TurboQuant"]
