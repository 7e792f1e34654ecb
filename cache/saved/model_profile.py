"""What is known about a model, in one file: the statistics of its keys, for engines that share pages.

An engine that shares pages between requests cannot take the mean key and the channel weights from each
request. `quantpress calibrate` measures them once; every request is then packed with the same ones.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.cache.saved.format import FileKind, read_file, write_file
from quantpress.errors import CacheFileError, InvalidInputError, NonFiniteError
from quantpress.quantization.transform import ChannelTransform

MODEL_PROFILE = FileKind(
    entry="quantpress_profile",
    name="model profile",
    writers="`quantpress calibrate`",
    again="run `quantpress calibrate MODEL` again",
    mode=0o644,
)

_PARTS = ("mean", "weight")
_ABOUT = {"model": str, "text": str, "tokens": int, "piece_tokens": int, "fingerprint": dict}


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """What is known about a model, for engines that share pages between requests.

    Args:
        fingerprint: which models it is for, from `config_fingerprint`.
        statistics: for each layer whose cache is packed, by layer index, the transform of its keys: mean and
            weight, each [1, Hkv, D] float32, no order. Layers may differ in Hkv and D.
        model: name of the model that was measured.
        text: name of the text that it read.
        tokens: how many tokens were counted.
        piece_tokens: how many tokens it read at a time; keys at later positions were not seen.
        written_by: version of quantpress that wrote the file; None for a profile that was not loaded.

    Raises:
        InvalidInputError: a part is missing, has another shape or dtype, or a weight is not positive.
        NonFiniteError: a part holds NaN or infinity.
    """

    fingerprint: Mapping[str, Any]
    statistics: Mapping[int, ChannelTransform]
    model: str
    text: str
    tokens: int
    piece_tokens: int
    written_by: str | None = None

    def __post_init__(self) -> None:
        for index, transform in self.statistics.items():
            _check_statistics(index, transform)

    def transform(self, layer_index: int, heads: slice | None = None) -> ChannelTransform:
        """The transform of the keys of one layer.

        Args:
            layer_index: index of the layer in the model.
            heads: the KV heads of this process, where several share the model; None: all.

        Returns:
            mean and weight, each [1, h, D] float32 on the CPU, contiguous.

        Raises:
            InvalidInputError: the profile does not have this layer, or `heads` selects none of its heads.

        Example:
            >>> ones = torch.ones(1, 8, 64)
            >>> profile = ModelProfile({}, {0: ChannelTransform(0 * ones, ones)}, "m", "a novel", 4096, 2048)
            >>> profile.transform(0, slice(4, 8)).mean.shape
            torch.Size([1, 4, 64])
        """
        if layer_index not in self.statistics:
            there = ", ".join(map(str, sorted(self.statistics))) or "none"
            raise InvalidInputError(
                f"the profile of {self.model} has no statistics of layer {layer_index} (it has: {there}); "
                f"{MODEL_PROFILE.again}"
            )
        transform = self.statistics[layer_index]
        if heads is None:
            return transform
        count = next(iter(transform.tensors().values())).shape[1]
        if not range(count)[heads]:
            raise InvalidInputError(f"{heads} selects none of the {count} KV heads of layer {layer_index}")
        return transform.map(lambda part: part[:, heads].contiguous())

    def check(self, config: Any) -> None:
        """Refuse a model of another architecture or shape.

        A model of the same shape with other weights, such as a fine-tuned one, is accepted: its keys are
        packed correctly with any statistics, and more precisely with its own.

        Args:
            config: configuration of the model: that of transformers, or vLLM's `hf_config`.

        Raises:
            CacheFileError: it differs from the model that was measured; the message names the fields.
        """
        here = config_fingerprint(config)
        other = [name for name, value in self.fingerprint.items() if here.get(name) != value]
        if other:
            shown = ", ".join(
                f"{name} was {self.fingerprint[name]!r}, is {here.get(name)!r}" for name in other
            )
            raise CacheFileError(
                f"the profile was measured on another model, {self.model}: {shown}; {MODEL_PROFILE.again}, "
                "for the model that is served"
            )

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the profile, completely or not at all.

        Returns:
            Size of the file in bytes.

        Raises:
            CacheFileError: the file cannot be written.
        """
        about = {name: getattr(self, name) for name in _ABOUT}
        tensors = {
            f"layer.{index}.{name}": part[0]
            for index, transform in self.statistics.items()
            for name, part in transform.tensors().items()
        }
        return write_file(path, about, tensors, MODEL_PROFILE)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelProfile":
        """Read a profile.

        Raises:
            CacheFileError: the file does not exist, is no profile, is damaged, or was written by a quantpress
                with another format.
        """
        about, tensors = read_file(path, kind=MODEL_PROFILE)
        try:
            for name, kind in _ABOUT.items():
                if not isinstance(about.get(name), kind):
                    raise InvalidInputError(f"its {name} is {about.get(name)!r}")
            statistics = _statistics(tensors)
            return cls(
                **{name: about[name] for name in _ABOUT},
                statistics=statistics,
                written_by=about.get("quantpress"),
            )
        except InvalidInputError as error:
            raise CacheFileError(
                f"{path} is no usable model profile: {error}; {MODEL_PROFILE.again}"
            ) from error


def _statistics(tensors: Mapping[str, torch.Tensor]) -> dict[int, ChannelTransform]:
    """The transforms from the tensors of a file, copied, so that the file may change."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if start != "layer" or not index.isdecimal() or part not in _PARTS:
            raise InvalidInputError(f"it holds {name!r}")
        layers.setdefault(int(index), {})[part] = tensor.clone()[None]
    return {index: ChannelTransform(**parts) for index, parts in sorted(layers.items())}


def _check_statistics(index: int, transform: ChannelTransform) -> None:
    parts = transform.tensors()
    if set(parts) != set(_PARTS):
        raise InvalidInputError(f"layer {index} has {sorted(parts)}, not mean and weight")
    for name, part in parts.items():
        if part.dtype != torch.float32 or part.shape[0] != 1 or not part.numel():
            raise InvalidInputError(
                f"the {name} of layer {index} is {part.dtype} {tuple(part.shape)}, not float32 [1, Hkv, D]"
            )
        if not bool(part.isfinite().all()):
            raise NonFiniteError(f"the {name} of layer {index} holds NaN or infinity")
    if not bool((parts["weight"] > 0).all()):
        raise InvalidInputError(f"a weight of layer {index} is not positive")
