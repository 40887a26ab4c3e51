"""Cases of Rank & Sort, AP and aLRP."""
import functools

import harness
import oracles
import torch
from rsloss_kernels import alrp_regression_loss, use_backend
from samples import LOSSES, Loss
from torch import Tensor

from .case import Case, Wanted
from .source import FLOATS, INF, NAN, Source

DELTAS = (0.0, 0.1, 0.25, 0.5, 1.0, 5.0)
MORE_DELTAS = (1e-30, 1e-12, 1e-3, 0.3, 100.0, 1e10, 1e30)
ABOVE = (1, 100, 2**31 - 1, 2**62)  # what a label may exceed the number of classes by


def draw(source: Source, name: str, loss: Loss) -> Case:
    is_index = source.chance(0.5)
    dtype, size = source.dtype(), source.size()
    if is_index:
        classes = source.pick((1, 2, 3, 4, 7, 80), 0)
        shape = (*source.shape(size // max(classes, 1), 3), classes)
    else:
        shape = source.shape(size, 4, fewest_dims=0)
    # The oracle compares all pairs.
    share = source.pick((0.0, 0.02, 0.1, 0.5), 1.0) if size < 300 else source.pick((0.0, 0.005, 0.03))
    background = source.pick(("last", "first"))
    draw_targets = draw_labels if is_index else draw_dense
    targets, quality = draw_targets(source, shape, share, background, dtype)
    logits = source.lay(source.broken(source.values(shape, dtype)), may_expand=True)
    if not is_index and source.chance(0.3) and targets.is_floating_point():
        # What is ignored may hold anything.
        logits = source.lay(torch.where((targets < 0) & source.mask(shape, 0.5), source.pick((NAN, INF, -INF)), logits).to(dtype))
    options = {"delta": source.pick(DELTAS if source.chance(0.7) else MORE_DELTAS)}
    if is_index or source.chance(0.1):
        options["background"] = background
    if source.chance(0.1):
        options["max_positives"] = source.pick((1, 5, 10_000))
    ids, number = None, 1
    if loss.takes_segments and shape and source.chance(0.35):
        ids, number = draw_segments(source, shape, is_index, options)
    elements = oracles.read(logits, targets.double() if not is_index else targets, quality, background)
    third = (targets, *([] if quality is None else [quality]))
    alrp_losses = None
    if loss.name == "ap":
        third = (targets,)
        options["interpolated"] = source.chance(0.7)
        elements = elements if not is_index else oracles.read(logits, targets, None, background)
    elif loss.name == "alrp":
        is_per_row = is_index and source.chance(0.5)
        count = targets.shape if is_per_row else (int(elements.is_positive.sum()),)
        alrp_losses = source.values(count, source.pick(FLOATS), ("usual", "ties", "equal", "tiny")).abs()
        alrp_losses = source.lay(source.broken(alrp_losses, 0.07), may_expand=True)
        third = targets, alrp_losses
        if is_per_row:
            elements = oracles.read(logits, targets, alrp_losses, background)
        else:
            whole = oracles.read(logits, targets if is_index else targets.double(), None, background)
            elements = oracles.with_regression_losses(whole, alrp_losses)
    upstream = tuple(source.pick((1.0,), 0.7, -2.0, 0.0, 65536.0) for _ in range(loss.num_losses))
    if loss.num_losses == 2:
        if source.chance(0.1):
            options["upstream_parity"] = True
        elif source.chance(0.15):
            upstream = source.pick(((1.0, None), (None, 1.0)))

    @functools.cache
    def truth_of_all() -> oracles.Truth:
        more = (options["interpolated"],) if loss.name == "ap" else ()
        if ids is None:
            return loss.oracle(elements, options["delta"], *more)
        return oracles.segmented(loss.oracle, elements, ids, number, options["delta"], *more)

    def truth() -> Wanted:
        of_all = truth_of_all()
        factors = (upstream[0],) * 2 if options.get("upstream_parity") else upstream
        if elements.logits.numel():
            gradient = of_all.gradient(*factors)
        else:
            gradient = torch.zeros(0, dtype=torch.float64)
        check = None if alrp_losses is None else functools.partial(check_rank_and_order, elements, of_all, alrp_losses, dtype)
        return Wanted(of_all.losses, gradient, check)

    return Case(
        name, loss.name, loss.function, [logits], False, third, options, upstream, truth, source.given, source.notes
    )  # fmt: skip


def draw_quality(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Within [0, 1], few of them equal, all of some levels, or tiny."""
    quality = source.uniform(shape)
    levels = source.pick((None, None, 1, 2, 5))
    if levels:
        quality = (quality * levels).ceil() / levels
    elif source.chance(0.1):
        quality = quality * source.pick((1e-6, 1e-30, float(torch.finfo(dtype).tiny)))
    return quality.to(dtype)


def draw_dense(source: Source, shape: tuple[int, ...], share: float, background: str, dtype: torch.dtype) -> tuple[Tensor, None]:
    chance = source.uniform(shape)
    ignored = source.pick((0.0, 0.2), 0.9)
    if source.chance(0.15):
        kind = source.pick((torch.int64, torch.int32, torch.int8, torch.bool))
        targets = torch.where(chance < share, 1, torch.where(chance > 1 - ignored, 0 if kind == torch.bool else -1, 0)).to(kind)
        return source.lay(targets), None
    kind = source.pick(FLOATS)
    negative = source.pick((0.0, 0.0, -0.0))
    quality = draw_quality(source, shape, kind).double()
    targets = torch.where(chance < share, quality, torch.where(chance > 1 - ignored, -source.uniform(shape) - 0.1, negative)).to(kind)
    return source.lay(source.broken(targets, 0.05)), None


def draw_labels(
    source: Source, shape: tuple[int, ...], share: float, background: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    *rows, classes = shape
    kind = source.pick((torch.int64, torch.int64, torch.int32), torch.int16, torch.int8, torch.uint8)
    first, chance = int(background == "first"), source.uniform(rows)
    share, ignored = min(1.0, share * max(classes, 1)), source.pick((0.0, 0.2), 0.9)
    labels = torch.randint(0, max(classes, 1), rows, generator=source.generator) + first
    labels = torch.where(chance < share, labels, 0 if first else classes)
    if source.chance(0.1):
        above = classes + source.pick(ABOVE)
        labels = torch.where(source.mask(rows, 0.1), min(above, torch.iinfo(kind).max), labels)
    if kind != torch.uint8:
        lowest = source.pick((-1,), -7, torch.iinfo(kind).min)
        labels = torch.where(chance > 1 - ignored, lowest, labels)
    labels = source.lay(labels.to(kind), may_expand=True)
    if source.chance(0.3):
        return labels, None
    quality = draw_quality(source, tuple(rows), source.pick(FLOATS))
    return labels, source.lay(source.broken(quality, 0.07))


def draw_segments(source: Source, shape: tuple[int, ...], is_index: bool, options: dict) -> tuple[Tensor, int]:
    """The id of every element, flat, and how many segments there are; `options` gets the keywords."""
    if len(shape) >= 2 and source.chance(0.3):
        options["segments"] = "class"
        return torch.arange(shape[-1]).expand(shape).flatten(), max(shape[-1], 1)
    if source.chance(0.3):
        number = source.pick([number for number in (1, 2, 3, 4, 5, 8) if shape[0] % number == 0])
        options["segments"] = number
        rows = torch.arange(number).repeat_interleave(shape[0] // number)
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten(), number
    rows = shape if len(shape) == 1 and not is_index else shape[:-1]
    number = source.pick((1, 2, 3, 6), 40)
    ids = torch.randint(-1, number + 1, rows, generator=source.generator)
    if source.chance(0.3):
        ids = torch.where(source.mask(rows, 0.2), source.pick((-(2**31), 2**31 - 1)), ids)
    kind = source.pick((torch.int64, torch.int32))
    options |= {"segments": source.lay(ids.to(kind), may_expand=True), "num_segments": number}
    ids = options["segments"].long()
    return (ids if rows == shape else ids[..., None].expand(shape)).flatten(), number


def check_rank_and_order(
    elements: oracles.Elements, truth: oracles.Truth, losses: Tensor, dtype: torch.dtype, backend: harness.Backend, statistics: tuple
) -> None:
    """Of positives in flat order; per row those of the others are 0 and stand first."""
    rank, order = statistics
    assert rank.shape == order.shape == losses.shape and rank.dtype == torch.float64 and order.dtype == torch.int64
    is_per_row = losses.shape != truth.rank.shape or losses.dim() != 1
    count = truth.rank.numel()
    classes = elements.logits.numel() // max(losses.numel(), 1)
    place = torch.arange(count)
    if is_per_row:
        place = elements.is_positive.nonzero().flatten() // max(classes, 1)
    flat = rank.flatten()
    harness.assert_within(flat[place], truth.rank, backend.loss_gate(dtype) * truth.rank.abs(), "rank")
    is_other = torch.ones(losses.numel(), dtype=torch.bool)
    is_other[place] = False
    assert not flat[is_other].any(), "rank of rows without a positive"
    assert torch.equal(order.flatten().sort().values, torch.arange(losses.numel())), "order is no permutation"
    if truth.rank.isnan().any():
        return
    logits, values = elements.logits[elements.is_positive], losses.flatten().double()[place]
    by_loss = values.sort(stable=True).indices
    ascending = by_loss[logits[by_loss].sort(stable=True).indices]
    rest = order.flatten()[losses.numel() - count :]
    assert torch.equal(rest, place[ascending]), "order"
    leaf = losses.detach().requires_grad_()
    with use_backend(backend.name):
        value = alrp_regression_loss(leaf, rank, order)
    (gradient,) = torch.autograd.grad(value, leaf)
    wanted, slopes = oracles.alrp_regression(values, truth.rank, ascending)
    harness.assert_within(value.detach(), wanted, 2 * backend.loss_gate(leaf.dtype) * abs(wanted) + harness.NOISE, "regression loss")
    relative, smallest = harness.ROUNDING.get(leaf.dtype, (0.0, 0.0))
    bound = (backend.gradient_gate(leaf.dtype) + relative) * slopes.abs() + smallest + harness.NOISE
    harness.assert_within(gradient.flatten()[place], slopes, bound, "regression gradient")


LOSS_NAMES = tuple(LOSSES)
