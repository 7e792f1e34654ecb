"""How documents are spread over workers that may die, on a stand-in for Ray."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from quantpress.cli.batch import on_ray
from quantpress.cli.batch.documents import Document
from quantpress.cli.batch.on_ray import MOST_TRIES, Workers
from quantpress.cli.batch.worker import Job, Result
from quantpress.errors import InvalidInputError, QuantPressError, UnsupportedModelError
from tests.cli.batch.ray_double import RayDouble

JOB = Job("TurboQuant", ("w1",), 5)


class Answers:
    """A worker without a model."""

    refused = ""

    def __init__(self, job: Job) -> None:
        self.job = job

    def run(self) -> dict[str, Any]:
        return {"weights": "00"}

    def answer(self, document: Document) -> Result:
        if document.name == self.refused:
            raise UnsupportedModelError("no cache")
        return Result(document.name, [document.text])


class Taken:
    """Documents, and how many of them were taken but not answered."""

    def __init__(self, count: int) -> None:
        self.open = self.most_open = 0
        self._count = count

    def __iter__(self) -> Iterator[Document]:
        for index in range(self._count):
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            yield Document(f"{index}", f"text {index}")


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "Worker", Answers)


def answered(ray: RayDouble, count: int, checked: list[Any] | None = None) -> tuple[list[Result], Taken]:
    found: list[Result] = []
    taken = Taken(count)
    check = (checked if checked is not None else []).append
    for result in Workers(ray, JOB, 1).results(iter(taken), check):
        taken.open -= 1
        found.append(result)
    assert [name for name, times in Counter(one.document for one in found).items() if times > 1] == []
    assert len(found) == count
    return found, taken


def test_every_document_is_answered_once_and_few_are_held() -> None:
    ray, checked = RayDouble(machines=({"CPU": 2.0}, {"CPU": 1.0}, {"memory": 5.0})), []
    found, taken = answered(ray, 50, checked)
    assert all(one.answers == [f"text {one.document}"] for one in found)
    assert taken.most_open <= 3 and ray.most_waiting <= 3
    assert checked and all(one == {"weights": "00"} for one in checked)
    assert ray.options == {"max_restarts": 0, "num_cpus": 1}


@pytest.mark.parametrize("count", [0, 1, 2, 5, 30])
def test_workers_that_die_lose_nothing(count: int) -> None:
    calls = Counter[str]()

    def dies(method: str, *_: Any) -> bool:
        calls[method] += 1
        return calls["run"] % 4 == 1 if method == "run" else calls["answer"] % 3 == 1

    ray = RayDouble(dies)
    found, taken = answered(ray, count)
    assert all(one.answers == [f"text {one.document}"] for one in found)
    assert taken.most_open <= 2 + 1
    assert ray.killed > 0 or not count


def test_a_document_that_kills_its_workers_fails_alone() -> None:
    ray = RayDouble(lambda method, *given: method == "answer" and given[0].name in ("2", "4"))
    found, _ = answered(ray, 5)
    failed = {one.document: one.error for one in found if one.answers is None}
    assert failed == dict.fromkeys(("2", "4"), f"{MOST_TRIES} workers died over it: The actor died")
    assert ray.killed == 2 * MOST_TRIES


@pytest.mark.parametrize("method", ["run", "answer"])
def test_workers_that_only_die_end_the_run(method: str) -> None:
    ray = RayDouble(lambda called, *_: called == method)
    with pytest.raises(
        QuantPressError, match=r"workers died one after the other.*The actor died.*Ray's logs"
    ):
        for result in Workers(ray, JOB, 1).results(iter(Taken(10**9)), lambda _: None):
            assert result.answers is None


def test_an_error_that_all_would_have_is_raised_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "refused", "3")
    with pytest.raises(UnsupportedModelError, match="no cache"):
        answered(RayDouble(), 5)


@pytest.mark.parametrize(
    ("machines", "cores", "count", "share"),
    [
        (({"CPU": 16.0}, {"CPU": 9.0}), None, 2, {"num_cpus": 9}),
        (({"CPU": 16.0}, {"CPU": 9.0}), 4, 6, {"num_cpus": 4}),
        (({"CPU": 16.0, "GPU": 4.0}, {"CPU": 9.0}), 4, 4, {"num_gpus": 1, "num_cpus": 0}),
    ],
)
def test_how_many_workers_there_are(machines: Any, cores: int | None, count: int, share: Any) -> None:
    ray = RayDouble(machines=machines)
    assert Workers(ray, JOB, cores).count == count
    assert ray.options == {"max_restarts": 0, **share}


def test_too_many_cores_are_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"no machine of the cluster has 8 free cores.*\[2\].*fewer --cores"
    ):
        Workers(RayDouble(), JOB, 8)
