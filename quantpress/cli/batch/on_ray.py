"""Workers on a Ray cluster: one model for each GPU, or for some cores of each machine without GPUs.

Every worker has one document at a time, and the driver holds no more than these. When a worker dies, a new
one takes its place, and its document goes to the next worker that is free.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantpress.cli.arguments import is_url
from quantpress.cli.batch.documents import Document
from quantpress.cli.batch.worker import Job, Result, Worker
from quantpress.errors import InvalidInputError, MissingPackageError, QuantPressError, extra

LOCAL = "local"
MOST_TRIES = 3
"""Workers that may die over one document before it counts as failed."""
STORE_BYTES = 256 * 2**20
"""Ray's object store on a cluster that is started here; it holds the texts that are on their way."""


def import_ray() -> Any:
    """Ray itself.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            f"--address needs Ray, which cannot be imported ({error}); pip install {extra('ray')}, or "
            "leave --address out to answer in one process"
        ) from error
    return ray


class Workers:
    """The workers of a job on a cluster that Ray is connected to.

    Args:
        ray: the package.
        job: what is asked.
        cores: cores of each worker where the cluster has no GPU; None: all of the smallest machine.

    Attributes:
        count: how many workers there are.

    Raises:
        InvalidInputError: no machine has that many cores.
    """

    def __init__(self, ray: Any, job: Job, cores: int | None) -> None:
        self._ray = ray
        self._job = job
        self.count, share = _shares(ray, cores)
        self._actor = ray.remote(max_restarts=0, **share)(Worker)
        self._waiting: dict[Any, tuple[Any, Document | None]] = {}  # what each call is for
        self._again: list[Document] = []
        self._tries: dict[str, int] = {}  # of the documents that are under way
        self._deaths = 0  # since the last answer

    def results(
        self, documents: Iterator[Document], check: Callable[[dict[str, Any]], None]
    ) -> Iterator[Result]:
        """Answer documents, each once, in the order in which they are done.

        Args:
            documents: taken one at a time, when a worker is free.
            check: called with `Worker.run()` of every worker before it gets a document.

        Raises:
            QuantPressError: an error that every document would have, or workers die one after the other.
        """
        idle: list[Any] = []
        exhausted = False
        for _ in range(self.count):
            self._start()
        while True:
            while idle and not exhausted:
                document = self._again.pop() if self._again else next(documents, None)
                exhausted = document is None
                if document is not None:
                    self._send(idle.pop(), document)
            under_way = any(document is not None for _, document in self._waiting.values())
            if exhausted and not under_way:
                return
            (done,), _ = self._ray.wait(list(self._waiting), num_returns=1)
            actor, document = self._waiting.pop(done)
            try:
                found = self._ray.get(done)
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except self._ray.exceptions.RayError as error:
                failed = self._died(actor, document, error)
                exhausted = exhausted and not self._again
                if failed is not None:
                    yield failed
                continue
            idle.append(actor)
            if document is None:
                check(found)
            else:
                self._tries.pop(document.name, None)
                self._deaths = 0
                yield found

    def _start(self) -> None:
        actor = self._actor.remote(self._job)
        self._waiting[actor.run.remote()] = (actor, None)

    def _send(self, actor: Any, document: Document) -> None:
        self._tries[document.name] = self._tries.get(document.name, 0) + 1
        self._waiting[actor.answer.remote(document)] = (actor, document)

    def _died(self, actor: Any, document: Document | None, error: Exception) -> Result | None:
        """Replace a worker; its document is tried again, or has failed."""
        self._deaths += 1
        reason = str(error).strip().splitlines()[0]
        if self._deaths > MOST_TRIES * (self.count + MOST_TRIES):
            raise QuantPressError(
                f"{self._deaths} workers died one after the other, the last one of: {reason}; Ray's logs say "
                "more (session_latest/logs in its folder, /tmp/ray); then give the same command again"
            )
        self._ray.kill(actor)
        self._start()
        if document is None:
            return None
        if self._tries[document.name] < MOST_TRIES:
            self._again.append(document)
            return None
        del self._tries[document.name]
        return Result(document.name, error=f"{MOST_TRIES} workers died over it: {reason}")


@contextmanager
def workers(job: Job, address: str, cores: int | None) -> Iterator[Workers]:
    """Connect to a cluster, or start one, and let go of it in the end.

    Args:
        job: what is asked.
        address: of the cluster, as `ray.init` takes it; "local" starts one on this machine, which sends no
            usage statistics and ends with the block.
        cores: as for `Workers`.

    Raises:
        InvalidInputError: there is no cluster at the address, or no machine has that many cores.
        MissingPackageError: Ray is not installed.
    """
    ray = import_ray()
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        how |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "3")  # tries; else minutes where nobody is
    try:
        _reach(address)
        ray.init(**how)
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidInputError(
            f"there is no Ray cluster at --address {address} ({str(error).splitlines()[0]}); start one with "
            "`ray start --head`, or give --address local"
        ) from error
    try:
        yield Workers(ray, _with_whole_paths(job), cores)
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Ray tries for minutes where nobody listens; this tries once.

    Raises:
        OSError: nobody listens at this host and port.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _with_whole_paths(job: Job) -> Job:
    """Workers have other current folders."""
    model, store = job.model, job.store
    model = str(Path(model).absolute()) if model is not None and Path(model).is_dir() else model
    store = str(Path(store).absolute()) if store is not None and not is_url(store) else store
    return replace(job, model=model, store=store)


def _shares(ray: Any, cores: int | None) -> tuple[int, dict[str, float]]:
    """How many workers the cluster has room for, and what each of them takes."""
    machines = [one.get("Resources", {}) for one in ray.nodes() if one["Alive"]]
    gpus = sum(int(one.get("GPU", 0)) for one in machines)
    if gpus:
        return gpus, {"num_gpus": 1, "num_cpus": 0}
    there = [int(one["CPU"]) for one in machines if one.get("CPU", 0) >= 1]
    each = cores or min(there, default=1)
    count = sum(one // each for one in there)
    if not count:
        raise InvalidInputError(
            f"no machine of the cluster has {each} free cores for a worker (they have {there or 'none'}); "
            "give fewer --cores"
        )
    return count, {"num_cpus": each}


def _cause(error: Any) -> Exception:
    """What was raised in the worker."""
    cause: Exception = error.cause if isinstance(error.cause, QuantPressError) else error
    return cause
