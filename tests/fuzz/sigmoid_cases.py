"""Cases of the element-wise sigmoid losses: focal, quality focal, varifocal; EFL, EQFL and EQL v2."""
import dataclasses
import functools
import math
from collections.abc import Sequence

import harness
import rsloss_kernels
import torch
from sigmoid_samples import SUMS_GATE, SigmoidLoss
from torch import Tensor

from .case import Case, Wanted
from .ranking_cases import ABOVE, draw_quality
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


@dataclasses.dataclass
class Form:
    """How rows [R, C] lie in the logits that are given."""

    shapes: list[tuple[int, ...]]  # of the logits
    layout: str
    sizes: list[tuple[int, int, int]]  # B, S, A of each level of maps
    classes: int
    is_list: bool

    @property
    def is_maps(self) -> bool:
        return self.layout != "rows"

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The shape of the labels of each level."""
        return [(b, s * a) for b, s, a in self.sizes] if self.is_maps else [shape[:-1] for shape in self.shapes]

    @property
    def is_ambiguous(self) -> bool:
        """Whether [B, S A, C], or [B, *spatial, A] of one class, is the shape of some logits too, as which it is read then."""
        shapes = zip(self.shapes, self.rows, self.sizes, strict=True) if self.is_maps else ()
        return any(shape in ((*rows, self.classes), (shape[0], *shape[2:], sizes[2])) for shape, rows, sizes in shapes)

    def to_rows(self, values: Sequence[Tensor]) -> Tensor:
        """[R, C], of values in the shapes of the logits."""
        flat = []
        for number, value in enumerate(values):
            if self.is_maps:
                b, s, a = self.sizes[number]
                is_major = self.layout == "anchor_major"
                named = value.reshape(b, a, self.classes, s) if is_major else value.reshape(b, self.classes, a, s)
                value = named.permute(0, 3, 1, 2) if is_major else named.permute(0, 3, 2, 1)
            flat.append(value.reshape(-1, self.classes))
        return torch.cat(flat)

    def to_flat(self, values: Sequence[Tensor]) -> Tensor:
        return self.to_rows(values).reshape(-1)


def draw_form(source: Source, classes: int, takes_maps: bool) -> Form:
    size = source.size() // classes
    kind = source.random.random()
    levels = source.pick((1, 2, 3))
    if takes_maps and kind < 0.25:
        layout, batch, anchors = source.pick(("anchor_major", "class_major")), source.pick((1, 2)), source.pick((1, 2, 3))
        shapes, sizes = [], []
        for _ in range(levels):
            spatial = source.shape(size // (levels * batch * anchors), 3, 1)
            shapes.append((batch, anchors * classes, *spatial))
            sizes.append((batch, math.prod(spatial), anchors))
        return Form(shapes, layout, sizes, classes, levels > 1 or source.chance(0.3))
    if kind < 0.4:
        batch = source.pick((1, 2, 3))
        lengths = [source.random.randint(0, max(2 * size // (levels * batch), 0)) for _ in range(levels)]
        return Form([(batch, length, classes) for length in lengths], "rows", [], classes, True)
    return Form([(*source.shape(size, 3, 0), classes)], "rows", [], classes, False)


def lay_level(source: Source, value: Tensor, is_maps: bool) -> Tensor:
    if is_maps and source.chance(0.5):
        source.notes.append("channels last")
        last = value.movedim(1, -1).contiguous()
        source.given.append(last)
        return last.movedim(-1, 1)
    return source.lay(value, may_expand=True)


def per_level(source: Source, values: Sequence[Tensor], form: Form) -> Tensor | list[Tensor]:
    """A list, or one tensor for all levels, of what rows or elements have one of."""
    if not form.is_list:
        return values[0] if source.chance(0.8) else [values[0]]
    if form.is_maps or all(len(shape) == 3 for shape in form.shapes):
        if source.chance(0.4) and all(value.dim() in (2, 3) and value.shape[0] == values[0].shape[0] for value in values):
            return source.lay(torch.cat(values, 1))
    return list(values)


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
            of_truth["quality"] = torch.cat([value.reshape(-1) for value in drawn])
            qualities = per_level(source, drawn, form)
    others = [targets] + ([qualities] if loss.takes_quality and not is_dense and (qualities is not None) else [])
    pos_neg = None
    if loss.is_equalized:
        pos_neg = draw_ratios(source, form.classes - is_eqlv2, is_eqlv2)
        others.append(source.lay(pos_neg))
    reduction = "sum" if loss.is_equalized else source.pick(("sum", "mean", "none"))
    if not loss.is_equalized:
        options["reduction"] = reduction
    if not is_eqlv2 and source.chance(0.4):
        options["avg_factor"] = source.pick(FACTORS, 1e-30, 1e30)
        if source.chance(0.5):
            options["avg_factor"] = torch.tensor(options["avg_factor"], dtype=source.pick((torch.float32, torch.float64)))
    rows = form.to_rows(levels)
    upstream = draw_upstream(source, form, dtype, reduction)

    exponent = torch.as_tensor(options.get("focal_gamma", options.get("beta", options.get("gamma", 0.0)))).max()
    slack = max(1.0, (float(exponent) + options.get("scale_factor", 0.0)) / LARGEST_EXPONENT)

    @functools.cache
    def truth() -> Wanted:
        found = truth_of(loss, rows, of_truth, options, pos_neg, reduction)
        if is_singular(loss, rows, of_truth):
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
        options["gamma"] = 2.0 if gamma == 0 and is_weighting else gamma
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
    flat = torch.cat([value.reshape(-1) if is_row else value.reshape(-1, form.classes) for value in laid])
    return per_level(source, laid, form), flat


def draw_labels(source: Source, form: Form, background: str) -> tuple[Tensor | list[Tensor], Tensor]:
    kind = source.pick((torch.int64, torch.int32), torch.int16, torch.int8, torch.uint8)
    first, laid = int(background == "first"), []
    share, ignored = source.pick((0.0, 0.1, 0.5), 1.0), source.pick((0.0, 0.2), 0.9)
    above = min(form.classes + source.pick(ABOVE), torch.iinfo(kind).max) if source.chance(0.1) else None
    for shape in form.rows:
        chance = source.uniform(shape)
        labels = torch.randint(0, form.classes, shape, generator=source.generator) + first
        labels = torch.where(chance < share, labels, 0 if first else form.classes)
        if above:
            labels = torch.where(source.mask(shape, 0.1), above, labels)
        if kind != torch.uint8:
            labels = torch.where(chance > 1 - ignored, source.pick((-1,), -5, torch.iinfo(kind).min), labels)
        laid.append(source.lay(labels.to(kind), may_expand=True))
    flat = torch.cat([value.reshape(-1) for value in laid])
    if form.is_maps and source.chance(0.3):
        # [B, *spatial, A]
        laid = [
            value.reshape(shape[0], *shape[2:], sizes[2]) for value, shape, sizes in zip(laid, form.shapes, form.sizes, strict=True)
        ]
        return (laid if form.is_list else laid[0]), flat
    return per_level(source, laid, form), flat


def draw_dense(source: Source, form: Form, dtype: torch.dtype) -> tuple[Tensor | list[Tensor], Tensor]:
    """In the shape of the logits, or [B, S A, C] for maps."""
    share, kind = source.pick((0.05, 0.3), 1.0), source.pick(FLOATS, torch.int64, torch.bool)
    is_soft, ignored = source.chance(0.5), source.pick((0.0, 0.2))
    in_shape = not form.is_maps or form.is_ambiguous or source.chance(0.5)
    if form.is_ambiguous and kind not in FLOATS:
        kind = torch.float32
    laid = []
    for shape, rows in zip(form.shapes, form.rows, strict=True):
        shape = shape if in_shape else (*rows, form.classes)
        if kind not in FLOATS:
            laid.append(source.lay(source.mask(shape, share).to(kind)))
            continue
        chance = source.uniform(shape)
        soft = draw_quality(source, shape, kind).double() if is_soft else torch.ones(shape, dtype=torch.float64)
        values = torch.where(chance < share, soft, torch.where(chance > 1 - ignored, -0.7, source.pick((0.0, -0.0))))
        laid.append(source.lay(source.broken(values.to(kind), 0.05, (NAN,))))
    flat = form.to_rows(laid) if in_shape else torch.cat([value.reshape(-1, form.classes) for value in laid])
    flat = flat.to(dtype) if kind not in FLOATS else flat
    if not form.is_list:
        return laid[0], flat
    return (laid if in_shape else per_level(source, laid, form)), flat


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


