"""Compiles the CUDA backend, kernels and glue, with g++ against cuda_emulator.h.

The library brings the overloads `.cuda` for CPU tensors. The whole test-suite can then run under `use_backend("cuda")` without a
GPU, on the very sources that nvcc compiles.
"""
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

import torch

from rsloss_kernels import _backends

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_cpu"
SANITIZERS = "address,undefined,float-cast-overflow"
_TORCH = pathlib.Path(torch.__file__).resolve().parent
# A fortified longjmp refuses to jump between stacks; without fused multiply-adds the arithmetic is that of the source.
_FLAGS = [
    *("-std=c++20", "-fPIC", "-g1", "-U_FORTIFY_SOURCE", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DRSL_CUDA_EMULATOR", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"),
    *(f"-I{CSRC}", f"-I{HERE}", f"-isystem{_TORCH / 'include'}"),
]


def sources() -> list[pathlib.Path]:
    return sorted([*CSRC.glob("*/*.cu"), *CSRC.glob("*/*_cuda.cpp")])


def build(sanitize: bool = False) -> pathlib.Path:
    """Compiles the backend as far as it is not cached; returns the library. Raises RuntimeError with the compiler's output."""
    return compile_library("cuda_on_cpu", sources(), sanitize)


def compile_library(
    name: str, files: list[pathlib.Path], sanitize: bool = False, flags: Sequence[str] = ()
) -> pathlib.Path:
    """Compiles `files` into one library, cached by their content, all headers and the flags; once for all processes."""
    sanitizing = ["-O1", f"-fsanitize={SANITIZERS}", "-fno-omit-frame-pointer"]
    flags = [*_FLAGS, *(sanitizing if sanitize else ["-O2"]), *flags]
    common = hashlib.sha256(" ".join([torch.__version__, *flags]).encode())
    for path in sorted([*CSRC.glob("*/*.h"), *CSRC.glob("*/*.cuh"), *HERE.glob("*.h")]):
        common.update(path.read_bytes())
    objects = {}
    for source in files:
        digest = common.copy()
        digest.update(source.read_bytes())
        objects[CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"] = source
    parts = " ".join(path.name for path in objects)
    library = CACHE / f"lib{name}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _alone(library), concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        missing = {target: source for target, source in objects.items() if not target.exists()}
        list(pool.map(lambda target: _compile(["-x", "c++", *flags, "-c", str(missing[target])], target), missing))
        if not library.exists():
            link = ["-shared", *[str(path) for path in objects], f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
            _compile([*link, f"-fsanitize={SANITIZERS}"] if sanitize else link, library)
    return library


@contextlib.contextmanager
def _alone(library: pathlib.Path) -> Iterator[None]:
    """Other processes that want this library wait, and then find it."""
    with open(library.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def load_emulated_cuda(sanitize: bool = False) -> None:
    """Loads the emulated CUDA backend for CPU tensors, once. Raises RuntimeError with the compiler's output."""
    torch.ops.load_library(str(build(sanitize)))
    _backends.look_up_reasons()


def sanitizer_environment() -> dict[str, str]:
    """Environment of a subprocess that loads the sanitized library: the runtimes must come before everything else."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def _compile(arguments: list[str], target: pathlib.Path) -> None:
    """Runs g++ and moves its output into place, so that a build that was broken off leaves nothing behind."""
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    command = ["g++", *arguments, "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cuda_on_cpu: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    partial.replace(target)
