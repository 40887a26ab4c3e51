"""What the Triton kernels of all families share: launching, the size of a block, numbers as arguments, functions in float64, rounding."""
import math
import struct
import threading
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def fitting_block(blocks: dict[str, int], size: int, device: torch.device) -> int:
    """The block of the device; on a CPU no larger than the work."""
    block = blocks[device.type]
    return block if device.type == "cuda" else min(block, max(64, triton.next_power_of_2(size)))


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
