"""SigmoidFocalLoss, QualityFocalLoss and VarifocalLoss: the losses as modules with MMDetection's constructors and forwards."""
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from rsloss_kernels import _checks
from rsloss_kernels.losses.focal import api, arguments
from rsloss_kernels.losses.focal.op import Modulator
from rsloss_kernels.losses.levels import LAYOUTS, Levelled, Levels, read_levels, read_num_classes

# What MMDetection adds to `avg_factor`.
EPS = torch.finfo(torch.float32).eps


class _SigmoidLoss(nn.Module):
    """What the modules share; `_options` are the names of the attributes that `repr` shows."""

    _options: tuple[str, ...] = ()
    sums_classes = False

    def __init__(
        self,
        use_sigmoid: bool,
        activated: bool,
        reduction: str,
        loss_weight: float,
        background: str,
        ignore_index: int | None,
        layout: str,
        num_classes: int | None,
    ):
        super().__init__()
        name = type(self).__name__
        use_sigmoid = _checks.read_flag(name, "use_sigmoid", use_sigmoid)
        activated = _checks.read_flag(name, "activated", activated)
        if not use_sigmoid:
            raise NotImplementedError(f"{name}: use_sigmoid must be True (there is no softmax form), got False")
        if activated:
            raise NotImplementedError(
                f"{name}: activated must be False: logits are wanted, not probabilities, in which confident errors have been rounded away, "
                "got True"
            )
        _checks.check_choice(name, "reduction", reduction, arguments.REDUCTIONS)
        _checks.check_choice(name, "background", background, ("last", "first"))
        _checks.check_choice(name, "layout", layout, LAYOUTS)
        self.use_sigmoid = use_sigmoid
        self.activated = activated
        self.reduction = reduction
        self.loss_weight = arguments.read_number(name, "loss_weight", loss_weight, least=None)
        self.background = background
        self.ignore_index = arguments.read_ignore_index(name, ignore_index)
        self.layout = layout
        self.num_classes = read_num_classes(name, num_classes)

    @overload
    def forward(
        self,
        pred: Tensor,
        target: Levelled | tuple[Levelled, Levelled],
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        pred: Levelled,
        target: Levelled | tuple[Levelled, Levelled],
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]: ...

    def forward(
        self,
        pred: Levelled,
        target: Levelled | tuple[Levelled, Levelled],
        weight: Levelled | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | list[Tensor]:
        """The loss times `loss_weight`.

        Args:
            pred: `logits` of the function: [N, C], any [..., C], maps, or a list of levels.
            target: `targets` of the function: class indices or dense. For QualityFocalLoss and VarifocalLoss also a tuple
                `(labels, quality)`.
            weight: as in the function; or [N, 1], or flat [N * C], for `pred` [N, C].
            avg_factor: a number or a Tensor of one number. "mean" divides by it plus float32's epsilon, as in MMDetection; "none" does
                not look at it; an error for "sum".
            reduction_override: "none", "mean" or "sum", in place of the module's `reduction`.

        Returns:
            "mean" without `avg_factor`: the mean over all elements, for QualityFocalLoss over the rows. "none": the loss of each element
            in the shape and dtype of `pred`, for QualityFocalLoss of each row (in the layout "rows" only).

        Raises TypeError, ValueError: wrong types, shapes, devices or ranges.
        """
        name = type(self).__name__
        reduction = self.reduction if reduction_override is None else reduction_override
        _checks.check_choice(name, "reduction_override", reduction, arguments.REDUCTIONS)
        if avg_factor is not None and reduction == "sum":
            raise ValueError(f"{name}: avg_factor must be None with reduction 'sum': only 'mean' divides")
        levels = read_levels(name, pred, self.layout, self.num_classes)
        targets, quality = self._split(target)
        request = api.make_request(
            levels,
            targets,
            quality,
            *self._table(),
            _as_published(levels, weight),
            reduction,
            None if reduction == "none" else avg_factor,
            self.background,
            self.ignore_index,
            loss_weight=self.loss_weight,
            eps=EPS,
            mean_over=levels.num_rows if self.sums_classes else 0,
        )
        losses = request.reduce(reduction)
        if reduction != "none" or not self.sums_classes:
            return losses
        if self.layout != "rows":
            raise ValueError(f"{name}: layout must be 'rows' with reduction 'none', which sums over the classes, got {self.layout!r}")
        return losses.sum(-1) if isinstance(losses, Tensor) else [level.sum(-1) for level in losses]

    if TYPE_CHECKING:
        __call__ = forward

    def _table(self) -> tuple[arguments.ClassTable, int]:
        """How classes weigh, and the modulator."""
        raise NotImplementedError

    def _split(self, target: Any) -> tuple[Any, Any]:
        """Targets and quality."""
        if not isinstance(target, tuple):
            return target, None
        if len(target) != 2:
            raise ValueError(f"{type(self).__name__}: target must be a Tensor or a tuple (labels, quality), got {len(target)} entries")
        return target

    def extra_repr(self) -> str:
        names = (*self._options, "reduction", "loss_weight", "background", "ignore_index", "layout", "num_classes")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _as_published(levels: Levels, weight: Any) -> Any:
    """Weights [N, 1] and [N * C] for logits [N, C], which MMDetection's heads use."""
    if not isinstance(weight, Tensor) or levels.is_list or levels.first.dim() != 2 or levels.first.shape == weight.shape:
        return weight
    rows, classes = levels.first.shape
    if weight.shape == (rows, 1):
        return weight[:, 0]
    return weight.view(rows, classes) if weight.shape == (rows * classes,) and classes > 1 and rows > 0 else weight


class SigmoidFocalLoss(_SigmoidLoss):
    """`sigmoid_focal_loss`; a drop-in replacement for MMDetection's FocalLoss.

    `forward(pred, target, weight=None, avg_factor=None, reduction_override=None)`.

    Args:
        use_sigmoid: must be True, else NotImplementedError.
        gamma, alpha: see `sigmoid_focal_loss`.
        reduction: "mean", "sum" or "none".
        loss_weight: factor of the loss.
        activated: must be False, else NotImplementedError: probabilities have lost what the loss needs.
        background, ignore_index, layout, num_classes: see `sigmoid_focal_loss`.
    """

    _options = ("gamma", "alpha")

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
        *,
        background: str = "last",
        ignore_index: int | None = None,
        layout: str = "rows",
        num_classes: int | None = None,
    ):
        super().__init__(use_sigmoid, activated, reduction, loss_weight, background, ignore_index, layout, num_classes)
        self.gamma = arguments.read_number("SigmoidFocalLoss", "gamma", gamma)
        self.alpha = arguments.read_number("SigmoidFocalLoss", "alpha", alpha, least=None)

    def _table(self) -> tuple[arguments.ClassTable, int]:
        return arguments.ClassTable(self.gamma, *api.read_alpha("SigmoidFocalLoss", self.alpha)), Modulator.FOCAL

    def _split(self, target: Any) -> tuple[Any, None]:
        return target, None


class QualityFocalLoss(_SigmoidLoss):
    """`quality_focal_loss`; a drop-in replacement for MMDetection's module of this name: its "none" sums over the classes, its mean is
    over rows. A negative label drops its row (there it is background).

    `forward(pred, target, weight=None, avg_factor=None, reduction_override=None)` with `target` a tuple `(labels, quality)` or dense.

    Args:
        use_sigmoid: must be True, else NotImplementedError.
        beta: see `quality_focal_loss`.
        reduction: "mean", "sum" or "none".
        loss_weight: factor of the loss.
        activated: must be False, else NotImplementedError: probabilities have lost what the loss needs.
        background, ignore_index, layout, num_classes: see `sigmoid_focal_loss`.
    """

    _options = ("beta",)
    sums_classes = True

    def __init__(
        self,
        use_sigmoid: bool = True,
        beta: float = 2.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
        *,
        background: str = "last",
        ignore_index: int | None = None,
        layout: str = "rows",
        num_classes: int | None = None,
    ):
        super().__init__(use_sigmoid, activated, reduction, loss_weight, background, ignore_index, layout, num_classes)
        self.beta = arguments.read_number("QualityFocalLoss", "beta", beta)

    def _table(self) -> tuple[arguments.ClassTable, int]:
        return arguments.ClassTable(self.beta, 1.0, 1.0), Modulator.QUALITY


class VarifocalLoss(_SigmoidLoss):
    """`varifocal_loss`; a drop-in replacement for MMDetection's module of this name.

    `forward(pred, target, weight=None, avg_factor=None, reduction_override=None)` with `target` dense or a tuple `(labels, quality)`.

    Args:
        use_sigmoid: must be True, else NotImplementedError.
        alpha, gamma, iou_weighted: see `varifocal_loss`.
        reduction: "mean", "sum" or "none".
        loss_weight: factor of the loss.
        background, ignore_index, layout, num_classes: see `sigmoid_focal_loss`.
    """

    _options = ("alpha", "gamma", "iou_weighted")

    def __init__(
        self,
        use_sigmoid: bool = True,
        alpha: float = 0.75,
        gamma: float = 2.0,
        iou_weighted: bool = True,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        *,
        background: str = "last",
        ignore_index: int | None = None,
        layout: str = "rows",
        num_classes: int | None = None,
    ):
        super().__init__(use_sigmoid, False, reduction, loss_weight, background, ignore_index, layout, num_classes)
        self.alpha = arguments.read_number("VarifocalLoss", "alpha", alpha)
        self.gamma = arguments.read_number("VarifocalLoss", "gamma", gamma)
        iou_weighted = _checks.read_flag("VarifocalLoss", "iou_weighted", iou_weighted)
        self.iou_weighted = iou_weighted

    def _table(self) -> tuple[arguments.ClassTable, int]:
        modulator = Modulator.VARIFOCAL if self.iou_weighted else Modulator.VARIFOCAL_UNWEIGHTED
        return arguments.ClassTable(self.gamma, 1.0, self.alpha), modulator
