"""The one place that chooses a backend, and says why.

Automatic choice: CPU tensors take cpp, else reference; CUDA tensors take cuda, else triton, else reference.
`RSLOSS_BACKEND` (read at import) or `use_backend` forces one; one that cannot be had raises.
"""
import contextlib
import importlib.util
import itertools
import os
from collections.abc import Iterator

import torch

from rsloss_kernels import _ext, _library

_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_REPORTED_OPERATOR = "ranking_bin"
_forced: str | None = None


def resolve(operator: str, device_type: str) -> str:
    """The backend that runs `operator` on tensors of `device_type`; raises `RuntimeError` if a forced one cannot, and for one with
    a gradient under a transform of torch.func (one without may run on what is not transformed: `_library.refuse_transformed`)."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active() and _library.has_gradient(operator):
        _library.refuse_transform(operator)
    if _forced is not None:
        reason = why_not(operator, _forced, device_type)
        if reason is not None:
            raise RuntimeError(
                f"rsloss_kernels: backend '{_forced}' was asked for but cannot run {operator} on {device_type} tensors: "
                f"{reason}. Backends that can: {', '.join(usable(operator, device_type))}"
            )
        return _forced
    chosen = _automatic.get((operator, device_type))
    return _choose(operator, device_type) if chosen is None else chosen


def _choose(operator: str, device_type: str) -> str:
    for backend in _PREFERENCE.get(device_type, ()):
        if why_not(operator, backend, device_type) is None:
            return backend
    return "reference"


def usable(operator: str, device_type: str) -> list[str]:
    return [backend for backend in _library.BACKENDS if why_not(operator, backend, device_type) is None]


def why_not(operator: str, backend: str, device_type: str) -> str | None:
    """None if `backend` can run `operator` on `device_type`, else the reason in words."""
    key = (operator, backend, device_type)
    return _reasons[key] if key in _reasons else _find_reason(*key)


# Filled once for all that is defined, not as it is asked for: compiled code guards on what it reads here.
_reasons: dict[tuple[str, str, str], str | None] = {}
_automatic: dict[tuple[str, str], str] = {}


def look_up_reasons() -> None:
    """Looks at the loaded libraries; to be called after defining operators or loading a library."""
    for key in itertools.product(_library.defined, _library.BACKENDS, _PREFERENCE):
        _reasons[key] = _find_reason(*key)
    for pair in itertools.product(_library.defined, _PREFERENCE):
        _automatic[pair] = _choose(*pair)


def _find_reason(operator: str, backend: str, device_type: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "triton runs on CUDA tensors, and on CPU tensors only under TRITON_INTERPRET=1"
    if _library.has_native_kernel(operator, backend, device_type):
        return None
    return _ext.why_not_loaded(backend) or f"it has no kernel for {device_type} tensors"


def _validated(name: str, source: str) -> str:
    if name not in _library.BACKENDS:
        raise ValueError(f"{source}: backend must be one of {', '.join(_library.BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces every loss called inside the `with` block onto one backend, process-wide.

    Args:
        name: "reference", "cpp", "cuda" or "triton".

    Raises:
        ValueError: for another name. A call inside the block raises `RuntimeError` if the backend cannot run there.
    """
    global _forced
    previous, _forced = _forced, _validated(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def backend_report() -> str:
    """A table of the backends: where each can run, and why not elsewhere."""
    lines = [f"{'backend':<10} {'cpu tensors':<14} {'cuda tensors':<14} note"]
    for backend in _library.BACKENDS:
        reasons = {device: why_not(_REPORTED_OPERATOR, backend, device) for device in ("cpu", "cuda")}
        words = ["yes" if reason is None else "no" for reason in reasons.values()]
        notes = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason)) or "-"
        if backend == "reference":
            notes = "plain PyTorch; on CUDA tensors it synchronises with the host and is not bitwise deterministic"
        lines.append(f"{backend:<10} {words[0]:<14} {words[1]:<14} {notes}")
    forced = f"forced: {_forced}" if _forced else "forced: none (cpu: cpp > reference; cuda: cuda > triton > reference)"
    return "\n".join([*lines, forced])


if os.environ.get("RSLOSS_BACKEND"):
    _forced = _validated(os.environ["RSLOSS_BACKEND"], "RSLOSS_BACKEND")
