"""What the public functions of all ranking losses do before their own last step: check, read the targets, collect and bin."""
from typing import NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, _library

DENSE_CAPACITY = 16384


class Ranked(NamedTuple):
    """The state between the shared operators and a loss's finalize; the tensors are described in README.md beside this file."""

    logits: list[Tensor]
    negatives: Tensor
    ranked: Tensor
    counts: Tensor
    bins: Tensor
    delta: float
    backend: str


def rank_positives(
    function: str,
    finalize: str,
    logits: Tensor,
    targets: Tensor,
    quality: Tensor | None,
    *,
    delta: float,
    background: str,
    segments: Tensor | int | str | None,
    num_segments: int | None,
    max_positives: int | None,
    process_group: object | None,
) -> Ranked:
    """Checks the arguments of the loss `function` and runs the collect and bin operators on its backend."""
    _checks.check_logits(function, logits)
    _checks.check_tensor(function, "targets", targets)
    delta = _checks.check_delta(function, delta)
    _checks.check_choice(function, "background", background, ("last", "first"))
    if segments is not None or num_segments is not None:
        raise NotImplementedError(f"{function}: segments must be None in this version, got {segments!r}")
    if process_group is not None:
        raise NotImplementedError(f"{function}: process_group must be None in this version, got {process_group!r}")
    if max_positives is not None and (isinstance(max_positives, bool) or not isinstance(max_positives, int) or max_positives < 1):
        raise ValueError(f"{function}: max_positives must be None or an int of at least 1, got {max_positives!r}")
    targets, quality = read_targets(function, logits, targets, quality)
    backend = _backends.resolve(finalize, logits.device.type)

    level = logits.contiguous()
    data = [level.detach()]
    capacity = capacity_of(logits, targets, max_positives)
    if _checks.debug_checks():
        check_values(function, logits, targets, quality, background, max_positives if capacity is None else capacity)
    with torch.no_grad():
        positives, negatives, counts = _library.operator("ranking_collect", backend)(
            data, [targets], quality, None, 1, capacity, background == "first"
        )
        ranked, bins = _library.operator("ranking_bin", backend)(data, negatives, positives, counts, None, 1, delta)
    return Ranked([level], negatives, ranked, counts, bins, delta, backend)


def read_targets(
    function: str, logits: Tensor, targets: Tensor, quality: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Class indices as int32/int64, or dense targets in a floating dtype; and the list of qualities, empty if there are none."""
    _checks.check_strided(function, "targets", targets)
    _checks.check_device(function, "targets", targets, logits)
    if _checks.is_index_form(targets, logits):
        targets = _checks.as_labels(function, targets)
        if quality is None:
            return targets.contiguous(), []
        _checks.check_tensor(function, "quality", quality)
        _checks.check_floating(function, "quality", quality)
        _checks.check_strided(function, "quality", quality)
        _checks.check_device(function, "quality", quality, logits)
        _checks.check_shape(function, "quality", quality, targets.shape, "the shape of targets")
        return targets.contiguous(), [quality.detach().contiguous()]
    _checks.check_shape(
        function,
        "targets",
        targets,
        logits.shape,
        "the shape of logits (dense), or be integers with that shape less its last dimension (class indices)",
    )
    if quality is not None:
        raise ValueError(f"{function}: quality must be None with dense targets (they hold it already), got a Tensor")
    if targets.is_complex():
        raise TypeError(f"{function}: targets must be real, got {targets.dtype}")
    dense = targets if targets.is_floating_point() else targets.to(torch.float32)
    _checks.check_floating(function, "targets", dense)
    return dense.detach().contiguous(), []


def capacity_of(logits: Tensor, targets: Tensor, max_positives: int | None) -> int | None:
    """Slots for positives. None on a CPU outside of tracing: exactly as many as there are."""
    is_cpu = logits.device.type == "cpu"
    if is_cpu and not torch.compiler.is_compiling():
        return None
    if max_positives is not None:
        return max_positives
    is_index_form = not targets.is_floating_point()
    most = targets.numel() if is_index_form else logits.numel()
    if is_cpu:
        return most
    return most if is_index_form else min(most, DENSE_CAPACITY)


def check_values(
    function: str, logits: Tensor, targets: Tensor, quality: list[Tensor], background: str, capacity: int | None
) -> None:
    """Checks that read the data, on under RSLOSS_DEBUG_CHECKS=1 only."""
    if targets.is_floating_point():
        positives = int((targets > 0).sum())
        if 2 * positives > targets.numel():
            raise ValueError(
                f"{function}: targets must be positive for at most half of the elements (label smoothing is not supported: any "
                f"target above 0 is a positive), got {positives} of {targets.numel()}"
            )
        if positives and not float(targets.max()) <= 1:
            raise ValueError(f"{function}: targets must be at most 1, got {float(targets.max())}")
    else:
        classes = logits.shape[-1]
        positives = int(((targets >= (background == "first")) & (targets < classes + (background == "first"))).sum())
        if targets.numel() and int(targets.max()) > classes:
            raise ValueError(f"{function}: targets must be class indices up to {classes}, got {int(targets.max())}")
        for value in quality:
            if value.numel() and not bool(((value >= 0) & (value <= 1)).all()):
                raise ValueError(
                    f"{function}: quality must be within [0, 1], got [{float(value.min())}, {float(value.max())}]"
                )
    if capacity is not None and positives > capacity:
        raise RuntimeError(f"{function}: max_positives must be at least the number of positives, {positives}, got {capacity}")
