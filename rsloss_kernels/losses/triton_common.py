"""What the Triton kernels of all families share: launching, the size of a block, numbers as arguments, rounding."""
import struct
import threading
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor


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
