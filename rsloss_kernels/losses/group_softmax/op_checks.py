"""Checks of the arguments of the group softmax operators, for the backends in Python; the compiled ones check the same in C++."""
import torch
from torch import Tensor

from rsloss_kernels import _checks

MOST_GROUPS = 64


def check_others_ratio(function: str, ratio: object) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{function}: others_ratio must be a number or None, got {type(ratio).__name__}")
    if not ratio >= 0:
        raise ValueError(f"{function}: others_ratio must be at least 0, got {ratio}")


def check_columns(function: str, name: str, logits: Tensor, groups) -> None:
    """The most common mistake is a classifier of C or C + 1 channels."""
    if logits.dim() != 2 or logits.shape[1] != groups.num_logits:
        raise ValueError(
            f"{function}: {name} must have shape [N, {groups.num_logits}], got {list(logits.shape)}: one column for each of the "
            f"{groups.num_classes} classes, one for the background, one for the others of each group, as ClassGroups lays them out "
            "(ClassGroups.num_logits channels; not C, not C + 1)"
        )


def class_of(labels: Tensor, num_classes: int, background_first: bool) -> Tensor:
    """The class of each row, `num_classes` for the background and labels beyond, -1 for rows that are ignored; int64 [N]."""
    labels = labels.long()
    classes = torch.where(labels == 0, num_classes, labels - 1) if background_first else labels
    return torch.where(labels < 0, -1, classes.clamp(max=num_classes))


def _check_groups(op: str, class_columns: Tensor, like: Tensor, starts: list[int], others: list[int]) -> None:
    groups = len(others)
    if not 1 <= groups <= MOST_GROUPS:
        raise ValueError(f"{op}: others must hold a column per group, 1..{MOST_GROUPS} of them, got {groups}")
    if len(starts) != groups + 1:
        raise ValueError(f"{op}: starts must hold {groups + 1} columns, one more than others, got {len(starts)}")
    if starts[0] != 0 or starts[-1] >= _checks.LARGEST_COUNT or any(starts[g] >= starts[g + 1] for g in range(groups)):
        raise ValueError(f"{op}: starts must ascend from 0 and stay below 2^31, got {list(starts)}")
    for group, column in enumerate(others):
        if column != -1 and not starts[group] <= column < starts[group + 1]:
            raise ValueError(f"{op}: others must be -1 or a column of its group, got {column} for group {group} of {list(starts)}")
    size = starts[-1] - sum(column != -1 for column in others)
    _checks.check_table(op, "class_columns", class_columns, like, (size,), torch.int32)


def _check_logits(op: str, logits: Tensor, starts: list[int]) -> None:
    _checks.check_dtype(op, "logits", logits, *_checks.LOGIT_TYPES)
    if logits.dim() != 2 or logits.shape[1] != starts[-1]:
        raise ValueError(f"{op}: logits must have shape [N, {starts[-1]}], the columns of all groups, got {list(logits.shape)}")
    _checks.check_placement(op, "logits", logits, logits)


def _check_background_group(op: str, background_group: int, others: list[int]) -> None:
    if not 0 <= background_group < len(others):
        raise ValueError(f"{op}: background_group must be within 0..{len(others) - 1}, got {background_group}")


def group_softmax_sample(labels, class_columns, keys, starts, others, background_group, background_first, others_ratio) -> None:
    op = "group_softmax_sample"
    _check_groups(op, class_columns, labels, starts, others)
    _check_background_group(op, background_group, others)
    check_others_ratio(op, others_ratio)
    if labels.dim() != 1:
        raise ValueError(f"{op}: labels must have shape [N], got {list(labels.shape)}")
    _checks.check_table(op, "labels", labels, labels, (labels.shape[0],), torch.int32, torch.int64)
    if keys is not None:
        _checks.check_table(op, "keys", keys, labels, (len(others), labels.shape[0]), torch.float32)
    elif 0 < others_ratio < float("inf"):
        raise ValueError(f"{op}: keys must be given for others_ratio {others_ratio}, got None")


def _check_rows(op: str, logits, labels, class_columns, weights, starts, others) -> None:
    _check_groups(op, class_columns, logits, starts, others)
    _check_logits(op, logits, starts)
    rows = logits.shape[0]
    _checks.check_table(op, "labels", labels, logits, (rows,), torch.int32, torch.int64)
    _checks.check_table(op, "weights", weights, logits, (len(others), rows), *_checks.LOGIT_TYPES)


def group_softmax_forward(logits, labels, class_columns, weights, starts, others, background_first) -> None:
    _check_rows("group_softmax_forward", logits, labels, class_columns, weights, starts, others)


def group_softmax_backward(
    logits, labels, class_columns, weights, averages, row_tables, grad_losses, starts, others, background_first
) -> None:
    op = "group_softmax_backward"
    _check_rows(op, logits, labels, class_columns, weights, starts, others)
    groups = len(others)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    _checks.check_table(op, "averages", averages, logits, (groups,), torch.float64)
    _checks.check_table(op, "row_tables", row_tables, logits, (3, groups, logits.shape[0]), wide)
    _checks.check_table(op, "grad_losses", grad_losses, logits, (groups,), *_checks.LOGIT_TYPES)


def group_softmax_scores(logits, class_columns, starts, others, background_group, background_first) -> None:
    op = "group_softmax_scores"
    _check_groups(op, class_columns, logits, starts, others)
    _check_background_group(op, background_group, others)
    _check_logits(op, logits, starts)
