"""Cases of Rank & Sort, AP and aLRP."""
import dataclasses
import functools

import harness
import oracles
import torch
from rsloss_kernels import alrp_regression_loss, use_backend
from samples import Loss
from torch import Tensor

from . import levels
from .case import Case, Wanted
from .levels import ABOVE, Form, draw_form, draw_quality, lay_level, per_level
from .source import FLOATS, INF, NAN, Limits, Source

DELTAS = (0.0, 0.1, 0.25, 0.5, 1.0, 5.0)
MORE_DELTAS = (1e-30, 1e-20, 1e-12, 1e-9, 1e-6, 1e-3, 0.3, 100.0, 1e10, 1e30)
LEAST_DELTA, MOST_DELTA = 1e-30, 1e30
# Of the distance between two neighbouring floats: windows that hold one of them, touch, or overlap with few or many.
SHARES_OF_SPACING = (1e-12, 1e-6, 0.01, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 10.0)


@dataclasses.dataclass
class Drawn:
    """The arguments that all losses have, as given, and as rows [..., C] or of any shape for the oracles."""

    logits: list[Tensor]
    is_list: bool
    targets: Tensor | list[Tensor]
    quality: Tensor | list[Tensor] | None
    of_oracle: tuple[Tensor, Tensor, Tensor | None]
    row_shape: tuple[int, ...]  # of one tensor of class indices
    background: str
    form: Form | None = None

    def elements(self, third: Tensor | None) -> oracles.Elements:
        logits, targets, _ = self.of_oracle
        return oracles.read(logits, targets, third, self.background)

    @property
    def is_index(self) -> bool:
        return not self.of_oracle[1].is_floating_point()


def draw_one(source: Source, dtype: torch.dtype, options: dict) -> Drawn:
    """One tensor of any shape."""
    is_index, size = source.chance(0.5), source.size()
    if is_index:
        classes = source.pick((1, 2, 3, 4, 7, 80), 0)
        shape = (*source.shape(size // max(classes, 1), 3), classes)
    else:
        shape = source.shape(size, 4, fewest_dims=0)
    # The oracle compares all pairs.
    share = source.pick((0.0, 0.02, 0.1, 0.5), 1.0) if size < 300 else source.pick((0.0, 0.005, 0.03))
    background = source.pick(("last", "first"))
    targets, quality = (draw_labels if is_index else draw_dense)(source, shape, share, background, dtype)
    logits = source.lay(source.broken(draw_logits(source, shape, dtype)), may_expand=True)
    if not is_index and source.chance(0.3) and targets.is_floating_point():
        # What is ignored may hold anything.
        logits = source.lay(torch.where((targets < 0) & source.mask(shape, 0.5), source.pick((NAN, INF, -INF)), logits).to(dtype))
    if is_index or source.chance(0.1):
        options["background"] = background
    of_oracle = logits, targets if is_index else targets.double(), quality
    return Drawn([logits], False, targets, quality, of_oracle, shape[:-1], background)


def draw_levels(source: Source, dtype: torch.dtype, options: dict) -> Drawn:
    """Maps, or levels of rows."""
    classes, background = source.pick((1, 2, 3, 4, 7)), source.pick(("last", "first"))
    form = draw_form(source, classes, True, 2000)
    logits = [lay_level(source, source.broken(draw_logits(source, shape, dtype), 0.05), form.is_maps) for shape in form.shapes]
    if form.is_maps:
        options |= {"layout": form.layout, "num_classes": classes}
    rows, quality, of_rows = form.to_rows(logits), None, None
    if source.chance(0.4):
        targets, flat = levels.draw_dense(source, form, dtype)
        flat = flat.double()
    else:
        targets, flat = levels.draw_labels(source, form, background)
        if source.chance(0.7):
            kind = source.pick(FLOATS)
            drawn = [source.lay(source.broken(draw_quality(source, shape, kind), 0.05)) for shape in form.rows]
            quality, of_rows = per_level(source, drawn, form), form.of_rows(drawn)
        options["background"] = background
    row_shape = (form.batch, rows.shape[0] // max(form.batch, 1)) if form.batch_is_first else form.rows[0]
    return Drawn(logits, form.is_list, targets, quality, (rows, flat, of_rows), row_shape, background, form)


def draw(source: Source, name: str, loss: Loss) -> Case:
    dtype, options = source.dtype(), {}
    drawn = (draw_levels if source.chance(0.25) else draw_one)(source, dtype, options)
    options["delta"] = draw_delta(source, drawn.logits)
    if source.chance(0.1):
        options["max_positives"] = source.pick((1, 5, 10_000))
    ids, number = None, 1
    if loss.takes_segments and source.chance(0.35):
        if drawn.form is None and drawn.logits[0].dim():
            ids, number = draw_segments(source, tuple(drawn.logits[0].shape), drawn.is_index, options)
        elif drawn.form is not None and drawn.form.batch_is_first:
            number = source.pick([count for count in (1, 2, 3) if drawn.form.batch % count == 0])
            options["segments"] = number
            rows = torch.arange(number).repeat_interleave(drawn.of_oracle[0].shape[0] // number)
            ids = rows[:, None].expand(drawn.of_oracle[0].shape).flatten()
    third: tuple = (drawn.targets,)
    alrp_losses = None
    if loss.name == "rank_sort":
        elements = drawn.elements(drawn.of_oracle[2])
        third += () if drawn.quality is None else (drawn.quality,)
    else:
        elements = drawn.elements(None)
    if loss.name == "ap":
        options["interpolated"] = source.chance(0.7)
    elif loss.name == "alrp":
        is_per_row = drawn.is_index and source.chance(0.5)
        count = drawn.row_shape if is_per_row else (int(elements.is_positive.sum()),)
        alrp_losses = source.values(count, source.pick(FLOATS), ("usual", "ties", "equal", "tiny")).abs()
        alrp_losses = source.lay(source.broken(alrp_losses, 0.07), may_expand=True)
        third += (alrp_losses,)
        elements = drawn.elements(alrp_losses.flatten()) if is_per_row else oracles.with_regression_losses(elements, alrp_losses)
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
        name, loss.name, loss.function, drawn.logits, drawn.is_list, third, options, upstream, truth, source.given, source.notes,
        **({} if drawn.form is None else {"to_canonical": drawn.form.to_flat}),
    )  # fmt: skip


def draw_logits(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """In some cases floats next to one another, where windows touch that are narrower than their distance."""
    if not source.chance(0.2):
        return source.values(shape, dtype)
    most = Limits(dtype).max
    floats = [source.values((1,), dtype)]
    source.notes.append("neighbours")
    for _ in range(source.pick((1, 3, 12))):
        ends = (floats[0], -INF), (floats[-1], INF)
        below, above = (torch.nextafter(end, torch.full_like(end, towards)) for end, towards in ends)
        floats = [below, *floats, above]
    return torch.cat(floats).clamp(-most, most)[torch.randint(len(floats), shape, generator=source.generator)]


def draw_delta(source: Source, logits: list[Tensor]) -> float:
    """The usual ones, extreme ones, and some near the spacing of floats at one of the logits."""
    finite = torch.cat([level.flatten() for level in logits])
    finite = finite[finite.isfinite()]
    kind = source.random.choices(("usual", "extreme", "spacing"), (6, 2, 2))[0]
    if kind != "spacing" or not finite.numel():
        return source.pick(DELTAS if kind == "usual" else MORE_DELTAS)
    one = finite[source.random.randrange(finite.numel())].abs()
    spacing = one.double() - torch.nextafter(one, torch.full_like(one, -INF)).double()
    return min(max(float(spacing) * source.pick(SHARES_OF_SPACING), LEAST_DELTA), MOST_DELTA)


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

