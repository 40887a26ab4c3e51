"""Balanced group softmax in plain PyTorch, float64 inside, one group after the other.

Li et al., "Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced Group Softmax", CVPR 2020. README.md beside
this file has the forms used here and every tensor that passes between the operators.
"""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rsloss_kernels.losses.group_softmax.op_checks import class_of


def label_columns(labels: Tensor, class_columns: Tensor, background_first: bool) -> Tensor:
    """The column of each row's label, -1 for rows that are ignored; int64 [N]."""
    classes = class_of(labels, class_columns.numel() - 1, background_first)
    return torch.where(classes < 0, -1, class_columns.long()[classes.clamp(min=0)])


def group_softmax_sample(labels, class_columns, keys, starts, others, background_group, background_first, others_ratio) -> Tensor:
    columns = label_columns(labels, class_columns, background_first)
    is_used = labels >= 0
    weights = torch.empty((len(others), labels.numel()), dtype=torch.float32, device=labels.device)
    for group, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if group == background_group:
            weights[group] = is_used
            continue
        is_foreground = is_used & (columns >= start) & (columns < end)
        is_other = is_used & ~is_foreground
        count = int(is_foreground.sum())
        wanted = count * others_ratio if count else 0.0
        num_others = int(is_other.sum())
        if wanted >= num_others:
            is_kept = is_other if count else torch.zeros_like(is_other)
        else:
            rank = torch.empty_like(columns)
            # What is no other comes last; NaN before it, after all numbers.
            key = torch.zeros_like(labels, dtype=torch.float32) if keys is None else keys[group]
            order = torch.argsort(torch.where(key.isnan(), math.inf, key).double(), stable=True)
            order = order[torch.argsort(key.isnan()[order].int(), stable=True)]
            order = order[torch.argsort((~is_other)[order].int(), stable=True)]
            rank[order] = torch.arange(columns.numel(), device=columns.device)
            is_kept = is_other & (rank < math.floor(wanted))
        weights[group] = is_foreground | is_kept
    return weights


class Pairs(NamedTuple):
    """The pairs of one group that count, and how they read their logits."""

    columns: slice
    rows: Tensor  # int64 [P]
    weights: Tensor  # float64 [P]
    logits: Tensor  # float64 [P, columns of the group, and one for others without a column]
    target: Tensor  # int64 [P], within `logits`
    largest: Tensor  # int64 [P], within `logits`: one of the largest
    is_broken: Tensor  # bool [P]


def _pairs(logits, labels, class_columns, weights, starts, others, background_first) -> Iterator[Pairs]:
    columns = label_columns(labels, class_columns, background_first)
    for group, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        rows = ((weights[group] != 0) & (labels >= 0)).nonzero().flatten()
        values = logits[rows, start:end].double()
        if others[group] == -1:
            values = torch.nn.functional.pad(values, (0, 1))
        other = end - start if others[group] == -1 else others[group] - start
        column = columns[rows]
        target = torch.where((column >= start) & (column < end), column - start, other)
        at_target = values.gather(1, target[:, None])[:, 0]
        is_broken = (values.isnan() | (values == math.inf)).any(-1) | (at_target == -math.inf)
        values = torch.where(is_broken[:, None], 0.0, values)
        largest = values.argmax(-1)
        yield Pairs(slice(start, end), rows, weights[group, rows].double(), values, target, largest, is_broken)


def _terms(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`m`, `r`, `m - z_t` and `q` of each pair."""
    row = torch.arange(len(pairs.rows), device=pairs.rows.device)
    top = pairs.logits[row, pairs.largest]
    exponentials = torch.exp(pairs.logits - top[:, None])
    exponentials[row, pairs.largest] = 0.0
    rest = exponentials.sum(-1)
    gap = top - pairs.logits[row, pairs.target]
    is_largest = pairs.target == pairs.largest
    complement = torch.where(is_largest, rest, (1 + rest) - exponentials[row, pairs.target]) / (1 + rest)
    return top, rest, gap, complement


def _where_sound(pairs: Pairs, value: Tensor) -> Tensor:
    return torch.where(pairs.is_broken, math.nan, value)


def group_softmax_forward(
    logits, labels, class_columns, weights, starts, others, background_first
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = logits.new_zeros((len(others),), dtype=torch.float64)
    averages = torch.ones_like(losses)
    row_tables = logits.new_zeros((3, len(others), logits.shape[0]), dtype=wide)
    for group, pairs in enumerate(_pairs(logits, labels, class_columns, weights, starts, others, background_first)):
        top, rest, gap, complement = _terms(pairs)
        cross_entropy = _where_sound(pairs, gap + torch.log1p(rest))
        total = pairs.weights.sum()
        averages[group] = torch.where(total <= 1, 1.0, total)
        losses[group] = (pairs.weights * cross_entropy).sum() / averages[group]
        for table, value in zip(row_tables, (top, 1 / (1 + rest), complement), strict=True):
            table[group, pairs.rows] = _where_sound(pairs, value).to(wide)
    return losses.to(wide), averages, row_tables


def group_softmax_backward(
    logits, labels, class_columns, weights, averages, row_tables, grad_losses, starts, others, background_first
) -> Tensor:
    gradient = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for group, pairs in enumerate(_pairs(logits, labels, class_columns, weights, starts, others, background_first)):
        top, rest, _, complement = _terms(pairs)
        slopes = torch.exp(pairs.logits - top[:, None]) / (1 + rest[:, None])
        slopes.scatter_(1, pairs.target[:, None], -complement[:, None])
        slopes = slopes * (pairs.weights / averages[group] * grad_losses[group].double())[:, None]
        slopes = torch.where(pairs.is_broken[:, None], math.nan, slopes)
        gradient[pairs.rows, pairs.columns] = slopes[:, : pairs.columns.stop - pairs.columns.start]
    return gradient.to(logits.dtype)


def group_softmax_scores(logits, class_columns, starts, others, background_group, background_first) -> Tensor:
    # A column of no group: a score of 0.
    probabilities = torch.zeros((logits.shape[0], starts[-1] + 1), dtype=torch.float64, device=logits.device)
    foreground = None
    for group, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        values = logits[:, start:end].double()
        if others[group] == -1:
            values = torch.nn.functional.pad(values, (0, 1))
        probability = torch.softmax(values, -1)
        probabilities[:, start:end] = probability[:, : end - start]
        if group == background_group:
            foreground = probability[:, others[group] - start if others[group] != -1 else end - start]
    columns = class_columns.long()
    columns = torch.where((columns >= 0) & (columns < starts[-1]), columns, starts[-1])
    scores = probabilities[:, columns]
    scores[:, :-1] *= foreground[:, None]
    if background_first:
        scores = scores.roll(1, -1)
    return scores.to(logits.dtype)
