"""`TurboQuant`: the press that keeps every token and stores it in a few bits a number."""

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from quantpress.cache.saved.width_plan import WidthPlan
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.head_groups import by_head
from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.scalar import ScalarPages
from quantpress.codecs.trellis import TrellisPages
from quantpress.errors import InvalidInputError
from quantpress.presses.base import PressMixin
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.attention import attention_modules, full_attention_modules
from quantpress.presses.models.eligibility import PACKABLE, check
from quantpress.presses.models.filling import filled_caches
from quantpress.presses.models.old_names import name_old_until_unhooked
from quantpress.presses.models.restore import left_as_found
from quantpress.presses.packing.filled_cache import pack_cache
from quantpress.presses.packing.pack_layers import Packer
from quantpress.presses.presets import PRESETS
from quantpress.presses.ranks import own_heads
from quantpress.quantization.codebook import CODEBOOK_FORMS
from quantpress.quantization.spec import CodecSpec

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

CodecFactory = Callable[[int, str, int], PageCodec]
LayerBits = Mapping[int, float | tuple[float, float]]

UNPACKED_BITS = 16
"""In `layer_bits`: leave this layer as it is."""

DEFAULT_BITS = 4
"""Code width without `bits` and without a plan."""

FITS = "quantpress.evaluation.fitting.fit"
"""The module of the work of `TurboQuant.fit`, imported when it is called."""

TRELLIS = "trellis"
"""In `codebook`: trellis codes."""

SCALAR_BITS = 8
"""The width of which there are no trellis codes."""

_REFERENCE_HEAD_DIM = 128


@dataclass
class TurboQuant(
    PressMixin,
    BasePress,
    quantizes=True,
    keeps_tokens=True,
    widths_by_head=lambda press: press.widths_by_head,
):
    """Packs the KV cache at the end of the prefill: random rotation, scalar codes, one scale per vector.

    Use it alone, last in `Compose`, or last in kvpress's `ComposedPress`. Later tokens are packed too, page
    by page. Sliding-window layers stay as they are. Run the prefill under `torch.no_grad()` or
    `torch.inference_mode()`: with autograd it works, but the graph keeps the unpacked keys and values alive.

    Args:
        bits: code width of keys and values: 1, 2, 3, 4, 8 or a fraction between 1 and 4; left out, 4, unless
            there is a plan.
        key_bits: code width of keys, if it differs.
        value_bits: code width of values, if it differs.
        sink_tokens: first tokens of the text kept in 16 bits.
        recent_tokens: at least this many of the last tokens are kept in 16 bits.
        mean_key: subtract each head's mean key before encoding.
        balance: weight each head's key channels by what its queries need.
        rotation: "hadamard", "haar" or "identity".
        seed: seed of the rotation.
        scale: the stored scale: "auto", "norm_corrected", "unbiased" or "norm"; see `CodecSpec`.
        codebook: "int8", "lloyd_max", or "trellis": codes of whole vectors, with less error at the same
            bytes, for widths of 1, 2, 3 and 4; 8 bits stay scalar. Packing takes long.
        estimator: estimator of keys: "mse", or "prod" for the paper's 1-bit sketch of the residual. Values
            always use "mse".
        layer_bits: widths of single layers, by layer index, as bits or (key bits, value bits); 16 leaves a
            layer unpacked. Negative indices count from the last layer.
        balance_window: how many of the last queries of the prefill the balance looks at.
        codec: a function of (head_dim, "key" or "value", layer index) that makes the codec. It replaces
            widths, rotation, scale, scale dtype, codebook and estimator; `layer_bits` and `boundary_bits` can
            then only be 16.
        detect_sinks: how many more tokens of each head are kept in 16 bits: those that the last queries of
            the prefill attend to most, wherever they are. Cropping such a layer to less than its context
            drops tokens in the order in which they are stored. A padded batch has none, and a warning says
            so.
        boundary_layers: how many of the first layers, and of the last ones, get `boundary_bits`, unless
            `layer_bits` names them.
        boundary_bits: widths of those layers, as bits or (key bits, value bits); 16 leaves them unpacked.
        scale_dtype: dtype of the stored scales: "float16", "bfloat16", "float32", or "auto", which is float16
            except in layers that need float32; see `CodecSpec`.
        plan: widths of every layer, or of every KV head, from `quantpress fit`: the path of its file, or a
            `WidthPlan`. It replaces `bits`, `key_bits`, `value_bits`, `layer_bits`, `boundary_layers` and
            `codec`.

    Raises:
        UnsupportedBitsError: a width cannot be stored.
        InvalidInputError: another argument has a value that cannot be used.
        CacheFileError: `plan` is a file that is no plan.

    Source: TurboQuant, arXiv 2504.19874; mean key and balanced channels: `quantpress.quantization.transform`.

    Example:
        >>> TurboQuant(bits=3).bits_per_value(head_dim=128)
        3.125
        >>> press = TurboQuant.preset("quality", sink_tokens=8)
        >>> press.key_bits, press.value_bits, press.sink_tokens
        (8, 4, 8)
    """

    remedies: ClassVar[Mapping[str, str]] = {
        "compression_ratio": "it evicts nothing; give the width as bits=, and an evicting press in front: "
        "SnapKV(compression_ratio=0.5) | TurboQuant(bits=4)",
    }

    bits: float | None = None
    key_bits: float | None = None
    value_bits: float | None = None
    sink_tokens: int = 4
    recent_tokens: int = 128
    mean_key: bool = True
    balance: bool = True
    rotation: str = "hadamard"
    seed: int = 0
    scale: str = "auto"
    codebook: str = "int8"
    estimator: str = "mse"
    layer_bits: LayerBits | None = None
    balance_window: int = 256
    codec: CodecFactory | None = None
    detect_sinks: int = 0
    boundary_layers: int = 0
    boundary_bits: float | tuple[float, float] = UNPACKED_BITS
    scale_dtype: str = "auto"
    plan: WidthPlan | str | os.PathLike[str] | None = None

    warned_of_short_context = False  # no field: presses that differ in it are equal

    def __post_init__(self) -> None:
        self._take_plan()
        self._check_kinds()
        for index in (None, *(self.layer_bits or {})):
            if index is not None and not isinstance(index, int):
                raise InvalidInputError(f"layer_bits names layer {index!r}; give the index of a layer")
            if self.codec is None:
                self._codecs(index, 0, _REFERENCE_HEAD_DIM, _REFERENCE_HEAD_DIM)
        if self.codec is not None:
            self._check_unpacked(self.codec)
        elif self.boundary_layers:
            replace(self, layer_bits={0: self.boundary_bits}, boundary_layers=0)  # checks them

    def _take_plan(self) -> None:
        """Read the plan, and refuse what it replaces; without one, give `bits` its default."""
        if self.plan is None:
            self.bits = DEFAULT_BITS if self.bits is None else self.bits
            return
        if isinstance(self.plan, (str, os.PathLike)):
            self.plan = WidthPlan.load(self.plan)
        if not isinstance(self.plan, WidthPlan):
            raise InvalidInputError(
                f"plan is {self.plan!r}; give the path of a file that `quantpress fit` wrote, or a WidthPlan"
            )
        for name in ("bits", "key_bits", "value_bits", "layer_bits", "boundary_layers", "codec"):
            value = getattr(self, name)
            if value is not None and value != 0:
                raise InvalidInputError(
                    f"{name}={value!r} was given beside plan={self.plan!r}, which has the widths of every "
                    f"layer: leave {name} out, or the plan"
                )

    def _check_kinds(self) -> None:
        for name in ("sink_tokens", "recent_tokens", "balance_window", "detect_sinks", "boundary_layers"):
            value, least = getattr(self, name), int(name == "balance_window")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidInputError(f"{name} is {value!r}; give a whole number, {least} or more")
        for name in ("mean_key", "balance"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInputError(f"{name} is {getattr(self, name)!r}; give True or False")
        if self.codebook not in (forms := (*CODEBOOK_FORMS, TRELLIS)):
            raise InvalidInputError(f"codebook is {self.codebook!r}; use one of {', '.join(forms)}")
        if self.codebook == TRELLIS and self.estimator != "mse":
            raise InvalidInputError(
                f"estimator={self.estimator!r} is for scalar codes: leave it out, or codebook={TRELLIS!r}"
            )
        if self.layer_bits is not None and not isinstance(self.layer_bits, Mapping):
            raise InvalidInputError(
                f"layer_bits is {self.layer_bits!r}; give a dict from layer index to bits, such as {{0: 8}}"
            )
        if self.codec is not None and not callable(self.codec):
            raise InvalidInputError(
                f'codec is {self.codec!r}; give a function of (head_dim, "key" or "value", layer index)'
            )

    def _check_unpacked(self, codec: CodecFactory) -> None:
        """Refuse widths beside `codec`, other than the 16 that leaves a layer unpacked."""
        named = {f"layer_bits[{index}]": bits for index, bits in (self.layer_bits or {}).items()}
        if self.boundary_layers:
            named["boundary_bits"] = self.boundary_bits
        for name, bits in named.items():
            if _pair(bits) != (UNPACKED_BITS, UNPACKED_BITS):
                raise InvalidInputError(
                    f"{name} is {bits!r}, but codec={codec!r} decides how layers are packed: give 16 to "
                    "leave layers unpacked, and choose by layer inside codec otherwise"
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TurboQuant":
        """Settings by name: "quality" (8-bit keys, 4-bit values), "balanced" (4/4), "small" (3/3), "paper".

        The first three detect 8 sinks in each head and keep 64 recent tokens. This is closer to the
        uncompressed model, in fewer bytes, than the 128 recent tokens of `TurboQuant()`. Tokens are then not
        stored in the order of the text (see `detect_sinks`), unless `detect_sinks=0`. "paper" is TurboQuant
        as published. With `plan=`, the widths are those of the plan and the rest is the preset's.

        Args:
            name: one of `PRESETS`.
            overrides: fields of `TurboQuant` that replace the preset's.

        Raises:
            InvalidInputError: there is no such preset.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise InvalidInputError(f"there is no preset {name!r}; use one of {', '.join(sorted(PRESETS))}")
        preset = PRESETS[name]
        if overrides.get("plan") is not None:
            preset = {field: value for field, value in preset.items() if not field.endswith("bits")}
        return cls(**{**preset, **overrides})

    @classmethod
    def fit(cls, model: "PreTrainedModel", bits: float, **options: Any) -> "TurboQuant":
        """Measure which layers, or heads, need more bits, and meet a budget with the widths that cost least.

        Args:
            model: decoder-only.
            bits: most bits a value of the packed layers, in true bytes: codes, scales, statistics and
                windows, at a context of `context` tokens.
            **options: `tokenizer` (left out, it is loaded by the model's name), `context` (32768), `widths`
                to choose from (2, 3 and 4), and the arguments of `quantpress.evaluation.fitting.fit.measure`,
                such as `texts` by name, the `press` whose windows are used, `method`, "layer-by-layer" or
                "one-pass", and `by`, "layer" or "head".

        Returns:
            The press with its plan, which `press.plan.save("plan.json")` writes.

        Raises:
            UnsupportedModelError: the model cannot be packed.
            InvalidInputError: the budget cannot be met, or an option cannot be used.

        Example:
            >>> # press = TurboQuant.fit(model, bits=2.5)
            >>> # pipe(text, questions=["Who?"], press=press)
        """
        fitted: TurboQuant = import_module(FITS).fit(model, bits, **options)
        return fitted

    @property
    def compression_ratio(self) -> float:
        """Fraction of tokens evicted: 0. `bits_per_value` and the cache's memory say what packing saves."""
        return 0.0

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        raise AttributeError("TurboQuant evicts nothing: set its bits, or compose it with an evicting press")

    def bits_per_value(self, head_dim: int = _REFERENCE_HEAD_DIM) -> float:
        """True bits of a packed number with its share of the scales: the mean of keys and values.

        With a plan it is the mean over its layers. `layer_bits` and `boundary_bits` do not count.

        Args:
            head_dim: dimension D of keys and values.
        """
        layers: list[int | None] = [None] if self._fitted is None else list(self._fitted.widths)
        pairs = [self._codecs(index, 0, head_dim, head_dim) or () for index in layers]
        return sum(codec.bits_per_value for pair in pairs for codec in pair) / (2 * len(layers))

    def post_init_from_model(self, model: "PreTrainedModel") -> None:
        """Check that the cache of this model can be packed; called when a context is entered.

        Raises:
            UnsupportedModelError: this model's cache cannot be packed.
            UnsupportedHeadDimError: its head_dim cannot be packed.
            InvalidInputError: `layer_bits` names a layer that the model does not have.
            CacheFileError: the plan is for another model.
        """
        self.prepare(model)
        name_old_until_unhooked(attention_modules(model))

    def prepare(self, model: "PreTrainedModel") -> None:
        """Check the model and let its attention read packed layers."""
        check(model, PACKABLE)
        if self._fitted is not None:
            self._fitted.check(model.config)
        layers = len(attention_modules(model))
        for index in self.layer_bits or {}:
            if not -layers <= index < layers:
                raise InvalidInputError(f"layer_bits names layer {index}, but the model has {layers} layers")
        for module in full_attention_modules(model):
            head_dim = getattr(module, "head_dim", None)
            if isinstance(head_dim, int):
                self.layer_settings(module, head_dim, head_dim, self.sink_tokens)

    @contextmanager
    def __call__(self, model: "PreTrainedModel") -> Generator[None, None, None]:
        """Pack every cache that is prefilled inside the context.

        Raises:
            UnsupportedModelError, UnsupportedHeadDimError: this model's cache cannot be packed.
            CacheFileError: the plan is for another model.
        """
        with left_as_found(model):
            self.prepare(model)
            with filled_caches(model, evicts=False), own_heads(self, model), Packer(self).packing(model):
                yield

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """Pack the layer of one attention module; kvpress's `ComposedPress` calls it after the evictors."""
        Packer(self).pack(module, input, kwargs, output)
        return output

    def pack_cache(
        self,
        model: "PreTrainedModel",
        cache: Cache,
        *,
        query_moments: dict[int, torch.Tensor] | None = None,
        tokens_seen: int | None = None,
    ) -> None:
        """Pack a cache that is already filled.

        Args:
            model: the model that filled it.
            cache: changed in place, layer by layer.
            query_moments: E[q_j^2] by layer index, [B, Hkv, D] each, for channel balance; None: no balance.
            tokens_seen: positions used so far; None: as many as each layer keeps.

        Raises:
            UnsupportedModelError, UnsupportedHeadDimError: this model's cache cannot be packed.
            InvalidInputError: a layer is not a plain `DynamicLayer`.
            NonFiniteError: keys or values hold NaN or infinity.
        """
        self.prepare(model)
        pack_cache(self, model, cache, query_moments, tokens_seen)

    def layer_settings(
        self, module: nn.Module, key_dim: int, value_dim: int, sink_tokens: int
    ) -> LayerSettings | None:
        """How one layer is stored; None leaves it unpacked.

        Args:
            module: the layer's attention module.
            key_dim: dimension D of its keys.
            value_dim: dimension Dv of its values.
            sink_tokens: how many of the first tokens are kept in 16 bits.
        """
        layers = getattr(module.config, "num_hidden_layers", 0)
        codecs = self._codecs(int(module.layer_idx), layers, key_dim, value_dim)  # type: ignore[arg-type]
        if codecs is None:
            return None
        return LayerSettings(*codecs, sink_tokens, self.recent_tokens, self.mean_key, self.balance)

    def _codecs(
        self, layer_idx: int | None, layers: int, key_dim: int, value_dim: int
    ) -> tuple[PageCodec, PageCodec] | None:
        """Codecs of keys and values of one of `layers` layers; None leaves it unpacked."""
        key_bits, value_bits = self._widths(layer_idx, layers)
        if key_bits == value_bits == UNPACKED_BITS and layer_idx is not None:
            return None
        if self.codec is not None:
            return self.codec(key_dim, "key", layer_idx or 0), self.codec(value_dim, "value", layer_idx or 0)
        heads = next((len(bits) for bits in (key_bits, value_bits) if isinstance(bits, tuple)), 1)
        keys, values = (
            [self._codec(dim, one, role) for one in (bits if isinstance(bits, tuple) else (bits,) * heads)]
            for dim, bits, role in ((key_dim, key_bits, "key"), (value_dim, value_bits, "value"))
        )
        return by_head(keys, values)

    def _codec(self, head_dim: int, bits: float, role: str) -> PageCodec:
        form, rest = self.codebook, (self.rotation, self.seed, self.scale)
        if form == TRELLIS and bits != SCALAR_BITS:
            return TrellisPages(head_dim, bits, role, *rest, self.scale_dtype)  # type: ignore[arg-type]  # checked
        form = "int8" if form == TRELLIS else form
        estimator = self.estimator if role == "key" else "mse"
        fields = head_dim, bits, role, *rest, form, estimator, self.scale_dtype
        try:
            return _scalar_pages(*fields)
        except TypeError:  # a width that cannot be hashed, which the codec refuses
            return ScalarPages(CodecSpec(*fields))

    @property
    def widths_by_head(self) -> bool:
        """Whether heads of a layer have widths of their own, from the plan."""
        return self._fitted is not None and self._fitted.by_head

    @property
    def _fitted(self) -> WidthPlan | None:
        """The plan, which is no path any more."""
        return self.plan if isinstance(self.plan, WidthPlan) else None

    def _widths(
        self, layer_idx: int | None, layers: int
    ) -> tuple[float | tuple[int, ...], float | tuple[int, ...]]:
        """Widths of keys and of values of a layer; a tuple has those of each KV head."""
        if self._fitted is not None:
            fitted = self._fitted
            return fitted.layer(next(iter(fitted.widths)) if layer_idx is None else layer_idx)
        protected = self.layer_bits or {}
        for index in () if layer_idx is None else (layer_idx, layer_idx - layers):
            if index in protected:
                bits = protected[index]
                return _pair(bits)
        if layer_idx is not None and min(layer_idx, layers - 1 - layer_idx) < self.boundary_layers:
            return _pair(self.boundary_bits)
        bits = DEFAULT_BITS if self.bits is None else self.bits
        return (
            bits if self.key_bits is None else self.key_bits,
            bits if self.value_bits is None else self.value_bits,
        )


@lru_cache(maxsize=64, typed=True)  # typed: 4.0 and True are not 4 and 1
def _scalar_pages(*fields: Any) -> ScalarPages:
    """The codec, made and checked once for all layers."""
    return ScalarPages(CodecSpec(*fields))


def _pair(bits: float | tuple[float, float]) -> tuple[float, float]:
    return bits if isinstance(bits, tuple) else (bits, bits)
