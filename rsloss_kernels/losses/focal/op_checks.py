"""Checks of the arguments of the element-wise operators, for the backends written in Python; the compiled ones check the same in C++."""
import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels.losses.focal.op import Modulator

LABEL_TYPES = (torch.int32, torch.int64)


def row_shape(level: Tensor, num_classes: int, maps: bool) -> tuple[int, ...]:
    """The shape of a level's labels: `[..., C]` less C, or `[B, A, *spatial]` of maps `[B, A C, *spatial]`."""
    if maps:
        return (level.shape[0], level.shape[1] // num_classes, *level.shape[2:])
    return tuple(level.shape[:-1])


def _check_number(op: str, name: str, values: list[Tensor], logits: list[Tensor]) -> None:
    if len(values) != len(logits):
        raise ValueError(f"{op}: {name} must hold as many tensors as logits, {len(logits)}, got {len(values)}")


def _check_level(op: str, level: Tensor, num_classes: int, maps: bool) -> None:
    if maps:
        is_right = level.dim() >= 2 and level.shape[1] % num_classes == 0
        wanted = f"shape [B, A C, *spatial] with the {num_classes} classes of class_table"
    else:
        is_right = level.dim() >= 1 and level.shape[-1] == num_classes
        wanted = f"the {num_classes} classes of class_table as last dimension"
    if not is_right:
        raise ValueError(f"{op}: logits must have {wanted}, got shape {list(level.shape)}")


def _check_levels(op, logits, targets, qualities, weights, class_table, normalizer, modulator, maps) -> None:
    if not logits:
        raise ValueError(f"{op}: logits must hold at least one tensor, got none")
    first = logits[0]
    _check_number(op, "targets", targets, logits)
    for name, values in (("qualities", qualities), ("weights", weights)):
        if values:
            _check_number(op, name, values, logits)
    _checks.check_placement(op, "class_table", class_table, first)
    _checks.check_dtype(op, "class_table", class_table, torch.float64)
    if class_table.dim() != 2 or class_table.shape[0] != 3 or class_table.shape[1] < 1:
        raise ValueError(f"{op}: class_table must have shape [3, C] with C at least 1, got {list(class_table.shape)}")
    if normalizer is not None:
        _checks.check_placement(op, "normalizer", normalizer, first)
        _checks.check_dtype(op, "normalizer", normalizer, *_checks.LOGIT_TYPES)
        _checks.check_shape(op, "normalizer", normalizer, (), "no dimensions")
    if modulator not in tuple(Modulator):
        raise ValueError(f"{op}: modulator must be within 0..{max(Modulator)}, got {modulator}")
    num_classes, has_labels = class_table.shape[1], not targets[0].is_floating_point()
    if qualities and not has_labels:
        raise ValueError(f"{op}: qualities must be empty with dense targets, got {len(qualities)}")
    for number, (level, target) in enumerate(zip(logits, targets, strict=True)):
        _checks.check_dtype(op, "logits", level, *_checks.LOGIT_TYPES)
        _checks.check_dtype(op, "logits", level, first.dtype)
        _checks.check_placement(op, "logits", level, first)
        _check_level(op, level, num_classes, maps)
        rows = row_shape(level, num_classes, maps)
        _checks.check_placement(op, "targets", target, first)
        _checks.check_dtype(op, "targets", target, *(LABEL_TYPES if has_labels else _checks.LOGIT_TYPES))
        if has_labels:
            _checks.check_shape(op, "targets", target, rows, "one class index per row")
        else:
            _checks.check_shape(op, "targets", target, level.shape, "the shape of logits")
        if qualities:
            _checks.check_placement(op, "qualities", qualities[number], first)
            _checks.check_dtype(op, "qualities", qualities[number], *_checks.LOGIT_TYPES)
            _checks.check_shape(op, "qualities", qualities[number], rows, "the shape of targets")
        if weights:
            weight = weights[number]
            _checks.check_placement(op, "weights", weight, first)
            _checks.check_dtype(op, "weights", weight, *_checks.LOGIT_TYPES)
            if weight.shape != rows:
                _checks.check_shape(op, "weights", weight, level.shape, f"one number per row, {list(rows)}, or the shape of logits")


def focal_forward(logits, targets, qualities, weights, class_table, normalizer, modulator, maps, *_) -> None:
    _check_levels("focal_forward", logits, targets, qualities, weights, class_table, normalizer, modulator, maps)


def focal_elements(logits, targets, qualities, weights, class_table, normalizer, modulator, maps, *_) -> None:
    _check_levels("focal_elements", logits, targets, qualities, weights, class_table, normalizer, modulator, maps)


def focal_backward(logits, targets, qualities, weights, class_table, normalizer, grads, modulator, maps, *_) -> None:
    op = "focal_backward"
    _check_levels(op, logits, targets, qualities, weights, class_table, normalizer, modulator, maps)
    for number, grad in enumerate(grads):
        _checks.check_placement(op, "grads", grad, logits[0])
        _checks.check_dtype(op, "grads", grad, *_checks.LOGIT_TYPES)
        if len(grads) > 1 or grad.dim() > 0:
            _check_number(op, "grads", grads, logits)
            _checks.check_shape(op, "grads", grad, logits[number].shape, "the shape of logits")
    if not grads:
        raise ValueError(f"{op}: grads must hold one tensor of no dimensions, or one per level, got none")
