"""One process with Triton's interpreter on, for all tests that interpret kernels.

The interpreter has to be chosen before a kernel is made, so it needs a process of its own. Importing torch
there takes longer than most kernels do. Run as a script, this file is that process: it reads one call a line.
"""

import functools
import gc
import inspect
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def interpret(script: str, *arguments: str) -> str:
    """Run a test file as a script under Triton's interpreter.

    Args:
        script: the path of the file.
        arguments: what it finds in `sys.argv`.

    Returns:
        What it printed.
    """
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([script, *arguments]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise AssertionError(f"the process of Triton's interpreter ended with {process.wait()}")
    printed, failed = json.loads(answer)
    if failed:
        raise AssertionError(f"{printed}\n{failed}")
    return str(printed)


@functools.cache
def _process() -> Any:
    """The process; it ends when this one does, which closes its input."""
    root = str(Path(__file__).resolve().parents[2])
    settings = {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _patch_once_a_launch() -> None:
    """A launch replaces Triton's functions; so does every call inside the kernel, again, for nothing.

    A third of the time goes there. What a launch does, and undoes at its end, stays as it is.
    """
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang
    patched = set[str]()

    @functools.cache
    def seen_by(function: Any) -> set[str]:
        seen = (value.__name__ for value in function.__globals__.values() if inspect.ismodule(value))
        return {name for name in seen if name.startswith("triton.language")}

    def patch_the_rest(function: Any) -> Any:
        modules = seen_by(function)
        if modules <= patched:  # inside a launch, which alone asks for the scope
            return None
        scope = patch(function)
        patched.update(modules)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_the_rest  # type: ignore[assignment]


def _remember_types() -> None:
    """Every operation makes its types, shapes and NumPy's dtypes anew; there are few, and they do not change.

    What is remembered is what Triton's own functions made.
    """
    from triton.language import core
    from triton.runtime import interpreter

    make_dtype, make_block, make_tensor = (
        interpreter._get_np_dtype,
        core.block_type.__init__,
        core.tensor.__init__,
    )
    dtypes, blocks, tensors = dict[str, Any](), dict[Any, dict[str, Any]](), dict[str, dict[str, Any]]()

    def get_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = make_dtype(kind)
        return dtypes[name]

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        name = type.name  # of a block, with its shape
        if name not in tensors:
            make_tensor(self, handle, type)
            tensors[name] = vars(self).copy()
        vars(self).update(tensors[name], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype = get_dtype  # type: ignore[assignment]
    core.block_type.__init__ = init_block  # type: ignore[method-assign]
    core.tensor.__init__ = init_tensor  # type: ignore[method-assign]


def _check_overflow_in_one_step() -> None:
    """A sum, difference or product of integers that leaves its type is an error.

    Triton computes each of them again, operation by operation, which takes a third of the time, and then
    looks at what it found in its debug mode alone.
    """
    import numpy
    from triton.runtime import interpreter

    semantic: Any = type(interpreter.interpreter_semantic)
    check = semantic.binary_op_sanitize_overflow_impl
    operations = {"add": numpy.add, "sub": numpy.subtract, "mul": numpy.multiply}

    def check_at_once(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        operation, kind = operations.get(binary_op.__name__), lhs.type.scalar
        if operation is None or kind.int_bitwidth > 32 or not self.builder.options.sanitize_overflow:
            return check(self, lhs, rhs, binary_op)
        assert kind == rhs.type.scalar and kind.is_int()
        one, other = (side.handle.data.astype(numpy.int64) for side in (lhs, rhs))
        found = operation(one, other)
        inside = kind.get_int_min_value() <= found.min() and found.max() <= kind.get_int_max_value()
        assert inside, f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"

    semantic.binary_op_sanitize_overflow_impl = check_at_once


def _remember_how_operands_fit() -> None:
    """Two tensors are made to fit by their types alone, and a number by its value and the other's type.

    What Triton's own function made of them once is done again: nothing, a broadcast, or the same constant.
    Casts are left to it. No operation writes into a tensor, so that a constant may be shared.
    """
    import numpy
    from triton.language import core
    from triton.runtime import interpreter

    semantic: Any = type(interpreter.interpreter_semantic)
    fit = semantic.binary_op_type_checking_impl
    tensor, handle = core.tensor, interpreter.TensorHandle
    fitting, constants = dict[Any, Any](), dict[Any, Any]()

    def shaped(operand: Any, kind: Any) -> Any:
        if kind is None:
            return operand
        return tensor(handle(numpy.broadcast_to(operand.handle.data, kind.shape), operand.handle.dtype), kind)

    def fit_again(self: Any, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> tuple[Any, Any]:
        if type(lhs) is not tensor:
            return tuple(fit(self, lhs, rhs, *flags, **named))
        number = type(rhs) is not tensor
        key = (lhs.type.name, type(rhs), rhs if number else rhs.type.name, flags, *named.items())
        if number and key in constants:
            return lhs, constants[key]
        if not number and key in fitting:
            one, other = fitting[key]
            return shaped(lhs, one), shaped(rhs, other)
        both = fit(self, lhs, rhs, *flags, **named)
        if number and both[0] is lhs:
            constants[key] = both[1]
        elif not number and all(
            new.type.scalar == old.type.scalar for new, old in zip(both, (lhs, rhs), strict=True)
        ):
            fitting[key] = [
                None if new is old else new.type for new, old in zip(both, (lhs, rhs), strict=True)
            ]
        return tuple(both)

    semantic.binary_op_type_checking_impl = fit_again


def _look_at_constants_alone() -> None:
    """Every argument is asked whether it is a constant that holds another value: no tensor or number is."""
    from triton.language import core

    unwrap, same = core._unwrap_if_constexpr, core.dtype.__eq__
    plain = {core.tensor, core.dtype, core.block_type, core.pointer_type, int, float, bool, type(None), str}

    def unwrap_constants(given: Any) -> Any:
        return given if type(given) in plain else unwrap(given)

    core._unwrap_if_constexpr = unwrap_constants
    core.dtype.__eq__ = lambda self, other: self is other or same(self, other)  # type: ignore[method-assign]


def _serve() -> None:
    import torch

    _patch_once_a_launch()
    _remember_types()
    _remember_how_operands_fit()
    _look_at_constants_alone()
    _check_overflow_in_one_step()
    gc.disable()  # next to nothing of what an operation makes is garbage that only a search finds
    for line in sys.stdin:
        failed, printed = "", io.StringIO()
        torch.manual_seed(0)
        sys.argv = json.loads(line)
        try:
            with redirect_stdout(printed):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except Exception:
            failed = traceback.format_exc()
        print(json.dumps([printed.getvalue(), failed]), flush=True)
        gc.collect()


if __name__ == "__main__":
    _serve()
