"""Loads the compiled libraries, and remembers why one is missing.

They were installed with the package, or compiled later into the user's cache (`_jit.py`). RSLOSS_JIT=1 compiles what is
missing, RSLOSS_JIT=0 leaves the cache alone.
"""
import os
import pathlib

import torch

from rsloss_kernels import _build

_PACKAGE = pathlib.Path(__file__).resolve().parent
_causes: dict[str, str] = {}
_loaded: dict[str, pathlib.Path] = {}


def why_not_loaded(backend: str) -> str | None:
    """The reason in words why the library of `backend` is not loaded; None if it is."""
    return _causes.get(backend)


def loaded_library(backend: str) -> pathlib.Path | None:
    """The file of the loaded library of `backend`; None if there is none."""
    return _loaded.get(backend)


def is_installed(backend: str) -> bool:
    """Whether the loaded library of `backend` came with the package, not from the cache."""
    return backend in _loaded and _loaded[backend].parent == _PACKAGE


def load() -> None:
    """Loads the library of every compiled backend.

    Raises:
        ImportError: RSLOSS_JIT=1 and a library that can be had here does not compile; names both causes.
    """
    for backend, stem in _build.LIBRARIES.items():
        _causes.pop(backend, None)
        installed = _PACKAGE / f"{stem}.so"
        cause = _try(backend, installed) if installed.exists() else "it was not compiled"
        if cause is not None:
            cause = _from_cache(backend, cause)
        if cause is not None:
            _causes[backend] = cause


def _try(backend: str, library: pathlib.Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"its library {library.name} did not load ({error})"
    _loaded[backend] = library
    return None


def _from_cache(backend: str, cause: str) -> str | None:
    """Loads what was compiled into the cache, or is now; `cause` is why nothing precompiled was loaded."""
    wish = os.environ.get("RSLOSS_JIT", "")
    if backend == "cuda" and torch.version.cuda is None:
        return f"{cause} (this torch was built without CUDA)"
    if wish == "0":
        return f"{cause}; {_build.HOW_TO_COMPILE}"
    from rsloss_kernels import _jit

    if wish == "1":
        try:
            library = _jit.compiled(backend)
        except RuntimeError as error:
            # Where no CUDA can be compiled, the CPU library alone is what can be had.
            if backend == "cuda" and _build.why_not_cuda() is not None:
                return f"{cause} ({error})"
            raise ImportError(
                f"rsloss_kernels: no library for backend '{backend}'. Nothing precompiled was loaded: {cause}. "
                f"RSLOSS_JIT=1 asked to compile it, which failed: {error}"
            ) from error
    else:
        try:
            found = _jit.cached(backend)
        except (OSError, RuntimeError) as error:  # no home folder, or one that cannot be read
            return f"{cause} (its cache cannot be used: {error}); {_build.HOW_TO_COMPILE}"
        if found is None:
            return f"{cause}; {_build.HOW_TO_COMPILE}"
        library = found
    failure = _try(backend, library)
    return None if failure is None else f"{cause}; from the cache: {failure}"
