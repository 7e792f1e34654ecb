"""Statistics of a model's keys over texts, for a `ModelProfile`."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantpress.cache import host
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.cache.saved.model_profile import ModelProfile
from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.errors import EmptyContextError, InvalidInputError, UnsupportedModelError
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.rollback import model_rollback
from quantpress.presses.models.attention import attention_modules, full_attention_modules, hooked
from quantpress.presses.models.eligibility import PACKABLE, check
from quantpress.presses.models.positions import position_count
from quantpress.presses.packing.prefill_hook import plain_states, prefill_call
from quantpress.presses.packing.queries import UnknownAttentionError, check_keys, last_queries
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.running_moments import RunningMoments
from quantpress.quantization.transform import ChannelTransform, moment_statistics

DEFAULT_TOKENS = 4096
"""Tokens that are read."""

DEFAULT_PIECE_TOKENS = 2048
"""Tokens that are read at a time."""

LEAST_TOKENS = 512
"""Fewest tokens that a profile is made of."""


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    tokens: int = DEFAULT_TOKENS,
    piece_tokens: int = DEFAULT_PIECE_TOKENS,
    *,
    progress: bool | None = None,
) -> ModelProfile:
    """Measure the statistics of a model's keys.

    The model reads pieces of the texts, spread evenly over each. Mean and weight of keys are those of
    `quantization.transform.key_statistics`; mean and variance of queries come with them. The first few tokens
    of each piece, which are kept in 16 bits, do not count. Sums are in float64; the keys and queries of one
    piece at a time are in memory.

    Args:
        model: decoder-only.
        tokenizer: the model's. Each piece begins with its bos token, if it has one.
        texts: what to read, by name. Each gives the same number of tokens if it is long enough.
        tokens: most tokens of text that are read.
        piece_tokens: most tokens of a piece, its bos token apart; fewer where the model has fewer positions.
            Keys depend on their positions, so that a profile for long contexts needs long pieces.
        progress: True or False; None shows a bar in a terminal.

    Returns:
        The profile, with each layer that is packed.

    Raises:
        UnsupportedModelError: the model cannot be packed, or it caches latent vectors.
        EmptyContextError: there is no text.
        InvalidInputError: there are too few tokens, or `piece_tokens` is too small.
        NonFiniteError: keys or queries hold NaN or infinity.
    """
    _check_model(model)
    first = tokenizer.encode(tokenizer.bos_token, add_special_tokens=False) if tokenizer.bos_token else []
    positions = position_count(model.config)
    piece_tokens = piece_tokens if positions is None else min(piece_tokens, positions - len(first))
    encoded = [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in texts.values()]
    pieces = [first + piece for piece in _pieces(encoded, tokens, piece_tokens)]
    counted = sum(max(0, len(piece) - DEFAULT_SINK_TOKENS) for piece in pieces)
    if counted < LEAST_TOKENS:
        raise InvalidInputError(
            f"{counted} tokens are left of {', '.join(texts)} without the first {DEFAULT_SINK_TOKENS} of "
            f"each piece, too few to measure; give at least {LEAST_TOKENS}, better {DEFAULT_TOKENS}"
        )
    layers = _read(model, pieces, progress)
    return ModelProfile(
        fingerprint=config_fingerprint(model.config),
        statistics={index: layers[index].statistics() for index in sorted(layers)},
        queries={index: layers[index].query_moments() for index in sorted(layers) if layers[index].balanced},
        model=_name(model),
        text=", ".join(texts),
        tokens=counted,
        piece_tokens=piece_tokens,
    )


def _check_model(model: nn.Module) -> None:
    """Refuse a model whose keys have no statistics that an engine could use.

    Raises:
        UnsupportedModelError: its cache cannot be packed, or engines cache a latent vector for its tokens.
    """
    for module in attention_modules(model):
        if hasattr(module, "kv_lora_rank"):
            raise UnsupportedModelError(
                f"{type(module).__name__} makes keys of one latent vector for each token (MLA); engines "
                "cache that vector, which quantpress does not pack: there is nothing to calibrate"
            )
    check(model, PACKABLE)


class _LayerMoments:
    """Moments of the keys and queries of one layer, piece by piece.

    Args:
        keys: [1, Hkv, T, D] of the first piece, for their shape.
    """

    def __init__(self, keys: torch.Tensor) -> None:
        self.heads, dim = keys.shape[1], keys.shape[3]
        self.keys = RunningMoments(dim, self.heads)
        self.queries: RunningMoments | None = None
        self.balanced = True

    def add(self, call: Any, keys: torch.Tensor) -> None:
        """Add the tokens of a piece, without the first ones."""
        counted = keys.shape[2] - DEFAULT_SINK_TOKENS
        if counted < 1:
            return
        self.keys.update(keys[0, :, DEFAULT_SINK_TOKENS:])
        try:
            where = call.module, call.hidden_states, call.position_embeddings
            check_keys(*where, keys)
            queries = last_queries(*where, counted)[0]
        except UnknownAttentionError as reason:
            if self.balanced:
                warnings.warn(
                    f"the queries of {type(call.module).__name__} are not known ({reason}): its channels are "
                    "not balanced, which costs accuracy",
                    stacklevel=2,
                )
            self.balanced = False
            return
        self.queries = self.queries or RunningMoments(queries.shape[2], queries.shape[0])
        self.queries.update(queries)

    def statistics(self) -> ChannelTransform:
        """Mean and weight; the weight is 1 where queries are not known."""
        mean, energy = (one.float()[None] for one in (self.keys.mean, self.keys.variance))
        if not self.balanced or self.queries is None:
            return ChannelTransform(mean, torch.ones_like(mean))
        moment = self.queries.energy.unflatten(0, (self.heads, -1)).mean(1).float()[None]
        return moment_statistics(mean, energy, moment, groups=())

    def query_moments(self) -> QueryMoments:
        """Mean and variance of the queries of each head; only where they are known."""
        assert self.queries is not None
        parts = (self.queries.mean, self.queries.variance)
        return QueryMoments(*(part.unflatten(0, (self.heads, -1)).float() for part in parts))


def _read(model: PreTrainedModel, pieces: list[list[int]], progress: bool | None) -> dict[int, _LayerMoments]:
    """Let the model read the pieces, and add up each layer that is packed."""
    layers: dict[int, _LayerMoments] = {}
    total = len(pieces) * len(full_attention_modules(model))
    hidden = None if progress is None else not progress  # None: where there is no terminal
    bar = tqdm(total=total, desc="reading", unit="layer", leave=False, disable=hidden)

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = prefill_call(module, args, kwargs)
        if call is not None:
            keys = plain_states(call.cache, call.layer_idx)[0]
            layers.setdefault(call.layer_idx, _LayerMoments(keys)).add(call, keys)
            bar.update()

    with bar, model_rollback(model), hooked(model, hook):
        for piece in pieces:
            ids = torch.tensor([piece], dtype=torch.int64, device=model.device)
            read_context(model, ids, host.empty_cache(model), chunk_tokens=0, progress=False)
    return layers


def _pieces(texts: Sequence[list[int]], tokens: int, piece_tokens: int) -> Iterator[list[int]]:
    """Pieces of texts, of equal length in each text and spread evenly over it."""
    if not texts:
        raise EmptyContextError("there is no text to read; give one")
    if tokens < 1 or piece_tokens <= DEFAULT_SINK_TOKENS:
        raise InvalidInputError(
            f"{tokens} tokens in pieces of {piece_tokens} cannot be measured; give 1 or more in pieces of "
            f"more than {DEFAULT_SINK_TOKENS}"
        )
    for ids in texts:
        taken = min(-(-tokens // len(texts)), len(ids))
        count = -(-taken // piece_tokens)
        for number in range(count):
            start = number * (len(ids) // count)
            yield ids[start : start + taken // count]


def _name(model: PreTrainedModel) -> str:
    """The id of a model on the hub, the name of its folder, or that of its class."""
    name = str(getattr(model, "name_or_path", ""))
    return (Path(name).name if Path(name).is_dir() else name) or type(model).__name__
