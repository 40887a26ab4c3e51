"""Reads the arguments of the element-wise sigmoid losses: targets, weights, the class table, what divides.

Logits and what comes with them as losses/levels.py has it; README.md has what the operators take.
"""
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels.losses import levels as reading
from rsloss_kernels.losses.levels import Levels, read_values

REDUCTIONS = ("none", "mean", "sum")
FEW_ROWS = 16  # from which on a row of the class table costs nothing beside the elements of its class


def read_targets(
    levels: Levels,
    targets: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None,
    background: str,
    name: str = "targets",
) -> tuple[list[Tensor], list[Tensor]]:
    """As losses/levels.py has it; values too are checked under RSLOSS_DEBUG_CHECKS=1."""
    values, qualities = reading.read_targets(levels, targets, quality, background, name)
    _check_target_values(levels, name, values)
    return values, qualities


def _check_target_values(levels: Levels, name: str, values: list[Tensor]) -> None:
    if not _checks.debug_checks():
        return
    has_labels = not values[0].is_floating_point()
    for value in values:
        if has_labels and value.numel() and int(value.max()) > levels.num_classes:
            raise ValueError(
                f"{levels.function}: {name} must be class indices up to {levels.num_classes}, got {int(value.max())}"
            )
        if not has_labels and bool((value > 1).any()):
            raise ValueError(f"{levels.function}: {name} must be at most 1, got {float(value.max())}")


def read_weights(levels: Levels, weight: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if weight is None:
        return []
    values, _ = read_values(levels, "weight", reading.unexpanded(levels, weight), True, True)
    read = []
    for value in values:
        if not (value.dtype.is_floating_point or value.dtype.is_complex):
            value = value.to(torch.float32)
        _checks.check_floating(levels.function, "weight", value)
        read.append(value)
    return read


def read_reduction(
    levels: Levels, reduction: str, avg_factor: float | Tensor | None, loss_weight: float = 1.0, eps: float = 0.0, mean_over: int = 0
) -> tuple[Tensor | None, float]:
    """`normalizer` and `scale` of the operators. `eps` is added to `avg_factor`; `mean_over` is what "mean" divides by, 0: elements."""
    function = levels.function
    _checks.check_choice(function, "reduction", reduction, REDUCTIONS)
    if isinstance(avg_factor, Tensor):
        _checks.check_device(function, "avg_factor", avg_factor, levels.first)
        if avg_factor.numel() != 1 or avg_factor.dim() > 1 or avg_factor.is_complex():
            raise ValueError(f"{function}: avg_factor must be a number or a 0-d Tensor, got shape {list(avg_factor.shape)}")
        normalizer = avg_factor.detach().reshape(())
        if normalizer.dtype not in _checks.LOGIT_TYPES or eps:
            normalizer = normalizer.double() + eps
        return normalizer, loss_weight
    if avg_factor is not None:
        if not _checks.is_number(avg_factor):
            raise TypeError(f"{function}: avg_factor must be a number or a 0-d Tensor, got {type(avg_factor).__name__}")
        return _divided_by(avg_factor + eps, loss_weight, levels)
    if reduction == "mean":
        return _divided_by(max(mean_over or levels.numel, 1), loss_weight, levels)
    return None, loss_weight


def _divided_by(divisor: float, loss_weight: float, levels: Levels) -> tuple[Tensor | None, float]:
    if torch.compiler.is_compiling():
        # As a tensor, so that a graph serves every number.
        return torch.ones((), dtype=torch.float64, device=levels.first.device) * divisor, loss_weight
    return None, loss_weight / divisor if divisor else math.inf


def read_ignore_index(function: str, ignore_index: int | None) -> int | None:
    if ignore_index is None:
        return None
    ignore_index = _checks.read_int(function, "ignore_index", ignore_index, "an int or None")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{function}: ignore_index must be within 64 bits, got {ignore_index}")
    return ignore_index


def read_number(function: str, name: str, value: Any, least: float | None = 0.0) -> float:
    if not _checks.is_number(value):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    # NaN fails the comparisons.
    if not (-1e30 <= value <= 1e30) or (least is not None and value < least):
        at_least = "" if least is None else f" and at least {least:g}"
        raise ValueError(f"{function}: {name} must be finite{at_least}, got {value}")
    return float(value)


def read_class_vector(function: str, name: str, value: Tensor | Sequence[float], levels: Levels) -> Tensor:
    """float64 [C] on the device of the logits."""
    if not isinstance(value, Tensor):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{function}: {name} must be a Tensor or a list of numbers, got {type(value).__name__}")
        try:
            value = torch.tensor(value, dtype=torch.float64, device=levels.first.device)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{function}: {name} must be a Tensor or a list of numbers, got {value!r}") from error
    _checks.check_strided(function, name, value)
    _checks.check_device(function, name, value, levels.first)
    if value.is_complex():
        raise TypeError(f"{function}: {name} must be real, got {value.dtype}")
    _checks.check_shape(function, name, value, (levels.num_classes,), "one number per class")
    return as_double(value)


def as_double(value: Tensor) -> Tensor:
    value = value.detach() if value.requires_grad else value
    return value if value.dtype == torch.float64 else value.double()


class ClassTable(NamedTuple):
    """How elements are weighted and modulated by class: numbers, or float64 [C]."""

    gamma: float | Tensor
    positive: float | Tensor
    negative: float | Tensor
    class_weight: Tensor | Sequence[float] | None = None
    class_mask: Tensor | Sequence[bool] | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether all classes are alike."""
        return self.class_weight is None and self.class_mask is None and not any(isinstance(part, Tensor) for part in self[:3])

    def of(self, levels: Levels) -> Tensor:
        """float64 [3, C], the rows of the operators."""
        function, like, parts = levels.function, levels.logits[0], self[:3]
        if self.is_uniform:
            return table_of_numbers(levels.num_classes, parts, like)
        factor = like.new_ones(levels.num_classes, dtype=torch.float64)
        if self.class_weight is not None:
            factor = read_class_vector(function, "class_weight", self.class_weight, levels)
        if self.class_mask is not None:
            is_kept = read_class_vector(function, "class_mask", self.class_mask, levels) != 0
            factor = torch.where(is_kept, factor, 0.0)
        rows = [part if isinstance(part, Tensor) else torch.full_like(factor, part) for part in parts]
        return torch.stack([rows[0], rows[1] * factor, rows[2] * factor])


def has_few_rows(levels: Levels, targets: Any, weight: object) -> bool:
    """Whether a table of all classes would cost about as much as the elements, 1-D logits above all, and nothing belongs to rows."""
    first = levels.levels[0]
    if levels.is_list or first.order:
        return False
    # A graph serves any number of rows, 1-D logits apart.
    has_none = not torch.compiler.is_compiling() and levels.numel == 0
    if first.rows and not has_none and (torch.compiler.is_compiling() or levels.num_rows >= FEW_ROWS):
        return False
    per_element = [targets] if weight is None else [targets, weight]
    return all(isinstance(value, Tensor) and value.shape == first.given.shape for value in per_element) and targets.is_floating_point()


def table_of_numbers(num_classes: int, parts: tuple[Any, ...], like: Tensor) -> Tensor:
    """float64 [parts, C], the same for every class, kept from call to call where that is possible."""
    device = like.device
    # Tensors of a tracer, of a fake mode or of a CUDA graph in the making must not outlive it.
    is_lasting = not torch.compiler.is_compiling() and type(like) in (Tensor, torch.nn.Parameter)
    if is_lasting and like.is_cuda:
        is_lasting = not torch.cuda.is_current_stream_capturing()
    if not is_lasting:
        return _make_table(num_classes, parts, device)
    stream = torch.cuda.current_stream(device).cuda_stream if like.is_cuda else None
    return _cached_table(num_classes, parts, device, stream)


@functools.lru_cache(maxsize=64)
def _cached_table(num_classes: int, parts: tuple[float, ...], device: torch.device, stream: int | None) -> Tensor:
    with torch.inference_mode(False):
        return _make_table(num_classes, parts, device)


def _make_table(num_classes: int, parts: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.stack([torch.full((num_classes,), part, dtype=torch.float64, device=device) for part in parts])
