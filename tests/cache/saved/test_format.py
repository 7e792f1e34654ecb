"""The file format: what was written comes back bit for bit, and anything else is refused with the reason."""

import json
import os
import random
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantpress.cache.saved import format as file_format
from quantpress.cache.saved.format import read_file, write_file
from quantpress.errors import CacheFileError

DTYPES = (torch.uint8, torch.int16, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32)


def tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, one without entries, one scalar, and views."""
    made = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    whole = torch.randn(4, 6)
    views = {"columns": whole[:, 1:3], "rows": whole[1:3], "same": whole[1:3], "turned": whole.T}
    return {**made, **views, "empty": torch.zeros(2, 0, 3), "scalar": torch.tensor(7)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    write_file(path, {"note": ["é", None, 1.5]}, {"x": torch.arange(40), "y": torch.randn(3, 4).half()})
    return path


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path, made = tmp_path / "a", tensors()
    size = write_file(path, {"note": {"é": [1, None]}}, made)
    about, found = read_file(path)
    assert size == path.stat().st_size
    assert about["note"] == {"é": [1, None]}
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].shape == tensor.shape


def test_safetensors_itself_reads_the_file(file: Path) -> None:
    with safe_open(file, framework="pt") as source:
        assert torch.equal(source.get_tensor("x"), torch.arange(40))
        assert json.loads(source.metadata()["quantpress"])["tensors"]["x"]["shape"] == [40]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_only_the_owner_can_read_it_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"older, and open to all")
    path.chmod(0o666)
    before = os.umask(0)
    try:
        write_file(path, {}, {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def noted_replace(old: Any, new: Any) -> None:
        done.append("replace")
        assert stat.S_IMODE(Path(old).parent.stat().st_mode) == 0o700
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_file(tmp_path / "a", {}, {"x": torch.zeros(2)})
    ours = done[done.index("replace") - 1 :]
    assert ours == ["file", "replace", "folder"]


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_a_failure_leaves_the_older_file(file: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = file.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*((file_format, "save_file") if step == "save_file" else (os, "replace")), fail)
    with pytest.raises(CacheFileError, match=r"cannot be written.*no space"):
        write_file(file, {}, {"x": torch.zeros(2)})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CacheFileError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "a", {}, {"x": torch.zeros(2)})


# Reading


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_a_private_map_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    write_file(path, {}, {"x": torch.arange(1000), "y": torch.zeros(500, dtype=torch.int16)})
    _, found = read_file(path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    for tensor in found.values():
        assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in spans)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # so that bytes held are counted right
    before = path.read_bytes()
    found["x"][0] = -1
    assert path.read_bytes() == before


def test_the_file_may_be_replaced_or_deleted_while_it_is_in_use(file: Path) -> None:
    _, found = read_file(file)
    write_file(file, {}, {"x": torch.zeros(40)})
    file.unlink()
    assert torch.equal(found["x"], torch.arange(40))


def test_every_byte_counts(file: Path) -> None:
    """A flipped bit anywhere is refused, or (white space, form of a digit) does not change what is read."""
    whole = bytearray(file.read_bytes())
    about, expected = read_file(file)
    refused = 0
    for index in range(len(whole)):
        bit = 1 << random.randrange(8)
        whole[index] ^= bit
        file.write_bytes(whole)
        refused += not _same_or_refused(file, about, expected)
        whole[index] ^= bit
    assert refused > 0.9 * len(whole)


@pytest.mark.parametrize("kind", ["cut", "cut_start", "zeros", "doubled", "swapped", "noise", "grown"])
def test_other_mutations_never_load_wrong(file: Path, kind: str) -> None:
    whole = file.read_bytes()
    about, expected = read_file(file)
    for _ in range(40):
        start, stop = sorted(random.sample(range(len(whole) + 1), 2))
        middle = {
            "cut": b"",
            "zeros": bytes(stop - start),
            "doubled": whole[start:stop] * 2,
            "swapped": whole[start:stop][::-1],
            "noise": random.randbytes(stop - start),
        }.get(kind)
        if kind == "cut_start":
            changed = whole[start:]
        elif middle is None:
            changed = whole + random.randbytes(stop - start)
        else:
            changed = whole[:start] + middle + (whole[stop:] if kind != "cut" else b"")
        file.write_bytes(changed)
        same = _same_or_refused(file, about, expected)
        assert same == (changed == whole) or kind in ("swapped", "doubled")


def _same_or_refused(file: Path, about: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    try:
        found_about, found = read_file(file)
    except CacheFileError:
        return False
    assert found_about == about and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return True


def test_without_verifying_only_the_data_goes_unchecked(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(CacheFileError, match=r"bytes of \w+ have changed"):
        read_file(file)
    assert read_file(file, verify=False)[1].keys() == {"x", "y"}
    file.write_bytes(whole[:-1])
    with pytest.raises(CacheFileError, match="cut short"):
        read_file(file, verify=False)


@pytest.mark.parametrize("newer", [0, 2, "1", None])
def test_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(file_format, "FORMAT", newer)
        write_file(tmp_path / "a", {}, {"x": torch.zeros(2)})
    with pytest.raises(CacheFileError, match=rf"format {newer!r} .*reads format 1"):
        read_file(tmp_path / "a")


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(CacheFileError, match="no saved cache"):
        read_file(other)
    other.write_bytes(b"just some text, no tensors at all")
    with pytest.raises(CacheFileError, match="damaged"):
        read_file(other)
    with pytest.raises(CacheFileError, match="not a file"):
        read_file(tmp_path)
    with pytest.raises(CacheFileError, match="not a file"):
        read_file(tmp_path / "nowhere")


def test_tensors_that_changed_places_are_noticed(file: Path) -> None:
    """The table of safetensors itself may be rewritten so that it is still valid."""
    about, found = read_file(file)
    with safe_open(file, framework="pt") as source:
        header = source.metadata()
    for changed, reason in (
        ({"x": found["x"].flip(0).contiguous(), "y": found["y"]}, "bytes of x"),
        ({"x": found["x"].view(8, 5), "y": found["y"]}, "form"),
        ({"x": found["x"], "y": found["y"].view(torch.int16)}, "form"),
        ({"x": found["x"], "z": found["y"]}, "table"),
        ({"x": found["x"]}, "table"),
    ):
        copies = {name: tensor.clone() for name, tensor in changed.items()}
        save_file(copies, file, metadata=header)
        with pytest.raises(CacheFileError, match=reason):
            read_file(file)
    assert about["tensors"].keys() == {"x", "y"}
