"""Triton's interpreter without the work that it repeats: tests of interpreted kernels take half the time, with the same results."""
import inspect

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """To be called once, before a kernel runs."""
    # Integer arithmetic is done a second time to find overflows, which the interpreter then does not report.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call


_patched: set[tuple] = set()


def _call(function, *args, **kwargs):
    """A call of one jit function by another.

    The interpreter would replace the functions of triton.language before each of these calls. The launch has done so in `tl`, and
    in `tl.core`, which the library's own jit functions use, they stay replaced.
    """
    namespaces = tuple(id(value) for value in function.fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))
    if namespaces not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(namespaces)
    return function.rewrite()(*args, **kwargs)
