"""Defines the operators of the library, all in one way.

Every operator `name` has one overload per backend, `rsloss_kernels::name.reference`, `.cpp`, `.cuda` and `.triton`, all with
one schema, one fake implementation and one autograd formula. The public function picks the overload once; backward calls the
overload of the same backend. Schemas are defined here in Python, so that the operators exist when nothing was compiled; the
compiled libraries only add kernels to the overloads `.cpp` and `.cuda`, which the dispatcher then calls directly.
"""
import contextlib
import functools
import importlib
from collections.abc import Callable

import torch

NAMESPACE = "rsloss_kernels"
BACKENDS = ("reference", "cpp", "cuda", "triton")
defined: list[str] = []
_PYTHON_MODULES = {"reference": "reference", "triton": "triton_impl"}


def define(
    stem: str,
    name: str,
    schema: str,
    fake: Callable,
    setup_context: Callable | None = None,
    make_backward: Callable[[str], Callable] | None = None,
) -> None:
    """Defines `name` for every backend.

    The Python backends are looked up on the first call as the function `name` of `losses/<stem>/reference.py` and
    `losses/<stem>/triton_impl.py`, so that importing the library imports neither. `make_backward(backend)` returns the
    autograd formula, which must call operators of that backend only. Before a Python backend runs, the function `name` of
    `losses/<stem>/op_checks.py` gets the same arguments and raises on bad ones; a compiled backend checks for itself. Tensors on
    different devices are refused by the fake implementation too: with a meta tensor among them the dispatcher calls that.
    """
    defined.append(name)
    for backend in BACKENDS:
        qualified = f"{NAMESPACE}::{name}.{backend}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, _on_one_device(name, backend, fake))
        if backend in _PYTHON_MODULES:
            torch.library.impl(qualified, "default", _lazily(stem, backend, name))
        if make_backward is not None:
            backward = make_backward(backend)
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            _functions[name, backend] = _eager_function(operator(name, backend), setup_context, backward)


_functions: dict[tuple[str, str], type[torch.autograd.Function]] = {}


def differentiable(name: str, backend: str, logits: list[torch.Tensor], *args) -> tuple[torch.Tensor, ...]:
    """Calls the operator `name`, whose first argument is the list of logits, the only one with a gradient.

    Outside of tracing this takes a plain autograd function with the operator's own formula: the wrapper that PyTorch puts around a
    formula with tensor lists costs more than a small loss.
    """
    if torch.compiler.is_compiling():
        return operator(name, backend)(logits, *args)
    return _functions[name, backend].apply(len(args), *args, *logits)


def operator(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of the operator `name` for `backend`."""
    return getattr(getattr(torch.ops.rsloss_kernels, name), backend)


def has_native_kernel(name: str, backend: str, device_type: str) -> bool:
    """Whether a loaded library brought a kernel of `name.backend` for tensors on `device_type`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}.{backend}", key)


class _Unpacked:
    """A context whose saved tensors were taken out already: hooks that do so (activation checkpointing) must see autograd."""

    def __init__(self, ctx):
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name):
        return getattr(self._ctx, name)


def _eager_function(overload: Callable, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    # forward with ctx rather than a separate setup_context: torch binds the arguments of the latter by inspection on every call.
    class EagerFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, num_args, *inputs):
            logits, args = list(inputs[num_args:]), inputs[:num_args]
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(logits, *args)
            ctx.num_args = num_args
            setup_context(ctx, (logits, *args), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            unpacked = _Unpacked(ctx)
            # With create_graph=True the operators inside must see autograd, to refuse a second derivative.
            with contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
                grad_logits = backward(unpacked, *grads)[0]
            return (*[None] * (ctx.num_args + 1), *grad_logits)

    EagerFunction.__name__ = EagerFunction.__qualname__ = f"Eager_{overload.name()}"
    return EagerFunction


def _on_one_device(name: str, backend: str, fake: Callable) -> Callable:
    @functools.wraps(fake)
    def checked(*args):
        device = None
        for argument, value in zip(operator(name, backend)._schema.arguments, args, strict=True):
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    device = device or tensor.device
                    if tensor.device != device:
                        raise ValueError(f"{name}: {argument.name} must be on the device of logits, {device}, got {tensor.device}")
        return fake(*args)

    return checked


def _lazily(stem: str, backend: str, name: str) -> Callable:
    folder = f"rsloss_kernels.losses.{stem}"

    def implementation(*args):
        getattr(importlib.import_module(f"{folder}.op_checks"), name)(*args)
        return getattr(importlib.import_module(f"{folder}.{_PYTHON_MODULES[backend]}"), name)(*args)

    implementation.__name__ = f"{name}_{backend}"
    return implementation
