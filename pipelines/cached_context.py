"""`CachedContext`: a context that was read, ready to be asked about, now or in another process."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress, DMSPress
from transformers import Cache, PreTrainedModel

from quantpress.cache import CacheMemory, PackedLayer, cache_memory, install_packed_attention
from quantpress.cache.cache_file import read_file, write_file
from quantpress.cache.fingerprint import difference, model_fingerprint
from quantpress.cache.parts import Parts
from quantpress.cache.saved_codec import codec_parts
from quantpress.cache.saved_layers import cache_of, cache_parts
from quantpress.cache.settings import LayerSettings
from quantpress.errors import CacheFileError, InvalidInputError, QuantPressError
from quantpress.pipelines.members import decode_time_presses, members
from quantpress.pipelines.preserve import MASKS
from quantpress.presses.model_support import attention_modules, full_attention_modules
from quantpress.presses.turboquant import TurboQuant

Masks = dict[int, tuple[torch.Tensor, ...]]


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
        model: what tells the model that read it from others; see `quantpress.cache.fingerprint`.
        after: what the chat form puts between a question and its answer.
        press: what it was read under; None for nothing, and for a context that was loaded.
        description: that press in words.
        masks: what head-wise presses hide beside what the cache has let go: (batch, head, slot) by layer.

    Example:
        >>> # context = pipe.read(text, press="SnapKV(0.5) | TurboQuant(4)")
        >>> # context.save("book.safetensors")                              # another day, another process:
        >>> # context = CachedContext.load("book.safetensors", pipe.model)
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
            UnsupportedModelError: a weight is not in memory.
        """
        if any(isinstance(member, DMSPress) and member.decoding for member in members(press)):
            raise InvalidInputError(
                "DMSPress(decoding=True) keeps scores of one context on itself, which a CachedContext cannot "
                "take along; read with decoding=False, or ask the text itself"
            )
        masks = {
            int(module.layer_idx): tuple(getattr(module, MASKS))  # type: ignore[arg-type]
            for module in attention_modules(model)
            if getattr(module, MASKS, None) is not None
        }
        known = model_fingerprint(model)
        return cls(cache, tokens_seen, token_ids, known, after, press, repr(press), masks)

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
        install_packed_attention()
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
        parts = cache_parts(self.cache)
        masks = {
            str(layer): Parts("masks", tensors=dict(zip(("batch", "head", "slot"), indices, strict=True)))
            for layer, indices in self.masks.items()
        }
        whole = Parts(
            "context",
            {"tokens_seen": self.tokens_seen, "after": self.after, "press": self.description},
            {"token_ids": self.token_ids},
            {"cache": parts, "masks": Parts("all_masks", inner=masks)},
        )
        return write_file(path, {"model": self.model, "context": whole.outline()}, whole.flat())

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
            UnsupportedModelError: a weight of the model is not in memory.
        """
        about, tensors = read_file(path, verify)
        known = model_fingerprint(model)
        reason = difference(about.get("model") or {}, known)
        if reason is not None:
            raise CacheFileError(f"{path} was packed with another model: {reason}")
        try:
            whole = Parts.from_outline(about.get("context"), tensors)
            cache = cache_of(_placed(whole.inner["cache"], model))
            masks = {
                int(layer): _placed_masks(part, layer, model)
                for layer, part in whole.inner["masks"].inner.items()
            }
            text = {name: str(whole.about[name]) for name in ("after", "press")}
            context = cls(
                cache,
                int(whole.about["tokens_seen"]),
                whole.tensors["token_ids"],
                known,
                text["after"],
                description=text["press"],
                masks=masks,
            )
        except (QuantPressError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CacheFileError(f"{path} cannot be used: {error}") from error
        if press is not None:
            _check_press(path, context, model, press)
        install_packed_attention()
        return context


def _set_masks(module: Any, masks: Any) -> None:
    if masks is None:
        vars(module).pop(MASKS, None)
    else:
        setattr(module, MASKS, masks)


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """Where each attention module computes."""
    return [
        next((weight.device for weight in module.parameters()), model.device)
        for module in attention_modules(model)
    ]


def _placed(parts: Parts, model: PreTrainedModel) -> Parts:
    """Layer by layer where the model wants it; what is on the CPU stays mapped."""
    devices = _devices(model)
    if len(parts.inner) != len(devices):
        raise InvalidInputError(f"it has {len(parts.inner)} layers, the model has {len(devices)}")
    layers = {index: _moved(part, devices[int(index)]) for index, part in parts.inner.items()}
    return Parts(parts.kind, parts.about, parts.tensors, layers)


def _placed_masks(part: Parts, layer: str, model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    moved = _moved(part, _devices(model)[int(layer)])
    return tuple(moved.tensors[name] for name in ("batch", "head", "slot"))


def _moved(parts: Parts, device: torch.device) -> Parts:
    return parts if device.type == "cpu" else parts.map(lambda tensor: tensor.to(device))


def _check_press(path: Any, context: CachedContext, model: PreTrainedModel, press: BasePress) -> None:
    """Refuse codecs and settings other than those that a press would use."""
    quantizer = next((one for one in members(press) if isinstance(one, TurboQuant)), None)
    for module in full_attention_modules(model):
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layer = context.cache.layers[index]
        found = layer.settings if isinstance(layer, PackedLayer) else None
        wanted = None
        if quantizer is not None:
            keys, values = (getattr(layer, side).shape[-1] for side in ("keys", "values"))
            sinks = found.sink_tokens if found else quantizer.sink_tokens
            wanted = quantizer.layer_settings(module, keys, values, sinks)
        if found != wanted:
            before, now = _fields(found), _fields(wanted)
            names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            shown = ", ".join(f"{name} {before.get(name)!r} where it has {now.get(name)!r}" for name in names)
            raise CacheFileError(
                f"{path} was not packed as {press!r} packs: layer {index} has {shown}; pack it again, or load it "
                "without press="
            )


def _fields(settings: LayerSettings | None) -> dict[str, Any]:
    """The settings of a layer as plain values; nothing for a layer that is not packed."""
    if settings is None:
        return {"packed": False}
    fields: dict[str, Any] = {"packed": True}
    for name, value in vars(settings).items():
        if name.endswith("_codec"):
            about = codec_parts(value).about
            fields |= {f"{name[:-5]}{field}": one for field, one in about.items() if field != "constants"}
        else:
            fields[name] = value
    return fields
