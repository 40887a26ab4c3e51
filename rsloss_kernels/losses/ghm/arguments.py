"""Arguments of the GHM losses: checks, and the one form that operators take."""
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rsloss_kernels import _backends, _checks, distributed
from rsloss_kernels.losses import levels as reading
from rsloss_kernels.losses.ghm import op_checks
from rsloss_kernels.losses.levels import Levels

if TYPE_CHECKING:
    import torch.distributed as dist

EMPTY_BINS = ("skip", "count")


class Request(NamedTuple):
    """The checked arguments of a GHM loss, in the form that the operators take."""

    function: str
    levels: Levels | None  # what predictions are; None: one tensor
    preds: list[Tensor]
    targets: list[Tensor]  # one per level
    weights: list[Tensor]  # empty, or one per level
    bins: int
    mu: float | None
    is_background_first: bool
    momentum: float
    count_empty_bins: bool
    group: "dist.ProcessGroup | None"
    backend: str

    @property
    def elements(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What every operator takes, without gradients."""
        return [pred.detach() for pred in self.preds], self.targets, self.weights


def read_arguments(
    function: str,
    pred_name: str,
    pred: Any,
    target: Any,
    weight: Any,
    bins: int,
    mu: float | None,
    momentum: float,
    empty_bins: str,
    background: str,
    process_group: object | None,
    layout: str = "rows",
    num_classes: int | None = None,
    operator: str = "ghm_forward",
) -> Request:
    check_options(function, bins, mu, momentum, empty_bins, background)
    has_lists = any(isinstance(value, (list, tuple)) for value in (pred, target, weight))
    if mu is None and (has_lists or layout != "rows" or num_classes is not None or not isinstance(target, Tensor)):
        levels = reading.read_levels(function, pred, layout, num_classes)
        preds = levels.logits
        targets, weights = _read_targets_of_levels(levels, target, background), _read_weights_of_levels(levels, weight)
        if levels.num_classes == 1 and not targets[0].is_floating_point():
            # Or labels in the shape of the logits would be one-hot by mistake.
            preds = [pred.view(*target.shape, 1) for pred, target in zip(preds, targets, strict=True)]
    else:
        _checks.check_tensor(function, pred_name, pred)
        _checks.check_floating(function, pred_name, pred)
        levels, preds = None, [_checks.contiguous(pred)]
        targets = [_read_target(function, pred_name, pred, target, mu, background)]
        weights = [] if weight is None else [_read_weight(function, pred_name, pred, weight, mu)]
    group = None if process_group is None else distributed.resolve_group(function, process_group)
    return Request(
        function,
        levels,
        preds,
        targets,
        weights,
        int(bins),
        None if mu is None else float(mu),
        background == "first",
        float(momentum),
        empty_bins == "count",
        group,
        _backends.resolve(operator, preds[0].device.type),
    )


def check_options(function: str, bins: int, mu: float | None, momentum: float, empty_bins: str, background: str) -> None:
    op_checks.check_bins(function, bins)
    op_checks.check_momentum(function, momentum)
    if mu is not None:
        op_checks.check_mu(function, mu)
    _checks.check_choice(function, "empty_bins", empty_bins, EMPTY_BINS)
    _checks.check_choice(function, "background", background, ("last", "first"))


def _read_target(function: str, pred_name: str, pred: Tensor, target: Tensor, mu: float | None, background: str) -> Tensor:
    """Class indices as int32 or int64, or a dense target in a floating dtype; detached."""
    _checks.check_tensor(function, "target", target)
    _check_device(function, "target", target, pred_name, pred)
    if target.shape != pred.shape:
        if mu is None and _checks.is_index_form(target, pred):
            labels = _checks.as_labels(function, target, "target").contiguous()
            _check_values(function, labels, pred.shape[-1])
            return labels
        if mu is None and pred.dim() > 0 and target.shape == pred.shape[:-1]:
            wanted = f"integers where it has the shape of {pred_name} less its last dimension (class indices)"
            raise TypeError(f"{function}: target must be {wanted}, got {target.dtype}")
        forms = " (dense), or be integers with that shape less its last dimension (class indices)" if mu is None else ""
        _checks.check_shape(function, "target", target, pred.shape, f"the shape of {pred_name}{forms}")
    if target.dtype.is_complex:
        raise TypeError(f"{function}: target must be real, got {target.dtype}")
    if not target.dtype.is_floating_point:
        # Zeros and ones need no more; box offsets may be large.
        target = target.to(torch.float32 if mu is None else torch.float64)
    _checks.check_floating(function, "target", target)
    if mu is None:
        _check_values(function, target, 1)
    return _checks.plain(target)


def _check_values(function: str, target: Tensor, num_classes: int) -> None:
    """Of targets as read, for GHM-C."""
    if not _checks.debug_checks() or not target.numel():
        return
    if target.is_floating_point() and bool(((target < 0) | (target > 1)).any()):
        raise ValueError(f"{function}: target must be within [0, 1], got [{float(target.min())}, {float(target.max())}]")
    if not target.is_floating_point() and int(target.max()) > num_classes:
        raise ValueError(f"{function}: target must be class indices up to {num_classes}, got {int(target.max())}")


def _read_targets_of_levels(levels: Levels, target: Tensor | Sequence[Tensor], background: str) -> list[Tensor]:
    targets, _ = reading.read_targets(levels, target, None, background, "target")
    for value in targets:
        _check_values(levels.function, value, levels.num_classes)
    return targets


def _read_weights_of_levels(levels: Levels, weight: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    if weight is None:
        return []
    values, _ = reading.read_values(levels, "weight", reading.unexpanded(levels, weight), True, True)
    return [_as_weight(levels.function, value) for value in values]


def _read_weight(function: str, pred_name: str, pred: Tensor, weight: Tensor, mu: float | None) -> Tensor:
    _checks.check_tensor(function, "weight", weight)
    _check_device(function, "weight", weight, pred_name, pred)
    weight = _as_weight(function, weight)
    if weight.shape == pred.shape:
        if mu is None and weight.dim() > 0 and weight.shape[-1] > 1 and weight.stride(-1) == 0:
            # Expanded weights of rows: a copy would have one number per element.
            weight = weight[..., 0]
    elif mu is not None or pred.dim() == 0 or weight.shape != pred.shape[:-1]:
        less = " (or that less its last dimension)" if mu is None else ""
        _checks.check_shape(function, "weight", weight, pred.shape, f"the shape of {pred_name}{less}")
    return _checks.plain(weight)


def _as_weight(function: str, weight: Tensor) -> Tensor:
    if not (weight.dtype.is_floating_point or weight.dtype.is_complex):
        # Whether it is above 0 is all that matters, and an infinity tells that too.
        weight = weight.to(torch.float16)
    if weight.dtype not in _checks.LOGIT_TYPES:
        raise TypeError(f"{function}: weight must be float16, bfloat16, float32, float64, integers or bool, got {weight.dtype}")
    return weight


def _check_device(function: str, name: str, value: Tensor, pred_name: str, pred: Tensor) -> None:
    if value.device != pred.device:
        raise ValueError(f"{function}: {name} must be on the device of {pred_name}, {pred.device}, got {value.device}")


def read_state(request: Request, acc_sum: Tensor | None, num_updates: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if acc_sum is None and num_updates is None and request.momentum == 0:
        return None, None
    for name, value in (("acc_sum", acc_sum), ("num_updates", num_updates)):
        if value is not None:
            _checks.check_tensor(request.function, name, value)
    op_checks.check_state(request.function, acc_sum, num_updates, request.preds[0], request.bins, request.momentum)
    return acc_sum if acc_sum is None else _checks.plain(acc_sum), num_updates if num_updates is None else _checks.plain(num_updates)
