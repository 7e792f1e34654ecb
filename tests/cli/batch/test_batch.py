"""`quantpress batch` in one process: every document is answered once, whatever happened before."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cli.batch.answers_file import AnswersFile
from quantpress.cli.batch.documents import files_of
from quantpress.cli.batch.worker import Worker
from quantpress.errors import CacheFileError, InvalidInputError, MissingPackageError, UnsupportedModelError
from tests.pipelines.words import model_folder, ours, text

QUESTIONS = ["w1 w2", "w7"]
PRESS = "SnapKV(0.5, window_size=16) | TurboQuant(bits=3)"
NAMES = ["a.txt", "b.txt", "inner/a.txt", "inner/deeper/c.txt"]
ABOUT = {"press": "P", "max_new_tokens": 5, "questions": ["w1"]}
MODEL = {"weights": "00", "dtype": "float32", "model": "m"}

Batch = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents in folders, hidden ones, and others that the pattern leaves out."""
    for index, name in enumerate([*NAMES, ".hidden.txt", ".git/x.txt", "notes.md"]):
        path = tmp_path / "documents" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(300, seed=index), encoding="utf-8")
    (tmp_path / "questions.txt").write_text("\n  w1 w2\n\nw7\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def batch(model: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Runs the command in its folder, with further options, and returns its outcome."""
    monkeypatch.chdir(folder)

    def run(*options: str, status: int = 0) -> Any:
        whole = ["batch", "documents", "--questions", "questions.txt", "--out", "answers.jsonl", "-p", PRESS]
        whole += ["-m", model, "--device", "cpu", "--max-new-tokens", "5", "--json", *options]
        result = CliRunner().invoke(cli.app, whole, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)

    return run


def lines() -> dict[str, dict[str, Any]]:
    """The lines of the file by document, none of which is there twice."""
    found = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    named = {line["document"]: line for line in found}
    assert len(named) == len(found)
    return named


def answers() -> dict[str, list[str]]:
    return {name: [one["answer"] for one in line["answers"]] for name, line in lines().items()}


def test_every_document_is_answered_as_the_pipeline_answers(batch: Batch) -> None:
    found = batch()
    assert (found["answered"], found["failed"], found["answered_before"]) == (4, 0, 0)
    pipe = ours()
    for name, given in answers().items():
        content = Path("documents", name).read_text()
        expected = pipe(content, questions=QUESTIONS, press=PRESS, max_new_tokens=5)["answers"]
        assert given == expected
    line = lines()["inner/deeper/c.txt"]
    assert [one["question"] for one in line["answers"]] == QUESTIONS
    assert line["press"] == "SnapKV(0.5, window_size=16) | TurboQuant(3)"
    assert line["report"]["tokens_seen"] == 301 and line["from_store"] is False


def test_the_two_ways_to_ask_never_meet_in_one_file(batch: Batch) -> None:
    batch("--question-aware", "--pattern", "b.txt")
    content = Path("documents/b.txt").read_text()
    how = {"press": PRESS, "max_new_tokens": 5, "question_aware": True}
    assert answers() == {"b.txt": ours()(content, questions=QUESTIONS, **how)["answers"]}
    with pytest.raises(InvalidInputError, match="--question-aware was True, is False; give another --out"):
        batch()
    with pytest.raises(InvalidInputError, match="--store keeps contexts that were read without a question"):
        batch("--question-aware", "--store", "store")


def test_a_second_run_answers_what_is_new_and_loads_no_model_for_nothing(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch()
    before = Path("answers.jsonl").read_bytes()
    Path("documents/new.txt").write_text(text(300, seed=9))
    found = batch()
    assert (found["answered"], found["answered_before"], found["workers"]) == (1, 4, 1)
    assert Path("answers.jsonl").read_bytes().startswith(before) and set(lines()) == {*NAMES, "new.txt"}
    monkeypatch.setattr(Worker, "_loaded", None)
    assert batch()["workers"] == 0


def test_a_failed_document_is_reported_and_skipped_and_tried_again(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("documents/bytes.txt").write_bytes(b"\xff\xfe")
    Path("documents/blank.txt").write_text(" \n")
    with monkeypatch.context() as patch:
        answered = Worker._answered

        def fail(self: Worker, document: Any) -> Any:
            if document.name == "inner/a.txt":
                raise RuntimeError("CUDA out of memory")
            return answered(self, document)

        patch.setattr(Worker, "_answered", fail)
        found = batch(status=1)
    reasons = {one["document"]: one["reason"] for one in found["failures"]}
    assert (found["answered"], found["failed"]) == (3, 3)
    assert reasons.keys() == {"bytes.txt", "blank.txt", "inner/a.txt"}
    assert "cannot be read as text" in reasons["bytes.txt"] and "has no text" in reasons["blank.txt"]
    assert reasons["inner/a.txt"] == "RuntimeError: CUDA out of memory"
    Path("documents/bytes.txt").unlink()
    Path("documents/blank.txt").write_text(text(300))
    again = batch()
    assert (again["answered"], again["answered_before"], again["failed"]) == (2, 3, 0)
    assert set(lines()) == {*NAMES, "blank.txt"}


def test_a_run_that_ended_anywhere_is_resumed(batch: Batch) -> None:
    """Cut after any number of bytes, as by a kill in the middle of a write; every answer is there once."""
    batch()
    whole, expected = Path("answers.jsonl").read_bytes(), answers()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[1] + 5, len(whole) - 1):
        Path("answers.jsonl").write_bytes(whole[:cut])
        complete = sum(end <= cut for end in ends)
        found = batch()
        assert (found["answered"], found["answered_before"]) == (4 - complete, complete)
        assert answers() == expected


def test_an_interrupted_run_keeps_what_it_has(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = Worker._answered
    calls: list[str] = []

    def interrupted(self: Worker, document: Any) -> Any:
        calls.append(document.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answered(self, document)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_answered", interrupted)
        with pytest.raises((AssertionError, json.JSONDecodeError, KeyboardInterrupt)):
            batch()
    assert len(lines()) == 2
    assert batch()["answered"] == 2 and set(lines()) == set(NAMES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-p", "TurboQuant(bits=4)"], r"press was 'SnapKV.*', is 'TurboQuant\(4\)'"),
        (["--max-new-tokens", "6"], "--max-new-tokens was 5, is 6"),
        (["--questions", "others.txt"], r"questions was \['w1 w2', 'w7'\], is \['w1'\]"),
        (["-m", "other"], "the model's weights was '.*', is '.*'"),
        (["--dtype", "bfloat16"], "weights was|dtype was"),
    ],
    ids=["press", "tokens", "questions", "model", "dtype"],
)
def test_answers_of_another_run_are_refused_and_kept(batch: Batch, options: list[str], said: str) -> None:
    batch()
    before = Path("answers.jsonl").read_bytes()
    Path("others.txt").write_text("w1")
    Path("documents/new.txt").write_text(text(300, seed=9))
    if "-m" in options:
        ours().model.save_pretrained("other")
        ours("qwen3").model.save_pretrained("other")
        ours().tokenizer.save_pretrained("other")
    with pytest.raises(InvalidInputError, match=rf"answers of another run: .*({said}).*give another --out"):
        batch(*options)
    assert Path("answers.jsonl").read_bytes() == before


def test_known_documents_come_from_the_store(batch: Batch) -> None:
    batch()
    expected = answers()
    for count in (0, 4):
        Path("answers.jsonl").unlink()
        found = batch("--store", "contexts", "--store-bytes", "10MB")
        assert (found["answered"], found["from_store"]) == (4, count)
        assert answers() == expected
    assert all(line["from_store"] for line in lines().values())


@pytest.mark.parametrize("error", [UnsupportedModelError("no cache"), CacheFileError("no space")])
def test_what_would_fail_every_document_ends_the_run(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Worker, "_answered", fail)
    with pytest.raises(type(error)):
        batch()
    assert not lines()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "documents/answers.jsonl"], "lies among the documents; give --out another place"),
        (["--store", "documents/contexts"], "lies among the documents; give --store another place"),
        (["--out", "s3://bucket/answers"], "cannot be appended to; give --out a file"),
        (["--out", "nowhere/answers"], "no folder nowhere"),
        (["--questions", "empty.txt"], "empty.txt has no"),
        (["--pattern", "*.pdf"], r"documents has no file '\*\.pdf'"),
        (["--store-bytes", "5"], "'5' has no unit"),
        (["--cores", "2"], "--cores 2 is for a Ray cluster; give its --address, too"),
        (["--store", "s4://bucket"], "Protocol not known: s4"),
        (["-p", "Knormm"], "no press 'Knormm'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused_before_a_model_is_loaded(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setattr(Worker, "_loaded", None)
    Path("empty.txt").write_text("\n\n")
    with pytest.raises(InvalidInputError, match=said):
        batch(*options)


def test_a_folder_is_needed_and_ray_for_an_address(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"--address needs Ray.*\.\[ray\].*leave --address"):
        batch("--address", "auto")
    result = CliRunner().invoke(
        cli.app, ["batch", "nowhere", "--questions", "questions.txt", "--out", "a"], catch_exceptions=True
    )
    assert "nowhere is not a folder" in str(result.exception)


# The file


def test_each_line_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers"
    seen: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(path.stat().st_size) or fsync(handle))
    with AnswersFile(str(path), ABOUT) as file:
        file.check_run(MODEL)
        seen.clear()
        for index in range(3):
            file.add(str(index), ["w2"], {})
            assert seen[-1] == path.stat().st_size and len(seen) == index + 1
            assert str(index) in file and str(index + 1) not in file


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "answers")
    with (
        AnswersFile(path, ABOUT),
        pytest.raises(InvalidInputError, match=r"another process writes to .*wait for it"),
    ):
        AnswersFile(path, ABOUT)
    AnswersFile(path, ABOUT).__exit__(None, None, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json\n", "line 1 of .* is none that"),
        (b'{"document": "a"}\n', "line 1 of .* is none that"),
        (b"[1]\n", "line 1 of .* is none that"),
        (b"\n", "line 1 of .* is none that"),
        (b"\xff\xfe\n", "line 1 of .* is none that"),
    ],
)
def test_other_files_are_refused_and_kept(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "answers"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=said):
        AnswersFile(str(path), ABOUT)
    assert path.read_bytes() == content


def test_a_document_with_two_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with AnswersFile(str(path), ABOUT) as file:
        file.check_run(MODEL)
        file.add("a", ["w2"], {})
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(InvalidInputError, match=r"line 2 of .* answers a a second time"):
        AnswersFile(str(path), ABOUT)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with AnswersFile(str(tmp_path / "a"), ABOUT) as file, open("/dev/full", "ab", buffering=0) as full:
        file.check_run(MODEL)
        file._file = full
        with pytest.raises(InvalidInputError, match=r"cannot be written: .*make room"):
            file.add("a", ["w2"], {})


def test_files_are_found_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    scandir = os.scandir

    @contextmanager
    def counted(path: Path) -> Iterator[Iterator[Any]]:
        with scandir(path) as entries:
            yield (taken.append(entry.name) or entry for entry in entries)

    for index in range(50):
        (folder / "documents" / f"{index}.txt").touch()
    (folder / "documents" / "loop").symlink_to(folder / "documents")
    monkeypatch.setattr(os, "scandir", counted)
    found = files_of(folder / "documents", "*.txt")
    next(found)
    assert len(taken) < 12  # and no more than those that were passed over
    assert {name for name, _ in found} >= {"7.txt", "inner/deeper/c.txt"}
    assert "loop" in taken and taken.count("a.txt") == 2
