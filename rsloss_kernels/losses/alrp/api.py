"""aLRP loss: the public functions and the module."""
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsloss_kernels import _checks, _library, distributed
from rsloss_kernels._state import weighted
from rsloss_kernels.losses.levels import Levels, index_in_rows
from rsloss_kernels.losses.ranking import api as ranking
from rsloss_kernels.losses.ranking.arguments import read_arguments
from rsloss_kernels.losses.ranking.op import count_elements


class ALRPLosses(NamedTuple):
    """The classification part of aLRP, and what `alrp_regression_loss` needs for the other part."""

    classification: Tensor
    rank: Tensor
    order: Tensor


def alrp_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    regression_losses: Tensor,
    *,
    delta: float = 1.0,
    background: str = "last",
    max_positives: int | None = None,
    process_group: object | None = None,
    average_gradients: bool = True,
    layout: str = "rows",
    num_classes: int | None = None,
) -> ALRPLosses:
    """Classification part of aLRP loss; its gradient ranks positives with a good box higher.

    Oksuz et al., "A Ranking-based, Balanced Loss Function Unifying Classification and Localisation in Object Detection", NeurIPS 2020.
    The gradient is the paper's identity update, not the derivative of the value: the regression losses are in the gradient of the
    logits though not in the value. Exact for every delta; at `delta = 0` ties count in full (the authors' code divides by zero).

    Args:
        logits: any shape, class logits; float16, bfloat16, float32 or float64. For class indices the last dimension is the C classes.
            Or levels of a head, see `layout`.
        targets: dense or class indices, as in `average_precision_loss`: dense values above 0 are positives, whatever the value.
        regression_losses: finite losses of the boxes in any floating dtype, detached. `[P]`: of the P positives in flat order. Or, with
            class indices, the shape of `targets`: of every row; those of rows without a positive are ignored and may hold anything.
            Another number of values than positives is an error on a CPU; where the positives are not counted on the host (a GPU,
            torch.compile) or other processes would wait (a process group), everything returned and the whole gradient is NaN.
        delta: half-width of the smoothed step in logit units, 0 (a hard step, ties count) or within [1e-30, 1e30].
        background: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        max_positives: as in `rank_sort_loss`, but the default for `[P]` is P.
        process_group, average_gradients: as in `rank_sort_loss`; the ranks are those among all processes.
        layout, num_classes: for a head's output as it is, as in `rank_sort_loss`. `regression_losses` is one tensor, over all levels: `[P]`
            in the flat order of the levels put together as rows, [B, K, C] (image, level, place, anchor, class); or the shape in which
            one tensor would hold the class indices, [B, K].

    Returns:
        `(classification, rank, order)`. `classification` is 0-d, float64 for float64 logits, else float32; without positives an exact
        zero, connected to the graph. `rank` (float64: the smoothed rank of the positive among all elements, itself counted as one) and
        `order` (int64) have the shape of `regression_losses` and no gradient. `[P]`: `order` lists the places of the positives by
        ascending logit (ties: regression loss, then place). Per row: `rank` is 0 on rows without a positive, and `order` lists those
        rows first, then the positives in the same way; it counts rows of the flattened shape. With a process group `order` is that
        of this process.

    NaN and infinity: as in `rank_sort_loss`; a regression loss that is not finite makes its positive an invalid one: `classification`,
    its own `rank` and its own gradient are NaN. Do not edit `logits` in place before backward.

    Raises:
        TypeError, ValueError: as `rank_sort_loss`.
        RuntimeError: as `rank_sort_loss`; another number of regression losses than of positives, see there.
    """
    function = "alrp_loss"
    _checks.check_tensor(function, "regression_losses", regression_losses)
    _checks.check_floating(function, "regression_losses", regression_losses)
    request = read_arguments(
        function,
        "alrp_finalize",
        logits,
        targets,
        delta=delta,
        background=background,
        max_positives=max_positives,
        process_group=process_group,
        average_gradients=average_gradients,
        layout=layout,
        num_classes=num_classes,
        regression_losses=regression_losses,
    )
    regression_losses, levels = regression_losses.detach(), request.levels
    is_per_row = bool(request.quality)
    # Without a capacity the tables have been made to measure: the number of positives is on the host, and there is no padding.
    is_to_measure = request.capacity is None
    if is_to_measure and levels is None and request.backend in _library.implemented_by("alrp_forward"):
        losses = request.quality[0] if is_per_row else _checks.contiguous(regression_losses)
        return ALRPLosses(
            *_library.differentiable(
                "alrp_forward",
                request.backend,
                request.logits,
                request.targets,
                losses,
                is_per_row,
                request.is_background_first,
                request.delta,
            )
        )
    if is_per_row:
        edit_records = None
    elif is_to_measure:
        edit_records = functools.partial(_take_regression_losses, regression_losses, levels)
    else:
        edit_records = functools.partial(_put_regression_losses, regression_losses, levels, _checks.debug_checks())
    state = ranking.rank_positives(request, edit_records)
    classification, rank = ranking.finish("alrp", state)
    if request.group is not None:
        rank = _strictly_falling(rank, state.ranked[0])
    if is_per_row:
        slot = _in_rows(levels, _index(state.ranked).long()) // max(request.logits[0].shape[-1] if levels is None else levels.num_classes, 1)
    else:
        slot = _place_of(state, levels, is_to_measure)
    size = regression_losses.numel()
    if is_to_measure:
        slot = slot if levels is None else _ascending_in_ties(state.ranked, slot, size)
        rank, order = _all_in_input_order(rank, slot, size)
    else:
        rank, order = _in_input_order(state, levels, rank, slot, size)
    return ALRPLosses(classification, rank.view(regression_losses.shape), order.view(regression_losses.shape))


def _check_count(losses: Tensor, positives: int) -> None:
    if positives != losses.numel():
        raise RuntimeError(f"alrp_loss: regression_losses must have one value per positive, {positives}, got {losses.numel()}")


def _take_regression_losses(
    losses: Tensor, levels: Levels | None, positives: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """`_put_regression_losses` for records without padding, in place: every operation on a few values delays a small loss."""
    _check_count(losses, positives.shape[1])
    logit, quality, _, index = positives.unbind()
    if levels is None:
        quality.copy_(losses)
    else:
        quality.scatter_(0, _in_rows(levels, index.long()).argsort(), losses.double())
    logit += quality - quality  # 0, or NaN where a regression loss is not finite
    return positives, counts


def _put_regression_losses(
    losses: Tensor, levels: Levels | None, is_checked: bool, positives: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Records whose quality is the regression loss; an overflow if there are not as many of these as positives.

    is_checked: raise instead, for which the host reads `counts`.
    """
    if is_checked:
        _check_count(losses, int(counts[0]))
    capacity = positives.shape[1]
    logit, _, segment, index = positives.unbind()
    losses_of_slots = pad(losses.double(), (0, capacity - losses.numel()))
    if levels is not None:
        losses_of_slots = losses_of_slots.scatter(0, _keys(index, levels).argsort(stable=True), losses_of_slots)
    logit = torch.where(losses_of_slots.isfinite(), logit, torch.nan)
    losses_of_slots = torch.where(index >= 0, losses_of_slots, 0.0)
    found, *rest = counts.unbind()
    found = torch.where(found == losses.numel(), found, capacity + 1)
    return torch.stack([logit, losses_of_slots, segment, index]), torch.stack([found, *rest])


def _strictly_falling(rank: Tensor, logit: Tensor) -> Tensor:
    """`rank` with the next larger number wherever rounding left two logits of the `ranked` one: it is the order among processes.

    From the highest logit down, in the integers that are ordered like positive float64: a count of the steps between logits that
    differ, and a running maximum of what exceeds it.
    """
    is_valid = logit.isfinite()
    bits = torch.where(is_valid, rank, 0.0).view(torch.int64)
    is_step = is_valid[1:] & (logit[1:] != logit[:-1])
    steps = pad(is_step.long().flip(0).cumsum(0).flip(0), (0, 1))  # [cap], above each
    lifted = (bits - steps).flip(0).cummax(0).values.flip(0) + steps
    return torch.where(is_valid, lifted.view(torch.float64), rank)


def _index(records: Tensor) -> Tensor:
    """Flat indices. Not `records[3]`: that makes the device current, which a fake tensor of a missing GPU cannot."""
    return records.select(0, 3)


def _in_rows(levels: Levels | None, index: Tensor) -> Tensor:
    """int64 indices in the logits put together as rows."""
    return index if levels is None else index_in_rows(levels, index)


def _keys(index: Tensor, levels: Levels | None) -> Tensor:
    """Of flat indices of `positives`: what ascends in the order in which the caller counts positives; padding comes last."""
    return torch.where(index >= 0, index if levels is None else index_in_rows(levels, index.long()).double(), torch.inf)


def _place_of(state: ranking.Ranked, levels: Levels | None, is_to_measure: bool) -> Tensor:
    """Place of every ranked record among the positives of this process, as the caller counts them."""
    keys, ranked = _index(state.positives), _index(state.ranked)
    if levels is not None or not is_to_measure:
        keys = _keys(keys, levels)
    if levels is not None:
        keys, ranked = keys.sort().values, _in_rows(levels, ranked.long()).double()
    return torch.searchsorted(keys, ranked.contiguous())


def _ascending_in_ties(ranked: Tensor, slot: Tensor, size: int) -> Tensor:
    """Slots up to `size` of `ranked`, ascending among records of equal logit and regression loss: these are ranked by the place of the
    logit in memory, which on maps is not the order of the caller, and nothing else tells them apart.
    """
    keys = ranked[:2]
    is_equal = (keys[:, 1:] == keys[:, :-1]) | (keys[:, 1:].isnan() & keys[:, :-1].isnan())
    first = pad((~is_equal.all(0)).long().cumsum(0), (1, 0)) * (size + 1)
    return (first + slot).sort().values - first


def _all_in_input_order(rank: Tensor, slot: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`_in_input_order` where all records are positives of this process, each in a slot of its own."""
    if slot.shape[0] == size:
        return torch.empty_like(rank).scatter_(0, slot, rank), slot
    is_free = torch.ones(size, dtype=torch.bool, device=slot.device).scatter_(0, slot, False)
    return rank.new_zeros(size).scatter_(0, slot, rank), torch.cat([is_free.nonzero().flatten(), slot])


def _in_input_order(
    state: ranking.Ranked, levels: Levels | None, rank: Tensor, slot: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Ranks by input slot, 0 where there is none, and the slots in ascending order of the ranked, those that have none first."""
    index = _index(state.ranked)
    is_own = (index >= 0) & (index < count_elements(state.logits))
    slot = torch.where(is_own, slot, size).clamp(max=size)
    if levels is not None:
        slot = _ascending_in_ties(state.ranked, slot, size)
    by_slot = rank.new_zeros(size + 1).scatter(0, slot, rank).narrow(0, 0, size)
    by_slot = torch.where(state.counts.select(0, 0) > state.ranked.shape[1], torch.nan, by_slot)
    place = torch.arange(slot.shape[0], device=slot.device)
    return by_slot, slot.new_full((size + 1,), -1).scatter(0, slot, place).narrow(0, 0, size).argsort(stable=True)


def alrp_regression_loss(
    regression_losses: Tensor,
    rank: Tensor,
    order: Tensor,
    *,
    process_group: object | None = None,
    average_gradients: bool = True,
) -> Tensor:
    """Regression part of aLRP loss: the mean over the positives, best score first, of (r_1 + ... + r_k) / rank_k.

    Linear in the regression losses: `r_i` weighs the mean over the positives at or below it in score of 1 / rank, which is its gradient.

    Args:
        regression_losses: any shape and floating dtype; the gradient goes here. Values where `rank` is 0 may be anything.
        rank, order: from `alrp_loss` for the same regression losses; no gradient.
        process_group: the one given to `alrp_loss`: the mean is then over the positives of all processes, and the value that of the
            whole on every process. Lengths may differ between processes; they are read on the host.
        average_gradients: with a process group, multiply the gradient by the group's size for reducers that average.

    Returns:
        0-d, float64 for float64 regression losses, else float32. Without positives an exact zero, connected to the graph; NaN if a rank
        is NaN.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices or process group.
    """
    function = "alrp_regression_loss"
    _checks.check_tensor(function, "regression_losses", regression_losses)
    _checks.check_floating(function, "regression_losses", regression_losses)
    for name, value in (("rank", rank), ("order", order)):
        _checks.check_tensor(function, name, value)
        _checks.check_shape(function, name, value, regression_losses.shape, "the shape of regression_losses")
        _checks.check_device(function, name, value, regression_losses, "regression_losses")
    _checks.check_floating(function, "rank", rank)
    average_gradients = _checks.read_flag(function, "average_gradients", average_gradients)
    if order.dtype != torch.int64:
        raise TypeError(f"{function}: order must be int64, got {order.dtype}")
    group = None if process_group is None else distributed.resolve_group(function, process_group)

    rank, order = rank.detach().double().flatten(), order.flatten()
    losses = torch.where(rank != 0, regression_losses.double().flatten(), 0.0)
    if group is None:
        loss = (_regression_weights(rank, order) * losses).sum()
    else:
        all_ranks, start = distributed.gather_rows(function, rank, group)
        all_losses, _ = distributed.gather_rows(function, losses, group)
        weights = _regression_weights(all_ranks, _global_order(all_ranks, all_losses))
        own = (weights[start : start + losses.numel()] * losses).sum()
        scale = distributed.world_size(group) if average_gradients else 1
        # The value is that of the whole, the gradient that of the own part.
        loss = (weights * all_losses).sum() + (own - own.detach()) * scale
    return loss.to(torch.float64 if regression_losses.dtype == torch.float64 else torch.float32)


def _regression_weights(rank: Tensor, order: Tensor) -> Tensor:
    """For every positive the mean over those at or below it in score of 1 / rank."""
    is_positive = rank != 0
    inverse = torch.where(is_positive, 1 / rank, 0.0)
    weights = torch.zeros_like(rank).scatter(0, order, inverse[order].cumsum(0))
    return weights / is_positive.sum().clamp(min=1)


def _global_order(rank: Tensor, losses: Tensor) -> Tensor:
    """Ascending by logit, which is descending by rank; ties as in `alrp_loss`; what is no positive first, NaN last."""
    order = losses.sort(stable=True).indices
    key = torch.where(rank != 0, -rank, -torch.inf)
    return order[key[order].sort(stable=True).indices]


class ALRPLoss(ranking.RankingLoss):
    """`alrp_loss` as a module without state; `forward(logits, targets, regression_losses)` returns `(classification, rank, order)`.

    Args:
        loss_weight: factor of `classification`.
        The others are the keywords of `alrp_loss`.

    Raises TypeError, ValueError for wrong arguments, here or in `forward`.
    """

    def __init__(
        self,
        delta: float = 1.0,
        *,
        background: str = "last",
        max_positives: int | None = None,
        process_group: object | None = None,
        average_gradients: bool = True,
        layout: str = "rows",
        num_classes: int | None = None,
        loss_weight: float = 1.0,
    ):
        super().__init__(
            loss_weight,
            delta=delta,
            background=background,
            max_positives=max_positives,
            process_group=process_group,
            average_gradients=average_gradients,
            layout=layout,
            num_classes=num_classes,
        )

    def forward(
        self, logits: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], regression_losses: Tensor
    ) -> ALRPLosses:
        """`alrp_loss` of a batch, with its arguments; `classification` is multiplied by `loss_weight`."""
        classification, rank, order = alrp_loss(logits, targets, regression_losses, **self.options())
        return ALRPLosses(weighted(classification, self.loss_weight), rank, order)

    if TYPE_CHECKING:
        __call__ = forward
