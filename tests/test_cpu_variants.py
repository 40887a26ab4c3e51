"""The C++ backend in the forms that a run on this machine does not take by itself: for lesser processors, and under sanitizers.

Each form takes tests of the losses again, in a process of its own.
"""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from cuda_on_cpu import build

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rsloss_kernels"
TESTS = ("test_rank_sort.py", "test_ranking_edge_cases.py", "test_ghm_values.py", "test_ghm_edge_cases.py",
         "test_group_softmax_values.py", "test_group_softmax_edge_cases.py", "test_focal_values.py", "test_focal_edge_cases.py",
         "test_smooth_l1_values.py",
         "test_seesaw.py::test_samples", "test_seesaw.py::test_minus_infinity_is_a_probability_of_0")  # fmt: skip


def run_tests(*selection: str, cwd: pathlib.Path = ROOT, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    environment = {**os.environ, "RSLOSS_TEST_BACKENDS": "cpp", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and " passed" in done.stdout, report[-8000:]
    assert "runtime error" not in report and "AddressSanitizer" not in report, report[-8000:]


@pytest.mark.parametrize("capability", ["avx2", "plain"])
def test_lesser_processors(capability):
    tests = [ROOT / "tests" / name for name in TESTS]
    run_tests(*map(str, tests), "-k", "cpp", RSLOSS_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("capability", ["avx512", "plain"])
def test_sanitizers_find_nothing(tmp_path, capability):
    shutil.copytree(PACKAGE, tmp_path / "rsloss_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    sources = sorted((ROOT / "csrc").glob("*/*_cpu.cpp"))
    # GCC 12 takes the undefined halves of its own AVX-512 intrinsics for variables that were never set.
    # Not optimised: three paths of vectors, checked everywhere, take the optimiser minutes.
    flags = ["-O0", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi"]
    library = build.compile_library("ops_cpu", sources, sanitize=True, flags=flags)
    shutil.copy(library, tmp_path / "rsloss_kernels" / "_ops_cpu.so")
    # The tests below would pass with the installed library too: it must be this one that a process in this folder loads.
    script = "import rsloss_kernels; print([line.split()[-1] for line in open('/proc/self/maps') if '_ops_cpu' in line][0])"
    environment = {**build.sanitizer_environment(), "RSLOSS_CPU_CAPABILITY": capability}
    loaded = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert pathlib.Path(loaded.stdout.strip()).parent == tmp_path / "rsloss_kernels"
    tests = [ROOT / "tests" / name for name in TESTS]
    selection = "cpp and (apart or finite or nothing or dense or labels or capacity)"
    run_tests(
        *map(str, tests), "-k", selection, cwd=tmp_path, RSLOSS_CPU_CAPABILITY=capability, **build.sanitizer_environment()
    )
