"""Checks of arguments that many losses share. Every message names the function, the argument, what was wanted and what was got."""
import numbers
import os
from typing import Any

import torch
from torch import Tensor

LOGIT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What `os.environ` keeps its variables in: asking itself for one that is not set encodes, raises and catches twice, which a small
# loss feels.
_ENVIRONMENT, _DEBUG_CHECKS, _ON = os.environ, "RSLOSS_DEBUG_CHECKS", "1"
if hasattr(os.environ, "_data"):
    _ENVIRONMENT, _DEBUG_CHECKS, _ON = os.environ._data, os.environ.encodekey(_DEBUG_CHECKS), os.environ.encodevalue(_ON)


def debug_checks() -> bool:
    """Whether checks that read values of the tensors (and so wait for the device) are on."""
    return not torch.compiler.is_compiling() and _ENVIRONMENT.get(_DEBUG_CHECKS) == _ON


def check_tensor(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor, got {type(value).__name__}")
    check_strided(function, name, value)


def check_logits(function: str, logits: Tensor) -> None:
    check_tensor(function, "logits", logits)
    if logits.dtype not in LOGIT_TYPES:
        raise TypeError(f"{function}: logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")


def check_device(function: str, name: str, value: Tensor, other: Tensor, other_name: str = "logits") -> None:
    if value.device != other.device:
        raise ValueError(f"{function}: {name} must be on the device of {other_name}, {other.device}, got {value.device}")


def check_shape(function: str, name: str, value: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    if value.shape != wanted:
        raise ValueError(
            f"{function}: {name} must have {meaning}, {list(wanted)}, got {list(value.shape)}"
        )


def check_dtype(function: str, name: str, value: Tensor, *wanted: torch.dtype) -> None:
    if value.dtype not in wanted:
        raise TypeError(f"{function}: {name} must be {' or '.join(map(str, wanted))}, got {value.dtype}")


def check_placement(function: str, name: str, value: Tensor, logits: Tensor) -> None:
    """Contiguous, on the device of `logits`: what operators take."""
    check_device(function, name, value, logits)
    if not value.is_contiguous():
        raise ValueError(f"{function}: {name} must be contiguous, got shape {list(value.shape)} with strides {value.stride()}")


def check_table(
    function: str, name: str, value: Tensor, logits: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype
) -> None:
    check_placement(function, name, value, logits)
    check_dtype(function, name, value, *dtypes)
    check_shape(function, name, value, shape, "shape")


def check_delta(function: str, delta: float) -> float:
    if isinstance(delta, (Tensor, bool)) or not isinstance(delta, (int, float)):
        raise TypeError(f"{function}: delta must be a float, got {type(delta).__name__}")
    # NaN fails both comparisons (and torch.compile cannot trace math.isnan).
    if not (delta == 0 or 1e-30 <= delta <= 1e30):
        raise ValueError(f"{function}: delta must be 0 or within [1e-30, 1e30], got {delta}")
    return float(delta)


def read_flag(function: str, name: str, value: Any) -> bool:
    """A bool, 0 or 1, or a bool of NumPy or a 0-d Tensor."""
    if value is True or value is False:
        return value
    # Not whatever has a truth, or "False" of a configuration would be true.
    is_one = getattr(value, "shape", ()) == () and not isinstance(value, (str, bytes))
    if not is_one or (value != 0 and value != 1):
        raise TypeError(f"{function}: {name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(function: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def is_index_form(targets: Tensor, logits: Tensor) -> bool:
    """Class indices iff the dtype is integral and the shape is that of logits without its last dimension."""
    is_integral = not targets.dtype.is_floating_point and not targets.dtype.is_complex and targets.dtype != torch.bool
    return is_integral and logits.dim() > 0 and targets.shape == logits.shape[:-1]


def as_labels(function: str, targets: Tensor, name: str = "targets") -> Tensor:
    """Class indices of any integral dtype as int32 or int64, so that no comparison or subtraction wraps around."""
    if targets.dtype in (torch.int32, torch.int64):
        return targets
    if targets.dtype == torch.uint64:
        raise TypeError(f"{function}: {name} must be class indices that int64 can hold, got torch.uint64")
    return targets.to(torch.int64 if targets.dtype == torch.uint32 else torch.int32)


def plain(value: Tensor) -> Tensor:
    """Contiguous and without a gradient."""
    return contiguous(value.detach() if value.requires_grad else value)


def contiguous(value: Tensor) -> Tensor:
    # A call of a method that changes nothing would still cost.
    return value if value.is_contiguous() else value.contiguous()


# Counts and sizes have at most as many bits as an index on a GPU.
LARGEST_COUNT = 2**31 - 1


def is_int(value: object) -> bool:
    """Whether it is an integer of Python or NumPy, to be kept as `int(value)`; no bool."""
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def read_int(function: str, name: str, value: Any, wanted: str = "an int") -> int:
    if not is_int(value):
        raise TypeError(f"{function}: {name} must be {wanted}, got {None if value is None else type(value).__name__}")
    return int(value)


def read_count(function: str, name: str, value: Any) -> int:
    count = read_int(function, name, value)
    if not 1 <= count <= LARGEST_COUNT:
        raise ValueError(f"{function}: {name} must be at least 1 and below 2^31, got {count}")
    return count


def is_number(value: object) -> bool:
    # The two first: an abstract class is slow to ask.
    return type(value) in (float, int) or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def check_floating(function: str, name: str, value: Tensor) -> None:
    if value.dtype not in LOGIT_TYPES:
        raise TypeError(f"{function}: {name} must have a floating dtype, float16, bfloat16, float32 or float64, got {value.dtype}")


def check_strided(function: str, name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        raise TypeError(f"{function}: {name} must be a strided tensor, got layout {value.layout}")
