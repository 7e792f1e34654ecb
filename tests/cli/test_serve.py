"""`quantpress serve`: what it refuses, what it prints, and how it ends."""

import json
import os
import shlex
import signal
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from quantpress.cli import loading, serve
from quantpress.errors import InvalidInputError
from quantpress.pipelines.enabling.enable import enable
from tests.limits import HANG
from tests.pipelines.words import ours, text, word_tokenizer


def served_once(
    monkeypatch: pytest.MonkeyPatch, contents: list[str], pipe: Any = None, **options: Any
) -> tuple[list[str], list[str]]:
    """What the command says, and what it answers to a conversation before Ctrl-C ends it."""
    for needed in serve.NEEDED:
        pytest.importorskip(needed)
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: ours(chat=True) if pipe is None else pipe)
    said, answers = [], list[str]()

    def echo(line: str, err: bool = False) -> None:
        said.append(line)
        if len(said) == 1:
            threading.Thread(target=ask_and_interrupt, args=(line,)).start()

    def ask_and_interrupt(welcome: str) -> None:
        """Send what the example sends, to the address that it names."""
        try:
            _, url, *_, body = shlex.split(welcome.splitlines()[-1])
            message = {**json.loads(body), "max_tokens": 6}
            message["messages"] = [{**message["messages"][0], "content": one} for one in contents]
            how = {"headers": {"Content-Type": "application/json"}, "data": json.dumps(message).encode()}
            with urllib.request.urlopen(urllib.request.Request(url, **how), timeout=HANG) as reply:
                answers.append(json.load(reply)["choices"][0]["message"]["content"])
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(serve.typer, "echo", echo)
    serve.serve(port=0, **options)
    return said, answers


def test_it_says_where_it_listens_answers_and_ends_with_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (welcome, noted), answers = served_once(monkeypatch, [text(300)])
    assert "TurboQuant.preset('balanced')" in welcome and "4,096 tokens take" in welcome
    assert "303 tokens read, 6 new, 308 kept" in noted
    model, tokenizer = ours().model, word_tokenizer(chat=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text(300)}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with enable(model, "balanced"):
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, 303:]
    assert answers == [tokenizer.decode(expected)]
    assert "Traceback" not in capfd.readouterr().err


def test_a_conversation_is_found_in_the_store_after_a_restart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options, contents = {"store": str(tmp_path / "store"), "store_bytes": "1GiB"}, [text(300), "w1"]
    found = [served_once(monkeypatch, contents, **options) for _ in range(2)]
    assert f"Conversations are kept in {options['store']}, up to 1.0 GiB." in found[0][0][0]
    assert [said[1].partition(" new")[0] for said, _ in found] == [
        "305 tokens read, 6",
        "302 of 305 tokens from the store, 6",
    ]
    assert found[0][1] == found[1][1]


def test_what_it_cannot_do_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InvalidInputError, match="give another"),
    ):
        serve.serve(port=taken.getsockname()[1])
    with pytest.raises(InvalidInputError, match="cannot listen at nowhere, port 8000"):
        serve.serve(host="nowhere")
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("fastapi", "uvicorn") else name)
    with pytest.raises(InvalidInputError, match=r"pip install fastapi uvicorn$"):
        serve.serve()
