"""What `quantpress doctor` says of vLLM, from the metadata of packages alone: importing vLLM takes long."""

import os
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

TESTED = "0.33"
"""The release of vLLM that the plugin is tested with."""

GROUP, PLUGIN = "vllm.general_plugins", "quantpress"


def vllm_lines(torch: str | None) -> tuple[str, ...]:
    """Version of vLLM, whether the plugin is found, and which torch vLLM asks for; empty without vLLM.

    Args:
        torch: the version of torch that is installed; None: there is none.
    """
    try:
        installed = version("vllm")
    except PackageNotFoundError:
        return ()
    tested = Version(installed).release[:2] == Version(TESTED).release
    wanted = "" if tested else f'; the plugin is tested with {TESTED} (pip install "vllm=={TESTED}.*")'
    return (f"{installed}{wanted}", _plugin(), _torch(torch))


def _plugin() -> str:
    found = [one.value for one in entry_points(group=GROUP, name=PLUGIN)]
    if not found:
        return f"finds no plugin {PLUGIN!r} in {GROUP}; install quantpress in this environment"
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        return f"does not load the plugin: VLLM_PLUGINS is {chosen!r}; add {PLUGIN}, or leave it unset"
    return f"loads the plugin {found[0]}"


def _torch(installed: str | None) -> str:
    wanted = [Requirement(one) for one in requires("vllm") or ()]
    asked = next((str(one.specifier) for one in wanted if one.name == "torch" and not one.marker), "")
    return f"asks for torch{asked}; {installed or 'none'} is installed"
