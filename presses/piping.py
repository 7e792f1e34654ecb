"""What our presses have beside kvpress's: `|`, one thread at a time, an error where nothing is cached.

`SnapKV(0.5) | TurboQuant(4)` is `Compose([SnapKV(0.5), TurboQuant(4)])`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvpress import BasePress
from transformers.modeling_utils import PreTrainedModel

from quantpress.presses.models.filling import filled_caches
from quantpress.presses.models.lock import model_lock

if TYPE_CHECKING:
    from quantpress.presses.compose import Compose


class Pipeable:
    """Goes before a press class of kvpress: adds `|`, whose other side may be any press or press class."""

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """Apply the press to every prefill inside the context; other threads wait for the model meanwhile.

        Raises:
            UnsupportedModelError, InvalidInputError: as for `filled_caches`.
        """
        upstream: Any = super()
        with model_lock(model), filled_caches(model), upstream.__call__(model):
            yield

    def __or__(self, other: Any) -> "Compose":
        return _compose(self, other) if _is_press(other) else NotImplemented

    def __ror__(self, other: Any) -> "Compose":
        return _compose(other, self) if _is_press(other) else NotImplemented


def _is_press(press: Any) -> bool:
    return isinstance(press, BasePress) or (isinstance(press, type) and issubclass(press, BasePress))


def _compose(*presses: Any) -> "Compose":
    from quantpress.presses.compose import Compose

    return Compose(presses)
