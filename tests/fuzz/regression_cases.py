"""Cases of smooth L1 and of the authentic smooth L1 loss, and of what has no gradient: score weights and labels by IoU."""
import functools

import numpy as np
import oracles
import rsloss_kernels
import smooth_l1_samples
import torch
from torch import Tensor

from .case import Case, Wanted
from .ghm_cases import MORE_MUS, MUS, draw_offsets
from .ranking_cases import draw_dense, draw_labels
from .source import FLOATS, INF, NAN, Source

BETAS = (0.0, 0.11, 0.5, 1.0)
MORE_BETAS = (1e-30, 1e-6, 100.0, 1e30)


def draw_smooth_l1(source: Source, name: str) -> Case:
    beta = source.pick(BETAS if source.chance(0.7) else MORE_BETAS)
    function, of_tensor = rsloss_kernels.smooth_l1_loss, beta
    if source.chance(0.3):
        # The largest one is larger as a float32.
        kind = torch.float64 if beta > 1e29 else source.pick((torch.float64, torch.float32))
        of_tensor = source.lay(torch.tensor(beta, dtype=kind))
    pred, target, weight, options, upstream = draw_elements(source, beta or 1.0, has_rows=True)

    @functools.cache
    def truth() -> Wanted:
        inputs = smooth_l1_samples.Inputs(pred, target, of_tensor, weight, options)
        losses, slopes = smooth_l1_samples.truth(inputs)
        return wanted_of(losses, slopes, options, upstream)

    return Case(
        name, "smooth_l1", function, [pred], False, (target, of_tensor, weight), options, (upstream,), truth, source.given,
        source.notes, narrow=smooth_l1_samples.GRADIENT_GATE, is_elementwise=options["reduction"] == "none",
    )  # fmt: skip


def draw_authentic(source: Source, name: str) -> Case:
    mu = source.pick(MUS if source.chance(0.7) else MORE_MUS)
    pred, target, weight, options, upstream = draw_elements(source, mu, has_rows=False)

    @functools.cache
    def truth() -> Wanted:
        factor = np.ones(pred.shape) if weight is None else weight.double().numpy()
        is_dropped = factor == 0
        z, t = (np.where(is_dropped, 0.0, value.double().numpy()) for value in (pred, target))
        with np.errstate(all="ignore"):
            losses, slopes, _ = oracles._harmonized_elements(z, t, mu)
            divisor = max(pred.numel(), 1) if options["reduction"] == "mean" else 1
            divisor = float(options.get("avg_factor", divisor))
            losses, slopes = (np.where(is_dropped, 0.0, value * factor / divisor) for value in (losses, slopes))
        return wanted_of(losses, slopes, options, upstream)

    return Case(
        name, "asl1", rsloss_kernels.authentic_smooth_l1_loss, [pred], False, (target, weight), {**options, "mu": mu}, (upstream,),
        truth, source.given, source.notes, narrow=smooth_l1_samples.GRADIENT_GATE, is_elementwise=options["reduction"] == "none",
    )  # fmt: skip


def wanted_of(losses: np.ndarray, slopes: np.ndarray, options: dict, upstream: float | Tensor) -> Wanted:
    long = np.asarray(slopes).astype(np.longdouble)
    with np.errstate(all="ignore"):
        factor = upstream.double().numpy() if isinstance(upstream, Tensor) else np.longdouble(upstream)
        gradient = torch.as_tensor((long * factor).astype(np.float64)).flatten()
        elements = torch.as_tensor(np.asarray(losses).astype(np.float64))
        whole = elements if options["reduction"] == "none" else smooth_l1_samples.total(np.asarray(losses))
    return Wanted((whole,), gradient)


def draw_elements(
    source: Source, unit: float, has_rows: bool
) -> tuple[Tensor, Tensor, Tensor | None, dict, float | Tensor]:
    """Predictions and targets in the units of a loss, weights of elements or rows, a reduction."""
    dtype, shape = source.dtype(), source.shape(source.size(), 4, fewest_dims=0)
    values = source.values(shape, dtype)
    if source.chance(0.3):
        limit = torch.finfo(dtype).max
        values = (source.normal(shape) * unit).clamp(-limit, limit).to(dtype)
    pred = source.lay(source.broken(values, 0.1), may_expand=True)
    target = draw_offsets(source, pred, unit)
    weight = None
    if source.chance(0.5):
        rows = shape[:-1] if has_rows and len(shape) > 1 and source.chance(0.5) else shape
        kind, scale = source.pick(FLOATS, torch.bool), source.pick((1.0,), -1.0, 100.0, 1e-3)
        weight = torch.where(source.mask(rows, 0.3), 0.0, source.uniform(rows) * scale)
        weight = source.lay((weight > 0.5 if kind == torch.bool else weight).to(kind), may_expand=True)
        if rows != shape and source.chance(0.3):
            weight = weight[..., None].expand(source.pick((shape, (*rows, 1))))
    options: dict = {"reduction": source.pick(("mean", "sum", "none"))}
    if source.chance(0.3):
        options["avg_factor"] = source.pick((7.0, 0.5, 1e4), 1e-20, 1e20)
        if source.chance(0.5):
            options["avg_factor"] = torch.tensor(options["avg_factor"], dtype=source.pick((torch.float32, torch.float64)))
    upstream: float | Tensor = source.pick((1.0,), 0.7, -2.0, 0.0, 65536.0)
    if options["reduction"] == "none":
        upstream = source.lay(source.normal(shape).to(dtype))
    return pred, target, weight, options, upstream


def draw_score_weights(source: Source, name: str) -> Case:
    dtype, classes = source.dtype(), source.pick((1, 2, 3, 7, 80), 0)
    is_index, background = source.chance(0.5), source.pick(("last", "first"))
    shape = (*source.shape(source.size() // max(classes, 1), 3, 0), classes)
    logits = source.lay(source.broken(source.values(shape, dtype)), may_expand=True)
    targets, _ = (draw_labels if is_index else draw_dense)(source, shape, source.pick((0.0, 0.1, 0.5)), background, dtype)

    def truth() -> Wanted:
        if is_index:
            is_positive = oracles.read(logits, targets, None, background).is_positive
        else:
            is_positive = targets.flatten() > 0
        of_rows = is_positive.view(shape).any(-1)
        if not classes:
            return Wanted((torch.zeros(shape[:-1], dtype=torch.float64),), None)
        sure = 1 / (1 + (-logits.double()).exp())
        return Wanted((torch.where(of_rows, sure.amax(-1), 0.0),), None)

    return Case(
        name, "score_weights", rsloss_kernels.score_weights, [logits], False, (targets,), {"background": background}, (), truth,
        source.given, source.notes, has_gradient=False, noise=2.0**-126,
    )  # fmt: skip


def draw_assignment(source: Source, name: str) -> Case:
    dtype, shape = source.dtype(), source.shape(source.size(), 3, 0)
    overlaps = (source.uniform(shape) * 20).round() / 20 if source.chance(0.5) else source.uniform(shape)
    overlaps = torch.where(source.mask(shape, 0.1), source.pick((-1.0, 0.0, -0.0, 1.0)), overlaps)
    overlaps = source.lay(source.broken(overlaps.to(dtype)), may_expand=True)
    high, low = (source.pick((0.5, 0.55, 0.35, 0.1), 0.0, 1.0, -0.5, 2.0, NAN, INF) for _ in range(2))
    thresholds = []
    for value in (high, low) if source.chance(0.7) else (high,):
        as_tensor = source.chance(0.3)
        thresholds.append(torch.tensor(value, dtype=source.pick((torch.float64, torch.float32, dtype))) if as_tensor else value)

    def truth() -> Wanted:
        # By the definition in float64, the thresholds rounded as documented.
        high, low = (float(torch.as_tensor(value, dtype=dtype)) for value in (thresholds[0], thresholds[-1]))
        labels = [
            1 if value >= high and value >= 0 else 0 if 0 <= value < low else -1 for value in overlaps.double().flatten().tolist()
        ]
        return Wanted((torch.tensor(labels, dtype=torch.float64).view(shape),), None)

    return Case(
        name, "assign_by_iou", rsloss_kernels.assign_by_iou, [overlaps], False, tuple(thresholds), {}, (), truth, source.given,
        source.notes, has_gradient=False,
    )  # fmt: skip
