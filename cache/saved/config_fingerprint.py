"""Fingerprints of models from their configuration alone, for hosts that load the weights themselves.

The values are the same for every version of transformers and in vLLM, which both add defaults to the
configurations that they load.
"""

import json
from collections.abc import Mapping
from typing import Any

_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
)
"""Settings of rotary embeddings that change frequencies or scaling, wherever a model has them."""


def config_fingerprint(config: Any) -> dict[str, Any]:
    """What keys depend on, as far as a configuration says: architecture, shape and rotary embeddings.

    Args:
        config: configuration of transformers, or vLLM's `hf_config`; of a multimodal model the text part
            counts.

    Returns:
        Plain values: "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads",
        "num_key_value_heads", "head_dim" and "rope". What a configuration leaves open is None.

    Example:
        >>> from transformers import LlamaConfig
        >>> found = config_fingerprint(LlamaConfig(num_attention_heads=8, hidden_size=512))
        >>> found["num_key_value_heads"], found["head_dim"], found["rope"]["rope_type"]
        (8, 64, 'default')
    """
    text = config.get_text_config(decoder=True)
    stored = text.to_dict()  # has values for the whole model, too, where layers differ and attributes raise
    found = {name: stored[name] if name in stored else getattr(text, name, None) for name in _FIELDS}
    hidden, heads = found["hidden_size"], found["num_attention_heads"]
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = heads
    if found["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        found["head_dim"] = hidden // heads
    found["rope"] = _rope(stored.get("rope_parameters"))
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def changed_fields(fingerprint: Mapping[str, Any], config: Any) -> str:
    """How a configuration differs from a fingerprint, in words; empty where it does not.

    Args:
        fingerprint: from `config_fingerprint`, or a part of it.
        config: as for `config_fingerprint`.
    """
    here = config_fingerprint(config)
    return ", ".join(
        f"{name} was {value!r}, is {here.get(name)!r}"
        for name, value in fingerprint.items()
        if here.get(name) != value
    )


def _rope(parameters: Any) -> dict[str, Any] | None:
    """Rotary parameters without what versions add or rename; by type of layer where they are so."""
    if not isinstance(parameters, Mapping):
        return None
    if parameters and all(isinstance(one, Mapping) or one is None for one in parameters.values()):
        return {name: _rope(one) for name, one in sorted(parameters.items())}
    kept = {name: parameters[name] for name in _ROPE if parameters.get(name) is not None}
    return {
        "rope_type": parameters.get("rope_type") or parameters.get("type") or "default",
        "rope_theta": parameters.get("rope_theta"),
        "partial_rotary_factor": parameters.get("partial_rotary_factor") or 1.0,
        **kept,
    }
