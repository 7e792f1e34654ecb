"""`vllm serve` and the client of OpenAI: the engine is in a process of its own, which loads the plugin."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.engine import lossless
from tests.engines.vllm.engine.tiny import Truth, tokens
from tests.limits import HANG

pytestmark = pytest.mark.slow

NEW = 12
BLOCK = 128


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server that is up."""
    openai = pytest.importorskip("openai")
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    options = {
        "served-model-name": "tiny",
        "kv-cache-dtype": lossless.DTYPE,
        "attention-backend": "QUANTPRESS",
        "kv-cache-memory-bytes": 64 << 20,
        "max-model-len": 1024,
        "max-num-batched-tokens": 200,
        "max-num-seqs": 4,
        "dtype": "float32",
        "host": "127.0.0.1",
        "port": port,
    }
    command = [sys.executable, "-P", lossless.__file__, "serve", str(folder), "--enforce-eager"]
    command += ["--enable-prompt-tokens-details", *(f"--{name}={value}" for name, value in options.items())]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent)
    try:
        wait_until_up(server, port, log)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=HANG) as found:
            yield found
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + HANG
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the server is not up:\n{log.read_text()[-6000:]}")


def ask(client: Any, prompt: list[int], **options: Any) -> Any:
    ignoring = {"ignore_eos": True}
    return client.completions.create(
        model="tiny", prompt=prompt, max_tokens=NEW, temperature=0, extra_body=ignoring, **options
    )


def numbers(text: str) -> list[int]:
    """The tokens of words t7 t12 and so on; special ones are left out of texts."""
    return [int(word[1:]) for word in text.split()]


def expected(truth: Truth, prompt: list[int]) -> list[int]:
    """Greedy tokens of transformers, without the special ones."""
    made: list[int] = []
    for _ in range(NEW):
        made.append(int(truth.log_probabilities(prompt, [*made, 0])[-1].argmax()))
    return [token for token in made if token > 2]


def test_streams_from_several_clients_at_a_time(client: Any, truth: Truth) -> None:
    prompts = [tokens(count) for count in (1, 100, 300, 450, 128, 257)]

    def streamed(prompt: list[int]) -> list[str]:
        return [part.choices[0].text for part in ask(client, prompt, stream=True)]

    with ThreadPoolExecutor(len(prompts)) as pool:
        for prompt, parts in zip(prompts, pool.map(streamed, prompts), strict=True):
            assert len(parts) > 1
            assert numbers("".join(parts)) == expected(truth, prompt)


def test_prefixes_and_a_stream_that_is_broken_off(client: Any, truth: Truth) -> None:
    first = tokens(400)
    second = first[: 2 * BLOCK] + tokens(70)
    for prompt, reused in [(first, 0), (second, 2 * BLOCK), (first, 3 * BLOCK)]:
        with ask(client, tokens(350), stream=True) as broken_off:
            next(iter(broken_off))
        answer = ask(client, prompt)
        assert numbers(answer.choices[0].text) == expected(truth, prompt)
        assert answer.usage.prompt_tokens_details.cached_tokens == reused
