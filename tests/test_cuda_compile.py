"""nvcc compiles every .cu file for several GPUs: no spills, no stack, registers within a budget. The glue compiles against the stable
headers of torch, which the CPU build brings, and the headers of CUDA.

A machine without nvcc fails these tests; RSLOSS_NO_NVCC=1 says that it has none on purpose.
"""
import functools
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNEL_FILES = sorted(CSRC.glob("*/*.cu"))
GLUE_FILES = sorted(CSRC.glob("*/*_cuda.cpp"))
# Registers per thread. 64 let 1024 threads of any block shape be resident, which the launch bounds ask for.
MOST_REGISTERS = {
    "ranking_mask_kernel": 64,
    "ranking_count_kernel": 64,
    "ranking_pad_kernel": 40,
    "ranking_collect_kernel": 64,
    "ranking_rank_kernel": 48,
    "ranking_merge_kernel": 48,
    "ranking_offsets_kernel": 40,
    "ranking_breakpoints_kernel": 40,
    "ranking_bin_kernel": 64,
    "ranking_clear_kernel": 40,
    "ranking_histogram_kernel": 64,
    "ranking_distribute_kernel": 40,
    "ranking_value_table_kernel": 40,
    "ranking_look_up_kernel": 64,
    "ranking_before_slot_kernel": 64,
    "ranking_losses_kernel": 64,
    "ranking_tables_kernel": 64,
    "ranking_backward_kernel": 64,
    "ranking_scatter_kernel": 64,
    "rank_sort_pairs_kernel": 64,
    "rank_sort_tables_kernel": 64,
    "average_precision_errors_kernel": 64,
    "average_precision_interpolate_kernel": 64,
    "alrp_pairs_kernel": 64,
    "focal_forward_kernel": 128,
    "focal_combine_kernel": 64,
    "focal_elements_kernel": 96,
    "ghm_histogram_kernel": 128,
    "ghm_combine_kernel": 64,
    "ghm_finalize_kernel": 64,
    "ghm_backward_kernel": 128,
    "group_softmax_sample_kernel": 64,
    "group_softmax_forward_kernel": 64,
    "group_softmax_combine_kernel": 64,
    "group_softmax_backward_kernel": 64,
    "group_softmax_scores_kernel": 64,
    "smooth_l1_forward_kernel": 80,
    "smooth_l1_combine_kernel": 64,
    "smooth_l1_elements_kernel": 96,
    "smooth_l1_backward_kernel": 80,
}
# Of those, instances for float32 and narrower; float64 takes twice as many, class sums of the focal losses too. Three blocks of 256
# threads are resident with 80.
MOST_REGISTERS_OF_FLOATS = {"ghm_histogram_kernel": 80, "ghm_backward_kernel": 64, "focal_elements_kernel": 80}
# Instances of each kernel: one per type of the logits or targets, two per type where loads may be unaligned, twice as many where
# segments have a path of their own. GHM: in float and in double, three forms of targets each. Focal: in float, classes across and along
# what a thread loads, and in double; with class sums and without, or losses and gradients. Group softmax: one per type of the logits.
# Smooth L1: in float and in double.
INSTANCES = {
    "ranking_mask_kernel": 6,
    "ranking_collect_kernel": 6,
    "ranking_rank_kernel": 2,
    "ranking_breakpoints_kernel": 4,
    "ranking_bin_kernel": 16,
    "ranking_histogram_kernel": 4,
    "ranking_distribute_kernel": 2,
    "ranking_value_table_kernel": 2,
    "ranking_look_up_kernel": 4,
    "ranking_before_slot_kernel": 2,
    "ranking_losses_kernel": 2,
    "ranking_tables_kernel": 2,
    "ranking_backward_kernel": 16,
    "ranking_scatter_kernel": 4,
    "rank_sort_pairs_kernel": 2,
    "rank_sort_tables_kernel": 2,
    "average_precision_errors_kernel": 2,
    "average_precision_interpolate_kernel": 2,
    "alrp_pairs_kernel": 2,
    "focal_forward_kernel": 6,
    "focal_elements_kernel": 6,
    "ghm_histogram_kernel": 6,
    "ghm_backward_kernel": 6,
    "group_softmax_forward_kernel": 4,
    "group_softmax_combine_kernel": 2,
    "group_softmax_backward_kernel": 4,
    "group_softmax_scores_kernel": 4,
    "smooth_l1_forward_kernel": 2,
    "smooth_l1_elements_kernel": 2,
    "smooth_l1_backward_kernel": 2,
}

pytestmark = pytest.mark.skipif(os.environ.get("RSLOSS_NO_NVCC") == "1", reason="RSLOSS_NO_NVCC=1")


@functools.cache
def nvcc() -> str:
    found = shutil.which("nvcc")
    assert found, "nvcc is not on PATH (RSLOSS_NO_NVCC=1 says that this is meant)"
    return found


def cuda_include() -> pathlib.Path:
    done = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    assert top, done.stderr
    folder = pathlib.Path(top[1].strip()) / "include"
    assert (folder / "cuda_runtime.h").is_file(), f"no cuda_runtime.h in {folder}"
    return folder


def compile_kernels(source: pathlib.Path, folder: pathlib.Path, architecture: str) -> str:
    """Compiles to a cubin and returns what ptxas says."""
    flags = ["-cubin", "-std=c++17", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", f"-arch={architecture}", f"-I{CSRC}"]
    command = [nvcc(), *flags, str(source), "-o", str(folder / f"{source.stem}.{architecture}.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def resource_usage(report: str) -> list[tuple[str, bool, int, int, int]]:
    """(kernel, whether its first type is float, registers, bytes of stack, bytes of spills) of every kernel that ptxas reports."""
    usage = []
    for part in report.split("Compiling entry function")[1:]:
        mangled = part.split("'")[1]
        kernel = re.search(r"\d((?:ranking|rank_sort|average_precision|alrp|focal|ghm|group_softmax|smooth_l1)_\w*?_kernel)(If)?", mangled)
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        usage.append((kernel[1] if kernel else mangled, bool(kernel and kernel[2]), registers, stack, stores + loads))
    return usage


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_within_their_budgets(architecture, tmp_path):
    usage = [row for source in KERNEL_FILES for row in resource_usage(compile_kernels(source, tmp_path, architecture))]
    found = {kernel: sum(row[0] == kernel for row in usage) for kernel, *_ in usage}
    assert found == {kernel: INSTANCES.get(kernel, 1) for kernel in MOST_REGISTERS}
    for kernel, is_float, registers, stack, spills in usage:
        print(f"{architecture} {kernel}: {registers} registers")
        assert spills == 0 and stack == 0, f"{kernel}: {stack} bytes of stack, {spills} bytes of spills"
        most = MOST_REGISTERS_OF_FLOATS.get(kernel) if is_float else None
        assert registers <= (most or MOST_REGISTERS[kernel]), f"{kernel}: {registers} registers"


def test_a_spill_is_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) ranking_spilling_kernel(const float* in, float* out) {\n"
        "  float values[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) values[i] = in[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) out[(95 - i) * 1024 + threadIdx.x] = values[i] * values[95 - i];\n"
        "}\n"
    )
    ((kernel, _, registers, stack, spills),) = resource_usage(compile_kernels(source, tmp_path, "sm_90"))
    assert kernel == "ranking_spilling_kernel" and registers <= 32 and stack > 0 and spills > 0


@pytest.mark.parametrize("source", GLUE_FILES, ids=lambda path: path.name)
def test_glue_compiles_against_the_stable_headers(source):
    include = pathlib.Path(torch.__file__).resolve().parent / "include"
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    flags += [f"-I{CSRC}", f"-isystem{include}", f"-isystem{cuda_include()}"]
    macros = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    done = subprocess.run(["g++", *flags, *macros, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_is_compiled():
    stages = ("backward", "bin", "collect", "finalize", "rank", "value")
    losses = ("alrp", "ap", "focal", "ghm", "group_softmax", "rank_sort", "smooth_l1")
    kernels = {*(f"{loss}_kernels.cu" for loss in losses), *(f"ranking_{stage}_kernels.cu" for stage in stages)}
    assert {path.name for path in KERNEL_FILES} == kernels and len(KERNEL_FILES) == len(kernels)
    assert [path.name for path in GLUE_FILES] == sorted(f"{loss}_cuda.cpp" for loss in (*losses, "ranking"))
