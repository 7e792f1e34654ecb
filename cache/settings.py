"""How a packed layer stores tokens: codecs, tokens kept in 16 bits, and channel transforms."""

from dataclasses import dataclass, replace

import torch

from quantpress.codecs.protocol import PageCodec
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.kernels.moments import key_statistics
from quantpress.quantization.transform import ChannelTransform, value_statistics

DEFAULT_SINK_TOKENS = 4
"""Attention sinks kept in 16 bits: packing them multiplied the output error by 4.6 to 7 on two models."""

DEFAULT_RECENT_TOKENS = 128
"""Recent tokens kept in 16 bits."""


@dataclass(frozen=True)
class LayerSettings:
    """How a packed layer stores tokens: its codecs, and which tokens stay in 16 bits.

    Args:
        key_codec: packs keys.
        value_codec: packs values; its head_dim may differ from that of the keys.
        sink_tokens: number of first tokens kept in 16 bits.
        recent_tokens: least number of last tokens kept in 16 bits.
        mean_key: subtract the mean key of each head before encoding.
        balance: weight the key channels of each head before encoding, if the queries are known.

    Raises:
        InvalidInputError: `sink_tokens` or `recent_tokens` is negative, or keys and values have different
            groups of heads.
    """

    key_codec: PageCodec
    value_codec: PageCodec
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    mean_key: bool = True
    balance: bool = True

    def __post_init__(self) -> None:
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; give 0 or more")
        if self.key_codec.heads != self.value_codec.heads:
            raise InvalidInputError(
                f"the codec of the keys has heads {self.key_codec.heads}, that of the values "
                f"{self.value_codec.heads}; give both the same groups (quantpress.codecs.head_groups.by_head)"
            )

    def check_heads_alike(self, what: str) -> None:
        """Refuse codecs of their own for groups of heads, where there is no memory for them.

        Args:
            what: what needs all heads alike, as the subject of the message.

        Raises:
            InvalidInputError: the codecs have groups of heads.
        """
        if self.key_codec.heads:
            raise InvalidInputError(
                f"{what} needs one width for all KV heads of a layer, but heads {self.key_codec.heads} have "
                "widths of their own; use a plan by layer (`quantpress fit --by layer`), or one width"
            )

    @property
    def in_one_dtype(self) -> "LayerSettings":
        """The same settings with `PageCodec.in_one_dtype` of both codecs."""
        codecs = self.key_codec.in_one_dtype, self.value_codec.in_one_dtype
        return replace(self, key_codec=codecs[0], value_codec=codecs[1])

    def channel_transforms(
        self, tokens: DenseSegment, query_moment: torch.Tensor | None, in_use: torch.Tensor | None = None
    ) -> tuple[ChannelTransform, ChannelTransform]:
        """Channel transforms of keys and of values, computed from T tokens.

        Args:
            tokens: the T tokens.
            query_moment: [B, Hkv, D] mean square of the queries; None: channels are not balanced.
            in_use: [B, Hkv, T] bool, True for the tokens that count; None: all of them.

        Raises:
            NonFiniteError: the tokens contain NaN or infinity.
        """
        key_transform, value_transform = ChannelTransform(), ChannelTransform()
        if self.key_codec.wants_statistics:
            key_transform = key_statistics(
                tokens.keys,
                query_moment,
                self.key_codec.groups,
                mean=self.mean_key,
                balance=self.balance,
                in_use=in_use,
            )
        if self.value_codec.wants_statistics:
            value_transform = value_statistics(tokens.values, self.value_codec.groups, in_use)
        return key_transform, value_transform
