"""A dtype whose pages hold keys and values in float32.

Run as a script, this is vLLM's own command with that dtype.
"""

from __future__ import annotations

DTYPE = "quantpress_test_raw"


def register_lossless() -> None:
    """Make the dtype known in this process."""
    from quantpress.codecs.raw import RawPages
    from quantpress.engines.vllm.dtypes import register_dtype

    register_dtype(DTYPE, lambda head_dim, value_dim, _: (RawPages(head_dim, 32), RawPages(value_dim, 32)))


if __name__ in ("__main__", "__mp_main__"):  # the server, and the engine that it spawns
    register_lossless()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
