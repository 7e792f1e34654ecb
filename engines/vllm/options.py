"""Options of the plugin: `--additional-config '{"quantpress": {"profile": "profile.safetensors"}}'`."""

from dataclasses import dataclass, fields
from typing import Any

from quantpress.cache.engine_memory import sink_entries
from quantpress.errors import InvalidInputError

KEY = "quantpress"


@dataclass(frozen=True)
class Options:
    """What a user may set.

    Args:
        profile: file of `quantpress calibrate`, with the statistics of the model's keys; None: they are taken
            from the first piece of a prompt of `FREEZING_TOKENS` tokens or more.
        sink_entries: prompts whose first tokens are kept in 16 bits at a time; None: four for each request
            that may run, and at least 1024.
        plan: file of `quantpress fit`, with the widths of each layer; None: all layers have those of
            `--kv-cache-dtype`.
    """

    profile: str | None = None
    sink_entries: int | None = None
    plan: str | None = None

    def entries(self, requests: int) -> int:
        """Sink entries for this many requests at a time."""
        return sink_entries(requests) if self.sink_entries is None else self.sink_entries


def options_of(additional_config: Any, requests: int) -> Options:
    """The options in vLLM's `additional_config`.

    Args:
        additional_config: of the `VllmConfig`.
        requests: most requests at a time.

    Raises:
        InvalidInputError: an option is unknown, or its value makes no sense.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    names = [field.name for field in fields(Options)]
    if not isinstance(given, dict) or not set(given) <= set(names):
        raise InvalidInputError(f"additional_config[{KEY!r}] is {given!r}; give a dict with some of {names}")
    options = Options(**given)
    entries = options.sink_entries
    for name, command in (("profile", "calibrate"), ("plan", "fit")):
        path = getattr(options, name)
        if path is not None and not isinstance(path, str):
            raise InvalidInputError(f"{name} is {path!r}; give the path of a file of `quantpress {command}`")
    if entries is not None and not (isinstance(entries, int) and entries > requests):
        raise InvalidInputError(
            f"sink_entries is {entries!r}; give a whole number above max_num_seqs, which is {requests}"
        )
    return options
