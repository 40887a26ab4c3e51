"""`python -m rsloss_kernels.collect_env` prints what a bug report needs: versions, devices, backends, build, switches."""
import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shlex
import subprocess

import torch

import rsloss_kernels
from rsloss_kernels import _build, _ext, _jit

RUN_TIME_SWITCHES = {
    "RSLOSS_BACKEND": "backend of every loss: reference, cpp, cuda or triton",
    "RSLOSS_JIT": "1: compile on import what is missing; 0: leave the cache alone",
    "RSLOSS_DEBUG_CHECKS": "1: checks that read values, and wait for the device",
    "TRITON_INTERPRET": "1: Triton kernels run on CPU tensors",
}


def sections() -> dict[str, list[str]]:
    return {
        "versions": _versions(),
        "devices": _devices(),
        "backends": rsloss_kernels.backend_report().splitlines(),
        "libraries": _libraries(),
        "build report": _build_report(),
        "switches at run time": [_switch(name, meaning) for name, meaning in RUN_TIME_SWITCHES.items()],
        "switches at build time": [_switch(name, meaning) for name, meaning in _build.SWITCHES.items()],
    }


def _versions() -> list[str]:
    return [
        f"rsloss_kernels  {rsloss_kernels.__version__}",
        f"package         {package()}",
        f"python          {platform.python_version()}",
        f"torch           {torch.__version__}",
        f"triton          {_triton_version()}",
        f"CUDA of torch   {torch.version.cuda or 'none'}",
        f"CUDA toolkit    {_build.why_not_cuda() or 'found'}",
        f"compiler        {_compiler()}",
        f"system          {platform.platform()}",
    ]


def package() -> str:
    """The folder that the package was imported from, and whether that hides an installed one: inside a checkout it does."""
    here = pathlib.Path(rsloss_kernels.__file__).resolve().parent
    found = [one.locate_file("rsloss_kernels") for one in importlib.metadata.distributions(name="rsloss_kernels")]
    installed = {pathlib.Path(str(path)).resolve() for path in found if (pathlib.Path(str(path)) / "__init__.py").exists()} - {here}
    hidden = "".join(f", which hides the one installed in {path}: run this in another folder for that one" for path in installed)
    return f"{here}{hidden}"


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none"
    import triton

    return str(triton.__version__)


def _compiler() -> str:
    reason = _build.why_not_native()
    if reason is not None:
        return reason
    try:
        shown = subprocess.run([*shlex.split(_build.compiler()), "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"{_build.compiler()} does not run ({error.strerror})"
    return shown.splitlines()[0] if shown else f"{_build.compiler()} does not say its version"


def _devices() -> list[str]:
    lines = [f"cpu    {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        lines.append(f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return lines


def _libraries() -> list[str]:
    return [
        f"{backend:<5} {_ext.loaded_library(backend) or _ext.why_not_loaded(backend)}" for backend in _build.LIBRARIES
    ] + [f"cache {_cache()}"]


def _cache() -> str:
    try:
        return str(_jit.cache())
    except RuntimeError as error:
        return f"cannot be used: {error}"


def _build_report() -> list[str]:
    if importlib.util.find_spec("rsloss_kernels._C") is None:
        return ["none: nothing was compiled when the package was installed, or Python's headers were missing"]
    report = importlib.import_module("rsloss_kernels._C").build_report()
    return [f"{name:<20} {value or '-'}" for name, value in report.items()]


def _switch(name: str, meaning: str) -> str:
    return f"{name:<22} {os.environ.get(name) or '-':<10} {meaning}"


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m rsloss_kernels.collect_env", description=__doc__).parse_args(argv)
    for title, lines in sections().items():
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
