"""Reading the context: one forward pass into a cache, under a press, with a progress bar."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from quantpress.cache import host
from quantpress.cache.ranks import ranks_of
from quantpress.errors import InvalidInputError
from quantpress.pipelines.joined.step import joined_reading
from quantpress.pipelines.reading.chunk_sizes import chunk_length
from quantpress.pipelines.reading.chunked_prefill import (
    backbone,
    chunked_prefill,
    decoder_layers,
)
from quantpress.pipelines.reading.embeddings import Watcher, freed_embeddings
from quantpress.pipelines.report import Stopwatch
from quantpress.presses.base import PressMixin
from quantpress.presses.base_press import BasePress
from quantpress.presses.guard import named_assertion, named_context
from quantpress.presses.models.eligibility import HOOKABLE, check
from quantpress.presses.models.filling import (
    check_filled,
    check_keeps,
    check_takes_states,
    count_kept,
    warn_of_chance,
)
from quantpress.presses.models.scanning import scanned_once
from quantpress.presses.traits import renumbers_positions

LONG_CONTEXT = 8192  # tokens; the bar appears at once for more
PATIENCE_S = 3.0  # seconds; the bar appears after this time for fewer


@scanned_once()
def read_context(
    model: PreTrainedModel,
    context_ids: torch.Tensor,
    cache: Cache,
    press: BasePress | None = None,
    *,
    chunk_tokens: int | None = None,
    progress: bool | None = None,
    watch: Stopwatch | None = None,
    join_kernels: bool = True,
) -> int:
    """Fill a cache with a context, compressed by a press.

    Args:
        model: decoder-only.
        context_ids: [1, T] int64.
        cache: empty; its layers are filled, shortened and replaced.
        press: None keeps everything.
        chunk_tokens: as for `chunked_prefill`. 0 reads whole, None decides by length (`chunk_length`).
        progress: as for `layer_progress`.
        watch: adds up "prefill" and "compress".
        join_kernels: kernels of ours stand in for norms and the like, to the last bit; see `joined_reading`.

    Returns:
        The position of the next token, which is T unless a press numbers the kept tokens anew.

    Raises:
        InvalidInputError: the cache already holds tokens, or the press cannot compress this context.
        UnsupportedModelError: the model does not keep what it reads in this cache.
    """
    check_keeps(model)
    check_takes_states(model, cache)
    held = max((layer.get_seq_length() for layer in host.token_layers(cache)), default=0)
    if held:
        raise InvalidInputError(f"the cache already holds {held} tokens; give a new one for every context")
    if press is not None and not isinstance(press, PressMixin):  # our presses do both themselves
        check(model, HOOKABLE)
        count_kept(model, cache)
    warn_of_chance(model)
    tokens = context_ids.shape[1]
    with named_assertion(press, tokens), joined_reading(model) if join_kernels else nullcontext():
        position = _read(model, context_ids, cache, press, chunk_tokens, progress, watch)
    check_filled(model, cache)
    return position


def _read(
    model: PreTrainedModel,
    context_ids: torch.Tensor,
    cache: Cache,
    press: BasePress | None,
    chunk_tokens: int | None,
    progress: bool | None,
    watch: Stopwatch | None,
) -> int:
    tokens = context_ids.shape[1]
    chunk = chunk_length(tokens) if chunk_tokens is None else chunk_tokens
    timing = nullcontext() if watch is None else watch.measure("prefill")
    with timing, ExitStack() as chunks:
        if chunk:
            chunks.enter_context(chunked_prefill(model, chunk))
            chunks.enter_context(freed_embeddings(model, decoder_layers(model)))
        with ExitStack() as timers:
            _hook(watch, model, "start", timers)
            with nullcontext() if press is None else named_context(press, model):
                _hook(watch, model, "stop", timers)
                with layer_progress(model, tokens, progress):
                    # by name: KVzip and its kin read these two from the keyword arguments
                    decoder = backbone(model)
                    decoder(input_ids=context_ids, **{host.cache_name(decoder): cache}, use_cache=True)
                timers.close()
                if watch is not None:
                    watch.start()  # some presses do their work on exit
        if watch is not None:
            watch.stop()
    return cache.get_seq_length() if renumbers_positions(press) else tokens


def _hook(watch: Stopwatch | None, model: PreTrainedModel, at: str, stack: ExitStack) -> None:
    for handle in watch.hook(model, at) if watch is not None else ():
        stack.callback(handle.remove)


@contextmanager
def layer_progress(model: PreTrainedModel, tokens: int, show: bool | None = None) -> Iterator[None]:
    """While inside, a bar on stderr counts the decoder layers of one forward.

    Args:
        model: the model about to read.
        tokens: how many tokens it will read.
        show: True or False; None shows a bar in a terminal, for long contexts or slow machines. Of several
            processes that share the model, only the first shows one.
    """
    layers, ranks = decoder_layers(model), ranks_of(model)
    if show is False or not layers or (ranks is not None and not ranks.first):
        yield
        return
    at_once = show is True or tokens > LONG_CONTEXT
    bar = tqdm(
        total=len(layers),
        desc=f"reading {tokens:,} tokens",
        unit="layer",
        delay=0.0 if at_once else PATIENCE_S,
        disable=show is None and not sys.stderr.isatty(),
        leave=False,
        mininterval=0,  # layers are few
    )
    hooks = [layer.register_forward_hook(Watcher(bar.update)) for layer in layers]
    try:
        with bar:
            yield
    finally:
        for hook in hooks:
            hook.remove()
