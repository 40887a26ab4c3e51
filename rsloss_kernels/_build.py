"""Which sources make which library, with which flags: shared by setup.py, the build on first use and the build report.

Importable without torch and without the package around it (setup.py loads it by its path). Run as a program it compiles one
library into a folder: `python _build.py _ops_cpu FOLDER`.
"""
import functools
import hashlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

PACKAGE = pathlib.Path(__file__).resolve().parent
LIBRARIES = {"cpp": "_ops_cpu", "cuda": "_ops_cuda"}
REPORT_SOURCE = "build_report.cpp"
SWITCHES = {
    "RSLOSS_NO_EXT": "1: compile nothing",
    "RSLOSS_FORCE_CUDA": "1: fail where the CUDA library cannot be compiled",
    "TORCH_CUDA_ARCH_LIST": "GPU architectures; default: those of 8.0 9.0 10.0 12.0 that nvcc knows",
    "DEBUG": "1: -O0 -g",
    "CXX": "C++ compiler",
    "MAX_JOBS": "compiler processes at a time",
}
# One binary for torch 2.11 and newer: the stable ABI, whose headers hold no ATen.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
NO_FOLDER = "-fmacro-prefix-map"
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
HOW_TO_COMPILE = (
    "with torch and a C++ compiler at hand, `pip install --no-build-isolation .` compiles it at installation, "
    "`python -m rsloss_kernels.build` or RSLOSS_JIT=1 afterwards"
)


def is_on(switch: str) -> bool:
    return os.environ.get(switch, "") not in ("", "0")


def switch_lines() -> list[str]:
    """One line per switch: its value and what it does."""
    return [f"{name}={os.environ.get(name, '')} ({meaning})" for name, meaning in SWITCHES.items()]


def source_root() -> pathlib.Path:
    """The folder of the C++ and CUDA sources: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def cpu_sources(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in root.rglob("*.cpp") if not path.name.endswith("_cuda.cpp") and path.name != REPORT_SOURCE)


def cuda_sources(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*root.rglob("*.cu"), *root.rglob("*_cuda.cpp")])


def headers(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*root.rglob("*.h"), *root.rglob("*.cuh")])


def cxx_flags() -> list[str]:
    # Python's own flags, which come first, hold -g and -Wall. GCC 12 warns falsely about its own AVX-512 intrinsics, and about
    # vectors returned by functions that are all inlined.
    optimisation = ["-O0", "-g"] if is_on("DEBUG") else ["-O3", "-g0"]
    # Error messages name the file that checks, without the folder it was compiled in.
    prefix = f"{NO_FOLDER}={source_root()}/="
    return [*optimisation, "-std=c++17", prefix, "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi", *STABLE_ABI]


def portable_cxx_flags() -> list[str]:
    """`cxx_flags` without the folder of the sources, of which the library keeps nothing: the same for every installation."""
    return [flag for flag in cxx_flags() if not flag.startswith(NO_FOLDER)]


def nvcc_flags() -> list[str]:
    optimisation = ["-O0", "-g", "-lineinfo"] if is_on("DEBUG") else ["-O3"]
    relaxed = ["--expt-relaxed-constexpr", "--expt-extended-lambda"]
    return [*optimisation, "-std=c++17", *relaxed, *STABLE_ABI, "-DUSE_CUDA"]


def cuda_architectures(nvcc: str) -> str:
    """`TORCH_CUDA_ARCH_LIST`, or the default architectures that this nvcc knows, with PTX of the newest."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    chosen = [arch for arch in DEFAULT_ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}, but {', '.join(known)}")
    return ";".join([*chosen[:-1], f"{chosen[-1]}+PTX"])


def compiler() -> str:
    return os.environ.get("CXX") or "c++"


def why_not_native() -> str | None:
    """None if C++ can be compiled here, else the reason in words."""
    if is_on("RSLOSS_NO_EXT"):
        return "RSLOSS_NO_EXT is set"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported while building ({error}); an isolated build never sees it"
    reason = _why_no_rules_of_torch()
    if reason is not None:
        return reason
    if shutil.which(shlex.split(compiler())[0]) is None:
        return f"there is no C++ compiler {compiler()!r}"
    return None


def why_not_cuda() -> str | None:
    """None if CUDA can be compiled here, else the reason in words. Needs torch."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    reason = _why_no_rules_of_torch()
    if reason is not None:
        return reason
    from torch.utils.cpp_extension import CUDA_HOME

    if not CUDA_HOME:
        return "no CUDA toolkit was found (neither CUDA_HOME nor nvcc)"
    # torch asks this one for its version before it compiles, also where PYTORCH_NVCC names what compiles.
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    if not os.path.exists(nvcc):
        return f"the CUDA toolkit in {CUDA_HOME} has no compiler: there is no {nvcc}"
    return _why_not_nvcc(nvcc, torch.version.cuda)


@functools.cache
def _why_not_nvcc(nvcc: str, cuda: str) -> str | None:
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        return f"{nvcc} does not run ({error.strerror})"
    if done.returncode != 0:
        return f"{nvcc} does not run (exit status {done.returncode}): {done.stderr.strip()[-200:]}"
    # torch compiles nothing with the nvcc of another major version, and then the CPU library would be missing too.
    release = re.search(r"release (\d+)\.\d+", done.stdout)
    if release and release[1] != cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {release[0].split()[1]}, this torch of CUDA {cuda}"
    return None


def _why_no_rules_of_torch() -> str | None:
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch compiles by setuptools, which cannot be imported ({error}): pip install setuptools"
    return None


def why_no_report() -> str | None:
    """None if the build report can be compiled here, else the reason in words: alone of all it is a module of Python."""
    header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Python's headers are not installed: there is no {header}"


def extension(stem: str, root: pathlib.Path, relative_to: pathlib.Path | None = None) -> Any:
    """The setuptools extension of one library: a shared object without Python, registered with torch when loaded."""
    from torch.utils import cpp_extension

    if stem == LIBRARIES["cuda"]:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_architectures(f"{cpp_extension.CUDA_HOME}/bin/nvcc")
        make, sources = cpp_extension.CUDAExtension, cuda_sources(root)
        flags = {"cxx": [*cxx_flags(), "-DUSE_CUDA"], "nvcc": nvcc_flags()}
    else:
        make, sources = cpp_extension.CppExtension, cpu_sources(root)
        flags = {"cxx": cxx_flags()}
    return make(
        f"rsloss_kernels.{stem}",
        [_shown(path, relative_to) for path in sources],
        include_dirs=[str(root)],
        depends=[_shown(path, relative_to) for path in headers(root)],
        extra_compile_args=flags,
        py_limited_api=True,
    )


def report_extension(root: pathlib.Path, relative_to: pathlib.Path | None = None) -> Any:
    """The setuptools extension of `_C`, the pybind11 module that says how everything was compiled."""
    import torch
    from setuptools import Extension
    from torch.utils.cpp_extension import include_paths

    facts = {
        "TORCH": torch.__version__,
        "CUDA": why_not_cuda() or torch.version.cuda,
        "CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST", "") if why_not_cuda() is None else "",
        "CXX_FLAGS": " ".join(portable_cxx_flags()),
        "NVCC_FLAGS": " ".join(nvcc_flags()) if why_not_cuda() is None else "",
    }
    return Extension(
        "rsloss_kernels._C",
        [_shown(root / REPORT_SOURCE, relative_to)],
        include_dirs=include_paths(),
        extra_compile_args=["-O1", "-g0", "-std=c++17", *(f'-DRSLOSS_{name}="{value}"' for name, value in facts.items())],
        language="c++",
    )


def build_ext_command() -> type:
    """torch's build_ext, with names for the libraries that hold no Python: `_ops_cpu.so` serves every version of it."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildLibraries(BuildExtension):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **{**keywords, "no_python_abi_suffix": False})

        def get_ext_filename(self, ext_name: str) -> str:
            if ext_name.split(".")[-1] in LIBRARIES.values():
                return os.path.join(*ext_name.split(".")) + ".so"
            return str(super().get_ext_filename(ext_name))

    return BuildLibraries


def fingerprint(stem: str) -> str:
    """A name for what compiling `stem` here would give: torch, Python-independent flags, and the content of every source."""
    import torch

    root = source_root()
    uses_cuda = stem == LIBRARIES["cuda"]
    digest = hashlib.sha256()
    facts = [torch.__version__, sysconfig.get_platform(), compiler(), *portable_cxx_flags()]
    if uses_cuda:
        facts += [torch.version.cuda or "", *nvcc_flags(), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    digest.update("\n".join(facts).encode())
    for path in [*(cuda_sources(root) if uses_cuda else cpu_sources(root)), *headers(root)]:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{stem}-torch{torch.__version__}-{digest.hexdigest()[:16]}"


def compile_into(stem: str, folder: pathlib.Path) -> None:
    """Compiles one library into `folder` by the same steps as an installation does."""
    from setuptools import Distribution

    # pip puts ninja beside the interpreter, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(pathlib.Path(sys.executable).parent)])
    distribution = Distribution({"name": "rsloss_kernels", "ext_modules": [extension(stem, source_root())]})
    command = build_ext_command()(distribution)
    command.build_lib, command.build_temp = str(folder), str(folder / "objects")
    command.ensure_finalized()
    command.run()
    (folder / "rsloss_kernels" / f"{stem}.so").rename(folder / f"{stem}.so")
    shutil.rmtree(folder / "objects", ignore_errors=True)
    (folder / "rsloss_kernels").rmdir()


def _shown(path: pathlib.Path, relative_to: pathlib.Path | None) -> str:
    return str(path if relative_to is None else path.relative_to(relative_to))


if __name__ == "__main__":
    compile_into(sys.argv[1], pathlib.Path(sys.argv[2]))
