"""Loads the compiled libraries that were installed with the package, and remembers why one is missing."""
import pathlib

import torch

_PACKAGE = pathlib.Path(__file__).resolve().parent
_LIBRARIES = {"cpp": "_ops_cpu", "cuda": "_ops_cuda"}
_causes: dict[str, str] = {}


def why_not_loaded(backend: str) -> str | None:
    """The reason in words why the library of `backend` is not loaded; None if it is."""
    return _causes.get(backend)


def load() -> None:
    for backend, stem in _LIBRARIES.items():
        _causes.pop(backend, None)
        found = sorted(_PACKAGE.glob(f"{stem}*.so"))
        if not found:
            _causes[backend] = "it was not compiled"
            continue
        try:
            torch.ops.load_library(str(found[0]))
        except OSError as error:
            _causes[backend] = f"its library did not load ({error})"
