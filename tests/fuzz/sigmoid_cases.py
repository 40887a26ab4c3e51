"""Cases of the element-wise sigmoid losses: focal, quality focal, varifocal; EFL, EQFL and EQL v2."""
import functools
import math

import harness
import rsloss_kernels
import torch
from sigmoid_samples import SUMS_GATE, SigmoidLoss
from torch import Tensor

from .case import Case, Wanted
from .levels import Form, draw_dense, draw_form, draw_labels, draw_quality, lay_level, per_level
from .source import FLOATS, NAN, Source

GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
MORE_GAMMAS = (1e-30, 1e-3, 5.0, 16.0, 100.0, 1e4)
FACTORS = (7.3, 1e-3, 1e6)
LARGEST_EXPONENT = 16.0  # of the gates: losses/focal/README.md
UNREDUCED = {
    "focal": rsloss_kernels.sigmoid_focal_loss,
    "quality": rsloss_kernels.quality_focal_loss,
    "varifocal": rsloss_kernels.varifocal_loss,
}  # fmt: skip


def draw(source: Source, name: str, loss: SigmoidLoss) -> Case:
    is_eqlv2, dtype = loss.name == "eqlv2", source.dtype()
    classes = source.pick((1, 2, 3, 4, 7, 80)) + is_eqlv2
    form = draw_form(source, classes, not is_eqlv2)
    levels = [
        lay_level(source, source.broken(source.values(shape, dtype), 0.1 / len(form.shapes)), form.is_maps) for shape in form.shapes
    ]
    options, of_truth = {}, {}
    if form.is_maps:
        options["layout"] = form.layout
        if not loss.is_equalized:
            options["num_classes"] = form.classes
    is_dense = not loss.is_equalized and source.chance(0.4)
    draw_common(source, loss, form, is_dense, options, of_truth)
    qualities = None
    if is_dense:
        targets, of_truth["targets"] = draw_dense(source, form, dtype)
    else:
        targets, of_truth["targets"] = draw_labels(source, form, options.get("background", "last"))
        if loss.takes_quality and (loss.is_equalized or source.chance(0.7)):
            drawn = [draw_quality(source, shape, source.pick(FLOATS)) for shape in form.rows]
            drawn = [drawn[0]] if len(drawn) == 1 else [value.to(drawn[0].dtype) for value in drawn]
            if not loss.is_equalized and source.chance(0.1):
                drawn = [torch.where(source.mask(value.shape, 0.2), -0.5, value) for value in drawn]
            drawn = [source.lay(source.broken(value, 0.05, (NAN,))) for value in drawn]
            of_truth["quality"] = form.of_rows(drawn)
            qualities = per_level(source, drawn, form)
    others = [targets] + ([qualities] if loss.takes_quality and not is_dense and (qualities is not None) else [])
    pos_neg = None
    if loss.is_equalized:
        pos_neg = draw_ratios(source, form.classes - is_eqlv2, is_eqlv2)
        others.append(source.lay(pos_neg))
    reduction = "sum" if loss.is_equalized else source.pick(("sum", "mean", "none"))
    if not loss.is_equalized:
        options["reduction"] = reduction
    exponent = torch.as_tensor(options.get("focal_gamma", options.get("beta", options.get("gamma", 0.0)))).max()
    slack = max(1.0, (float(exponent) + options.get("scale_factor", 0.0)) / LARGEST_EXPONENT)
    if not is_eqlv2 and source.chance(0.4):
        options["avg_factor"] = source.pick(FACTORS, 1e-10 if slack == 1 else 1.0, 1e30)
        if source.chance(0.5):
            options["avg_factor"] = torch.tensor(options["avg_factor"], dtype=source.pick((torch.float32, torch.float64)))
    rows = form.to_rows(levels)
    upstream = draw_upstream(source, form, dtype, reduction)

    @functools.cache
    def truth() -> Wanted:
        found = truth_of(loss, rows, of_truth, options, pos_neg, reduction)
        if is_singular(loss, rows, of_truth) or is_underflowing(rows, of_truth, float(exponent)):
            return Wanted((None,), None)
        if reduction == "none":
            elements, slopes = (torch.from_numpy(value.astype("float64")).flatten() for value in (found.elements, found.slopes))
            return Wanted((elements,), slopes * form.to_flat(upstream).double())
        check = functools.partial(check_sums, found.class_sums, dtype, slack) if loss.is_equalized else None
        return Wanted(tuple(found.losses), found.gradient(upstream[0]).flatten(), check)

    if loss.is_equalized:
        of_truth["pos_neg"] = pos_neg if is_eqlv2 else pos_neg.double().clamp(0, 1)
    function = loss.function if loss.is_equalized else UNREDUCED[loss.name]
    return Case(
        name, loss.name, function, levels, form.is_list, tuple(others), options, tuple(upstream), truth, source.given,
        source.notes, narrow=loss.narrow, slack=slack, to_canonical=form.to_flat, is_elementwise=reduction == "none",
    )  # fmt: skip


def truth_of(loss: SigmoidLoss, rows: Tensor, of_truth: dict, options: dict, pos_neg: Tensor | None, reduction: str):
    names = ("background", "ignore_index", "class_weight", "class_mask", "gamma", "beta", "alpha", "scale_factor", "weighting_factor")
    names += ("iou_weighted", "mu", "focal_gamma")
    chosen = {key: options[key] for key in names if key in options}
    if "weight" in of_truth:
        chosen["weight"] = of_truth["weight"]
    if "avg_factor" in options:
        chosen["avg_factor"] = float(options["avg_factor"])
    elif reduction == "mean" and not loss.is_equalized:
        chosen["avg_factor"] = float(max(rows.numel(), 1))
    others = [of_truth["quality"]] if "quality" in of_truth else []
    others += [of_truth["pos_neg"]] if loss.is_equalized else []
    return loss.truth(rows, of_truth["targets"], *others, **chosen)


def is_singular(loss: SigmoidLoss, rows: Tensor, of_truth: dict) -> bool:
    """Whether a probability is so close to a soft target of a quality loss that rounding the one shows in their difference."""
    if loss.modulator != "quality":
        return False
    is_dense = of_truth["targets"].shape == rows.shape
    targets = of_truth["targets"] if is_dense else of_truth.get("quality", torch.ones(1))[:, None]
    is_near = (rows.double().sigmoid() - targets.double()).abs() < 1e-4
    return bool((is_near & (targets != 0) & (targets != 1)).any())


def is_underflowing(rows: Tensor, of_truth: dict, exponent: float) -> bool:
    """Whether the modulator of an infinite loss, a power of a soft target, may be 0 in float64, and is more in the oracle."""
    soft = [value.double() for value in (of_truth["targets"], of_truth.get("quality")) if value is not None and value.is_floating_point()]
    least = min((float(value[value > 0].min()) for value in soft if bool((value > 0).any())), default=1.0)
    return bool(rows.isinf().any()) and exponent * math.log10(least) < -100


def check_sums(wanted: tuple[Tensor, Tensor], dtype: torch.dtype, slack: float, backend: harness.Backend, statistics: tuple) -> None:
    gate, noise = (backend.loss_gate(dtype), 1e-300) if dtype == torch.float64 else (SUMS_GATE, 2.0**-149)
    gate, noise = slack * gate, noise if slack == 1 else 1e-25
    for part, value, expected in zip(("positives", "negatives"), statistics, wanted, strict=True):
        expected = expected[: len(value)]
        assert value.dtype == torch.float64
        is_same = (expected.isinf() & (value == expected)) | (expected > 1e300) & (value > 1e300)
        value, expected = value.masked_fill(is_same, 0), expected.masked_fill(is_same, 0)
        harness.assert_within(value, expected, gate * expected.abs() + noise, f"sums of {part}")


def draw_common(source: Source, loss: SigmoidLoss, form: Form, is_dense: bool, options: dict, of_truth: dict) -> None:
    """Exponents, class weights, weights, what is ignored."""
    def exponent() -> float:
        return source.pick(GAMMAS if source.chance(0.8) else MORE_GAMMAS)

    if loss.name == "eqlv2":
        options |= {"gamma": source.pick((12.0, 1.0, 0.0), -3.0, 50.0), "mu": source.pick((0.8, 0.0), 3.0)}
        options |= {"alpha": source.pick((4.0, 0.0), 1e6), "focal_gamma": source.pick((0.0, 0.0, exponent()))}
        return
    if loss.is_equalized:
        is_weighting = source.chance(0.8)
        gamma = exponent()
        options["gamma"] = 2.0 if gamma < 1e-3 and is_weighting else gamma
        options |= {"scale_factor": source.pick((8.0, 0.0, 1.0), 1e3), "weighting_factor": is_weighting}
        if loss.modulator == "focal":
            options["alpha"] = source.pick((0.25, -1.0, 0.0, 1.0, 0.5))
    else:
        gamma = exponent()
        if source.chance(0.2):
            gamma = source.lay(torch.tensor([exponent() for _ in range(form.classes)], dtype=source.pick((torch.float64, torch.float32))))
        options["beta" if loss.modulator == "quality" else "gamma"] = gamma
        if loss.modulator == "focal":
            options["alpha"] = source.pick((0.25, -1.0, 0.0, 1.0, 0.5))
        if loss.modulator == "varifocal":
            options |= {"alpha": source.pick((0.75, 0.0, 1.0), 1e4), "iou_weighted": source.chance(0.7)}
        if source.chance(0.15):
            drawn = source.uniform((form.classes,)) * 3
            drawn = torch.where(source.mask(drawn.shape, 0.2), 0.0, drawn)
            options["class_weight"] = drawn.tolist() if source.chance(0.2) else source.lay(drawn.to(source.pick(FLOATS)))
        if source.chance(0.15):
            options["class_mask"] = source.lay(source.mask((form.classes,), 0.7).to(source.pick((torch.bool, torch.int64))))
    if not is_dense and source.chance(0.3):
        options["background"] = source.pick(("last", "first"))
    if not is_dense and source.chance(0.15):
        options["ignore_index"] = source.pick((0, form.classes, form.classes + 1, -5), 2**40, 255)
    if source.chance(0.4):
        options["weight"], of_truth["weight"] = draw_weight(source, form)


def draw_weight(source: Source, form: Form) -> tuple[Tensor | list[Tensor], Tensor]:
    is_row = source.chance(0.5) or form.is_ambiguous
    shapes = [(*rows, *([] if is_row else [form.classes])) for rows in form.rows]
    kind, scale = source.pick(FLOATS, torch.bool, torch.int64), source.pick((1.0,), -1.0, 100.0, 1e-3, 1e4)
    drawn = [torch.where(source.mask(shape, 0.3), 0.0, source.uniform(shape) * 2 * scale) for shape in shapes]
    drawn = [(value if kind in FLOATS else value > 0.5).to(kind) for value in drawn]
    if kind in FLOATS:
        drawn = [source.broken(value, 0.03, (NAN,)) for value in drawn]
    laid = [source.lay(value, may_expand=True) for value in drawn]
    if is_row and not form.is_maps and source.chance(0.3):
        laid = [value[..., None].expand(*value.shape, form.classes) for value in laid]
        is_row = False
    return per_level(source, laid, form), form.of_rows(laid) if is_row else form.of_elements(laid)


def draw_ratios(source: Source, classes: int, is_eqlv2: bool) -> Tensor:
    drawn = source.uniform((classes,)) * (1.3 if is_eqlv2 else 1.0)
    drawn = torch.where(source.mask((classes,), 0.2), source.pick((0.0, 1.0), 1.5, -0.5), drawn)
    return drawn.to(source.pick((torch.float64, torch.float32), torch.float16))


def draw_upstream(source: Source, form: Form, dtype: torch.dtype, reduction: str) -> list[float | Tensor]:
    if reduction != "none":
        return [source.pick((1.0,), 0.7, -2.0, 0.0, 65536.0)]
    if source.chance(0.3):
        return [torch.ones(shape, dtype=dtype) for shape in form.shapes]
    return [source.lay(source.normal(shape).to(dtype)) for shape in form.shapes]
