"""Lets kvpress be imported before, after or never: the task stays ours, and its attention lies inside ours.

kvpress registers its own pipeline under that name when it is imported. Importing kvpress takes seconds, so it
is not imported here. Instead an entry that loads our pipeline when it is used goes into transformers'
registry: at once if transformers.pipelines is loaded, and again after each import that would replace it.
kvpress also wraps every attention function of transformers. Ours must stay around its wrappers.
"""

import sys
from importlib import import_module
from typing import Any

TASK = "kv-press-text-generation"  # as `quantpress.pipelines` has it
_ATTENTION = "kvpress.attention_patch"
_WATCHED = ("transformers.pipelines", "kvpress.pipeline", _ATTENTION)


class LazyTask(dict[str, Any]):
    """The entry of the task in transformers' registry, filled in when it is read."""

    def _filled(self) -> dict[str, Any]:
        if not dict.__len__(self):
            self.update(import_module("quantpress.pipelines").register())
        return dict(self)

    def __getitem__(self, key: str) -> Any:
        return self._filled()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._filled()

    def get(self, key: str, default: Any = None) -> Any:
        return self._filled().get(key, default)


class _Watcher:
    """A finder that finds nothing itself: it asks the others, and claims the task after the import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None and spec.loader is not None:
                run = spec.loader.exec_module

                def run_and_claim(module: Any, run: Any = run) -> None:
                    if name == "kvpress.pipeline":
                        import_module("transformers.pipelines")  # not below, which would claim the task
                    _withdraw()  # otherwise kvpress's registration would be logged as overwriting ours
                    try:
                        run(module)
                    finally:
                        claim_task()
                    if name == _ATTENTION:
                        _wrap_inside(module)

                spec.loader.exec_module = run_and_claim
                return spec
        return None


def _wrap_inside(module: Any) -> None:
    """Have kvpress wrap the functions that lie inside ours, where ours are in place."""
    patch = module.patch_attention_functions

    def patch_attention_functions() -> None:
        functions: Any = sys.modules.get("quantpress.cache.attention.functions")
        if functions is None:
            patch()
        else:
            functions.wrap_original_functions(module.attention_patch)

    module.patch_attention_functions = patch_attention_functions


def claim_task() -> None:
    """Put our entry into transformers' registry, if the registry is loaded and has no entry of ours."""
    registry = _registry()
    if registry is None:
        return
    registered = registry.supported_tasks.get(TASK)
    ours = getattr(sys.modules.get("quantpress.pipelines.text_generation"), "TextGenerationPipeline", None)
    if isinstance(registered, LazyTask) or (ours is not None and (registered or {}).get("impl") is ours):
        return
    registry.supported_tasks[TASK] = LazyTask()


def _withdraw() -> None:
    registry = _registry()
    if registry is not None:
        registry.supported_tasks.pop(TASK, None)


def _registry() -> Any:
    """transformers' registry of pipelines; None while it is not loaded."""
    return getattr(sys.modules.get("transformers.pipelines"), "PIPELINE_REGISTRY", None)


def watch_imports() -> None:
    """Claim the task now and after every import that would change it; may be called again."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    claim_task()
