"""How a packed layer stores tokens."""

from dataclasses import dataclass, replace

from quantpress.codecs.page_codec import PageCodec, ScalarPages
from quantpress.errors import InvalidInputError

DEFAULT_SINK_TOKENS = 4
"""Attention sinks kept in 16 bits: packing them multiplied the output error by 4.6 to 7 on two models."""

DEFAULT_RECENT_TOKENS = 128
"""Recent tokens kept in 16 bits."""


@dataclass(frozen=True)
class LayerSettings:
    """Codecs and windows of a packed layer.

    Args:
        key_codec: packs keys.
        value_codec: packs values; its head_dim may differ from the keys'.
        sink_tokens: first tokens kept in 16 bits.
        recent_tokens: last tokens kept in 16 bits, at least.
        mean_key: subtract the mean key of each head before encoding.
        balance: weight the key channels of each head before encoding, when queries are known.

    Raises:
        InvalidInputError: a window is negative.
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

    @property
    def in_one_dtype(self) -> "LayerSettings":
        """The same with `ScalarPages.in_one_dtype` for both codecs."""
        keys, values = (
            codec.in_one_dtype if isinstance(codec, ScalarPages) else codec
            for codec in (self.key_codec, self.value_codec)
        )
        return replace(self, key_codec=keys, value_codec=values)
