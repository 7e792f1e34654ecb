"""A server over a tiny model, and a client of it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import logging

from quantpress.pipelines.enabling.serving import Answer, ModelServer
from tests.limits import HANG
from tests.pipelines.words import word_tokenizer
from tests.tiny_models import tiny_model


@contextmanager
def server() -> Iterator[SimpleNamespace]:
    """A server over a model that no other test has, a client of it, and the answers that it noted."""
    for needed in ("fastapi", "openai", "uvicorn"):
        pytest.importorskip(needed)
    import openai

    verbosity = logging.get_verbosity()
    model, notes = tiny_model("llama", seed=1), list[Answer]()
    plain = deepcopy(model)
    own = ModelServer(model, word_tokenizer(chat=True), "tiny", notes.append)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=own.server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=HANG) as client:
            yield SimpleNamespace(own=own, model=model, plain=plain, client=client, notes=notes, url=url)
        own.server.should_exit = True
        thread.join()
    own.close()
    logging.set_verbosity(verbosity)


def ask(served: SimpleNamespace, content: str | list[str], **options: Any) -> Any:
    """Ask with one message, or with those of a conversation, which the user begins and ends."""
    contents = [content] if isinstance(content, str) else content
    return served.client.chat.completions.create(
        **{"model": "tiny", "messages": messages(contents), "max_tokens": 6, **options}
    )


def messages(contents: list[str]) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": one} for index, one in enumerate(contents)]


def said(served: SimpleNamespace, content: str | list[str], **options: Any) -> str:
    """The answer, in one piece or streamed."""
    answer = ask(served, content, **options)
    if options.get("stream"):
        return "".join(part.choices[0].delta.content or "" for part in answer)
    return str(answer.choices[0].message.content)
