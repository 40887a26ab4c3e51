"""Checks of arguments of ranking losses that read the data, on under RSLOSS_DEBUG_CHECKS=1 only."""
import torch
from torch import Tensor


def check_values(
    function: str,
    num_classes: int,
    targets: list[Tensor],
    quality: list[Tensor],
    is_positive: list[Tensor],
    ids: Tensor | None,
    num_segments: int,
    capacity: int | None,
) -> None:
    """One tensor per level. `quality`: empty, or what must be within [0, 1]; `ids`, `num_segments`: as the operators take them."""
    values, found = joined(targets), joined(is_positive)
    highest = values.max().item() if values.numel() else 0
    if values.is_floating_point():
        positives = int(found.sum())
        if 2 * positives > values.numel():
            raise ValueError(
                f"{function}: targets must be positive for at most half of the elements (label smoothing is not supported: any "
                f"target above 0 is a positive), got {positives} of {values.numel()}"
            )
        if positives and not highest <= 1:
            raise ValueError(f"{function}: targets must be at most 1, got {highest}")
    elif highest > num_classes:
        raise ValueError(f"{function}: targets must be class indices up to {num_classes}, got {highest}")
    if ids is not None and ids.shape[1] == 1:
        by_row = found.view(ids.shape[0], found.numel() // max(ids.shape[0], 1))
        found = (by_row & (ids >= 0) & (ids < num_segments)).flatten()
    value = joined(quality)[found] if quality else found[:0]
    if value.numel() and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{function}: quality must be within [0, 1] where there is a positive, got [{float(value.min())}, {float(value.max())}]"
        )
    if capacity is not None and int(found.sum()) > capacity:
        raise RuntimeError(
            f"{function}: max_positives must be at least the number of positives, {int(found.sum())}, got {capacity}"
        )


def joined(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])
