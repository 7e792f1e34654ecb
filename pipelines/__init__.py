"""Wiring: presses and packed caches in transformers generation.

text_generation.py     the pipeline class: arguments and order of work
arguments.py           which arguments it takes; the generation configuration
argument_values.py     what kind of value each of them takes
prompt.py              context and questions as token ids, in chat form
decoding.py            one answer with `model.generate`
report.py              what it cost: memory and time
rollback.py            a context unchanged by questions, a model unchanged by presses
attention_masks.py     masks for layers of different lengths, and slots that heads hide
method_replacement.py  a method of one model replaced, and put back
calibration.py         statistics of keys over texts, for engines that share pages
question_hint.py       a hint at presses that evict by a question they have not seen
press_argument.py      what `press=` may be, made into a press
ranks.py               the same decisions in all processes that share a model
reading/               how a context is read: one forward in chunks, with a progress bar
capture/               decode steps as replays of one CUDA graph, and the rules against it
joined/                kernels of ours in place of pieces of a model, each proven first
contexts/              contexts that are read once, and their files
enabling/              every later `model.generate` with a compressed cache
patching/              attention on keys and values packed and restored just before, live
default_model/         the embedded default model
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantpress.errors import unknown_name

if TYPE_CHECKING:
    from quantpress.pipelines.calibration import calibrate
    from quantpress.pipelines.capture.captured import captured_decoding
    from quantpress.pipelines.enabling.enable import disable, enable
    from quantpress.pipelines.patching.live_patch import patch_attention
    from quantpress.pipelines.reading.chunked_prefill import chunked_prefill
    from quantpress.pipelines.report import Report
    from quantpress.pipelines.text_generation import TextGenerationPipeline

__all__ = [
    "Report",
    "TASK",
    "TextGenerationPipeline",
    "calibrate",
    "captured_decoding",
    "chunked_prefill",
    "disable",
    "enable",
    "patch_attention",
    "register",
]

TASK = "kv-press-text-generation"
_LAZY = {
    "Report": "quantpress.pipelines.report",
    "TextGenerationPipeline": "quantpress.pipelines.text_generation",
    "calibrate": "quantpress.pipelines.calibration",
    "captured_decoding": "quantpress.pipelines.capture.captured",
    "chunked_prefill": "quantpress.pipelines.reading.chunked_prefill",
    "disable": "quantpress.pipelines.enabling.enable",
    "enable": "quantpress.pipelines.enabling.enable",
    "patch_attention": "quantpress.pipelines.patching.live_patch",
}


def register() -> dict[str, Any]:
    """Make `transformers.pipeline(TASK)` build our pipeline, with the default model; may be called again.

    Unless `dtype=` is given, the default model is loaded in the dtype that `QUANTPRESS_DTYPE` names, or else
    in the faster one here. Importing quantpress is enough to claim the task; see `quantpress.task`.

    Returns:
        The entry of the task in transformers' registry.
    """
    from transformers.pipelines import PIPELINE_REGISTRY

    from quantpress.pipelines.default_model.lazy import AutoModelForCausalLM, LazyDefault
    from quantpress.pipelines.text_generation import TextGenerationPipeline  # imports kvpress

    registered: dict[str, Any] = PIPELINE_REGISTRY.supported_tasks.get(TASK, {})
    if dict.get(registered, "impl") is TextGenerationPipeline:  # `LazyTask.get` would call this function
        return registered
    PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)  # or transformers would log that it is replaced
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=TextGenerationPipeline,
        pt_model=AutoModelForCausalLM,
        default=LazyDefault(),
        type="text",
    )
    entry: dict[str, Any] = PIPELINE_REGISTRY.supported_tasks[TASK]
    return entry


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise unknown_name(__name__, name, __all__)
    return getattr(import_module(_LAZY[name]), name)
