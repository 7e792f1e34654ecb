"""What is known about a model, in one file: the statistics of its keys, for engines that share pages.

An engine that shares pages between requests cannot take the mean key and the channel weights from each
request. `quantpress calibrate` measures them once; every request is then packed with the same ones.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from quantpress.cache.saved.config_fingerprint import changed_fields
from quantpress.cache.saved.format import FileKind, read_file, write_file
from quantpress.errors import CacheFileError, InvalidInputError, NonFiniteError
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.transform import ChannelTransform

MODEL_PROFILE = FileKind(
    entry="quantpress_profile",
    name="model profile",
    writers="`quantpress calibrate`",
    again="run `quantpress calibrate MODEL` again",
    mode=0o644,
)

_PARTS = ("mean", "weight")
_QUERY_PARTS = {"query_mean": "mean", "query_variance": "variance"}
_QUERY_DTYPE = torch.bfloat16  # in the file: they only choose a key of each page
_ABOUT = {"model": str, "text": str, "tokens": int, "piece_tokens": int, "fingerprint": dict}


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """What is known about a model, for engines that share pages between requests.

    Args:
        fingerprint: which models it is for, from `config_fingerprint`.
        statistics: for each layer whose cache is packed, by layer index, the transform of its keys: mean and
            weight, each [1, Hkv, D] float32, no order. Layers may differ in Hkv and D.
        queries: by layer index, the moments of its queries, where they are known.
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
    queries: Mapping[int, QueryMoments] = field(default_factory=dict)
    written_by: str | None = None

    def __post_init__(self) -> None:
        for index, transform in self.statistics.items():
            _check_statistics(index, transform)
        for index, moments in self.queries.items():
            _check_queries(index, moments, self.statistics.get(index))

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

    def query_moments(
        self, layer_index: int, heads: slice | None = None, group: slice | None = None
    ) -> QueryMoments | None:
        """Moments of the queries of one layer; None where they are not known.

        Args:
            layer_index: index of the layer in the model.
            heads: the KV heads of this process, where several share the model; None: all.
            group: the query heads of each of them that this process has; None: all.

        Returns:
            mean and variance, each [h, g, D] float32 on the CPU, contiguous.
        """
        moments = self.queries.get(layer_index)
        if moments is None or (heads is None and group is None):
            return moments
        own = heads or slice(None), group or slice(None)
        return moments.map(lambda part: part[own].contiguous())

    def check(self, config: Any) -> None:
        """Refuse a model of another architecture or shape.

        A model of the same shape with other weights, such as a fine-tuned one, is accepted: its keys are
        packed correctly with any statistics, and more precisely with its own.

        Args:
            config: configuration of the model: that of transformers, or vLLM's `hf_config`.

        Raises:
            CacheFileError: it differs from the model that was measured; the message names the fields.
        """
        changed = changed_fields(self.fingerprint, config)
        if changed:
            raise CacheFileError(
                f"the profile was measured on another model, {self.model}: {changed}; {MODEL_PROFILE.again}, "
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
        tensors |= {
            f"layer.{index}.{name}": getattr(moments, part).to(_QUERY_DTYPE)
            for index, moments in self.queries.items()
            for name, part in _QUERY_PARTS.items()
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
            layers = _parts_of_layers(tensors)
            return cls(
                **{name: about[name] for name in _ABOUT},
                statistics=_statistics(layers),
                queries=_queries(layers),
                written_by=about.get("quantpress"),
            )
        except InvalidInputError as error:
            raise CacheFileError(
                f"{path} is no usable model profile: {error}; {MODEL_PROFILE.again}"
            ) from error


def _parts_of_layers(tensors: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """The tensors of a file by layer and name, copied, so that the file may change."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if start != "layer" or not index.isdecimal() or part not in (*_PARTS, *_QUERY_PARTS):
            raise InvalidInputError(f"it holds {name!r}")
        layers.setdefault(int(index), {})[part] = tensor.clone()
    return dict(sorted(layers.items()))


def _statistics(layers: Mapping[int, dict[str, torch.Tensor]]) -> dict[int, ChannelTransform]:
    return {
        index: ChannelTransform(**{name: parts[name][None] for name in _PARTS if name in parts})
        for index, parts in layers.items()
    }


def _queries(layers: Mapping[int, dict[str, torch.Tensor]]) -> dict[int, QueryMoments]:
    queries = {}
    for index, parts in layers.items():
        there = {part: parts[name].float() for name, part in _QUERY_PARTS.items() if name in parts}
        if len(there) == 1:
            raise InvalidInputError(f"layer {index} has only the {next(iter(there))} of its queries")
        if there:
            queries[index] = QueryMoments(**there)
    return queries


def _check_queries(index: int, moments: QueryMoments, transform: ChannelTransform | None) -> None:
    shape = None if transform is None or transform.mean is None else transform.mean.shape[1:]
    if shape is None or moments.mean.shape[::2] != shape:
        raise InvalidInputError(
            f"moments of queries of layer {index} are {tuple(moments.mean.shape)}, not [Hkv, G, D] with Hkv "
            "and D of its keys"
        )
    if not bool(moments.mean.isfinite().all() & moments.variance.isfinite().all()):
        raise NonFiniteError(f"the queries of layer {index} hold NaN or infinity")
    if not bool((moments.variance >= 0).all()):
        raise InvalidInputError(f"a variance of the queries of layer {index} is negative")


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
