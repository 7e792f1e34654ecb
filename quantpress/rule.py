"""Rules as data: each says what would break it, and the reason that is given then."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Found: TypeAlias = Mapping[str, object] | str | bool | None
"""The values that a message names, a word for {found}, or True; None or False if the rule is kept."""


@dataclass(frozen=True)
class Rule:
    """One reason against something.

    Args:
        message: the reason, without a full stop. Names in braces stand for values that `found` returns, and
            {subject} for the class of the subject.
        found: takes the subject of the rule and says whether it breaks the rule.
        lasting: False if the reason may go away with a later token.

    Example:
        >>> rule = Rule("{subject} has {found}", lambda number: number.imag and "an imaginary part")
        >>> reasons([rule], 1j), reasons([rule], 1.0)
        (['complex has an imaginary part'], [])
    """

    message: str
    found: Callable[[Any], Found]
    lasting: bool = True

    def reason(self, subject: object) -> str | None:
        """The message about a subject; None if it keeps the rule."""
        found = self.found(subject)
        if not found:
            return None
        values = found if isinstance(found, Mapping) else {"found": found}
        return self.message.format(subject=type(subject).__name__, **values)


def reasons(rules: Iterable[Rule], subject: object) -> list[str]:
    """The reason of every rule that a subject breaks, in the order of the rules."""
    return [reason for rule in rules if (reason := rule.reason(subject)) is not None]
