"""How many positions a model was made for, rotary scaling included."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SCALED_ALREADY = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
"""Model types whose published max_position_embeddings already includes their linear scaling."""

_OWN_LENGTH = ("llama3", "longrope")
"""Rope types whose factor is not a ratio of lengths: max_position_embeddings counts if it was raised."""

_LOCAL = ("sliding_attention", "chunked_attention")


def position_count(config: "PreTrainedConfig") -> int | None:
    """The number of positions that a model was made for.

    transformers scales rotary positions by `rope_parameters` and leaves `max_position_embeddings` as written:

    - "linear" and "dynamic" scaling: max_position_embeddings times the factor, because transformers'
      documentation asks not to change max_position_embeddings;
    - "yarn": `original_max_position_embeddings` times the factor;
    - "llama3" and "longrope": the same, unless max_position_embeddings was raised above the original length.

    The result is never less than max_position_embeddings. If layer types have different scalings, the
    smallest result among the types that see the whole context counts.

    Args:
        config: configuration of the model, or of its text decoder.

    Returns:
        The number of positions; None when the configuration does not say.

    Source: transformers.modeling_rope_utils; the instructions for YaRN in Qwen's model cards.

    Example:
        >>> from transformers import Qwen3Config
        >>> yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
        >>> yarn["original_max_position_embeddings"] = 32768
        >>> position_count(Qwen3Config(max_position_embeddings=40960, rope_parameters=yarn))
        131072
    """
    text: Any = config.get_text_config(decoder=True)
    written = getattr(text, "max_position_embeddings", None)
    if not isinstance(written, int):
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return written
    by_layer = {name: one for name, one in rope.items() if isinstance(one, Mapping)}
    scalings = (
        [one for name, one in by_layer.items() if name not in _LOCAL] or list(by_layer.values()) or [rope]
    )
    scaled = text.model_type in _SCALED_ALREADY
    return max(written, min(_scaled(one, written, scaled) for one in scalings))


def _scaled(rope: Mapping[str, Any], written: int, scaled_already: bool) -> int:
    """The number of positions under one scaling; `written` is max_position_embeddings."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = float(rope.get("factor") or 1)
    if kind == "default" or (kind == "linear" and scaled_already):
        return written
    if kind in ("linear", "dynamic"):
        return int(written * factor)
    original = int(rope.get("original_max_position_embeddings") or written)
    return written if kind in _OWN_LENGTH and written > original else int(original * factor)
