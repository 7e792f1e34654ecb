"""Presses: what of a KV cache is kept, and how precisely.

compose.py        Compose: several presses as one
turboquant.py     TurboQuant: packs what is left in 2 to 4 bits
presets.py        its settings by name
demote.py         Demote: fewer bits for tokens that a press would evict
names.py          kvpress's presses under short names, one class statement each
finch.py          Finch, whose delimiter a pipeline makes a token
arguments.py      which arguments and values a press takes; presses given as classes
base.py           the base classes with which names.py declares presses; what all presses of ours have
traits.py         what a press is: the table of traits, and what is read from it
rules.py          which presses may stand together, and every reason why not
guard.py          a press's context, with errors that name the press and the remedy
expression.py     a press written as text
models/           what presses ask of a model, and how they leave it
packing/          from prefilled layers to packed layers

Importing this package imports kvpress.
"""

from typing import TYPE_CHECKING, Any

from quantpress.errors import unknown_name
from quantpress.presses import names
from quantpress.presses.compose import Compose as Compose
from quantpress.presses.demote import Demote as Demote
from quantpress.presses.finch import Finch as Finch
from quantpress.presses.names import *  # noqa: F403
from quantpress.presses.turboquant import TurboQuant as TurboQuant

if not TYPE_CHECKING:
    __all__ = sorted(["Compose", "Demote", "Finch", "TurboQuant", *names.__all__])

    def __getattr__(name: str) -> Any:
        raise unknown_name(__name__, name, __all__)
