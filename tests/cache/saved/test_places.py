"""Files elsewhere, in the memory file system of fsspec: what holds on this machine holds there."""

import json
import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from safetensors.torch import load

from quantpress.cache.saved import places
from quantpress.cache.saved.format import read_description, read_file, write_file
from quantpress.errors import CacheFileError, InvalidInputError, MissingPackageError

URL = "memory://bucket/folder/a.safetensors"
TENSORS = {"x": torch.arange(40), "y": torch.randn(3, 4).half(), "empty": torch.zeros(2, 0)}


@pytest.fixture(autouse=True)
def files() -> Iterator[Any]:
    """The file system, empty before and after."""
    there = fsspec.filesystem("memory")
    there.store.clear()
    yield there
    there.store.clear()


def names(files: Any) -> list[str]:
    return sorted(files.store)


def test_what_was_written_elsewhere_comes_back(files: Any) -> None:
    size = write_file(URL, {"note": ["é", None]}, TENSORS)
    whole = files.cat_file(URL)
    assert size == len(whole) and names(files) == ["/bucket/folder/a.safetensors"]
    assert torch.equal(load(whole)["x"], TENSORS["x"])  # safetensors itself reads it
    about, found = read_file(URL)
    assert about["note"] == ["é", None] and found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_path_of_this_machine_may_be_a_url(tmp_path: Path) -> None:
    write_file(f"file://{tmp_path}/a", {}, TENSORS)
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert torch.equal(read_file(tmp_path / "a")[1]["x"], read_file(f"local://{tmp_path}/a")[1]["x"])


@pytest.mark.parametrize("step", ["open", "mv"])
def test_a_failure_leaves_the_older_file_alone(
    files: Any, monkeypatch: pytest.MonkeyPatch, step: str, tmp_path: Path
) -> None:
    """Nothing is written under the name itself before all of it is there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    write_file(URL, {}, TENSORS)
    before = files.cat_file(URL)
    seen: list[list[str]] = []

    def fail(self: Any, path: str, *_: Any, **__: Any) -> None:
        if step == "open":
            files.store[f"/{path.lstrip('/')}"] = MemoryFile(files, path, b"half of it")
        seen.append(names(files))
        raise RuntimeError("the bucket is closed")  # what packages raise is not always an OSError

    monkeypatch.setattr(MemoryFileSystem, step, fail)
    with pytest.raises(CacheFileError, match=r"memory://.*cannot be written: the bucket is closed"):
        write_file(URL, {}, {"x": torch.zeros(3)})
    (there,) = seen
    assert len(there) == 2 and there[0].startswith("/bucket/folder/.a.safetensors-")
    assert names(files) == ["/bucket/folder/a.safetensors"] and files.cat_file(URL) == before
    assert not list(tmp_path.iterdir())


def test_a_file_passes_in_pieces_and_is_mapped(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read or write is as large as the file, and what was fetched is deleted, but stays mapped."""
    monkeypatch.setattr(MemoryFileSystem, "blocksize", 2**16)
    monkeypatch.setattr(places, "PIECE", 2**16)
    sizes: list[int] = []
    kind: Any = type(files.open("memory://new", "wb"))
    write = kind.write
    monkeypatch.setattr(kind, "write", lambda self, data: sizes.append(len(data)) or write(self, data))
    large = torch.randn(2**18)
    write_file(URL, {}, {"x": large, "y": large[:4]})
    assert len(sizes) > 10 and max(sizes) <= 2**16
    _, found = read_file(URL)
    assert torch.equal(found["x"], large)
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in maps if line.endswith("/fetched (deleted)")]
        at = found["x"].data_ptr()
        assert any(int(start, 16) <= at < int(stop, 16) for start, stop in spans)


def test_the_description_alone_takes_the_header_alone(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(URL, {"note": 3}, {"x": torch.randn(2**16)})
    about, fetched = read_file(URL)[0], []
    cat = MemoryFileSystem.cat_file

    def noted(self: Any, path: str, start: int, end: int, **options: Any) -> bytes:
        fetched.append(end - start)
        return cat(self, path, start, end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    assert read_description(URL) == about
    assert sum(fetched) < 2000


def test_mutated_files_never_load_wrong(files: Any) -> None:
    write_file(URL, {"note": 1}, TENSORS)
    whole = files.cat_file(URL)
    about, expected = read_file(URL)
    refused = 0
    for trial in range(150):
        changed = bytearray(whole)
        if trial % 3:
            changed[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        else:
            start, stop = sorted(random.sample(range(len(whole) + 1), 2))
            changed[start:stop] = random.randbytes(random.randrange(2) * (stop - start))
        files.pipe_file(URL, bytes(changed))
        try:
            found_about, found = read_file(URL)
        except CacheFileError:
            refused += 1
            with pytest.raises(CacheFileError):
                read_file(URL)  # and again
        else:
            assert found_about == about
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        with suppress(CacheFileError):
            assert read_description(URL) == about
    assert refused > 120


def test_a_header_that_is_no_header_is_refused(files: Any) -> None:
    text = json.dumps([1]).encode()
    for content in (b"", b"\xff" * 8, b"\xff" * 4 + bytes(4), len(text).to_bytes(8, "little") + text):
        files.pipe_file(URL, content)
        for read in (read_description, read_file):
            with pytest.raises(CacheFileError, match=r"damaged|no saved cache"):
                read(URL)


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("s4://bucket/a", InvalidInputError, "Protocol not known: s4.*did you mean 's3'"),
        ("nowhere://bucket/a", InvalidInputError, "install the package that adds it to fsspec"),
        ("memory://bucket/none", CacheFileError, "memory://bucket/none is not a file; give one that"),
        ("memory://bucket", CacheFileError, "memory://bucket is not a file"),
    ],
)
def test_what_cannot_be_opened_is_named(files: Any, url: str, kind: type[Exception], said: str) -> None:
    files.pipe_file("memory://bucket/b", b"")
    for read in (read_description, read_file):
        with pytest.raises(kind, match=said):
            read(url)
    if kind is InvalidInputError:
        with pytest.raises(kind, match=said):
            write_file(url, {}, TENSORS)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingPackageError, match=r"s3://b/a needs a package .*Install s3fs"):
        read_file("s3://b/a")


def test_what_a_package_raises_becomes_our_error(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("403 Forbidden")

    write_file(URL, {}, TENSORS)
    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    for read in (read_description, read_file):
        with pytest.raises(CacheFileError, match="cannot be read: 403 Forbidden"):
            read(URL)
