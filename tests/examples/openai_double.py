"""A server with the few calls of OpenAI's API that an example makes: it says the same thing to everyone.

It counts words as tokens, and as cached whole blocks of 128 that an earlier prompt began with, as vLLM does.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from typing import Any

BLOCK = 128


class Served:
    """What the server was asked.

    Attributes:
        url: its address; behind "/silent" it counts no tokens.
        asked: the models' names.
        prompts: words of each.
    """

    def __init__(self, url: str) -> None:
        self.url, self.asked, self.prompts = url, list[str](), list[list[str]]()

    def usage(self, words: list[str]) -> dict[str, Any]:
        """What vLLM says of a prompt, which is then cached."""
        same = (_shared(words, earlier) for earlier in self.prompts)
        cached = max(same, default=0) // BLOCK * BLOCK
        self.prompts.append(words)
        counted = {"prompt_tokens": len(words), "completion_tokens": 2, "total_tokens": len(words) + 2}
        return {**counted, "prompt_tokens_details": {"cached_tokens": cached}}


def _shared(one: list[str], other: list[str]) -> int:
    """Words that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@contextmanager
def openai_server() -> Iterator[Served]:
    """A server in a thread of this process."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "tests"}
            self._send("application/json", json.dumps({"object": "list", "data": [model]}))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append(asked["model"])
            words = asked["messages"][0]["content"].split()
            parts = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in ("At ", "nine.")]
            if "silent" not in self.path and asked["stream_options"]["include_usage"]:
                parts.append({"choices": [], "usage": served.usage(words)})
            about = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny"}
            events = [json.dumps({**about, **part}) for part in parts]
            self._send("text/event-stream", "".join(f"data: {one}\n\n" for one in [*events, "[DONE]"]))

        def _send(self, kind: str, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Served(f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
