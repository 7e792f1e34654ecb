"""Outlines of models: layers, heads, dimensions and bytes of the weights, without loading the weights.

The model is built from its configuration on the "meta" device, which holds shapes and no data. So the code of
each architecture in transformers says what there is. Known models are not built; a test builds them all, and
compares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig

from quantpress.cache import host
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.evaluation.sizing.known_models import KnownModel, known_model, known_models
from quantpress.presses.models.attention import attention_modules, is_sliding
from quantpress.presses.models.eligibility import PACKABLE, check
from quantpress.presses.models.positions import position_count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHAPE_FIELDS = {
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}
"""Names in a shape that is written as text, and the fields of a Llama's configuration that they set."""

_NEEDED = ("layers", "kv_heads", "head_dim")
_OF_WEIGHTS = ("heads", "hidden", "intermediate", "vocab")
EXAMPLE_SHAPE = "layers=32,heads=32,kv_heads=8,head_dim=128,hidden=4096,intermediate=14336,vocab=128256"


@dataclass(frozen=True, eq=False)
class LayerOutline:
    """The attention of one layer.

    Args:
        module: the attention module, on the meta device or of a model in memory. For a known model it has
            what presses ask for, `config` and `layer_idx`.
        index: index of the layer.
        sliding: whether it attends to a window only, and stays unpacked.
        query_heads: number of query heads, Hq.
        kv_heads: number of KV heads as cached, Hkv.
        head_dim: dimension of the keys as cached, D.
        value_dim: dimension of the values, Dv.
        with_state: whether the layer also keeps a state of fixed size, beside its tokens.
    """

    module: Any
    index: int
    sliding: bool
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    with_state: bool = False

    @property
    def kind(self) -> str:
        """What grows with the text: "full", "sliding", or "full, state" where a state is kept beside it."""
        return ("sliding" if self.sliding else "full") + (", state" if self.with_state else "")


@dataclass(frozen=True, eq=False)
class ModelOutline:
    """A model without its weights.

    Args:
        name: name that it was asked for by.
        architecture: name of its class.
        layers: its attention layers in order.
        other_layers: number of layers that cache something else (state spaces, convolutions), or nothing of
            their own.
        weights_bytes: bytes of all parameters; None where a shape leaves them open.
        dtype: dtype of the weights.
        hidden: width of the hidden states; None where a shape leaves it open.
        intermediate: width of the feed-forward; None where it is not known.
        positions: most tokens that the model was made for; None where it does not say.
        refusal: why its cache cannot be packed; None when it can.
        quantized: whether its checkpoint holds weights of smaller widths than `dtype`.
        repository: repository on the hub whose shape it has, where it is a known model; otherwise None.
        state_bytes: bytes of the states of one sequence, which do not grow with the text (linear attention,
            state spaces, convolutions); None where they are not known.
    """

    name: str
    architecture: str
    layers: tuple[LayerOutline, ...]
    other_layers: int
    weights_bytes: int | None
    dtype: torch.dtype
    hidden: int | None
    intermediate: int | None
    positions: int | None
    refusal: str | None
    quantized: bool = False
    repository: str | None = None
    state_bytes: int | None = 0

    @classmethod
    def of(cls, name: str, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "ModelOutline":
        """The outline of a model in memory or on the meta device.

        Args:
            name: what to call it.
            model: decoder-only.
            dtype: dtype that the weights will have; left out, that of the parameters.
        """
        config = model.config.get_text_config()
        empty = enumerate(host.empty_cache(model).layers)
        states = {index for index, layer in empty if isinstance(layer, host.LINEAR_LAYER)}
        own = [one for one in attention_modules(model) if not getattr(one, "is_kv_shared_layer", False)]
        layers = tuple(_layers(own, states))
        total = int(getattr(config, "num_hidden_layers", len(layers)))
        kind = dtype or model.dtype
        parameters = {id(one): one for one in model.parameters()}.values()  # tied ones count once
        try:
            check(model, PACKABLE)
            refusal = None
        except UnsupportedModelError as error:
            refusal = str(error)
        return cls(
            name=name,
            architecture=type(model).__name__,
            layers=layers,
            other_layers=max(0, total - len(layers)),
            weights_bytes=sum(one.numel() for one in parameters) * kind.itemsize,
            dtype=kind,
            hidden=getattr(config, "hidden_size", None),
            intermediate=getattr(config, "intermediate_size", None),
            positions=position_count(model.config),
            refusal=refusal,
            quantized=getattr(model.config, "quantization_config", None) is not None,
            state_bytes=_state_bytes(model.config, kind) if states else 0,
        )


def outline(model: str | None = None) -> ModelOutline:
    """The outline of a model, by name, configuration or shape.

    Args:
        model: a folder, a config.json, a known model (`known_models`), another id on the hub, or a shape such
            as `EXAMPLE_SHAPE`, of which heads, hidden, intermediate and vocab may be left out; None for the
            default model.

    Raises:
        InvalidInputError: there is no such model or configuration, or the shape cannot be read.
        ModelFilesError: the default model could not be fetched.
    """
    if model is not None and "=" in model:
        return _of_shape(model)
    if model is not None and not Path(model).exists() and model.endswith(".json"):
        raise InvalidInputError(f"there is no file {model}; give a config.json, a folder, an id or a shape")
    known = None if model is None or Path(model).exists() else known_model(model)
    if known is not None:
        return _of_known(str(model), known)
    try:
        config = _config(model)
        made = _without_weights(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InvalidInputError(
            f"{model} cannot be outlined: {reason}. Give a folder, a config.json, an id on the hub, a shape "
            f"such as {EXAMPLE_SHAPE}, or one of the names that need no hub: {', '.join(known_models())}"
        ) from error
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    dtype = stored if isinstance(stored, torch.dtype) else torch.bfloat16
    return ModelOutline.of(model or Path(str(config.name_or_path)).name, made, dtype)


def _of_known(name: str, known: KnownModel) -> ModelOutline:
    """The outline of a known model from its configuration alone: all of them are packed, without states."""
    config: Any = AutoConfig.for_model(**known.config)
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    modules = [SimpleNamespace(config=text, layer_idx=index) for index in range(text.num_hidden_layers)]
    return ModelOutline(
        name=name,
        architecture=config.architectures[0],
        layers=tuple(
            LayerOutline(
                module=one,
                index=one.layer_idx,
                sliding=is_sliding(one),  # type: ignore[arg-type]
                query_heads=heads,
                kv_heads=text.num_key_value_heads,
                head_dim=head_dim,
                value_dim=head_dim,
            )
            for one in modules
        ),
        other_layers=0,
        weights_bytes=known.parameters * torch.bfloat16.itemsize,
        dtype=torch.bfloat16,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        positions=position_count(config),
        refusal=None,
        repository=known.repository,
    )


def _config(model: str | None) -> "PreTrainedConfig":
    """The configuration in a folder, in a file or on the hub; that of the default model for None."""
    from quantpress.pipelines.default_model import DEFAULT_MODEL_NAME, ensure_default_model

    source = str(ensure_default_model()) if model in (None, DEFAULT_MODEL_NAME) else str(model)
    config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    return config


def _without_weights(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model on the meta device."""
    from transformers import AutoModelForCausalLM  # takes a second, which known models do without

    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = make(config)
    model.eval()
    return model


def _state_bytes(config: "PreTrainedConfig", dtype: torch.dtype) -> int | None:
    """Bytes of the states of one sequence: of a reading on the meta device."""
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    for kind in (dtype, torch.bfloat16):
        try:
            with torch.device("meta"), torch.no_grad():
                model = make(config, dtype=kind).eval()
                cache = host.empty_cache(model)
                ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
                model(ids, use_cache=True, **{host.cache_name(model): cache})
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            continue  # a kernel that knows no such dtype, or no such device
        return sum(state.numel() * state.element_size() for state in host.state_tensors(cache))
    return None


def _of_shape(text: str) -> ModelOutline:
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        name = name.strip()
        if name not in SHAPE_FIELDS or not number.strip().isdecimal() or int(number) < 1:
            raise InvalidInputError(
                f"{part.strip()!r} in the shape {text!r} cannot be read; write NAME=NUMBER with commas "
                f"between, of {', '.join(SHAPE_FIELDS)}, such as {EXAMPLE_SHAPE}"
            )
        given[name] = int(number)
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        raise InvalidInputError(f"the shape {text!r} lacks {', '.join(missing)}; such as {EXAMPLE_SHAPE}")
    whole = all(name in given for name in _OF_WEIGHTS)
    filled = {"heads": given["kv_heads"], "intermediate": 64, "vocab": 64, **given}
    filled.setdefault("hidden", filled["heads"] * filled["head_dim"])
    fields: dict[str, Any] = {SHAPE_FIELDS[name]: number for name, number in filled.items()}
    model = _without_weights(AutoConfig.for_model("llama", **fields))
    known = ModelOutline.of(text, model, torch.bfloat16)
    return ModelOutline(
        **{
            **vars(known),
            "weights_bytes": known.weights_bytes if whole else None,
            "hidden": given.get("hidden"),
            "intermediate": given.get("intermediate"),
            "positions": given.get("positions"),
        }
    )


def _layers(modules: list[nn.Module], states: set[int]) -> Iterator[LayerOutline]:
    for module in modules:
        of: Any = module
        config = getattr(of, "config", None)
        if config is None:  # attention of a kind that cannot be packed either
            continue
        heads = int(config.num_attention_heads)
        latent = getattr(of, "qk_head_dim", None)  # it caches a key and a value for every query head
        head_dim = latent or getattr(of, "head_dim", None) or config.hidden_size // heads
        kv_heads = heads if latent else _kv_heads(of, heads)
        value_dim = of.v_head_dim if latent else head_dim
        if hasattr(of, "expand_kv"):  # it caches what keys and values are made of
            kv_heads, head_dim, value_dim = 1, of.kv_lora_rank, of.qk_rope_head_dim
        yield LayerOutline(
            module=module,
            index=int(of.layer_idx),
            sliding=is_sliding(module),
            query_heads=heads,
            kv_heads=kv_heads,
            head_dim=int(head_dim),
            value_dim=int(value_dim),
            with_state=int(of.layer_idx) in states,
        )


def _kv_heads(module: Any, heads: int) -> int:
    """KV heads as the module itself counts them, which may ignore its configuration."""
    for name in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return heads // int(getattr(module, "num_key_value_groups", 1))
