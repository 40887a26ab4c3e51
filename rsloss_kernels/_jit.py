"""Compiles the libraries of an installed package into the user's cache, on first use.

A library goes to `<cache>/<library>-torch<version>-<hash of sources and flags>/`, is built in a folder of its own and moved
there in one step, so that no process ever sees half a library; a file lock keeps many processes from doing the same work at once.
The cache is TORCH_EXTENSIONS_DIR/rsloss_kernels, else XDG_CACHE_HOME/rsloss_kernels, else ~/.cache/rsloss_kernels. A library there
is code that this process runs: it is loaded only where nobody but its user and root can have written it, the cache, or one of its
folders, and where no folder above lets everyone replace them.
"""
import contextlib
import os
import pathlib
import shutil
import stat
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
    """The library of `backend` compiled earlier from these very sources and flags, or None.

    Raises:
        RuntimeError: others can write it, or the cache.
    """
    stem = _build.LIBRARIES[backend]
    library = cache() / _build.fingerprint(stem) / f"{stem}.so"
    if not library.exists():
        return None
    reason = why_not_trusted(library)
    if reason is not None:
        raise RuntimeError(reason)
    return library


def why_not_trusted(path: pathlib.Path) -> str | None:
    """None if only the user of this process and root own and can write `path`, in the cache, and what holds it up to the cache, and no
    folder above is everyone's; else the reason in words. Permissions of other systems than POSIX are not looked at."""
    if os.name != "posix":
        return None
    path = path.resolve()
    own = cache().resolve()
    for part in (path, *path.parents):
        status = part.stat()
        mode = stat.S_IMODE(status.st_mode)
        in_cache = part == own or own in part.parents
        if in_cache and status.st_uid not in (0, os.geteuid()):
            return f"{part} belongs to user {status.st_uid}, not to the user of this process, {os.geteuid()}"
        # On the way to the cache a group may write, as its administrators chose; of a sticky folder nobody moves others' entries.
        others = 0o022 if in_cache else 0o002 if not mode & stat.S_ISVTX else 0
        if mode & others:
            return f"{part} can be written by other users (mode {mode:04o}): remove it, or run `chmod go-w {part}`"
    return None


def why_not(backend: str) -> str | None:
    """None if the library of `backend` can be compiled here, else the reason in words."""
    return _build.why_not_native() or (_build.why_not_cuda() if backend == "cuda" else None)


def compiled(backend: str) -> pathlib.Path:
    """The library of `backend`, compiled now unless it was before.

    Raises:
        RuntimeError: it cannot be compiled; the message holds the end of the compiler's output.
    """
    try:
        return cached(backend) or _compiled_now(backend)
    except OSError as error:
        raise RuntimeError(f"the cache folder cannot be used ({error})") from error


def _compiled_now(backend: str) -> pathlib.Path:
    reason = why_not(backend)
    if reason is not None:
        raise RuntimeError(reason)
    target = cache() / _build.fingerprint(_build.LIBRARIES[backend])
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    reason = why_not_trusted(target.parent)
    if reason is not None:
        raise RuntimeError(f"the cache folder cannot be used ({reason})")
    with _only_one(target.with_name(target.name + ".lock")):
        if cached(backend) is None:
            _compile(_build.LIBRARIES[backend], target)
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
        for made in (fresh, *fresh.rglob("*")):
            made.chmod(0o755)
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
