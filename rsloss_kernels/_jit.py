"""Compiles the libraries of an installed package into the user's cache, on first use.

A library goes to `<cache>/<library>-torch<version>-<hash of sources and flags>/`, is built in a folder of its own and moved
there in one step, so that no process ever sees half a library; a file lock keeps many processes from doing the same work at once.
The cache is TORCH_EXTENSIONS_DIR/rsloss_kernels, else XDG_CACHE_HOME/rsloss_kernels, else ~/.cache/rsloss_kernels.
"""
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from rsloss_kernels import _build

ERROR_LINES = 30


def cache() -> pathlib.Path:
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "rsloss_kernels"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "rsloss_kernels"


def cached(backend: str) -> pathlib.Path | None:
    """The library of `backend` compiled earlier from these very sources and flags, or None."""
    stem = _build.LIBRARIES[backend]
    library = cache() / _build.fingerprint(stem) / f"{stem}.so"
    return library if library.exists() else None


def why_not(backend: str) -> str | None:
    """None if the library of `backend` can be compiled here, else the reason in words."""
    return _build.why_not_native() or (_build.why_not_cuda() if backend == "cuda" else None)


def compiled(backend: str) -> pathlib.Path:
    """The library of `backend`, compiled now unless it was before.

    Raises:
        RuntimeError: it cannot be compiled; the message holds the end of the compiler's output.
    """
    reason = why_not(backend)
    if reason is not None:
        raise RuntimeError(reason)
    try:
        target = cache() / _build.fingerprint(_build.LIBRARIES[backend])
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_name(target.name + ".lock")):
            if cached(backend) is None:
                _compile(_build.LIBRARIES[backend], target)
    except OSError as error:
        raise RuntimeError(f"the cache folder cannot be used ({error})") from error
    library = cached(backend)
    if library is None:
        raise RuntimeError(f"the build left no library in {target}")
    return library


def _compile(stem: str, target: pathlib.Path) -> None:
    # By its path and in its own process: it loads torch and setuptools, not this package.
    print(f"rsloss_kernels: compiling {stem} into {target} (once)", file=sys.stderr, flush=True)
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f"{stem}-", dir=target.parent))
    try:
        command = [sys.executable, str(pathlib.Path(_build.__file__)), stem, str(fresh)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        if done.returncode != 0:
            tail = "\n".join(done.stdout.splitlines()[-ERROR_LINES:])
            raise RuntimeError(f"compiling {stem} failed with exit code {done.returncode}:\n{tail}")
        shutil.rmtree(target, ignore_errors=True)
        fresh.chmod(0o755)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def _only_one(lock: pathlib.Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        # Without it two processes may compile the same; the move in one step still keeps the result whole.
        yield
        return
    # The kernel drops the lock with its process, so one that dies leaves nobody waiting.
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
