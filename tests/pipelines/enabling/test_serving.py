"""An enabled model behind transformers' server, over HTTP, and as the server up to 5.4 calls it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig, TextIteratorStreamer

from quantpress.cache import PackedLayer
from quantpress.errors import InvalidInputError
from quantpress.pipelines.enabling.enable import enable
from quantpress.pipelines.enabling.serving import ModelServer
from quantpress.presses import Compose, SnapKV, TurboQuant
from tests.docs.markdown import ROOT, blocks
from tests.pipelines.enabling.served import ask, said, server
from tests.pipelines.words import text, word_tokenizer
from tests.presses.reading import lossless
from tests.tiny_models import tiny_model

SNAP = SnapKV(0.5, window_size=16)


class Server:
    """The calls of `transformers.cli.serve.Serve`: a thread, a streamer, the last cache if it is shorter."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokenizer, self.cache = model, word_tokenizer(chat=True), None

    def answer(self, messages: list[dict[str, str]]) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True
        )
        cache = self.cache
        if cache is not None and inputs["input_ids"].shape[-1] <= cache.get_seq_length():
            cache = None
        streamer = TextIteratorStreamer(self.tokenizer, skip_special_tokens=True, skip_prompt=True)
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        options = {"streamer": streamer, "generation_config": config, "return_dict_in_generate": True}

        def generate() -> None:
            self.cache = self.model.generate(**inputs, **options, past_key_values=cache).past_key_values

        thread = threading.Thread(target=generate)
        thread.start()
        said = "".join(streamer)
        thread.join()
        return said


def conversation(server: Any) -> list[str]:
    messages = [{"role": "user", "content": text(300)}]
    for turn in range(3):
        messages.append({"role": "assistant", "content": server.answer(messages)})
        messages.append({"role": "user", "content": text(20, seed=turn + 1)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_a_conversation_with_the_calls_of_the_server() -> None:
    model = tiny_model("llama")
    plain = Server(model)
    expected = conversation(plain)
    with enable(model, lossless()):
        server = Server(model)
        assert conversation(server) == expected
        assert all(isinstance(layer, PackedLayer) for layer in server.cache.layers)
        assert server.cache.get_seq_length() == plain.cache.get_seq_length()
    with enable(model, Compose([SNAP, TurboQuant(4)])):
        evicted = Server(model)
        assert len(conversation(evicted)) == 3
    kept = evicted.cache.layers[0].get_seq_length()
    assert kept + 140 < evicted.cache.get_seq_length() == plain.cache.get_seq_length()


@pytest.fixture(scope="module")
def served() -> Iterator[SimpleNamespace]:
    with server() as running:
        yield running


def generated(model: Any, content: str) -> str:
    """What `model.generate` says to the same ids."""
    tokenizer = word_tokenizer(chat=True)
    messages = [{"role": "user", "content": content}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


PRESSES = [TurboQuant.preset("balanced"), Compose([SNAP, TurboQuant(2, sink_tokens=4, recent_tokens=16)])]


@pytest.mark.parametrize("press", PRESSES, ids=["every token", "evicted"])
def test_every_request_is_answered_as_generate_does_from_a_packed_cache(
    served: SimpleNamespace, press: Any
) -> None:
    texts = [text(300, seed=seed) for seed in (1, 2)]
    served.notes.clear()
    with enable(served.model, press), ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda one: said(served, one), texts))
        streamed = said(served, texts[0], stream=True)
    assert len(served.notes) == 3
    for note in served.notes:
        assert (note.prompt_tokens, note.new_tokens) == (303, 6)
        assert all(layer.packed_tokens >= 128 for layer in note.memory.layers)
    with enable(served.plain, press):
        expected = [generated(served.plain, one) for one in texts]
    assert at_once == expected and expected[0] != expected[1]
    assert streamed == expected[0]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "400 - ValueError"),
    ({"messages": []}, "Error code: 400"),
    ({"extra_body": {"nonsense": 1}}, "422"),
    ({"messages": [{"role": "user", "content": "w1 " * 5000}]}, "the prompt has 5003 tokens"),
    ({"stream": True, "max_tokens": 0}, "greater than 0|during streaming"),
]


def test_a_wrong_request_is_an_error_and_the_server_lives_on(served: SimpleNamespace) -> None:
    from openai import APIError

    with enable(served.model, 4):
        before = said(served, "w1 w2")
        for options, reason in WRONG:
            with pytest.raises(APIError, match=reason):
                list(ask(served, "w1 w2", **options))
        assert said(served, "w1 w2") == before
    assert [one.id for one in served.client.models.list()] == ["tiny"]


def test_the_example_of_the_page_runs(served: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (one for one in blocks(ROOT / "docs" / "serving.md") if "import OpenAI" in one.parsed)
    with enable(served.model, 4):
        exec(example.parsed.replace("http://127.0.0.1:8000/v1", served.url), {})
    assert capsys.readouterr().out.strip()


def test_a_server_that_is_built_differently_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pytest.importorskip("transformers.cli.serve")
    monkeypatch.setattr(serve, "Serve", type("Serve", (), {"__init__": lambda self, **_: None}))
    with pytest.raises(InvalidInputError, match="is built differently"):
        ModelServer(tiny_model("llama"), word_tokenizer(chat=True), "tiny", print)
