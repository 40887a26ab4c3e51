"""nvcc compiles every .cu file for several GPUs: no spills, no stack, registers and shared memory within budgets that leave room for
as many warps as the kernel counts on, and none of the instructions that would make a hot loop slow. The glue compiles against the
stable headers of torch, which the CPU build brings, and the headers of CUDA.

A machine without nvcc fails these tests; RSLOSS_NO_NVCC=1 says that it has none on purpose.
"""
import functools
import os
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
import torch
import triton

ROOT = pathlib.Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
KERNEL_FILES = sorted(CSRC.glob("*/*.cu"))
GLUE_FILES = sorted(CSRC.glob("*/*_cuda.cpp"))
class Budget(NamedTuple):
    """What every instance of a kernel must keep to.

    registers: per thread; of_floats: of those, instances whose first type is float; float64 takes twice as many. shared: static, bytes.
    dynamic: bytes of a block at the sizes of a detector, None: all that a block may have. warps: that must fit a processor at once with
    all that; of_floats_warps likewise. instances: one per type of the logits or targets, two per type where loads may be unaligned,
    twice as many where segments have a path of their own. GHM: in float and in double, three forms of targets each. Focal: in float,
    classes across and along what a thread loads, and in double; with class sums and without, or losses and gradients. Group softmax:
    one per type of the logits. Smooth L1: in float and in double.
    """

    instances: int
    registers: int
    warps: int
    threads: int = 256
    shared: int = 0
    dynamic: int | None = 0
    of_floats: int | None = None
    of_floats_warps: int | None = None


# Kernels of 256 threads ask for four resident blocks where they stream or walk pairs; those of 1024 threads set up tables and are
# alone on a processor.
LARGE = {"threads": 1024, "warps": 32}
BUDGETS = {
    "ranking_mask_kernel": Budget(6, 64, 32, shared=64),
    "ranking_count_kernel": Budget(1, 64, **LARGE, shared=256),
    "ranking_pad_kernel": Budget(1, 40, 48),
    "ranking_collect_kernel": Budget(6, 64, 32, shared=64),
    "ranking_rank_kernel": Budget(2, 48, 40),
    "ranking_merge_kernel": Budget(1, 48, 40),
    "ranking_offsets_kernel": Budget(1, 40, 48),
    "ranking_breakpoints_kernel": Budget(4, 40, 48),
    "ranking_bin_kernel": Budget(16, 64, **LARGE, dynamic=None),
    "ranking_histogram_kernel": Budget(4, 64, **LARGE, dynamic=None),
    "ranking_distribute_kernel": Budget(2, 40, 48),
    "ranking_value_table_kernel": Budget(2, 40, 48),
    "ranking_look_up_kernel": Budget(4, 64, **LARGE, dynamic=None),
    "ranking_sweep_kernel": Budget(4, 64, **LARGE, shared=256),
    "ranking_losses_kernel": Budget(2, 64, **LARGE, shared=768),
    "ranking_tables_kernel": Budget(2, 64, 32),
    "ranking_backward_kernel": Budget(16, 64, **LARGE, dynamic=None),
    "ranking_scatter_kernel": Budget(4, 64, 32),
    "rank_sort_pairs_kernel": Budget(2, 64, 32),
    "rank_sort_tables_kernel": Budget(2, 64, 32),
    "average_precision_errors_kernel": Budget(2, 64, 32),
    "average_precision_interpolate_kernel": Budget(2, 64, **LARGE, shared=768),
    "alrp_pairs_kernel": Budget(2, 64, 32),
    # Of the dynamic memory: the table of exponentials, 80 classes and, with class sums, a cell for each lane and class.
    "focal_forward_kernel": Budget(6, 128, 16, shared=96, dynamic=24 << 10),
    "focal_combine_kernel": Budget(1, 64, 32),
    "focal_elements_kernel": Budget(6, 96, 16, shared=32, dynamic=8 << 10, of_floats=80, of_floats_warps=24),
    # Of 30 bins in eight columns.
    "ghm_histogram_kernel": Budget(6, 128, 16, shared=128, dynamic=24 << 10, of_floats=80, of_floats_warps=24),
    "ghm_combine_kernel": Budget(1, 64, 32),
    "ghm_finalize_kernel": Budget(1, 64, 32, shared=64),
    "ghm_backward_kernel": Budget(6, 128, 16, dynamic=1 << 10, of_floats=64, of_floats_warps=32),
    "group_softmax_sample_kernel": Budget(1, 64, **LARGE, shared=2048),
    "group_softmax_forward_kernel": Budget(4, 64, 32, shared=512),
    "group_softmax_combine_kernel": Budget(2, 64, 32),
    "group_softmax_backward_kernel": Budget(4, 64, 32, shared=512),
    "group_softmax_scores_kernel": Budget(4, 64, 32, shared=8704),
    "smooth_l1_forward_kernel": Budget(2, 80, 24, shared=64),
    "smooth_l1_combine_kernel": Budget(1, 64, 32, shared=64),
    "smooth_l1_elements_kernel": Budget(2, 96, 16),
    "smooth_l1_backward_kernel": Budget(2, 80, 24),
}


class Processor(NamedTuple):
    """Limits of one streaming multiprocessor, and the shared memory that each block takes for itself, in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    reserved: int = 1 << 10
    registers: int = 1 << 16


PROCESSORS = {
    "sm_80": Processor(64, 32, 164 << 10, 163 << 10),
    "sm_90": Processor(64, 32, 228 << 10, 227 << 10),
    "sm_100": Processor(64, 32, 228 << 10, 227 << 10),
    "sm_120": Processor(48, 24, 100 << 10, 99 << 10),
}
ARCHITECTURES = tuple(PROCESSORS)
# Instructions that no kernel may have: local memory; loops of compare-and-swap, which 64-bit and floating atomics in shared memory
# are; accesses that find out at run time whether an address is shared. Looked for where the instruction set changed last.
DISASSEMBLED = ("sm_90", "sm_120")
FORBIDDEN = {
    "local memory": r"(?:LDL|STL)\S*",
    "compare-and-swap": r"ATOM\S*\.CAS\S*",
    "generic addresses": r"(?:LD|ST|ATOM)(?:\.E|\.U|\.S|\.1|\.6)\S*",
}
# float64 arithmetic in the passes over float32 and narrower logits that must not wait for it.
FORBIDDEN_DOUBLES = r"D(?:ADD|MUL|FMA|SETP|MNMX)\S*"
WITHOUT_DOUBLES = ("ranking_mask_kernel", "ranking_histogram_kernel", "ranking_look_up_kernel", "ranking_backward_kernel")

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


class Usage(NamedTuple):
    """Of one kernel; sizes in bytes."""

    kernel: str
    is_float: bool  # its first type is float
    registers: int
    stack: int
    spills: int
    shared: int


NAMES = re.compile(r"\d((?:ranking|rank_sort|average_precision|alrp|focal|ghm|group_softmax|smooth_l1)_\w*?_kernel)(I(\w))?")


def resource_usage(report: str) -> list[Usage]:
    """Of every kernel that ptxas reports."""
    usage = []
    for part in report.split("Compiling entry function")[1:]:
        mangled = part.split("'")[1]
        kernel = NAMES.search(mangled)
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        is_float = bool(kernel and kernel[3] == "f")
        usage.append(Usage(kernel[1] if kernel else mangled, is_float, registers, stack, stores + loads, int(shared[1]) if shared else 0))
    return usage


def resident_warps(processor: Processor, threads: int, registers: int, shared: int) -> int:
    """Warps of one processor that blocks of this shape can fill. Registers are given out to warps by 256."""
    warps = threads // 32
    by_registers = processor.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = processor.shared // (shared + processor.reserved)
    return warps * min(processor.warps // warps, processor.blocks, by_registers, by_shared)


@functools.cache
def disassembler() -> pathlib.Path:
    """Triton brings one; the toolkit does not always."""
    found = shutil.which("nvdisasm")
    return pathlib.Path(found or pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm")


def instructions(cubin: pathlib.Path) -> dict[str, set[str]]:
    """The opcodes of every function of a cubin, by mangled name."""
    done = subprocess.run([str(disassembler()), "-c", str(cubin)], capture_output=True, text=True, check=True)
    functions = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section, re.MULTILINE)
        functions[section.split(",", 1)[0]] = set(opcodes)
    return functions


def forbidden_instructions(function: str, opcodes: set[str]) -> list[str]:
    """What a function must not have, in words."""
    kernel = NAMES.search(function)
    patterns = dict(FORBIDDEN)
    if kernel and kernel[1] in WITHOUT_DOUBLES and kernel[3] != "d":
        patterns["float64"] = FORBIDDEN_DOUBLES
    return [f"{what}: {opcode}" for what, pattern in patterns.items() for opcode in opcodes if re.fullmatch(pattern, opcode)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_within_their_budgets(architecture, tmp_path):
    processor = PROCESSORS[architecture]
    usage = [row for source in KERNEL_FILES for row in resource_usage(compile_kernels(source, tmp_path, architecture))]
    found = {row.kernel: sum(other.kernel == row.kernel for other in usage) for row in usage}
    assert found == {kernel: budget.instances for kernel, budget in BUDGETS.items()}
    for row in usage:
        budget = BUDGETS[row.kernel]
        of_floats = row.is_float and budget.of_floats is not None
        most = budget.of_floats if of_floats else budget.registers
        fewest = budget.of_floats_warps if of_floats and budget.of_floats_warps else budget.warps
        dynamic = processor.shared_per_block - row.shared if budget.dynamic is None else budget.dynamic
        warps = resident_warps(processor, budget.threads, row.registers, row.shared + dynamic)
        print(f"{architecture} {row.kernel}: {row.registers} registers, {row.shared} bytes, {warps} of {processor.warps} warps")
        assert row.spills == 0 and row.stack == 0, row
        assert row.registers <= most and row.shared <= budget.shared, f"{row}, of {budget}"
        assert warps >= min(fewest, processor.warps), f"{row}: {warps} warps, of {budget}"
    if architecture in DISASSEMBLED:
        functions = {name: opcodes for path in tmp_path.glob("*.cubin") for name, opcodes in instructions(path).items()}
        assert len([name for name in functions if NAMES.search(name)]) == len(usage)
        slow = {name: bad for name, opcodes in functions.items() if (bad := forbidden_instructions(name, opcodes))}
        assert not slow, slow


SLOW_KERNELS = """
__device__ __noinline__ float look_up(const float* table, int i) { return table[i]; }

__global__ void ranking_look_up_kernel(const float* in, float* out, double* sums, int local) {
  __shared__ float table[256];
  __shared__ unsigned long long counts[256];
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = in[i * 256 + threadIdx.x];
  table[threadIdx.x] = values[local];
  counts[threadIdx.x] = 0;
  __syncthreads();
  // 64-bit shared atomics, a pointer of two kinds, an array that is indexed at run time, float64.
  atomicAdd(&counts[local % 256], 1ull);
  out[threadIdx.x] = look_up(local > 3 ? table : in, values[threadIdx.x % 64] > 1 ? threadIdx.x : 3);
  __syncthreads();
  sums[threadIdx.x] = static_cast<double>(counts[threadIdx.x]) * sums[threadIdx.x];
}
"""


def test_slow_instructions_are_seen(tmp_path):
    source = tmp_path / "slow.cu"
    source.write_text(SLOW_KERNELS)
    compile_kernels(source, tmp_path, "sm_90")
    functions = instructions(tmp_path / "slow.sm_90.cubin")
    found = {reason.split(":")[0] for name, opcodes in functions.items() for reason in forbidden_instructions(name, opcodes)}
    assert found == {*FORBIDDEN, "float64"}


def test_occupancy_is_that_of_the_tables():
    """Blocks of 1024 threads with more than 32 registers are alone; 80 registers leave room for three blocks of 256 threads."""
    processor = PROCESSORS["sm_90"]
    shapes = [(1024, 33, 0), (1024, 32, 0), (256, 80, 0), (256, 81, 0), (256, 32, 57 << 10), (32, 16, 0)]
    assert [resident_warps(processor, *shape) for shape in shapes] == [32, 64, 24, 16, 24, 32]


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
    (row,) = resource_usage(compile_kernels(source, tmp_path, "sm_90"))
    assert row.kernel == "ranking_spilling_kernel" and row.registers <= 32 and row.stack > 0 and row.spills > 0


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
