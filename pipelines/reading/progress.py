"""A progress bar over the layers of a long prefill."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from quantpress.pipelines.reading.chunked_prefill import decoder_layers
from quantpress.pipelines.reading.embeddings import Watcher

LONG_CONTEXT = 8192  # tokens; a bar shows at once
PATIENCE_S = 3.0  # seconds; a bar shows for shorter contexts that take longer than this


@contextmanager
def layer_progress(model: PreTrainedModel, tokens: int, show: bool | None = None) -> Iterator[None]:
    """Count the decoder layers of one forward pass on stderr.

    Args:
        model: the model about to read.
        tokens: how many tokens it will read.
        show: True or False; None shows a bar in a terminal, for long contexts or slow machines.
    """
    layers = decoder_layers(model)
    if show is False or not layers:
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
