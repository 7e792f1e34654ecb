"""How many tokens presses will keep, as far as their settings say."""

from collections.abc import Iterator

from quantpress.errors import InvalidInputError
from quantpress.presses.base_press import BasePress, ScorerPress
from quantpress.presses.demote import Demote
from quantpress.presses.traits import short_repr, traits_of, with_inner


def described(press: BasePress | None) -> str:
    """A press as it is written on a command line; "uncompressed" for none.

    Example:
        >>> from quantpress.presses.expression import parse_press
        >>> described(parse_press("SnapKV | TurboQuant(bits=3, seed=7)"))
        'SnapKV(0.5) | TurboQuant(3, seed=7)'
    """
    return " | ".join(map(short_repr, parts(press))) or "uncompressed"


def parts(press: BasePress | None) -> Iterator[BasePress]:
    """Yield the presses of a composition, or the press itself; nothing for None."""
    if press is not None:
        inner = getattr(press, "presses", None)
        yield from (press,) if inner is None else inner


def prefill_evictors(press: BasePress | None) -> Iterator[BasePress]:
    """Yield the presses that evict tokens at the prefill, in order."""
    for one in parts(press):
        if isinstance(getattr(one, "prefilling_press", None), BasePress):
            yield from prefill_evictors(one.prefilling_press)
        else:
            traits = traits_of(one)
            zeroes_channels = traits.keeps_tokens and not traits.demotes
            if not (traits.quantizes or zeroes_channels or traits.decodes):
                yield one


def tokens_kept(evictors: tuple[BasePress, ...], tokens: int, packed: bool) -> tuple[int, bool]:
    """How many tokens every head of a layer keeps, on average.

    Args:
        evictors: presses that evict at the prefill, in order.
        tokens: tokens of the context.
        packed: whether a quantizer follows, which frees what head-wise presses only hide.

    Returns:
        The number of tokens, and whether it is certain: kvpress's scorers keep int(T (1 - ratio)) in every
            head.

    Raises:
        InvalidInputError: how much a press evicts depends on the text, or a press packs in two widths.
    """
    exact = True
    for press in evictors:
        if isinstance(press, Demote):
            raise InvalidInputError(
                f"{short_repr(press)} packs in two widths, which is not planned for; measure it with "
                "`quantpress compare`"
            )
        try:
            ratio = float(press.compression_ratio)
        except (AssertionError, AttributeError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"how much {short_repr(press)} evicts depends on the text; measure it with "
                "`quantpress compare`"
            ) from error
        if traits_of(press).masks_heads:
            exact = False
            if not packed:
                continue  # kvpress hides these tokens, and keeps them
        inner = list(with_inner(press))
        plain = (
            len(inner) == 1
            and isinstance(press, ScorerPress)
            and type(press).compress.__qualname__ == "ScorerPress.compress"
        )
        exact = exact and plain
        tokens = int(tokens * (1 - ratio))
    return tokens, exact
