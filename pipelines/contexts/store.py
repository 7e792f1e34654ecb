"""`ContextStore`: contexts that were read, in one folder, found by text, model and press."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from quantpress.cache.saved.places import Place, file_system, local_path
from quantpress.errors import CacheFileError, InvalidInputError
from quantpress.pipelines.contexts.cached_context import CachedContext, check_saved
from quantpress.pipelines.contexts.context_key import context_key
from quantpress.pipelines.contexts.saved_context import steady_fingerprint
from quantpress.pipelines.reading.planned import Reading

if TYPE_CHECKING:
    from quantpress.pipelines.text_generation import TextGenerationPipeline

SUFFIX = ".kv.safetensors"
USED = ".used"
ABANDONED_S = 24 * 3600.0
"""Seconds after which an unfinished file counts as left over by a writer that was killed."""


class ContextStore:
    """Contexts that were read, in one folder, found by text, model and press.

    Any number of processes and machines may read and write the same folder at the same time: a file appears
    when it is complete, and what two of them write under one name is the same context. **A stored context
    contains the prompt**, as a saved one does.

    Args:
        path: a folder, which is made; or a URL that fsspec knows, such as s3://bucket/contexts.
        max_bytes: the most bytes that the files may have together. After every write, those that were not
            used for the longest time are deleted until it holds; while processes write, the folder can be
            larger by what they write. None: no bound. Give all users of a folder the same bound, because
            without one no use is recorded.

    Raises:
        CacheFileError: the folder cannot be made.
        InvalidInputError: `max_bytes` is not a positive whole number, or the protocol of a URL is unknown.
        MissingPackageError: the package for a URL is not installed.

    Example:
        >>> # store = ContextStore("contexts", max_bytes=20 * 2**30)
        >>> # context = store.get_or_read(pipe, text, press="SnapKV(0.5) | TurboQuant(4)")
        >>> # pipe(context, questions=["Who?", "Where?"])["answers"]
    """

    def __init__(self, path: Place, max_bytes: int | None = None) -> None:
        whole = isinstance(max_bytes, int) and not isinstance(max_bytes, bool)
        if max_bytes is not None and not (whole and max_bytes > 0):
            raise InvalidInputError(
                f"max_bytes is {max_bytes!r}; give a number of bytes, or None for no bound"
            )
        here = local_path(path)
        self.path = str(path) if here is None else str(here.absolute())
        self.max_bytes = max_bytes
        self._files, self._folder = file_system(path)
        with self._usable():
            if here is not None:
                here.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_abandoned()

    def __repr__(self) -> str:
        return f"ContextStore({self.path!r}, max_bytes={self.max_bytes})"

    def get_or_read(self, pipe: "TextGenerationPipeline", text: str, **options: Any) -> CachedContext:
        """The context of a text: from the store, or else read now and stored.

        Args:
            pipe: the pipeline that reads, and that will be asked.
            text: the text.
            **options: as for `pipe.read`.

        Raises:
            InvalidInputError: the press acts during decoding, or a setting of it has no lasting name.
            CacheFileError: the context cannot be written.
            EmptyContextError, ContextTooLongError, CompositionError, UnsupportedModelError: as for
                `pipe.read`.

        Warns:
            UserWarning: a stored file is damaged, and is replaced; or the context alone is larger than
                `max_bytes`, and is not stored.
        """
        plan = pipe.plan_reading(text, **options)
        context = self.get_planned(pipe, plan)
        if context is None:
            context = pipe.read_planned(plan)
            self.put(plan, context)
        return context

    def get(self, pipe: "TextGenerationPipeline", text: str, **options: Any) -> CachedContext | None:
        """The context of a text if it is in the store, else None; arguments as for `get_or_read`."""
        return self.get_planned(pipe, pipe.plan_reading(text, **options))

    def get_planned(self, pipe: "TextGenerationPipeline", *plans: Reading) -> CachedContext | None:
        """The first context that is in the store, of those that several plans would read; else None.

        Args:
            pipe: the pipeline that would read, and that will be asked.
            *plans: what `pipe.plan_reading` returned, or a `Reading` of token ids.

        Raises:
            InvalidInputError: as for `get_or_read`.
            CacheFileError: the store cannot be used.

        Warns:
            UserWarning: a stored file is damaged.
        """
        for plan in plans:
            check_saved(plan.press)
        model = steady_fingerprint(pipe.model)
        found = (self._found(pipe, plan, context_key(plan, model)) for plan in plans)
        return next((context for context in found if context is not None), None)

    def put(self, plan: Reading, context: CachedContext) -> None:
        """Store a context that was read.

        Args:
            plan: what was read, and how.
            context: what `pipe.read_planned(plan)` returned.

        Raises:
            InvalidInputError, CacheFileError: as for `get_or_read`.

        Warns:
            UserWarning: the context alone is larger than `max_bytes`, and is not stored.
        """
        key = context_key(plan, context.model)
        size = context.memory.total_bytes
        if self.max_bytes is not None and size > self.max_bytes:
            warnings.warn(
                f"a context of {size:,} bytes is larger than the whole store ({self.max_bytes:,}) and is not "
                "stored; give a larger max_bytes",
                stacklevel=3,
            )
            return
        context.save(self._place(key))
        self._mark(key)
        with self._usable():
            self._keep_the_bound()

    @property
    def total_bytes(self) -> int:
        """The bytes of all stored contexts now."""
        return sum(size for _, size in self._contexts())

    def _found(self, pipe: "TextGenerationPipeline", plan: Reading, key: str) -> CachedContext | None:
        if not self._is_there(key):
            return None
        try:
            context = CachedContext.load(self._place(key), pipe.model, press=plan.press)
            if not torch.equal(context.token_ids.cpu(), plan.ids.cpu()):
                raise CacheFileError(f"{self._place(key)} holds another text")
        except CacheFileError as error:
            if self._is_there(key):  # or else another process has deleted it
                warnings.warn(f"{error}; the text is read again", stacklevel=3)
            return None
        self._mark(key)
        return context

    def _place(self, key: str) -> str:
        return f"{self.path.rstrip('/')}/{key}{SUFFIX}"

    def _inner(self, name: str) -> str:
        return f"{self._folder.rstrip('/')}/{name}"

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """What the file system says, as an error of ours that names the folder."""
        try:
            yield
        except Exception as error:  # each package has exceptions of its own
            raise CacheFileError(f"{self.path} cannot be used as a store: {error}") from error

    def _is_there(self, key: str) -> bool:
        with self._usable():
            self._files.invalidate_cache()
            return bool(self._files.exists(self._inner(key + SUFFIX)))

    def _mark(self, key: str) -> None:
        """Note that a context was used now; the time is that of an empty file beside it."""
        if self.max_bytes is not None:
            with self._usable():
                self._files.touch(self._inner(key + USED))

    def _listed(self) -> list[dict[str, Any]]:
        self._files.invalidate_cache()
        try:
            return list(self._files.ls(self._folder, detail=True))
        except FileNotFoundError:  # an object store has no empty folders
            return []

    def _contexts(self) -> Iterator[tuple[str, int]]:
        """Key and size of every stored context."""
        for one in self._listed():
            name = one["name"].rpartition("/")[2]
            if name.endswith(SUFFIX) and not name.startswith("."):
                yield name.removesuffix(SUFFIX), int(one["size"])

    def _keep_the_bound(self) -> None:
        if self.max_bytes is None:
            return
        sizes = dict(self._contexts())
        total = sum(sizes.values())
        if total <= self.max_bytes:
            return
        for key in sorted(sizes, key=self._last_used):
            if total <= self.max_bytes:
                return
            for name in (key + SUFFIX, key + USED):
                with suppress(FileNotFoundError):  # another process was faster
                    self._files.rm_file(self._inner(name))
            total -= sizes[key]

    def _last_used(self, key: str) -> float:
        return max(self._time(self._inner(key + name)) for name in (SUFFIX, USED))

    def _time(self, inner: str) -> float:
        """When a file was written, in seconds; 0 for one that is gone."""
        try:
            return float(self._files.modified(inner).timestamp())
        except FileNotFoundError:
            return 0.0

    def _remove_abandoned(self) -> None:
        for one in self._listed():
            hidden = one["name"].rpartition("/")[2].startswith(".")
            if hidden and 0 < self._time(one["name"]) < time.time() - ABANDONED_S:
                with suppress(FileNotFoundError):
                    self._files.rm(one["name"], recursive=True)
