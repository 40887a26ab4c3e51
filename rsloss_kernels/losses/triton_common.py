"""What the Triton kernels of all families share: the table of their configurations, launching, numbers as arguments, functions in
float64, rounding."""
import functools
import math
import struct
import threading
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Configuration(NamedTuple):
    """How a pass is cut into programs.

    block: elements, or rows of a table, at a time of one program. registers: without a limit of its own the assembler spills some, to fit
    one more block on a processor. rows: of a tile of `block` partners. columns: the most of a tile. programs: of a pass whose programs
    go on until the end, all at work at once on a large GPU.
    """

    block: int
    warps: int = 4
    registers: int | None = None
    rows: int = 0
    columns: int = 0
    programs: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Arguments of a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit}

    @property
    def arguments(self) -> dict[str, int]:
        return {"BLOCK": self.block, **self.options}

    def tile(self, rows: int, columns: int) -> dict[str, int]:
        """Rows and columns of a tile of `block` elements of a table of so many."""
        width = min(self.columns, triton.next_power_of_2(columns))
        return {"ROWS": min(self.block // width, triton.next_power_of_2(rows)), "COLUMNS": width}


class Entry(NamedTuple):
    """A configuration for compute capabilities from `capability` on (10 major + minor), of up to `most` elements; None: any number."""

    configuration: Configuration
    capability: int = 0
    most: int | None = None


# By pass; the first entry that fits holds. It depends on the device and on sizes, never on a measurement at run time: the order of float
# sums must not change from run to run. Passes that add floats (a comment says so) have one entry, that a loss does not hang on
# the size of its tensor or the kind of GPU. Small tensors take small blocks, so that every processor has one.
SMALL = 1 << 18
CONFIGURATIONS = {
    "ranking stream": (Entry(Configuration(1024)),),
    # Blocks of 2048 would spill registers.
    "ranking search": (
        Entry(Configuration(512, registers=128), most=SMALL),
        Entry(Configuration(1024, registers=128)),
    ),
    "ranking table": (Entry(Configuration(256, warps=8)),),
    # Floats: sums over partners, and the losses.
    "ranking pairs": (Entry(Configuration(128, warps=8, rows=8)),),
    "ranking losses": (Entry(Configuration(1024, warps=8)),),
    # A quarter of the values takes 64 KiB of shared memory and a part of the registers, which are more than a GPU of 12.0 has for 512
    # threads.
    "ranking values": (
        Entry(Configuration(4096, warps=8, programs=64), capability=120),
        Entry(Configuration(8192, warps=16, programs=32)),
    ),
    # Floats.
    "focal sums": (Entry(Configuration(512, registers=248, programs=512)),),
    "focal class sums": (Entry(Configuration(512, registers=248, columns=64, programs=512)),),
    "focal elements": (Entry(Configuration(256, registers=248), most=SMALL), Entry(Configuration(512, registers=248))),
    "focal total": (Entry(Configuration(1024)),),
    # Floats.
    "ghm histogram": (Entry(Configuration(1024, registers=240, programs=512)),),
    "ghm gradient": (Entry(Configuration(512), most=SMALL), Entry(Configuration(1024))),
    # One program, all bins at once.
    "ghm table": (Entry(Configuration(512)),),
    # Floats: sums over rows of a tile, and of the tiles.
    "group softmax": (Entry(Configuration(512, registers=248, columns=128)),),
    "group softmax sample": (Entry(Configuration(2048, registers=248)),),
    "group softmax losses": (Entry(Configuration(1024)),),
    # Floats: sums over columns.
    "seesaw": (Entry(Configuration(512, registers=248, columns=256)),),
    # Floats.
    "smooth l1 sums": (Entry(Configuration(1024, programs=512)),),
    "smooth l1 elements": (Entry(Configuration(512), most=SMALL), Entry(Configuration(1024))),
}
# On a CPU, where the interpreter pays per program: no larger than the work where it says so.
INTERPRETED = {
    **dict.fromkeys(CONFIGURATIONS, Configuration(1 << 16)),
    "ranking table": Configuration(1 << 12),
    "ranking pairs": Configuration(128, rows=128),
    "ranking losses": Configuration(1 << 12),
    "ranking values": Configuration(1 << 18, programs=64),
    "focal sums": Configuration(1 << 16, programs=512),
    "focal class sums": Configuration(1 << 16, programs=512, columns=1 << 12),
    "focal total": Configuration(1024),
    "ghm histogram": Configuration(1 << 16, programs=512),
    "group softmax": Configuration(1 << 16, columns=1 << 12),
    "seesaw": Configuration(1 << 16, columns=1 << 12),
    "smooth l1 sums": Configuration(1 << 16, programs=512),
}
NOT_SHRUNK = ("ranking pairs", "ranking losses", "focal class sums", "focal total", "group softmax", "seesaw")


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configuration(name: str, size: int, device: torch.device) -> Configuration:
    """Of the pass `name` over `size` elements on the device."""
    if device.type == "cuda":
        return choose(name, size, _capability(device))
    chosen = INTERPRETED[name]
    return chosen if name in NOT_SHRUNK else chosen._replace(block=min(chosen.block, max(64, triton.next_power_of_2(size))))


def choose(name: str, size: int, capability: int) -> Configuration:
    """Of the pass `name` over `size` elements on a GPU of this compute capability."""
    fitting = (
        entry.configuration
        for entry in CONFIGURATIONS[name]
        if capability >= entry.capability and (entry.most is None or size <= entry.most)
    )
    return next(fitting)


# Coefficients of exp(x) and of atanh(x) / x in x^2. The functions of the library branch on special values, which costs registers.
EXP_TERMS = tl.constexpr(tuple(1 / math.factorial(k) for k in range(14)))
ATANH_TERMS = tl.constexpr(tuple(1 / (2 * k + 1) for k in range(13)))
LOG2_E = tl.constexpr(math.log2(math.e))
LOG_2 = tl.constexpr(math.log(2))


def float_bits(value: float) -> int:
    """A Python float as an argument of a kernel, which `float_of` reads: Triton would pass it as a float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


# The interpreter swaps functions of triton.language while a kernel runs: one thread at a time.
_interpreter = threading.RLock()


def launching_on(tensor: Tensor) -> AbstractContextManager:
    """The context that kernels must be launched in: the device of `tensor`; on a CPU, the interpreter to oneself."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _interpreter


@triton.jit
def float_of(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2^exponent in float64; 0 below the normal numbers, inf above them."""
    exponent = tl.minimum(tl.maximum(exponent, -1023), 1024)
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def reciprocal(x):
    """1 / x to float64, for x that float32 has too."""
    result = (1.0 / x.to(tl.float32)).to(tl.float64)
    result *= 2.0 - x * result
    return result * (2.0 - x * result)


@triton.jit
def exp_of_minus(x):
    """exp(-x) for x >= 0, to float64."""
    power = -x * LOG2_E
    power = tl.where(power < -2000.0, -2000.0, power)
    whole = tl.floor(power + 0.5)
    rest = (power - whole) * LOG_2
    result = tl.full(x.shape, EXP_TERMS[13], tl.float64)
    for k in tl.static_range(12, -1, -1):
        result = result * rest + EXP_TERMS[k]
    # In two steps, as the result may be subnormal.
    half = tl.floor(0.5 * whole)
    return result * power_of_two(half) * power_of_two(whole - half)


@triton.jit
def log1p_of_fraction(x):
    """log(1 + x) for x within [0, 1], right to 2e-14 relative: 2 atanh(x / (2 + x))."""
    ratio = x * reciprocal(2.0 + x)
    square = ratio * ratio
    result = tl.full(x.shape, ATANH_TERMS[12], tl.float64)
    for k in tl.static_range(11, -1, -1):
        result = result * square + ATANH_TERMS[k]
    return 2.0 * ratio * result


@triton.jit
def log1p_of(x):
    """log(1 + x) for x >= 0, to float64: what rounding takes from 1 + x is added to first order."""
    whole = 1.0 + x
    return tl.log(whole) + (x - (whole - 1.0)) / whole


@triton.jit
def rounded_to(value, TYPE: tl.constexpr):
    """float64 values in a floating type, to the nearest. bfloat16 by hand: the interpreter would cut bits off."""
    if TYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, 0x7FC0)
        return nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif TYPE == tl.float16:
        return value.to(tl.float32).to(tl.float16)
    else:
        return value.to(TYPE)


@triton.jit
def row_and_class(start, lane, size, classes, inner, MAPS: tl.constexpr):
    """Row and class of the elements start + lane of `[outer, classes, inner]`; beyond the last element those of the last."""
    lane = tl.minimum(lane, size - 1 - start).to(tl.int32)
    # Only the first plane and row need a 64-bit division.
    if MAPS:
        first_plane = start // inner
        ahead = (start - first_plane * inner).to(inner.dtype) + lane
        plane = ahead // inner
        inside_plane = ahead - plane * inner
    else:
        first_plane = start
        plane = lane
    first_outer = first_plane // classes
    ahead = (first_plane - first_outer * classes).to(tl.int32) + plane
    row = first_outer + ahead // classes
    if MAPS:
        row = row * inner + inside_plane
    return row, ahead % classes
