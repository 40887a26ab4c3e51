"""Defines the operators of the library, all in one way.

Every operator `name` has one overload per backend, `rsloss_kernels::name.reference`, `.cpp`, `.cuda` and `.triton`, all with
one schema, one fake implementation and one autograd formula. The public function picks the overload once; backward calls the
overload of the same backend. Schemas are defined here in Python, so that the operators exist when nothing was compiled; the
compiled libraries only add kernels to the overloads `.cpp` and `.cuda`, which the dispatcher then calls directly.
"""
import functools
import importlib
from collections.abc import Callable

import torch

NAMESPACE = "rsloss_kernels"
BACKENDS = ("reference", "cpp", "cuda", "triton")
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
    for backend in BACKENDS:
        qualified = f"{NAMESPACE}::{name}.{backend}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, _on_one_device(name, backend, fake))
        if backend in _PYTHON_MODULES:
            torch.library.impl(qualified, "default", _lazily(stem, backend, name))
        if make_backward is not None:
            torch.library.register_autograd(qualified, make_backward(backend), setup_context=setup_context)


def operator(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of the operator `name` for `backend`."""
    return getattr(getattr(torch.ops.rsloss_kernels, name), backend)


def has_native_kernel(name: str, backend: str, device_type: str) -> bool:
    """Whether a loaded library brought a kernel of `name.backend` for tensors on `device_type`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}.{backend}", key)


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
