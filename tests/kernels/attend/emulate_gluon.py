"""A Gluon kernel's source run in PyTorch, its assembly in numpy: what it computes, whatever its layouts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.kernels.ptx import run_ptx

Tile = torch.Tensor
"""While a kernel runs, torch's tensors are what the language's are (`as_in_the_language`)."""


@contextmanager
def as_in_the_language() -> Iterator[None]:
    """Tensors with what the language's have beside; a class of its own costs more than the arithmetic."""
    plain = torch.Tensor.to

    def to(self: Any, dtype: Any, bitcast: bool = False) -> Any:
        return self.view(dtype) if bitcast else plain(self, dtype)

    def add(self: Any, other: Any) -> Any:  # a new value, as there
        return self + other

    own = {"to": to, "__iadd__": add, "type": SimpleNamespace(layout=None)}
    assert not own.keys() & vars(torch.Tensor).keys()
    for name, value in own.items():
        setattr(torch.Tensor, name, value)
    try:
        yield
    finally:
        for name in own:
            delattr(torch.Tensor, name)


NUMBERS = ("operand_channels", "row_words")
"""Functions of constants that return numbers."""


class Pointer:
    """A pointer to a tensor's memory, or tensors of them."""

    def __init__(self, tensor: torch.Tensor, offset: Any = 0) -> None:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.memory = tensor.as_strided((size,), (1,), 0)
        self.offset = offset if isinstance(offset, torch.Tensor) else tensor.storage_offset() + offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, steps: Any) -> "Pointer":
        moved = Pointer(self.memory)
        moved.offset = self.offset + steps
        return moved

    def read(self, mask: Any = True, other: float = 0) -> torch.Tensor:
        offset, mask = torch.broadcast_tensors(torch.as_tensor(self.offset), torch.as_tensor(mask))
        if not bool(mask.any()):  # there may be no memory
            return torch.full(offset.shape, other, dtype=self.memory.dtype)
        assert bool((offset[mask] >= 0).all()), "a load in front of the memory"
        return self.memory[torch.where(mask, offset, 0)].where(mask, other)

    def write(self, value: Any, mask: Any = True) -> None:
        value = torch.as_tensor(value).to(self.memory.dtype)
        mask, offset, value = torch.broadcast_tensors(
            torch.as_tensor(mask), torch.as_tensor(self.offset), value
        )
        self.memory[offset[mask]] = value[mask]


class Shared:
    """A piece of shared memory."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def index(self, at: int) -> "Shared":
        return Shared(self.held[at])

    def store(self, value: torch.Tensor) -> None:
        self.held.copy_(value)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.held.narrow(dim, start, length))

    @property
    def shape(self) -> Any:
        return self.held.shape

    layout = None

    def load(self, layout: Any) -> Any:
        return self.held.clone().as_subclass(Tile)


class Language:
    """The language's functions, for one program of a grid."""

    float16, bfloat16, float32 = torch.float16, torch.bfloat16, torch.float32
    int8, int32, int64 = torch.int8, torch.int32, torch.int64
    rsqrt, sqrt, reshape, expand_dims = torch.rsqrt, torch.sqrt, torch.reshape, torch.unsqueeze
    permute, static_range, abs, exp2 = torch.permute, range, torch.abs, torch.exp2

    def __init__(self, program: tuple[int, int], grid: tuple[int, int]) -> None:
        self.program, self.grid = program, grid

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        raise AttributeError(name)

    def program_id(self, axis: int) -> Any:
        return torch.tensor(self.program[axis]).as_subclass(Tile)

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def arange(self, start: int, stop: int, layout: Any) -> Any:
        return torch.arange(start, stop).as_subclass(Tile)

    def full(self, shape: list[int], value: float, dtype: torch.dtype, layout: Any) -> Any:
        return torch.full(shape, value, dtype=dtype).as_subclass(Tile)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return torch.where(*map(torch.as_tensor, (condition, a, b)))

    def minimum(self, a: Any, b: Any) -> Any:
        return torch.minimum(*_tiles(a, b))

    def maximum(self, a: Any, b: Any) -> Any:
        return torch.maximum(*_tiles(a, b))

    def max(self, x: Any, axis: int) -> Any:
        return x.amax(axis)

    def sum(self, x: Any, axis: int) -> Any:
        return x.sum(axis).to(x.dtype)

    def reduce(self, x: Any, axis: int, combine: Any) -> Any:
        """Of one tensor, or of several of one shape."""
        several = isinstance(x, tuple)
        found, *others = zip(*(one.unbind(axis) for one in (x if several else (x,))), strict=True)
        for other in others:
            found = combine(*found, *other)
            found = found if several else (found,)
        return found if several else found[0]

    def associative_scan(self, x: Any, axis: int, add: Any) -> Any:
        return x.cumsum(axis).to(x.dtype)

    def split(self, x: Any) -> Any:
        return x.unbind(-1)

    def join(self, a: Any, b: Any) -> Any:
        return torch.stack((a, b), -1)

    def convert_layout(self, x: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return x

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0, **caching: str) -> Any:
        return pointer.read(mask, other).as_subclass(Tile)

    def store(self, pointer: Pointer, value: Any, mask: Any = True) -> None:
        pointer.write(value, mask)

    def allocate_shared_memory(self, dtype: Any, shape: Any, layout: Any, value: Any = None) -> Shared:
        if value is None:
            garbage = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
            return Shared(torch.full(shape, garbage, dtype=dtype))
        return Shared(value.to(dtype))

    def inline_asm_elementwise(
        self, asm: str, constraints: str, args: Any, dtype: Any, is_pure: bool, pack: int
    ) -> Any:
        if asm.lstrip().startswith(("bar.", "griddepcontrol")):
            return torch.zeros((), dtype=dtype).as_subclass(Tile)
        if asm.startswith("shfl.sync.bfly"):  # of rows whose channels the lanes share, neighbours together
            x, bit = args
            return x[..., torch.arange(x.shape[-1]) ^ bit * (x.shape[-1] // 32)]
        if "%lanemask_eq" in asm:  # only where a number is kept changes
            return args[0]
        if asm.startswith("ex2.approx"):
            return torch.exp2(args[0]).as_subclass(Tile)
        if asm.startswith("rcp.approx"):
            return (1 / args[0]).as_subclass(Tile)
        words = torch.broadcast_tensors(*map(torch.as_tensor, args))
        words = [x.to(torch.float32 if x.is_floating_point() else torch.int32) for x in words]
        plain = [x.as_subclass(torch.Tensor).contiguous().numpy().view(np.uint32) for x in words]
        if pack > 1:  # registers of so many elements each, those of an output joined in one
            plain = [x.reshape(-1, pack)[:, k] for x in plain for k in range(pack)]
        results = run_ptx(asm, plain, len(dtype))
        return [
            torch.from_numpy(x.view(np.int32)).view(kind).as_subclass(Tile).reshape(words[0].shape)
            for x, kind in zip(results, dtype, strict=True)
        ]


def _tiles(*values: Any) -> list[Any]:
    """Numbers and tensors as tensors of one dtype."""
    tensors = [torch.as_tensor(value).as_subclass(Tile) for value in values]
    if any(x.is_floating_point() for x in tensors):
        return [x if x.is_floating_point() else x.to(torch.float32) for x in tensors]
    return tensors


def _small_product(a: Any, b: Any, start: Any) -> Any:
    if a.is_floating_point():
        return (a.double() @ b.double() + start).float().as_subclass(Tile)
    return (a.long() @ b.long() + start).to(torch.int32).as_subclass(Tile)


def _product(a: Any, b: Shared, y: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    exact = (a.held if isinstance(a, Shared) else a).double() @ b.held.double()
    return (exact + y if use_acc else exact).float().as_subclass(Tile)


def everything_in(module: ModuleType) -> dict[str, Any]:
    """What the module's functions may name, and those that it takes from other modules."""
    names, todo, seen = {}, [module], set()
    while todo:
        one = todo.pop()
        seen.add(one.__name__)
        for name, held in vars(one).items():
            if not name.startswith("__"):
                assert names.setdefault(name, held) is held, f"{name} is two things"
            home = getattr(getattr(held, "fn", None), "__module__", None)
            if home is not None and home.startswith("quantpress.") and home not in seen:
                todo.append(sys.modules[home])
    return names


def emulate(module: ModuleType, kernel: str, arguments: dict[str, Any], grid: tuple[int, int]) -> None:
    """Run every program of a grid, one after the other."""
    copies = SimpleNamespace(
        commit_group=lambda: None,
        wait_group=lambda count: None,
    )
    held_by_name = everything_in(module)
    names: dict[str, Any] = {name: getattr(held, "value", held) for name, held in held_by_name.items()}
    names |= {"async_load": lambda to, pointer, mask=True: to.held.copy_(pointer.read(mask))}
    names |= {"reinterpret": lambda shared, dtype, shape, layout: Shared(shared.held.view(dtype))}
    names |= {"async_copy": copies, "fence_async_shared": lambda: None, "warpgroup_mma": _product}
    names |= {"warpgroup_mma_wait": lambda count, results: results if results[1:] else results[0]}
    names |= {"mma_v2": _small_product, "barrier": lambda: None}
    for name, held in held_by_name.items():
        if hasattr(held, "arg_names"):
            names[name] = FunctionType(held.fn.__code__, names, name, held.fn.__defaults__)
        elif hasattr(held, "fn"):  # of numbers, or of layouts
            names[name] = held.fn if name in NUMBERS else lambda *_: None
    call = {name: Pointer(one) if isinstance(one, torch.Tensor) else one for name, one in arguments.items()}
    with as_in_the_language():
        for program in ((i, j) for j in range(grid[1]) for i in range(grid[0])):
            names["gl"] = Language(program, grid)
            names[kernel](**call)
