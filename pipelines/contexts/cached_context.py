"""`CachedContext`: a context that was read, ready for questions, now or in another process."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from quantpress.cache import CacheMemory, PackedLayer, cache_memory, host
from quantpress.cache.ranks import Ranks, ranks_of
from quantpress.cache.saved.fingerprint import difference, model_fingerprint
from quantpress.errors import InvalidInputError
from quantpress.pipelines.attention_masks import HiddenSlots, hidden_slots, hiding
from quantpress.pipelines.contexts.saved_context import (
    SavedContext,
    check_packed_by,
    load_context,
    save_context,
    steady_fingerprint,
)
from quantpress.pipelines.press_argument import AnyPress, as_press
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.filling import check_keeps
from quantpress.presses.traits import decode_time_presses, import_kvpress, short_repr, traits_of


@dataclass(eq=False)
class CachedContext:
    """A context that was read: its cache, and everything needed to continue from it.

    `TextGenerationPipeline.read` makes one, and the pipeline takes one wherever it takes a text. Questions
    never change it.

    **A saved context contains the prompt**: its token ids as they are, and its keys and values, from which
    the text can be recovered. Only its owner can read the file (mode 0600). Treat it as you treat the text.

    Args:
        cache: the context's keys and values.
        tokens_seen: the position of the next token.
        token_ids: [1, T] int64, the context.
        model: the fingerprint of the model that read it; see `quantpress.cache.saved.fingerprint`.
        after: what the chat form puts between a question and its answer.
        press: the press that it was read under; None for no press, and for a context that was loaded.
        description: that press in words.
        masks: the slots that head-wise presses hide and the cache still holds: (batch, head, slot) indices by
            layer.
        ranks: the processes that share the model, if there are several; each has the keys and values of its
            own heads.

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
    masks: HiddenSlots = field(default_factory=dict)
    ranks: Ranks | None = None

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
            model: the model that has read the context.
            cache: the cache that it was read into. It belongs to the result from now on.
            token_ids: [1, T] int64, the context.
            tokens_seen: the position of the next token.
            press: the press that it was read under.
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
        masks = {layer: tuple(slots) for layer, slots in hidden_slots(model).items()}
        known = model_fingerprint(model)
        described = "None" if press is None else short_repr(press)
        return cls(cache, tokens_seen, token_ids, known, after, press, described, masks, ranks_of(model))

    @property
    def memory(self) -> CacheMemory:
        """What the cache holds. For a loaded context, what it would hold if all of it were used."""
        return cache_memory(self.cache)

    def branch(self) -> Cache:
        """A cache that shares this memory. Tokens added to one of the two never show in the other."""
        cache = copy.copy(self.cache)
        cache.layers = [host.copied(layer) for layer in self.cache.layers]
        for layer, own in zip(cache.layers, self.cache.layers, strict=True):
            if isinstance(layer, PackedLayer) and isinstance(own, PackedLayer):
                layer.restore(own.snapshot())
        return cache

    @contextmanager
    def opened(self, model: PreTrainedModel) -> Iterator[Cache]:
        """A branch for `model.generate` of your own, while the model hides what head-wise presses hid.

        Args:
            model: the model that read the context, or the same one loaded again.

        Raises:
            InvalidInputError: another model read the context.
            UnsupportedModelError: the model ignores its cache: training mode with gradient checkpointing.

        Example:
            >>> # with context.opened(model) as cache:
            >>> #     inputs = continue_inputs(cache, question_ids, tokens_seen=context.tokens_seen)
            >>> #     model.generate(**inputs, past_key_values=cache)
        """
        reason = difference(self.model, steady_fingerprint(model))
        if reason is not None:
            raise InvalidInputError(
                f"this context was read by another model: {reason}; read it again with this one"
            )
        check_keeps(model)
        with hiding(model, self.masks):
            yield self.branch()

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the context to one safetensors file, which contains the prompt.

        The file has mode 0600, and it is complete or not there at all. Processes that share a model
        (`tp_plan`) all call this, and the first writes one file with all heads.

        Args:
            path: the file; an older one of this name is replaced. A URL that fsspec knows, such as
                s3://bucket/name, writes it there; who can read it is then the place's own matter.

        Returns:
            The number of bytes written.

        Raises:
            CacheFileError: the file system refuses.
            InvalidInputError: a layer or codec cannot be saved, the press acts during decoding too, several
                processes have heads that keep different numbers of tokens, or the protocol of a URL is
                unknown.
            MissingPackageError: the package for a URL is not installed.
        """
        check_saved(self.press)
        saved = SavedContext(
            self.cache, self.tokens_seen, self.token_ids, self.after, self.description, self.masks
        )
        return save_context(saved, self.model, path, self.ranks)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        press: AnyPress = None,
        verify: bool = True,
    ) -> "CachedContext":
        """Map a saved context into memory.

        On the CPU, pages are read from the file when attention first uses them. For a model on another device
        they are moved there now. Processes that share a model all call this, and each takes its own heads. Do
        not change the file in place meanwhile; it may be replaced or deleted.

        Args:
            path: a file that `save` or `quantpress pack` wrote, or its URL. A remote file is fetched through
                the folder for temporary files, and mapped from there.
            model: the model that read the context.
            press: refuse a context that this press would have packed differently (widths, seed, ...). It is
                given as to `TextGenerationPipeline`.
            verify: compare every tensor with its SHA-256, which reads the whole file once.

        Raises:
            CacheFileError: the file is damaged or cut short, or was made by another version, model, rotation
                or press; the message says which.
            InvalidInputError, CompositionError: `model` is no model, or `press` is no press.
            UnsupportedModelError: a weight of the model was never loaded.
            MissingPackageError: a head-wise press hides tokens of the context, and there is no kvpress; or
                the package for a URL is not installed.
        """
        wanted = as_press(press)
        if not isinstance(model, nn.Module):
            raise InvalidInputError(f"a {type(model).__name__} is no model; give one, such as pipe.model")
        known = steady_fingerprint(model)
        saved = load_context(path, model, known, verify)
        context = cls(
            saved.cache,
            saved.tokens_seen,
            saved.token_ids,
            known,
            saved.after,
            description=saved.press,
            masks=saved.masks,
            ranks=ranks_of(model),
        )
        if context.masks:  # layers in 16 bits hide slots by kvpress's attention
            import_kvpress(f"{path}, read under a press that evicts head by head,")
        if wanted is not None:
            check_packed_by(wanted, model, context.cache, str(path))
        return context


def check_saved(press: BasePress | None) -> None:
    """Check that a context read under a press can be saved.

    Raises:
        InvalidInputError: the press acts during decoding, which a file cannot.
    """
    if decode_time_presses(press):
        raise InvalidInputError(
            f"{short_repr(press)} acts during decoding, which a file cannot: read under the presses of "
            "the prefill only, and give the others when asking"
        )
