"""What is run in one process and in several, with the same results: a program for each test.

Run as a script under torchrun, this loads models that the processes share, and writes the result of each
program.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from quantpress import disable, enable
from quantpress.cache import cache_memory, continue_inputs
from quantpress.cache.ranks import Ranks, ranks_of
from quantpress.cache.saved.fingerprint import model_fingerprint
from quantpress.errors import CompositionError, QuantPressError
from quantpress.pipelines.capture.eligibility import why_not
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import AdaKV, ChunkKV, Compose, Demote, SnapKV, TurboQuant
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.traits import traits_of, with_inner
from tests.pipelines.words import text, word_tokenizer
from tests.presses.matrix import CONTEXT, QUESTION, catalogue
from tests.presses.reading import lossless
from tests.tiny_models import prompt

STEPS = 24
PACKED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "lossless": lossless,
    "SnapKV, lossless": lambda: Compose([SnapKV(0.5), lossless()]),
    "4 bits": lambda: TurboQuant(4, recent_tokens=16),
    "small": lambda: TurboQuant.preset("small"),
    "SnapKV, 4 bits": lambda: Compose([SnapKV(0.5), TurboQuant(4, recent_tokens=16)]),
    "SnapKV, small": lambda: Compose([SnapKV(0.5), TurboQuant.preset("small")]),
    "AdaKV, lossless": lambda: Compose([AdaKV(SnapKV(0.5)), lossless()]),
    "AdaKV, 3 bits": lambda: Compose([AdaKV(SnapKV(0.5)), TurboQuant(3, recent_tokens=16)]),
    "AdaKV alone": lambda: AdaKV(SnapKV(0.5)),
    "ChunkKV, 4 bits": lambda: Compose([ChunkKV(SnapKV(0.5)), TurboQuant(4, recent_tokens=16)]),
    "Demote, 4 bits": lambda: Compose([Demote(SnapKV(0.5), bits=2), TurboQuant(4, recent_tokens=16)]),
}
SAVED = {name: PACKED[name] for name in ("nothing", "SnapKV, small", "Demote, 4 bits", "AdaKV alone")}
RAGGED = "AdaKV, 3 bits"  # heads keep different numbers of tokens
BY_CHANCE = ("CURPress", "DMSPress", "LeverageScorePress", "RandomPress")  # numbers go by the place of a head
ADAPTED = "RestoreKVPress"  # changes the model before it is refused


@dataclass(frozen=True)
class Place:
    """Where a program runs.

    Args:
        folder: files that all processes see.
        models: the models by name, each split over all processes.
        ranks: the processes; None: one.
    """

    folder: Path
    models: dict[str, PreTrainedModel]
    ranks: Ranks | None

    @property
    def count(self) -> int:
        return 1 if self.ranks is None else self.ranks.count

    @property
    def index(self) -> int:
        return 0 if self.ranks is None else self.ranks.index

    @property
    def model(self) -> PreTrainedModel:
        return self.models["llama"]

    def pipe(self, name: str = "llama") -> TextGenerationPipeline:
        """A pipeline that captures nothing; `captured.py` is about that."""
        return TextGenerationPipeline(model=self.models[name], tokenizer=word_tokenizer(), cuda_graph=False)

    def context_file(self, name: str, count: int | None = None) -> Path:
        """A context as it was saved by `count` processes, or by those that are here."""
        return self.folder / f"{name} {count or self.count}.safetensors"


def generated(model: PreTrainedModel, press: Any) -> dict[str, Any]:
    """Greedy tokens after a context, their logits, and the heads and bytes of the cache."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if press is None:
            model.base_model(input_ids=prompt(600).to(model.device), past_key_values=cache)
        else:
            with press(model):
                model.base_model(input_ids=prompt(600).to(model.device), past_key_values=cache)
    held = cache_memory(cache).total_bytes
    keys: Any = cache.layers[1].keys
    output = model.generate(
        **continue_inputs(cache, prompt(5, seed=3).to(model.device), tokens_seen=600),
        past_key_values=cache,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for module in attention_modules(model):
        vars(module).pop("masked_key_indices", None)
    logits = torch.cat(output.logits).float().cpu()
    return {
        "tokens": output.sequences[0, -STEPS:].tolist(),
        "logits": logits,
        "bytes": held,
        "heads": keys.shape[1],
    }


def packed(place: Place) -> Any:
    return {name: generated(place.model, press()) for name, press in PACKED.items()}


def other_plans(place: Place) -> Any:
    """Biases, heads fused in one projection, and a plan that leaves all heads to each process."""
    presses = {"qwen2": "SnapKV, 4 bits", "phi3": "SnapKV, 4 bits", "gpt_neox": "lossless"}
    return {name: generated(place.models[name], PACKED[press]()) for name, press in presses.items()}


def every_press(place: Place) -> Any:
    """The answer under each press of kvpress, or why it is refused."""
    answers = {}
    for name, entry in catalogue.CATALOGUE.items():
        if entry.kind == catalogue.BASE or name == ADAPTED or entry.attention != "sdpa":
            continue
        press = entry.make(place.model)
        if any(traits_of(one).needs_all_heads for one in with_inner(press)):
            answers[name] = "refused" if place.count == 1 else _said(place, press)
            continue
        with suppress(CompositionError):
            press = Compose([press, lossless()])
        question = "" if entry.one_token else QUESTION
        answers[name] = place.pipe()(CONTEXT, question=question, press=press, max_new_tokens=12)["answer"]
    return answers


def _said(place: Place, press: Any) -> str:
    try:
        place.pipe()(CONTEXT, question=QUESTION, press=press, max_new_tokens=2)
    except QuantPressError as error:
        assert "each process of a model split by tensor parallelism" in str(error), error
        return "refused"
    return "not refused"


def asked(place: Place) -> Any:
    """Questions, sampled answers of processes with seeds of their own, and an enabled model."""
    pipe, press = place.pipe(), PACKED["SnapKV, lossless"]()
    questions = [text(5, seed=1), text(9, seed=2)]
    found = {"answers": pipe(text(500), questions=questions, press=press, max_new_tokens=12)["answers"]}
    torch.manual_seed(7 + place.index)
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": 12}
    found["sampled"] = pipe(text(500), questions=questions, press=press, **sampling)["answers"]
    model, ids = place.model, prompt(500, seed=5).to(place.model.device)
    with enable(model, press, cuda_graph=False):
        found["enabled"] = model.generate(ids, max_new_tokens=12, do_sample=False)[0, -12:].tolist()
        torch.manual_seed(7 + place.index)
        found["enabled, sampled"] = model.generate(ids, **sampling)[0, -12:].tolist()
    disable(model)
    own = [module.config is model.config and not module._forward_hooks for module in attention_modules(model)]
    found["left as it was"] = all(own)
    found["fingerprints"] = [model_fingerprint(one) for one in place.models.values()]
    return found


def saved(place: Place) -> Any:
    """Contexts that this many processes save and load, and those that others have saved."""
    pipe, answers = place.pipe(), {}
    for name, press in SAVED.items():
        read = pipe.read(text(500), press=press())
        written = read.save(place.context_file(name))
        assert written == place.context_file(name).stat().st_size
        answers[f"{name}, before"] = _answer(pipe, read)
    for name in (*SAVED, RAGGED):
        for count in (1, 2, 4):
            if place.context_file(name, count).exists():
                loaded = CachedContext.load(place.context_file(name, count), place.model)
                answers[f"{name} of {count}"] = _answer(pipe, loaded)
    return answers


def _answer(pipe: TextGenerationPipeline, context: CachedContext) -> str:
    answer: str = pipe(context, question=QUESTION, max_new_tokens=12)["answer"]
    return answer


def refused(place: Place) -> Any:
    """What every process says where something cannot be done, although only one may know."""
    pipe, ragged = place.pipe(), place.pipe().read(text(500), press=PACKED[RAGGED]())
    missing = place.context_file("nothing", 1 if place.index == 0 else 7)
    short = {"press": TurboQuant(4), "max_new_tokens": 2}
    ids = prompt(300).to(place.model.device)

    def enabled() -> None:
        with enable(place.model, 4):
            place.model.generate(ids, max_new_tokens=2, max_time=5.0)

    cases: dict[str, Callable[[], Any]] = {
        "heads": lambda: place.pipe("three heads")(text(300), question=QUESTION, **short),
        "heads, evicted": lambda: SnapKV(0.5)(place.models["three heads"]).__enter__(),
        "heads, enabled": lambda: enable(place.models["three heads"], 4),
        "ragged": lambda: ragged.save(place.folder / "ragged"),
        "no file": lambda: CachedContext.load(missing, place.model),
        "no folder": lambda: pipe.read(text(300)).save(place.folder / "none" / "context"),
        "context": lambda: pipe(text(300, seed=place.index), question=QUESTION, **short),
        "press": lambda: pipe.read(text(300), press=TurboQuant(seed=place.index)),
        "clock": lambda: pipe(text(300), question=QUESTION, max_time=5.0, **short),
        "clock, enabled": enabled,
    }
    said = {name: _raised(case) for name, case in cases.items()}
    return {**said, "captured": " and ".join(why_not(model=place.model))}


def made(place: Place) -> Any:
    """A model of random shards is split as a loaded one, and processes answer alike."""
    if place.ranks is None:
        return None
    path = Path(__file__).parents[2] / "benchmarks" / "random_shards.py"
    spec: Any = importlib.util.spec_from_file_location("quantpress_benchmark_random_shards", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.shared_model(place.model.config, torch.float32)
    own, loaded = (
        {name: one.shape for name, one in each.named_parameters()} for each in (model, place.model)
    )
    return own == loaded, generated(model, lossless())["tokens"]


def _raised(case: Callable[[], Any]) -> str:
    try:
        case()
    except QuantPressError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


PROGRAMS = (packed, other_plans, every_press, asked, saved, refused, made)


def outcomes(place: Place) -> dict[str, Any]:
    """The result of every program, or the exception that ended it."""
    return {program.__name__: program(place) for program in PROGRAMS}


def load(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """One of the models that the tests have saved."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, **options).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


if __name__ == "__main__":
    disable_progress_bar()
    folder = Path(sys.argv[1])
    models = {name: load(folder, name, tp_plan="auto") for name in sys.argv[2:]}
    here = Place(folder, models, ranks_of(models["llama"]))
    name = f"{here.index} of {here.count}"
    try:
        torch.save(outcomes(here), folder / f"{name}.pt")
    except BaseException:  # transformers silences all but one process on GPUs
        (folder / f"{name}.error").write_text(traceback.format_exc())
        raise
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
