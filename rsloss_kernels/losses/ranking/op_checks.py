"""Checks of the arguments of the ranking operators, for the backends written in Python.

The compiled backends check the same in C++.  The functions named after an operator take its arguments. The public functions
hand over good arguments; these keep a direct call through torch.ops from reading or writing out of bounds.
"""
import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels.losses.ranking.op import COUNT_ENTRIES, GRADIENT_ROWS, LINE_ROWS, MOST_POSITIVES, RECORD_ROWS, mask_bytes


def check_placement(op: str, name: str, value: Tensor, logits: list[Tensor]) -> None:
    _checks.check_placement(op, name, value, logits[0])


def check_levels(op: str, logits: list[Tensor], segments: Tensor | None, num_segments: int) -> None:
    if not logits:
        raise ValueError(f"{op}: logits must hold at least one tensor, got none")
    for level in logits:
        _checks.check_logits(op, level)
        _checks.check_dtype(op, "logits", level, logits[0].dtype)
        check_placement(op, "logits", level, logits)
    check_segments(op, logits, segments, num_segments)


def check_segments(op: str, logits: list[Tensor], segments: Tensor | None, num_segments: int) -> None:
    if num_segments < 1:
        raise ValueError(f"{op}: num_segments must be at least 1, got {num_segments}")
    sizes = [level.numel() for level in logits]
    if segments is None:
        for size in sizes:
            if size % num_segments:
                raise ValueError(f"{op}: num_segments must divide the elements of every tensor of logits, {size}, got {num_segments}")
        return
    check_placement(op, "segments", segments, logits)
    _checks.check_dtype(op, "segments", segments, torch.int32)
    if segments.dim() != 2 or 1 not in segments.shape:
        raise ValueError(f"{op}: segments must have shape [rows, 1] or [1, columns], got {list(segments.shape)}")
    rows, columns = segments.shape
    # Ids per row: every row has the same number of elements. Ids per column: every tensor holds whole rows.
    whole = [sum(sizes)] if columns == 1 else sizes
    pieces = rows if columns == 1 else columns
    if any(size % pieces if pieces else size for size in whole):
        raise ValueError(f"{op}: segments must cut logits of {whole} elements into whole rows, got shape {list(segments.shape)}")


def check_matches_levels(op: str, name: str, values: list[Tensor], logits: list[Tensor]) -> None:
    if len(values) != len(logits):
        raise ValueError(f"{op}: {name} must hold as many tensors as logits, {len(logits)}, got {len(values)}")
    for value in values:
        check_placement(op, name, value, logits)


def check_table(op: str, name: str, table: Tensor, logits: list[Tensor], dtype: torch.dtype, rows: int, columns: int | None) -> None:
    check_placement(op, name, table, logits)
    _checks.check_dtype(op, name, table, dtype)
    if table.dim() != 2 or table.shape[0] != rows or columns not in (None, table.shape[1]):
        wanted = f"[{rows}, {'any' if columns is None else columns}]"
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(table.shape)}")


def check_mask_and_counts(op: str, negatives: Tensor, counts: Tensor, logits: list[Tensor]) -> None:
    for name, value, dtype, size in (
        ("negatives", negatives, torch.uint8, mask_bytes(logits)),
        ("counts", counts, torch.int64, COUNT_ENTRIES),
    ):
        check_placement(op, name, value, logits)
        _checks.check_dtype(op, name, value, dtype)
        _checks.check_shape(op, name, value, (size,), "shape")


def check_map_labels(op: str, level: Tensor, labels: Tensor) -> None:
    """[B, A, *spatial] for [B, A * C, *spatial]."""
    is_map = level.dim() >= 2 and labels.dim() == level.dim()
    rest = [dim for dim in range(level.dim()) if dim != 1]
    if is_map and all(labels.shape[dim] == level.shape[dim] for dim in rest):
        channels, anchors = level.shape[1], labels.shape[1]
        is_map = channels == 0 if anchors == 0 else channels % anchors == 0
    else:
        is_map = False
    if not is_map:
        raise ValueError(
            f"{op}: targets must have shape [B, A, *spatial] for maps [B, A * C, *spatial] of logits, {list(level.shape)}, got "
            f"{list(labels.shape)}"
        )


def ranking_collect(logits, targets, quality, segments, num_segments, max_positives, maps, background_first) -> None:
    op = "ranking_collect"
    check_levels(op, logits, segments, num_segments)
    check_matches_levels(op, "targets", targets, logits)
    if quality:
        check_matches_levels(op, "quality", quality, logits)
    for number, (level, target) in enumerate(zip(logits, targets, strict=True)):
        _checks.check_dtype(op, "targets", target, *_checks.LOGIT_TYPES, torch.int32, torch.int64)
        is_index_form = not target.is_floating_point()
        if is_index_form and maps:
            check_map_labels(op, level, target)
        else:
            if is_index_form and level.dim() == 0:
                raise ValueError(f"{op}: logits must have a last dimension of classes for class indices, got shape []")
            wanted = level.shape[:-1] if is_index_form else level.shape
            _checks.check_shape(op, "targets", target, wanted, "the shape of logits (class indices: less the last dimension)")
        if quality:
            if not is_index_form:
                raise ValueError(f"{op}: quality must be empty with dense targets, got {len(quality)} tensors")
            _checks.check_dtype(op, "quality", quality[number], *_checks.LOGIT_TYPES)
            _checks.check_shape(op, "quality", quality[number], target.shape, "the shape of targets")
    if max_positives is not None and not 0 <= max_positives < MOST_POSITIVES:
        raise ValueError(f"{op}: max_positives must be None or at least 0 and below 2^29, got {max_positives}")


def ranking_bin(logits, negatives, positives, counts, segments, num_segments, delta) -> None:
    op = "ranking_bin"
    check_levels(op, logits, segments, num_segments)
    check_mask_and_counts(op, negatives, counts, logits)
    check_table(op, "positives", positives, logits, torch.float64, RECORD_ROWS, None)
    _checks.check_delta(op, delta)


def check_finalize(op, logits, negatives, ranked, counts, bins, segments, num_segments, delta) -> None:
    """What the last operator of every ranking loss takes from the shared ones."""
    check_levels(op, logits, segments, num_segments)
    check_mask_and_counts(op, negatives, counts, logits)
    check_table(op, "ranked", ranked, logits, torch.float64, RECORD_ROWS, None)
    check_table(op, "bins", bins, logits, torch.int64, 2, 2 * ranked.shape[1] + 1)
    _checks.check_delta(op, delta)


def ranking_backward(logits, negatives, gradients, lines, counts, segments, num_segments, grad_first, grad_second) -> None:
    op = "ranking_backward"
    check_levels(op, logits, segments, num_segments)
    check_mask_and_counts(op, negatives, counts, logits)
    check_table(op, "gradients", gradients, logits, torch.float64, GRADIENT_ROWS, None)
    check_table(op, "lines", lines, logits, torch.float64, LINE_ROWS, 2 * gradients.shape[1])
    for name, grad in (("grad_first", grad_first), ("grad_second", grad_second)):
        if grad is not None:
            check_placement(op, name, grad, logits)
            _checks.check_dtype(op, name, grad, *_checks.LOGIT_TYPES)
            _checks.check_shape(op, name, grad, (), "shape")
