"""`CachedContext`: a context that was read, ready to be asked about, now or in another process."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress
from transformers import Cache, PreTrainedModel

from quantpress.cache import CacheMemory, PackedLayer, cache_memory
from quantpress.cache.saved.fingerprint import difference, model_fingerprint
from quantpress.cache.tokens.evicted_slots import MASKS, named_to_hide
from quantpress.errors import InvalidInputError
from quantpress.pipelines.contexts.saved_context import Masks, check_packed_by, load_context, save_context
from quantpress.presses.models.filling import check_keeps
from quantpress.presses.models.support import attention_modules
from quantpress.presses.traits import decode_time_presses, short_repr, traits_of


@dataclass(eq=False)
class CachedContext:
    """A context that was read: its cache, and all it takes to go on from it.

    `TextGenerationPipeline.read` makes one, and the pipeline takes one wherever it takes a text.
    Questions never change it.

    **A saved context contains the prompt**: its token ids as they are, its keys and values, from which
    the text can be told. The file is readable by its owner only (mode 0600); treat it as you treat the text.

    Args:
        cache: the context's keys and values.
        tokens_seen: the position of the next token.
        token_ids: [1, T] int64, the context.
        model: what tells the model that read it from others; see `quantpress.cache.saved.fingerprint`.
        after: what the chat form puts between a question and its answer.
        press: what it was read under; None for nothing, and for a context that was loaded.
        description: that press in words.
        masks: what head-wise presses hide beside what the cache has let go: (batch, head, slot) by layer.

    Example:
        >>> # context = pipe.read(text, press="SnapKV(0.5) | TurboQuant(4)")
        >>> # context.save("book.safetensors")
        >>> # context = CachedContext.load("book.safetensors", pipe.model)  # another day, another process
        >>> # pipe(context, questions=["Who?", "Where?"])["answers"]
    """

    cache: Cache
    tokens_seen: int
    token_ids: torch.Tensor
    model: dict[str, Any]
    after: str = ""
    press: BasePress | None = None
    description: str = "None"
    masks: Masks = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        cache: Cache,
        token_ids: torch.Tensor,
        tokens_seen: int,
        press: BasePress | None = None,
        after: str = "",
    ) -> "CachedContext":
        """Take what a prefill has left in a cache and on a model's attention modules.

        Args:
            model: has read the context.
            cache: what it was read into; belongs to the result from now on.
            token_ids: [1, T] int64.
            tokens_seen: the position of the next token.
            press: what it was read under.
            after: as for the class.

        Raises:
            InvalidInputError: the press keeps notes about the context on itself.
            UnsupportedModelError: a weight was never loaded.
        """
        if any(traits_of(member).keeps_scores for member in decode_time_presses(press)):
            raise InvalidInputError(
                "DMSPress(decoding=True) keeps scores of one context on itself, which a CachedContext cannot "
                "take along; read with decoding=False, or ask the text itself"
            )
        masks = {
            int(module.layer_idx): tuple(named_to_hide(module))  # type: ignore[arg-type]
            for module in attention_modules(model)
            if named_to_hide(module) is not None
        }
        known = model_fingerprint(model)
        described = "None" if press is None else short_repr(press)
        return cls(cache, tokens_seen, token_ids, known, after, press, described, masks)

    @property
    def memory(self) -> CacheMemory:
        """What the cache holds; of a loaded one, what it would hold when all of it is used."""
        return cache_memory(self.cache)

    def branch(self) -> Cache:
        """A cache over the same memory: what one of the two is given never shows in the other."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer, own in zip(cache.layers, self.cache.layers, strict=True):
            if isinstance(layer, PackedLayer) and isinstance(own, PackedLayer):
                layer.restore(own.snapshot())
        return cache

    @contextmanager
    def opened(self, model: PreTrainedModel) -> Iterator[Cache]:
        """For `model.generate` of your own: a branch, while the model hides what head-wise presses hid.

        Args:
            model: the one that read the context, or the same loaded again.

        Raises:
            InvalidInputError: another model.
            UnsupportedModelError: it is in a state in which it looks at no cache: training mode with gradient
                checkpointing.

        Example:
            >>> # with context.opened(model) as cache:
            >>> #     inputs = continue_inputs(cache, question_ids, tokens_seen=context.tokens_seen)
            >>> #     model.generate(**inputs, past_key_values=cache)
        """
        reason = difference(self.model, model_fingerprint(model))
        if reason is not None:
            raise InvalidInputError(
                f"this context was read by another model: {reason}; read it again with this one"
            )
        check_keeps(model)
        modules = attention_modules(model)
        before = [vars(module).get(MASKS) for module in modules]
        try:
            for module in modules:
                _set_masks(module, self.masks.get(int(module.layer_idx)))  # type: ignore[arg-type]
            yield self.branch()
        finally:
            for module, masks in zip(modules, before, strict=True):
                _set_masks(module, masks)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write it to one safetensors file, which holds the prompt: mode 0600, complete or not there at all.

        Args:
            path: an older file of this name is replaced.

        Returns:
            Bytes written.

        Raises:
            CacheFileError: the file system refuses.
            InvalidInputError: a layer or codec cannot be saved, or the press acts during decoding too.
        """
        if decode_time_presses(self.press):
            raise InvalidInputError(
                f"{self.description} acts during decoding, which a file cannot: read under the presses of "
                "the prefill only, and give the others when asking"
            )
        return save_context(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        press: BasePress | None = None,
        verify: bool = True,
    ) -> "CachedContext":
        """Map a saved context into memory.

        On the CPU, pages are read from the file when attention gets to them; for a model on another device
        they are moved there. Do not change the file in place meanwhile; replacing or deleting it is safe.

        Args:
            path: what `save` or `quantpress pack` wrote.
            model: the model that read the context.
            press: refuse a context that was packed in another way than by this press (widths, seed, ...).
            verify: compare every tensor with its SHA-256, which reads the file through once.

        Raises:
            CacheFileError: damaged, cut short, of another version, model, rotation or press; with the reason.
            UnsupportedModelError: a weight of the model was never loaded.
        """
        known = model_fingerprint(model)
        saved = load_context(path, model, known, verify)
        context = cls(
            saved.cache,
            saved.tokens_seen,
            saved.token_ids,
            known,
            saved.after,
            description=saved.press,
            masks=saved.masks,
        )
        if press is not None:
            check_packed_by(press, model, context.cache, str(path))
        return context


def _set_masks(module: Any, masks: Any) -> None:
    if masks is None:
        vars(module).pop(MASKS, None)
    else:
        setattr(module, MASKS, masks)
