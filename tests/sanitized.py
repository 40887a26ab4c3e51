"""The test suite with the C++ kernels, and with the emulated CUDA kernels, under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.sanitized                            every test of a backend that is cpp or cuda
    python -m tests.sanitized --backends cpp --capability plain tests/test_ap.py

Other options, written `--name=value`, go to pytest. CI takes a selection of the same (test_cpu_variants.py, test_cuda_on_cpu.py): all
of it takes an hour.
Exit status 1 if a test fails, which a finding of the sanitizers makes it do.
"""
import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from cuda_on_cpu import build

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rsloss_kernels"
# GCC 12 takes the undefined halves of its own AVX-512 intrinsics for variables that were never set.
# Not optimised: three paths of vectors, checked everywhere, take the optimiser minutes.
FLAGS = ("-O0", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="cpp,cuda", help="cpp, cuda (emulated) or both")
    parser.add_argument("--capability", default="", help="of the C++ kernels: avx2 or plain; what the processor has by default")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files, folders or tests, from the root of the checkout")
    arguments, of_pytest = parser.parse_known_args(argv)
    chosen = [str(ROOT / test) for test in arguments.tests]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        for backend in arguments.backends.split(","):
            environment = {**environment_of(pathlib.Path(folder), backend), "RSLOSS_CPU_CAPABILITY": arguments.capability}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"{backend}-cpu"]
            done = subprocess.run([*command, *of_pytest, *chosen], cwd=folder, env=environment)
            status = status or done.returncode
    return status


def environment_of(folder: pathlib.Path, backend: str) -> dict[str, str]:
    """Of a process in the folder whose kernels of the backend are compiled with the sanitizers."""
    if backend == "cpp":
        install(folder, "ops_cpu", sanitize=True)
    else:
        build.build(sanitize=True)  # here, because the compiler itself would run under the sanitizers there
    return build.sanitizer_environment() | {"RSLOSS_TEST_BACKENDS": backend, "RSLOSS_TEST_SANITIZED": "1"}


def install(folder: pathlib.Path, name: str, sanitize: bool, *flags: str) -> None:
    """The package with a library compiled for this, in a folder where Python finds it first."""
    shutil.rmtree(folder / "rsloss_kernels", ignore_errors=True)
    shutil.copytree(PACKAGE, folder / "rsloss_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    sources = sorted((ROOT / "csrc").glob("*/*_cpu.cpp"))
    library = build.compile_library(name, sources, sanitize=sanitize, flags=[*FLAGS, *flags])
    shutil.copy(library, folder / "rsloss_kernels" / "_ops_cpu.so")


def loaded_library(folder: pathlib.Path, environment: dict[str, str]) -> pathlib.Path:
    """Which library of operators a process in the folder loads."""
    script = "import rsloss_kernels; print([line.split()[-1] for line in open('/proc/self/maps') if '_ops_cpu' in line][0])"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return pathlib.Path(done.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
