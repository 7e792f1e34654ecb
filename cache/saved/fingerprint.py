"""Fingerprints of models: only the model that computed keys and values can use them.

A fingerprint consists of the fields of the text configuration that keys and values may depend on; `SAMPLE`
evenly spaced numbers of every weight and every saved buffer (`weight_samples.py`); the frequencies of rotary
embeddings; and the active adapters. Further training changes these. Changing single numbers by hand may not,
and changes made by a hook or another `forward` are not seen.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantpress.cache.saved.adapters import Adapters, plain_name, unwrapped
from quantpress.cache.saved.weight_samples import samples
from quantpress.errors import UnsupportedModelError

_SAME_FREQUENCY = 1e-4  # relative tolerance; devices round differently

# Fields that say how a model is run, loaded or prompted; they do not change keys and values.
_OTHER_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "transformers_version",
        "use_cache",
    }
)


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """The fingerprint of a model in its present state, as plain values.

    Args:
        model: the model, with its weights on any device. Weights that accelerate offloads for a `device_map`
            are read once more. Of a `PeftModel`, the model inside and its active adapters count.

    Returns:
        A dict with "config" (the fields that count), "weights", "dtype", "adapters", "buffers", "ties",
        "rotary", and "name" (where the model was loaded from), which is not compared. "adapters", "buffers",
        "ties" and "rotary" are None if the model has none.

    Raises:
        UnsupportedModelError: a weight was never loaded.
    """
    config: Any = getattr(model, "config", None)
    fields = {} if config is None else config.get_text_config(decoder=True).to_dict()
    kept = {name: value for name, value in fields.items() if name not in _OTHER_FIELDS}
    base = unwrapped(model)
    adapters = Adapters.of(base)
    named: Iterator[tuple[str, Tensor]] = base.named_parameters(remove_duplicate=False)
    own = [(name, one) for name, one in named if id(one) not in adapters.owned]
    first = {id(one): name for name, one in reversed(own)}
    parameters = {name: one for name, one in own if first[id(one)] == name}
    return {
        "config": json.loads(json.dumps(kept, sort_keys=True, default=str)),
        "name": str(getattr(config, "name_or_path", "")) or None,
        "dtype": str(own[0][1].dtype).removeprefix("torch.") if own else None,
        "weights": _digest(base, parameters),
        "adapters": _adapters(base, adapters),
        "buffers": _digest(base, buffers) if (buffers := dict(_buffers(base, adapters))) else None,
        "ties": _ties(base, own, first),
        "rotary": sorted(_rotary(base)) or None,
    }


def difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The difference between two fingerprints, in words; None if they are the same.

    Args:
        saved: fingerprint of the model that read the context. In older files it may have only "config",
            "weights" and "dtype".
        here: fingerprint of the model that is to continue.
    """
    if saved.get("dtype") != here.get("dtype"):
        return f"its weights were {saved.get('dtype')}, they are {here.get('dtype')} here"
    before, now = saved.get("config") or {}, here.get("config") or {}
    ordered = sorted({*before, *now}, key=lambda name: (name != "model_type", name))
    names = [name for name in ordered if before.get(name) != now.get(name)]
    if names:
        shown = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:3])
        return f"{shown}{' and more' if len(names) > 3 else ''}"
    return _other_adapters(saved, here) or _other_numbers(saved, here)


def _other_adapters(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    before, now = saved.get("adapters") or {}, here.get("adapters") or {}
    merged = saved.get("weights") != here.get("weights") and before.get("merged", []) != now.get("merged", [])
    if before.get("digest") == now.get("digest") and not merged:
        return None
    then, present = _words(before), _words(now)
    if then != present:
        return f"adapters: {then} then, {present} now"
    if before.get("scaling") != now.get("scaling"):
        scalings = (", ".join(map(str, one.get("scaling", ()))) for one in (before, now))
        return f"the scaling of its adapters ({then}) was {next(scalings)}, is {next(scalings)}"
    return f"its adapters ({then}) have other weights or settings"


def _words(adapters: Mapping[str, Any]) -> str:
    names = [f'"{name}"' for name in adapters.get("names", ())]
    return ", ".join([*names, *(f'"{name}" (merged)' for name in adapters.get("merged", ()))]) or "none"


def _other_numbers(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    if saved.get("weights") != here.get("weights"):
        return "it has the same form, but other weights"
    for name, reason in (("buffers", "other buffers"), ("ties", "other weights tied to each other")):
        if name in saved and saved[name] != here[name]:
            return f"it has the same weights, but {reason}"
    before, now = saved.get("rotary"), here.get("rotary")
    if before is not None and now is not None and not _close(before, now):
        return "its rotary embeddings have other frequencies"
    return None


def _close(before: list[list[float]], now: list[list[float]]) -> bool:
    pairs = [pair for one, other in zip(before, now, strict=False) for pair in zip(one, other, strict=False)]
    return len(before) == len(now) and all(math.isclose(*pair, rel_tol=_SAME_FREQUENCY) for pair in pairs)


def _digest(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    named = sorted((_first_name(plain_name(name)), name, tensor) for name, tensor in tensors.items())
    plain = [pair for to, name, one in named for pair in _parts(to, _in_memory(model, name, one))]
    for (part, one), (shape, sample) in zip(plain, samples(model, plain), strict=True):
        digest.update(f"{part} {shape} {one.dtype}\n".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _first_name(name: str) -> str:
    """The name that a bias had before transformers' tensor parallelism moved it in the first forward."""
    return f"{name.removesuffix('._bias')}.bias" if name.endswith("._bias") else name


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors inside a quantized tensor class (torchao, quanto); a plain tensor itself."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for inner in flatten()[0]:
        yield from _parts(f"{name} {inner}", getattr(tensor, inner))


def _in_memory(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    weight = _offloaded(model, name) if tensor.is_meta else tensor
    if weight is None:
        raise UnsupportedModelError(
            f"{name} was never loaded (it is on the meta device): the model cannot be told from others; "
            "load its weights to read a context once and ask it again"
        )
    return weight


def _adapters(model: nn.Module, adapters: Adapters) -> dict[str, Any] | None:
    if not adapters.names and not adapters.merged:
        return None
    digest = None
    if adapters.names:
        settings = json.dumps(adapters.settings, sort_keys=True)
        digest = hashlib.sha256(f"{_digest(model, adapters.weights)} {settings}".encode()).hexdigest()
    return {
        "names": adapters.names,
        "merged": adapters.merged,
        "scaling": adapters.scaling,
        "digest": digest,
    }


def _buffers(model: nn.Module, adapters: Adapters) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are saved with the weights, such as some quantized weights and biases of routers."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            saved = buffer is not None and name not in module._non_persistent_buffers_set
            if saved and id(buffer) not in adapters.owned:
                yield f"{path}.{name}", buffer


def _ties(model: nn.Module, own: list[tuple[str, Tensor]], first: dict[int, str]) -> str | None:
    """Digest of which weights are tied, except the head; None if none are, or if weights are offloaded."""
    if any(one.is_meta for _, one in own):
        return None
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = getattr(get_head() if callable(get_head) else None, "weight", None)
    tied = [(name, first[id(one)]) for name, one in own if first[id(one)] != name and one is not head]
    return hashlib.sha256(json.dumps(tied).encode()).hexdigest() if tied else None


def _rotary(model: nn.Module) -> Iterator[list[float]]:
    """Two sums over the original frequencies of each rotary embedding, and its scaling."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            kind, is_frequency, _ = name.rpartition("inv_freq")
            derived = f"{kind}original_inv_freq" in module._buffers or kind.endswith("long_")
            if not is_frequency or derived or buffer is None or buffer.is_meta:
                continue
            numbers = buffer.detach().double()
            number = torch.arange(1, numbers.numel() + 1, dtype=torch.float64, device=numbers.device)
            scaling = getattr(module, f"{kind.removesuffix('original_')}attention_scaling", 1.0)
            sums = torch.stack([numbers.sum(), (numbers.reshape(-1) * number).sum()]).tolist()
            yield [*sums, float(scaling)]


def _offloaded(model: nn.Module, name: str) -> Tensor | None:
    """A weight that accelerate keeps in memory or on disk until its module, or a parent, is called."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:cut])), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # a module may have several hooks
            kept, own = getattr(one, "weights_map", None) or {}, ".".join(parts[cut:])
            if own in kept:
                weight: Tensor = kept[own]
                return weight
    return None
