"""Presses: what of a KV cache is kept, and how precisely.

compose.py        Compose: several presses as one
turboquant.py     TurboQuant: packs what is left in 2 to 4 bits
presets.py        its settings by name
demote.py         Demote: fewer bits for tokens that a press would evict
names.py          kvpress's presses under short names, one class statement each
finch.py          Finch, whose delimiter a pipeline makes a token
declaration.py    the base classes with which names.py declares presses
base.py           what every press of ours has: |, traits, the lock, a filled cache
traits.py         what a press is: the table of traits, and questions to it
rules.py          which presses may stand together, and every reason why not
guard.py          a press's context as Compose enters it, with errors that say what is wrong
failures.py       which press failed at which context, and the remedy
expression.py     a press written as text
models/           what presses ask of a model, and how they leave it
packing/          from prefilled layers to packed layers

Importing this package imports kvpress.
"""

from quantpress.presses import names
from quantpress.presses.compose import Compose
from quantpress.presses.demote import Demote
from quantpress.presses.finch import Finch
from quantpress.presses.names import *  # noqa: F403
from quantpress.presses.turboquant import TurboQuant

__all__ = ["Compose", "Demote", "Finch", "TurboQuant"]
__all__ += names.__all__
__all__.sort()
