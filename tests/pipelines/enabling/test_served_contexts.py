"""A server with a store of contexts reads the earlier messages of a conversation once."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch

from quantpress.cache.continuation import continue_inputs
from quantpress.errors import CacheFileError, InvalidInputError
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.contexts.store import ContextStore
from quantpress.pipelines.enabling.enable import enable
from quantpress.pipelines.enabling.served_contexts import ServedContexts
from quantpress.pipelines.enabling.user_turns import turn_opening, turn_starts
from quantpress.pipelines.reading.planned import Reading
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compose, Decoding, Knorm, SnapKV, TurboQuant
from tests.pipelines.enabling.served import messages, said, server
from tests.pipelines.words import ours, text, word_tokenizer

SNAP = SnapKV(0.5, window_size=16)
SMALL = {"sink_tokens": 4, "recent_tokens": 16}
PRESSES: dict[str, Callable[[], Any]] = {
    "every token": lambda: TurboQuant.preset("balanced"),
    "evicted": lambda: Compose([SNAP, TurboQuant(2, **SMALL)]),
    "renumbered": lambda: Compose([kvpress.KeyRerotationPress(Knorm(0.4)), TurboQuant(3, **SMALL)]),
    "hidden by heads": lambda: Compose([kvpress.AdaKVPress(SNAP), TurboQuant(4, **SMALL)]),
    "hidden in 16 bits": lambda: Compose([kvpress.AdaKVPress(SNAP)]),
}
TOKENIZER = word_tokenizer(chat=True)
BOOK, QUESTION, OTHER = text(300), text(9, seed=1), text(5, seed=2)


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    with server() as running:
        yield running


@contextmanager
def storing(served: SimpleNamespace, press: Any, store: ContextStore) -> Iterator[list[int]]:
    """While inside, the server has a store; gives the tokens of each forward but for single ones."""
    lengths: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.extend([kwargs["input_ids"].shape[1]] if kwargs["input_ids"].shape[1] > 1 else [])

    pipe = TextGenerationPipeline(model=served.model, tokenizer=TOKENIZER)
    hook = served.model.model.register_forward_pre_hook(count, with_kwargs=True)
    served.notes.clear()
    try:
        with enable(served.model, press) as enabled:
            served.own.contexts = ServedContexts(pipe, store, enabled.press)
            yield lengths
    finally:
        served.own.contexts = None
        hook.remove()


def after_context(served: SimpleNamespace, press: Any, contents: list[str], place: int) -> str:
    """The answer of a model that read `place` tokens under the press, and goes on from there."""
    form = TOKENIZER.apply_chat_template(messages(contents), tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([TOKENIZER.encode(form, add_special_tokens=False)])
    pipe = TextGenerationPipeline(model=served.plain, tokenizer=TOKENIZER)
    context = pipe.read_planned(Reading(ids[:, :place], "", press))
    rest = ids[:, place:]
    with context.opened(served.plain) as cache:
        inputs = continue_inputs(cache, rest, tokens_seen=context.tokens_seen)
        how = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache}
        made = served.plain.generate(**inputs, **how)[0, rest.shape[1] :]
    return str(TOKENIZER.decode(made, skip_special_tokens=True))


@pytest.mark.parametrize("name", PRESSES)
def test_another_question_is_all_that_is_read(served: SimpleNamespace, name: str, tmp_path: Path) -> None:
    """Two requests at once read the context once, a restarted server does not, and answers are the same."""
    press, first, second = PRESSES[name](), [BOOK, "w1", QUESTION], [BOOK, "w1", OTHER]
    place = 1 + 301 + 2
    with storing(served, press, ContextStore(tmp_path)) as lengths, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda one: said(served, one), [first, second]))
        assert sorted(lengths) == [7, 11, place]
    assert sorted(note.stored_tokens for note in served.notes) == [0, place]
    with storing(served, PRESSES[name](), ContextStore(tmp_path)) as lengths:
        answers += [said(served, first), said(served, second, stream=True)]
        assert lengths == [11, 7]
    assert [(note.stored_tokens, note.prompt_tokens) for note in served.notes] == [
        (place, place + 11),
        (place, place + 7),
    ]
    expected = [after_context(served, press, one, place) for one in (first, second)]
    assert answers == expected * 2 and expected[0] != expected[1]


def test_nothing_evicted_and_nothing_packed_gives_the_answer_of_the_plain_model(
    served: SimpleNamespace, tmp_path: Path
) -> None:
    expected = said(served, [BOOK, "w1", QUESTION])
    with storing(served, Knorm(0.0), ContextStore(tmp_path)):
        assert [said(served, [BOOK, "w1", QUESTION]) for _ in range(2)] == [expected] * 2
    assert served.notes[-1].stored_tokens == 304


def test_a_conversation_that_grows_goes_on_from_what_is_stored(
    served: SimpleNamespace, tmp_path: Path
) -> None:
    """It is read anew once more was said since than is stored."""
    contents = [BOOK]
    with storing(served, TurboQuant(3, **SMALL), ContextStore(tmp_path)) as lengths:
        for turn in range(4):
            contents.append(said(served, contents))
            contents.append(text((9, 9, 400, 9)[turn], seed=turn))
        answers = [len(answer.split()) + 1 for answer in contents[1::2]]  # a special token has no text
        context = 1 + 301 + answers[0]
        assert [note.stored_tokens for note in served.notes] == [0, 0, context, context]
        assert len(list(tmp_path.iterdir())) == 1
        lengths.clear()
        said(served, contents)
        longer = context + 10 + answers[1] + 10 + answers[2] + 401 + answers[3]
        assert lengths == [longer, 11] and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_a_context_is_read_with_its_question(served: SimpleNamespace, tmp_path: Path) -> None:
    """Short ones, and those that the press cannot work on by themselves."""
    with storing(served, TurboQuant(4, **SMALL), ContextStore(tmp_path)) as lengths:
        said(served, [text(140), "w1", QUESTION])
        assert lengths == [1 + 141 + 2 + 11]
    with storing(served, SnapKV(0.5, window_size=200), ContextStore(tmp_path)) as lengths:
        said(served, [text(150), "w1", text(60)])
        assert lengths[-1] == 1 + 151 + 2 + 62
    assert not list(tmp_path.iterdir())


def test_a_store_that_fails_costs_no_answer(
    served: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents, store = [BOOK, "w1", QUESTION], ContextStore(tmp_path)
    save, full = CachedContext.save, CacheFileError("no space left")

    def fail(*_: Any) -> None:
        raise full

    with storing(served, TurboQuant(4, **SMALL), store) as lengths:
        monkeypatch.setattr(CachedContext, "save", fail)
        expected = said(served, contents)
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(CachedContext, "save", save)
        said(served, contents)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.warns(UserWarning, match="the text is read again"):
            assert said(served, contents) == expected
        assert lengths == [304, 11] * 3
        assert said(served, contents) == expected and lengths[6:] == [11]
        monkeypatch.setattr(store, "_is_there", fail)
        assert said(served, contents) == expected and lengths[7:] == [304, 11]


def test_what_no_store_can_hold_is_refused_at_once(tmp_path: Path) -> None:
    store, pipe = ContextStore(tmp_path), ours(chat=True)
    decoding = Compose([Decoding(base_press=Knorm(), compression_interval=4, target_size=100)])
    with pytest.raises(InvalidInputError, match="acts during decoding"):
        ServedContexts(pipe, store, decoding)
    with pytest.raises(InvalidInputError, match="no store can find a context again"):
        ServedContexts(pipe, store, TurboQuant(codec=lambda dim, role, layer: None))


TEMPLATES = {
    "<user> {{ content }} ": ["<user>"],
    "<answer> <user> {{ content }} </s> ": ["<answer>", "<user>"],
    "{% if loop.first %}<s> w9 {% endif %}w8 <user> {{ content }} ": ["w8", "<user>"],
}


def test_the_opening_of_a_turn_is_found_in_any_template() -> None:
    tokenizer = type(TOKENIZER)(tokenizer_object=TOKENIZER._tokenizer)
    for form, opening in TEMPLATES.items():
        user = f"{{% set content = message['content'] %}}{form}"
        tokenizer.chat_template = (
            "{% for message in messages %}{% if message['role'] == 'user' %}"
            f"{user}{{% else %}}w7 {{{{ message['content'] }}}} {{% endif %}}{{% endfor %}}"
        )
        found = turn_opening(tokenizer)
        assert tokenizer.convert_ids_to_tokens(found) == opening
        conversation = [*messages(["w1 w2", "w3", "w4"])]
        ids = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(conversation, tokenize=False))])
        places = turn_starts(ids, found)
        assert len(places) == 2 and "w4" not in tokenizer.decode(ids[0, : places[1]])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    with pytest.raises(InvalidInputError, match="no context can be told from its question"):
        turn_opening(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInputError, match="cannot write a conversation: roles must alternate"):
        turn_opening(tokenizer)
