"""An enabled model behind `transformers serve`: what its server does with a model and a cache."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, TextIteratorStreamer

from quantpress.cache import PackedLayer
from quantpress.pipelines.enabling.enable import enable
from quantpress.presses import Compose, SnapKV, TurboQuant
from tests.limits import HANG
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_itself(tmp_path: Path) -> None:
    """Over HTTP, on loopback: a conversation of two turns, with and without compression."""
    for needed in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(needed)
    import httpx
    from transformers.cli.serve import Serve

    model, tokenizer = tiny_model("llama"), word_tokenizer(chat=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(
        device="cpu",
        host="127.0.0.1",
        port=port,
        force_model=str(tmp_path),
        non_blocking=True,
        log_level="error",
    )
    try:
        served, _ = server.load_model_and_processor(server.process_model_name(str(tmp_path)))
        url = f"http://127.0.0.1:{port}"
        _wait_for(httpx, url)

        def ask(messages: list[dict[str, str]]) -> str:
            config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0).to_json_string()
            body = {"model": str(tmp_path), "messages": messages, "stream": True, "generation_config": config}
            chunks = []
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=HANG) as reply:
                assert reply.status_code == 200
                for line in reply.iter_lines():
                    chunks.append(line)
            return "".join(chunks)

        answers = []
        for press in (None, lossless(), Compose([SNAP, TurboQuant(4)])):
            first = [{"role": "user", "content": text(300)}]
            second = [
                *first,
                {"role": "assistant", "content": "w1"},
                {"role": "user", "content": text(20, seed=1)},
            ]
            if press is None:
                answers.append([_content(ask(first)), _content(ask(second))])
                continue
            with enable(served, press):
                answers.append([_content(ask(first)), _content(ask(second))])
                layers = server.last_kv_cache.layers
                assert all(isinstance(layer, PackedLayer) for layer in layers)
        assert answers[1] == answers[0]
        assert answers[2][0].split()[:1] == answers[0][0].split()[:1] and answers[2] != answers[0]
    finally:
        server.kill_server()
        server.last_kv_cache = None  # its thread holds on to the server


def _wait_for(httpx: Any, url: str) -> None:
    for _ in range(20 * HANG):
        try:
            if httpx.get(f"{url}/health", timeout=HANG).status_code == 200:
                return
        except httpx.TransportError:
            threading.Event().wait(0.05)
    pytest.fail(f"no server at {url}")


def _content(stream: str) -> str:
    import json

    words = []
    for part in stream.split("data: ")[1:]:
        delta = json.loads(part)["choices"][0]["delta"] if part.startswith("{") else {}
        words.append(delta.get("content") or "")
    return "".join(words)
