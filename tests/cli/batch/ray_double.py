"""As much of Ray as `Workers` uses, in this process: calls are done when waited for, and workers can die."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class RayDouble:
    """Stands in for the package.

    Args:
        dies: whether the worker dies in this call of `run` or `answer`, with these arguments.
        machines: resources of each machine.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, dies: Callable[..., bool] = lambda *_: False, machines: Any = ({"CPU": 2},)) -> None:
        self.dies = dies
        self.machines = machines
        self.killed = 0
        self.most_waiting = 0
        self.options: dict[str, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": one} for one in self.machines] + [{"Alive": False}]

    def remote(self, **options: Any) -> Callable[[type], Any]:
        self.options = options

        def wrapped(made: type) -> Any:
            return SimpleNamespace(remote=lambda *arguments: Actor(self, made(*arguments)))

        return wrapped

    def wait(self, calls: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.most_waiting = max(self.most_waiting, len(calls))
        return [calls[-1]], calls[:-1]  # the latest first, so that an order of documents would be noticed

    def get(self, call: Callable[[], Any]) -> Any:
        return call()

    def kill(self, actor: Any) -> None:
        self.killed += 1


class Actor:
    def __init__(self, ray: RayDouble, worker: Any) -> None:
        self.run = SimpleNamespace(remote=lambda: lambda: self._called(ray, worker.run))
        self.answer = SimpleNamespace(remote=lambda one: lambda: self._called(ray, worker.answer, one))

    def _called(self, ray: RayDouble, method: Any, *arguments: Any) -> Any:
        if ray.dies(method.__name__, *arguments):
            raise RayError("The actor died\nand more")
        try:
            return method(*arguments)
        except Exception as error:
            raise RayTaskError(error) from error
