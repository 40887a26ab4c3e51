"""Focal, quality focal and varifocal loss: the public functions."""
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from rsloss_kernels import _backends, _checks, _library
from rsloss_kernels.losses.focal import arguments
from rsloss_kernels.losses.focal.op import Modulator
from rsloss_kernels.losses.levels import Levelled, Levels, read_levels


class Request(NamedTuple):
    """The checked arguments of a loss, in the form that the operators take."""

    levels: Levels
    targets: list[Tensor]
    qualities: list[Tensor]
    weights: list[Tensor]
    class_table: Tensor
    normalizer: Tensor | None
    modulator: int
    background_first: bool
    ignore_index: int | None
    scale: float

    def call(self, operator: str, *more: object) -> tuple[Tensor, ...]:
        logits = [level.logits for level in self.levels.levels]
        backend = _backends.resolve(operator, logits[0].device.type)
        tensors = self.targets, self.qualities, self.weights, self.class_table, self.normalizer
        options = int(self.modulator), self.levels.maps, self.background_first, self.ignore_index, self.scale
        return _library.differentiable(operator, backend, logits, *tensors, *options, *more)

    def reduce(self, reduction: str) -> Tensor | list[Tensor]:
        if reduction == "none":
            return self.levels.restore(self.call("focal_elements"))
        return self.call("focal_forward", False)[0]


class Keywords(TypedDict, total=False):
    """Those that all functions share but `reduction`, for the types of what they return."""

    weight: Levelled | None
    class_weight: Tensor | Sequence[float] | None
    class_mask: Tensor | Sequence[bool] | None
    avg_factor: float | Tensor | None
    background: str
    ignore_index: int | None
    layout: str
    num_classes: int | None


class FocalKeywords(Keywords, total=False):
    alpha: float
    gamma: float | Tensor


class QualityKeywords(Keywords, total=False):
    beta: float | Tensor


class VarifocalKeywords(FocalKeywords, total=False):
    iou_weighted: bool


@overload
def sigmoid_focal_loss(
    logits: Tensor, targets: Levelled, *, reduction: str = "none", **keywords: Unpack[FocalKeywords]
) -> Tensor: ...


@overload
def sigmoid_focal_loss(
    logits: Sequence[Tensor], targets: Levelled, *, reduction: Literal["none"] = "none", **keywords: Unpack[FocalKeywords]
) -> list[Tensor]: ...


@overload
def sigmoid_focal_loss(
    logits: Sequence[Tensor], targets: Levelled, *, reduction: Literal["mean", "sum"], **keywords: Unpack[FocalKeywords]
) -> Tensor: ...


@overload
def sigmoid_focal_loss(
    logits: Levelled, targets: Levelled, *, reduction: str = "none", **keywords: Unpack[FocalKeywords]
) -> Tensor | list[Tensor]: ...


def sigmoid_focal_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    alpha: float = 0.25,
    gamma: float | Tensor = 2.0,
    weight: Tensor | Sequence[Tensor] | None = None,
    class_weight: Tensor | Sequence[float] | None = None,
    class_mask: Tensor | Sequence[bool] | None = None,
    reduction: str = "none",
    avg_factor: float | Tensor | None = None,
    background: str = "last",
    ignore_index: int | None = None,
    layout: str = "rows",
    num_classes: int | None = None,
) -> Tensor | list[Tensor]:
    """Focal loss `-alpha_t (1 - p_t)^gamma log p_t` of each element; with `gamma=0, alpha=-1` binary cross entropy with class weights.

    Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, eq. 5. Finite for every finite logit.

    Args:
        logits: one tensor, or a list of levels with one dtype (float16, bfloat16, float32 or float64) and one number of classes C:
            [..., C] in the layout "rows", else maps [B, A * C, *spatial] of A anchors as from a head.
        targets: class indices, an integral dtype: per level the shape of the logits less C, or for maps [B, S * A], [B, *spatial, A] (one
            anchor: [B, *spatial]) in the order (h, w, anchor). A label that is no foreground class is background; a negative one
            drops its row. Or dense, any real dtype, with the shape of the logits or that of labels and C: values in [0, 1] mix the two
            terms as in torchvision, one below 0 drops its element. A list with one per level, or one tensor in which the levels follow
            one another ([B, K] or [B, K, C]). All levels have one form; where shapes fit two, dense ones are read as the logits are.
        alpha: weight of positives, 1 - alpha that of negatives; below 0: both weigh 1.
        gamma: at least 0, one number or a Tensor [C].
        weight: floating, integral or bool; per row, with the shape of labels, or per element, with that of dense targets. Elements whose
            weight is 0 may hold anything.
        class_weight: [C], a factor of each class; integral or floating, a Tensor or a list (which a GPU waits for: in every call it is copied
            to the device, which a CUDA graph cannot capture: give a Tensor).
        class_mask: [C], the classes that take part (not 0), in either form; the columns of others cost and do nothing, as in federated
            losses.
        reduction: "none", "mean" (over all elements, or `avg_factor`) or "sum".
        avg_factor: a number or a Tensor of one number that divides, whatever the reduction; a Tensor is read where it is, on its device.
            0 divides as in floating point: infinity, or NaN where nothing counts.
        background: of class indices: "last" (classes 0..C-1, background C) or "first" (background 0, classes 1..C).
        ignore_index: one more label that drops its row, whatever else it would mean.
        layout: "rows"; or of maps "anchor_major" (channel = anchor * C + class, as heads have it) or "class_major" (class * A + anchor).
            Maps in channels-last memory are taken as they lie.
        num_classes: C; None: the last dimension of rows; the channels of maps, which have one anchor then.

    Returns:
        "none": the loss of each element, in the shapes and the dtype of the logits (a list for a list), 0 where it was dropped. Else
        0-d, float64 for float64 logits, else float32; an exact zero connected to the graph where nothing counts.

    Everything but `logits` is detached; `logits`, `targets` and `weight` must not be edited in place before backward, which computes
    all anew. NaN in an element that counts makes the loss and that element's gradient NaN, and no other gradient.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, ranges; with RSLOSS_DEBUG_CHECKS=1 also labels above C and targets above 1.
        RuntimeError: a forced backend that cannot run.
    """
    function = "sigmoid_focal_loss"
    levels = read_levels(function, logits, layout, num_classes)
    gamma = read_gamma(function, "gamma", gamma, levels)
    table = arguments.ClassTable(gamma, *read_alpha(function, alpha), class_weight, class_mask)
    common = (weight, reduction, avg_factor, background, ignore_index)
    return make_request(levels, targets, None, table, Modulator.FOCAL, *common).reduce(reduction)


@overload
def quality_focal_loss(
    logits: Tensor, targets: Levelled, quality: Levelled | None = None, *, reduction: str = "none",
    **keywords: Unpack[QualityKeywords],
) -> Tensor: ...


@overload
def quality_focal_loss(
    logits: Sequence[Tensor], targets: Levelled, quality: Levelled | None = None, *, reduction: Literal["none"] = "none",
    **keywords: Unpack[QualityKeywords],
) -> list[Tensor]: ...


@overload
def quality_focal_loss(
    logits: Sequence[Tensor], targets: Levelled, quality: Levelled | None = None, *, reduction: Literal["mean", "sum"],
    **keywords: Unpack[QualityKeywords],
) -> Tensor: ...


@overload
def quality_focal_loss(
    logits: Levelled, targets: Levelled, quality: Levelled | None = None, *, reduction: str = "none",
    **keywords: Unpack[QualityKeywords],
) -> Tensor | list[Tensor]: ...


def quality_focal_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None = None,
    *,
    beta: float | Tensor = 2.0,
    weight: Tensor | Sequence[Tensor] | None = None,
    class_weight: Tensor | Sequence[float] | None = None,
    class_mask: Tensor | Sequence[bool] | None = None,
    reduction: str = "none",
    avg_factor: float | Tensor | None = None,
    background: str = "last",
    ignore_index: int | None = None,
    layout: str = "rows",
    num_classes: int | None = None,
) -> Tensor | list[Tensor]:
    """Quality focal loss `|t - p|^beta CE(p, t)` with the quality of a box as target `t` of its class.

    Li et al., "Generalized Focal Loss", NeurIPS 2020, eq. 5.

    Args:
        targets: class indices with `quality`, or dense targets, which are the qualities.
        quality: floating, within [0, 1], with the shape of class indices: the target of the labelled class. None: 1. Below 0: the element
            of the labelled class is dropped.
        beta: at least 0, one number or a Tensor [C].

    Everything else as in `sigmoid_focal_loss`.
    """
    function = "quality_focal_loss"
    levels = read_levels(function, logits, layout, num_classes)
    table = arguments.ClassTable(read_gamma(function, "beta", beta, levels), 1.0, 1.0, class_weight, class_mask)
    common = (weight, reduction, avg_factor, background, ignore_index)
    return make_request(levels, targets, quality, table, Modulator.QUALITY, *common).reduce(reduction)


@overload
def varifocal_loss(
    logits: Tensor, targets: Levelled, quality: Levelled | None = None, *, reduction: str = "none",
    **keywords: Unpack[VarifocalKeywords],
) -> Tensor: ...


@overload
def varifocal_loss(
    logits: Sequence[Tensor], targets: Levelled, quality: Levelled | None = None, *, reduction: Literal["none"] = "none",
    **keywords: Unpack[VarifocalKeywords],
) -> list[Tensor]: ...


@overload
def varifocal_loss(
    logits: Sequence[Tensor], targets: Levelled, quality: Levelled | None = None, *, reduction: Literal["mean", "sum"],
    **keywords: Unpack[VarifocalKeywords],
) -> Tensor: ...


@overload
def varifocal_loss(
    logits: Levelled, targets: Levelled, quality: Levelled | None = None, *, reduction: str = "none",
    **keywords: Unpack[VarifocalKeywords],
) -> Tensor | list[Tensor]: ...


def varifocal_loss(
    logits: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None = None,
    *,
    alpha: float = 0.75,
    gamma: float | Tensor = 2.0,
    iou_weighted: bool = True,
    weight: Tensor | Sequence[Tensor] | None = None,
    class_weight: Tensor | Sequence[float] | None = None,
    class_mask: Tensor | Sequence[bool] | None = None,
    reduction: str = "none",
    avg_factor: float | Tensor | None = None,
    background: str = "last",
    ignore_index: int | None = None,
    layout: str = "rows",
    num_classes: int | None = None,
) -> Tensor | list[Tensor]:
    """Varifocal loss: `t CE(p, t)` of positives, whose target is their quality, and `alpha p^gamma CE(p, 0)` of negatives.

    Zhang et al., "VarifocalNet", CVPR 2021, eq. 2. Elements with `t > 0` are positives: a quality of 0 is a negative, as published.

    Args:
        targets: class indices with `quality`, or dense targets, which are the qualities.
        quality: as in `quality_focal_loss`.
        alpha: weight of negatives, at least 0.
        gamma: at least 0, one number or a Tensor [C].
        iou_weighted: whether positives are weighted by their quality.

    Everything else as in `sigmoid_focal_loss`.
    """
    function = "varifocal_loss"
    iou_weighted = _checks.read_flag(function, "iou_weighted", iou_weighted)
    levels = read_levels(function, logits, layout, num_classes)
    gamma, alpha = read_gamma(function, "gamma", gamma, levels), arguments.read_number(function, "alpha", alpha)
    table = arguments.ClassTable(gamma, 1.0, alpha, class_weight, class_mask)
    modulator = Modulator.VARIFOCAL if iou_weighted else Modulator.VARIFOCAL_UNWEIGHTED
    common = (weight, reduction, avg_factor, background, ignore_index)
    return make_request(levels, targets, quality, table, modulator, *common).reduce(reduction)


def make_request(
    levels: Levels,
    targets: Tensor | Sequence[Tensor],
    quality: Tensor | Sequence[Tensor] | None,
    table: arguments.ClassTable | Tensor,
    modulator: int,
    weight: Tensor | Sequence[Tensor] | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    background: str,
    ignore_index: int | None,
    name_of_targets: str = "targets",
    **normalising: Any,
) -> Request:
    """`name_of_targets`: of `arguments.read_targets`; `normalising`: options of `arguments.read_reduction`."""
    if isinstance(table, arguments.ClassTable):
        if table.is_uniform and arguments.has_few_rows(levels, targets, weight):
            levels = levels.as_elements()
        table = table.of(levels)
    normalizer, scale = arguments.read_reduction(levels, reduction, avg_factor, **normalising)
    targets, qualities = arguments.read_targets(levels, targets, quality, background, name_of_targets)
    ignored = arguments.read_ignore_index(levels.function, ignore_index)
    weights, first = arguments.read_weights(levels, weight), background == "first"
    return Request(levels, targets, qualities, weights, table, normalizer, modulator, first, ignored, scale)


def read_gamma(function: str, name: str, gamma: float | Tensor, levels: Levels) -> float | Tensor:
    if isinstance(gamma, Tensor) and gamma.dim() > 0:
        return arguments.read_class_vector(function, name, gamma, levels)
    return arguments.read_number(function, name, gamma)


def read_alpha(function: str, alpha: float) -> tuple[float, float]:
    """The weights of positives and of negatives."""
    alpha = arguments.read_number(function, "alpha", alpha, least=None)
    return (1.0, 1.0) if alpha < 0 else (alpha, 1.0 - alpha)
