"""quantpress inside vLLM: `vllm serve MODEL --kv-cache-dtype quantpress_4bit --attention-backend QUANTPRESS`.

vLLM's own engine, its scheduler and its pages; ours are what a page holds and the attention over it.
`register` is the entry point "vllm.general_plugins", which vLLM calls in each of its processes. Modules:

dtypes.py        names of KV-cache dtypes, and their codecs
page_layout.py   where codes and scales lie in a block of vLLM's cache
block_state.py   which blocks have 16-bit copies of their tokens, and where
step_plan.py     what one step writes and reads, for all layers
layer_store.py   the tokens of one layer: packed blocks, recent pages, sink entries
attention.py     attention over them while decoding
prompts.py       attention of pieces of prompts; a whole step of a layer
backend.py       the backend and the implementation of a layer that vLLM asks for
builder.py       the plan of each step, from what vLLM tells of its requests
cpu.py           how they come into vLLM's CPU platform
options.py       what a user may set
model_files.py   the profile and the plan that a user names, checked against the model
checks.py        what is refused when the engine starts, and why
"""

import logging
from typing import Any

from quantpress.errors import extra

BACKEND = "QUANTPRESS"
"""The name for `--attention-backend`."""

_CLASS = "quantpress.engines.vllm.backend.QuantpressBackend"


def register() -> None:
    """Tell vLLM of the attention backend and of the KV-cache dtypes; any number of times.

    vLLM calls this wherever quantpress is installed. A release that has moved what the plugin needs must
    still run, so that is a warning; the dtypes are then unknown to it.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning(
            "quantpress cannot register with this vLLM, since it was made for 0.33 (%s): its KV-cache dtypes "
            "and its attention backend are missing; pip install %s",
            error,
            extra("vllm"),
        )


def _register() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from quantpress.engines.vllm.dtypes import announce, dtype_names

    for name in dtype_names():
        announce(name)
    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, _CLASS)
        # Members are pickled by value, and a spawned engine reads its configuration before it loads plugins.
        member: Any = AttentionBackendEnum[BACKEND]
        member.__reduce_ex__ = lambda protocol: (_registered_member, ())
    if current_platform.is_cpu():  # the CPU platform has one backend, whatever is asked for
        register_backend(AttentionBackendEnum.CPU_ATTN, "quantpress.engines.vllm.cpu.Backend")


def _registered_member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum[BACKEND]
