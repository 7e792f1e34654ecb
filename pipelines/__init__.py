"""Wiring: presses and packed caches in transformers generation.

text_generation.py  the pipeline class: arguments, order of work
arguments.py        which arguments there are; the generation configuration
prompt.py           context and questions as token ids, in chat form
reading.py          one forward pass into a cache, under a press
prefill.py          the same forward with small activations
layer_chunks.py, query_chunks.py, causal_chunks.py, by_position.py   its layers and its attention in chunks
embeddings.py       their memory, given back
cached_context.py   a context that was read: ask it again, save it, load it
saved_context.py    the same on disk
decoding.py         one answer with model.generate
enabling.py         every later model.generate with a compressed cache
captured.py, captured_forward.py, single_token.py   decode steps as replays of one CUDA graph, by thread
preserve.py         a cache unchanged by questions, a model unchanged by presses
masks.py            layers that keep different numbers of tokens
live_patch.py       attention on keys and values packed and restored just before, live
round_trip.py, attention_record.py, attention_functions.py   one such call, its record, where calls are found
replaced.py         a method of one model replaced, and put back
members.py          a composition is treated like the presses in it
progress.py, stopwatch.py, report.py   what is shown while it works, and what it cost
default_model/      the embedded default model
fidelity.py         attention over packed keys beside exact attention
commands/           what the commands of quantpress do
model_outline.py, kept_tokens.py, memory_plan.py, work_space.py   what a model and its cache will weigh
key_statistics.py   what makes keys hard to pack
token_clock.py      when each token of an answer came, and the memory that took
devices.py          which devices a model is on, and what they are called
haystack.py, demo.py   facts planted in a book, and who still knows them
evaluation/         quality against controls: divergence, attention, tasks, equal bytes
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    "captured_decoding": "quantpress.pipelines.capture.captured",
    "chunked_prefill": "quantpress.pipelines.reading.chunked_prefill",
    "disable": "quantpress.pipelines.enabling.enable",
    "enable": "quantpress.pipelines.enabling.enable",
    "patch_attention": "quantpress.pipelines.patching.live_patch",
}


def register() -> dict[str, Any]:
    """Make `transformers.pipeline(TASK)` build our pipeline, with the default model; may be called again.

    The default model is loaded in the dtype that is quick on this machine, or that `QUANTPRESS_DTYPE` names,
    unless `dtype=` says another. Importing quantpress has promised the task already, see `quantpress.task`.

    Returns:
        The entry of the task in transformers' registry.
    """
    from transformers.pipelines import PIPELINE_REGISTRY

    from quantpress.pipelines.default_model import LazyDefault
    from quantpress.pipelines.default_model.auto_model import AutoModelForCausalLM
    from quantpress.pipelines.text_generation import TextGenerationPipeline  # imports kvpress

    registered: dict[str, Any] = PIPELINE_REGISTRY.supported_tasks.get(TASK, {})
    if dict.get(registered, "impl") is TextGenerationPipeline:  # of dict: a `LazyTask` would come back here
        return registered
    PIPELINE_REGISTRY.supported_tasks.pop(TASK, None)  # or it would log that it replaces it
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
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
