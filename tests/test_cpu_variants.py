"""The C++ backend in the forms that a run on this machine does not take by itself: for lesser processors, and under sanitizers.

Each form takes tests of the losses again, in a process of its own.
"""
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import sanitized

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ("test_rank_sort.py", "test_ranking_edge_cases.py", "test_ranking_bad_input.py", "test_ranking_maps.py",
         "test_ranking_large.py", "test_segments.py", "test_ghm_values.py", "test_ghm_edge_cases.py", "test_ghm_maps.py",
         "test_group_softmax_values.py", "test_group_softmax_edge_cases.py",
         "test_focal_values.py", "test_focal_maps.py", "test_focal_edge_cases.py", "test_focal_bad_input.py", "test_focal_narrow.py",
         "test_smooth_l1_values.py", "test_seesaw.py::test_samples", "test_seesaw.py::test_minus_infinity_is_a_probability_of_0")  # fmt: skip


def run_tests(*selection: str, cwd: pathlib.Path = ROOT, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    environment = {**os.environ, "RSLOSS_TEST_BACKENDS": "cpp", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and " passed" in done.stdout, report[-8000:]
    assert "runtime error" not in report and "AddressSanitizer" not in report, report[-8000:]


# avx512 is without what came after it: a conversion to bfloat16, and gathers, which the gradients of ranking losses take.
@pytest.mark.parametrize(
    "capability, of_it", [("avx512", "not graph and (bfloat16 or rank or segments)"), ("avx2", "not graph"), ("plain", "not graph")]
)
def test_lesser_processors(capability, of_it):
    tests = [ROOT / "tests" / name for name in TESTS]
    run_tests(*map(str, tests), "-k", f"cpp and {of_it}", RSLOSS_CPU_CAPABILITY=capability)


@pytest.mark.parametrize("capability", ["best", "plain"])
def test_sanitizers_find_nothing(tmp_path, capability):
    environment = {**sanitized.environment_of(tmp_path, "cpp"), "RSLOSS_CPU_CAPABILITY": capability}
    # The tests below would pass with the installed library too: it must be this one that a process in this folder loads.
    assert sanitized.loaded_library(tmp_path, environment).parent == tmp_path / "rsloss_kernels"
    tests = [ROOT / "tests" / name for name in TESTS]
    selection = "cpp and (apart or finite or nothing or dense or labels or capacity or garbage or samples or beside)"
    run_tests(*map(str, tests), "-k", selection, cwd=tmp_path, **environment)


RACE = """
#include <thread>
int shared = 0;
int main() {
  std::thread one([] { ++shared; }), two([] { ++shared; });
  one.join(), two.join();
}
"""


def test_no_two_threads_race(tmp_path):
    """Every loss under the sanitizer of threads. Each task has a thread of its own: it does not see those of torch's pool."""
    runtime = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tmp_path),
    }
    # The sanitizer does not know every arrangement of a process's memory.
    fixed = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    (tmp_path / "race.cpp").write_text(RACE)
    subprocess.run(["g++", "-fsanitize=thread", "-g1", "race.cpp", "-o", "race"], cwd=tmp_path, check=True)
    control = subprocess.run([*fixed, "./race"], cwd=tmp_path, capture_output=True, text=True, env={**environment, "LD_PRELOAD": ""})
    assert control.returncode == 66 and "data race" in control.stderr, "the sanitizer does not see a race here"
    sanitized.install(tmp_path, "ops_cpu_threads", False, "-fsanitize=thread", "-DRSL_OWN_THREADS")
    program = [*fixed, sys.executable, str(ROOT / "tests" / "threads_at_work.py"), str(tmp_path / "rsloss_kernels")]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and done.stdout.endswith("done\n") and "ThreadSanitizer" not in report, report[-8000:]
