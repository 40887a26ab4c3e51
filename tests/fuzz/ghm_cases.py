"""Cases of GHM-C and GHM-R."""
import functools

import ghm_samples
import harness
import oracles
import torch
from rsloss_kernels import gradient_density, use_backend
from torch import Tensor

from .case import Case, Wanted
from .levels import draw_form, draw_labels, lay_level, per_level
from .source import FLOATS, INF, INTEGERS, NAN, Source

BINS = (1, 2, 3, 5, 10, 30, 256)
MUS = (0.02, 0.5, 1.0)
MORE_MUS = (1e-30, 1e-6, 1e3, 1e30)


def draw(source: Source, name: str, loss: ghm_samples.GHM) -> Case:
    if not loss.is_regression and source.chance(0.25):
        return draw_levels(source, name, loss)
    dtype, shape = source.dtype(), source.shape(source.size(), 4, fewest_dims=0)
    pred = source.lay(source.broken(source.values(shape, dtype), 0.1), may_expand=True)
    options: dict = {"bins": source.pick(BINS) if source.chance(0.7) else source.random.randint(1, 256)}
    if loss.is_regression:
        options["mu"] = source.pick(MUS if source.chance(0.7) else MORE_MUS)
        target = draw_offsets(source, pred, options["mu"])
    else:
        target = draw_targets(source, pred, options)
    weight = None
    if source.chance(0.5):
        rows = not loss.is_regression and len(shape) > 0 and source.chance(0.5)
        weight = draw_weight(source, shape[:-1] if rows else shape)
        if rows and source.chance(0.3):
            weight = weight[..., None].expand(shape)
        pred, target = with_garbage(source, pred, target, weight)
    draw_state(source, options)
    upstream = source.pick((1.0,), 0.7, -2.0, 0.0, 65536.0)

    cleaned = target
    if target.shape == pred.shape:
        # An infinite target is as NaN.
        cleaned = target.double() if loss.is_regression else torch.where(target.isinf(), torch.nan, target.double())

    @functools.cache
    def truth() -> Wanted:
        of_oracle = {key: value for key, value in options.items() if value is not None}
        return wanted_of(loss, pred, cleaned, weight, of_oracle, upstream)

    def also(backend: harness.Backend) -> None:
        if truth().gradient is None:
            return
        counts = ghm_counts(pred, target, weight, options, backend)
        found = loss.truth(pred, cleaned, *([] if weight is None else [weight]), **{**options, "momentum": 0.0})
        assert torch.equal(counts, found.counts), f"counts {counts.tolist()}, wanted {found.counts.tolist()}"

    return Case(
        name, loss.name, loss.function, [pred], False, (target, weight), options, (upstream,), truth, source.given, source.notes,
        narrow=loss.narrow, also=also if source.chance(0.1) and not target.is_floating_point() else None,
    )  # fmt: skip


def draw_levels(source: Source, name: str, loss: ghm_samples.GHM) -> Case:
    """Of maps, or levels of rows."""
    dtype, form = source.dtype(), draw_form(source, source.pick((1, 2, 3, 4, 7)), True, 2000)
    logits = [lay_level(source, source.broken(source.values(shape, dtype), 0.05), form.is_maps) for shape in form.shapes]
    options: dict = {"bins": source.pick(BINS)}
    if form.is_maps:
        options |= {"layout": form.layout, "num_classes": form.classes}
    if source.chance(0.4):
        kind, share = source.pick(FLOATS), source.pick((0.0, 0.3), 1.0)
        drawn = [torch.where(source.mask(shape, share), 1.0, source.uniform(shape) * source.pick((0.0, 1.0))) for shape in form.shapes]
        targets = [source.lay(source.broken(value.to(kind), 0.05)) for value in drawn]
        flat = form.to_rows(targets)
        target = targets if form.is_list else targets[0]
    else:
        options["background"] = source.pick(("last", "first"))
        target, flat = draw_labels(source, form, options["background"])
    weight = of_weights = None
    if source.chance(0.5):
        is_row = source.chance(0.5) or form.is_ambiguous
        kind = source.pick(FLOATS)
        weights = [
            source.lay(torch.where(source.mask(shape, 0.3), 0.0, source.uniform(shape)).to(kind), may_expand=is_row)
            for shape in (form.rows if is_row else form.shapes)
        ]
        of_weights = form.of_rows(weights) if is_row else form.to_rows(weights)
        weight = per_level(source, weights, form) if is_row else weights if form.is_list else weights[0]
    draw_state(source, options)
    upstream = source.pick((1.0,), 0.7, -2.0, 0.0, 65536.0)
    rows = form.to_rows(logits)
    cleaned = torch.where(flat.isinf(), torch.nan, flat.double()) if flat.is_floating_point() else flat

    @functools.cache
    def truth() -> Wanted:
        of_oracle = {key: value for key, value in options.items() if value is not None and key not in ("layout", "num_classes")}
        return wanted_of(loss, rows, cleaned, of_weights, of_oracle, upstream)

    return Case(
        name, loss.name, loss.function, logits, form.is_list, (target, weight), options, (upstream,), truth, source.given, source.notes,
        narrow=loss.narrow, to_canonical=form.to_flat,
    )  # fmt: skip


def wanted_of(loss: ghm_samples.GHM, pred: Tensor, target: Tensor, weight: Tensor | None, options: dict, upstream: float) -> Wanted:
    found = loss.truth(pred.contiguous(), target.contiguous(), *([] if weight is None else [weight]), **options)
    if is_on_an_edge(pred, target, weight, options, loss.is_regression):
        return Wanted((None,), None)
    check = None
    if options.get("acc_sum") is not None:
        def check(backend, got):
            ghm_samples.assert_state(got, found, options)
    return Wanted(found.losses, found.gradient(upstream).flatten(), check)


def ghm_counts(pred: Tensor, target: Tensor, weight: Tensor | None, options: dict, backend: harness.Backend) -> Tensor:
    kept = {key: options[key] for key in ("bins", "mu", "empty_bins", "background") if key in options}
    with use_backend(backend.name):
        return gradient_density(pred, target, weight, **kept).counts


def is_on_an_edge(pred: Tensor, target: Tensor, weight: Tensor | None, options: dict, is_regression: bool) -> bool:
    """Whether a gradient norm is so close to the edge of a bin that the rounding of the oracle's float64 decides."""
    z, t = pred.double().numpy(), target
    if not is_regression and not target.is_floating_point() and target.shape != pred.shape:
        t = target[..., None] == torch.arange(pred.shape[-1]) + (options.get("background") == "first")
    with torch.no_grad(), oracles.np.errstate(all="ignore"):
        norms = torch.as_tensor(oracles._harmonized_elements(z, t.double().numpy(), options.get("mu"))[2])
    scaled = norms * options["bins"]
    distance = (scaled - scaled.round()).abs()
    # One of exactly 0 or 1 is where it is; also the middle of logits that are 0.
    is_sure = (norms == 0) | (norms > 1 - 1e-12) | (scaled < 0.5) | ((pred == 0) & (norms == 0.5) & (not is_regression))
    return bool(((distance < 1e-12 * options["bins"]) & ~is_sure).any())


def draw_offsets(source: Source, pred: Tensor, mu: float) -> Tensor:
    """Near the prediction, in the units of `mu`, or anywhere."""
    kind = source.pick(FLOATS, torch.int64, torch.int32)
    if kind in INTEGERS:
        return source.lay(torch.randint(-3, 4, pred.shape, generator=source.generator).to(kind))
    if source.chance(0.3):
        return source.lay(source.broken(source.values(pred.shape, kind), 0.05))
    limit = torch.finfo(kind).max
    near = pred.double().nan_to_num(0, 1, -1) + source.normal(pred.shape) * source.pick((1.0, mu, 10 * mu))
    near = torch.where(source.mask(pred.shape, 0.1), pred.double().nan_to_num(0, 1, -1), near)
    return source.lay(source.broken(near.clamp(-limit, limit).to(kind), 0.05))


def draw_targets(source: Source, pred: Tensor, options: dict) -> Tensor:
    shape, share = tuple(pred.shape), source.pick((0.0, 0.02, 0.3), 1.0)
    if shape and source.chance(0.4):
        options["background"] = source.pick(("last", "first"))
        kind, classes = source.pick((torch.int64, torch.int32), torch.int8), shape[-1]
        labels = torch.randint(-2, max(classes, 1) + 2, shape[:-1], generator=source.generator)
        far = source.pick((-1, 2**31 - 1, -(2**31)))
        if source.chance(0.1) and kind != torch.int8:
            labels = torch.where(source.mask(shape[:-1], 0.2), far, labels)
        return source.lay(labels.to(kind), may_expand=True)
    is_positive = source.mask(shape, share)
    if source.chance(0.2):
        return source.lay(is_positive.to(source.pick((torch.bool, torch.int64, torch.uint8))))
    kind = source.pick(FLOATS)
    soft = source.uniform(shape) * source.pick((1.0, 1.0, 1e-3, 1e-30))
    targets = torch.where(is_positive, 1.0, soft if source.chance(0.4) else source.pick((0.0, -0.0)))
    return source.lay(source.broken(targets.to(kind), 0.05))


def draw_weight(source: Source, shape: tuple[int, ...]) -> Tensor:
    """Some 0, below it, or NaN: not valid."""
    weight = torch.where(source.mask(shape, source.pick((0.0, 0.3), 1.0)), source.pick((0.0, -1.0, NAN)), source.uniform(shape) * 2)
    if source.chance(0.1):
        weight = weight * source.pick((1e-4, 100.0, INF))
    kind = source.pick(FLOATS, torch.bool, torch.int64)
    if kind in FLOATS:
        return source.lay(weight.to(kind), may_expand=True)
    return source.lay((weight > 0.5).to(kind), may_expand=True)


def with_garbage(source: Source, pred: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Elements that are not valid may hold anything."""
    if not source.chance(0.3):
        return pred, target
    rows = weight if weight.shape == pred.shape else weight[..., None].expand(pred.shape)
    is_dropped = ~(rows > 0) & source.mask(pred.shape, 0.5)
    pred = source.lay(torch.where(is_dropped, source.pick((NAN, INF)), pred).to(pred.dtype))
    if target.is_floating_point():
        target = source.lay(torch.where(is_dropped, source.pick((NAN, -INF, 7.0)), target).to(target.dtype))
    return pred, target


def draw_state(source: Source, options: dict) -> None:
    if source.chance(0.5):
        options["empty_bins"] = source.pick(("skip", "count"))
    if not source.chance(0.4):
        return
    bins = options["bins"]
    options["momentum"] = source.pick((0.0, 0.5, 0.75, 0.9), 1e-6, 0.999, 0.999999)
    of_bins = source.uniform((bins,)) * source.pick((20.0, 1e6, 0.0, 1e-3))
    options["acc_sum"] = source.lay(of_bins.to(source.pick((torch.float32, torch.float64))))
    if source.chance(0.5):
        most = source.pick((2, 9, 10_000))
        options["num_updates"] = source.lay(torch.randint(0, most, (bins,), generator=source.generator))
