"""The press that `enable` has put on a model."""

from kvpress import BasePress
from torch import nn

ENABLED = "_quantpress_enabled"
"""The attribute of a model that holds its `Enabled`."""


def enabled_press(model: nn.Module) -> BasePress | None:
    """The press of an enabled model; None for any other model."""
    press: BasePress | None = getattr(vars(model).get(ENABLED), "press", None)
    return press
