"""Where the turns of the user begin in the token ids of a conversation, whatever the chat template.

A probe is written in the chat form with many different messages at the same place. The ids in front of that
place that are always the same, for the first message and for a later one, open a turn of the user.
"""

from itertools import takewhile
from typing import Any

import torch

from quantpress.errors import InvalidInputError

PROBES = 12
BEFORE = ("", " ", "\n\n", "(")
"""What probes begin with: it may become one token with the end of what stands in front of a message."""


def turn_opening(tokenizer: Any) -> list[int]:
    """The token ids that open a turn of the user, as far as no message can change them.

    Args:
        tokenizer: with a chat template.

    Raises:
        InvalidInputError: the template does not write conversations, or nothing in it opens a turn.

    Example:
        >>> # turn_opening(AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))  # "<|im_start|>", "user"
    """
    words = [
        tokenizer.decode([len(tokenizer) * index // PROBES], skip_special_tokens=True).strip() or "?"
        for index in range(PROBES)
    ]
    probes = [BEFORE[index % len(BEFORE)] + word for index, word in enumerate(words)]
    first = _shared_ids(tokenizer, [[probe] for probe in probes])
    later = _shared_ids(tokenizer, [[words[0], words[1], probe] for probe in probes])
    opening = _common_beginning([first[::-1], later[::-1]])[::-1]
    if not opening:
        raise InvalidInputError(
            "the chat template has no token of its own in front of every message of the user, so that no "
            "context can be told from its question"
        )
    return opening


def _shared_ids(tokenizer: Any, conversations: list[list[str]]) -> list[int]:
    """The ids that conversations of the user and the assistant, in turn, all begin with."""
    forms = []
    for contents in conversations:
        roles = ("user", "assistant") * len(contents)
        turns = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]
        try:
            form = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise InvalidInputError(f"the chat template cannot write a conversation: {error}") from error
        forms.append(tokenizer.encode(form, add_special_tokens=False))
    return _common_beginning(forms)


def _common_beginning(lists: list[list[int]]) -> list[int]:
    same = takewhile(lambda ids: len(set(ids)) == 1, zip(*lists, strict=False))
    return [ids[0] for ids in same]


def turn_starts(ids: torch.Tensor, opening: list[int]) -> list[int]:
    """The places at which turns of the user begin, in ascending order.

    Args:
        ids: [1, T] int64, a conversation.
        opening: what `turn_opening` returned.

    Example:
        >>> turn_starts(torch.tensor([[1, 7, 8, 5, 6, 7, 8, 4, 7]]), [7, 8])
        [1, 5]
    """
    if ids.shape[1] < len(opening):
        return []
    windows = ids[0].unfold(0, len(opening), 1)  # [T - len(opening) + 1, len(opening)]
    wanted = torch.tensor(opening, dtype=ids.dtype, device=ids.device)
    return [int(place) for place in (windows == wanted).all(-1).nonzero()]
