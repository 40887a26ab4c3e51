"""The losses with the constructors and calls of MMDetection, registered in its `MODELS`.

A loss that MMDetection has as well is registered as `Fused<its name>` and takes what its own takes: FusedFocalLoss, FusedGHMC, ...
`patch_mmdet` puts them under the framework's names. Values and gradients are those of the framework's losses, but for what rounding
takes from theirs; state, as GHM's and EQL v2's, changes in training mode only.
"""
import torch
from mmdet.models import losses as theirs
from mmdet.registry import MODELS
from torch import Tensor, nn

import rsloss_kernels
from rsloss_kernels.losses.focal.modules import EPS
from rsloss_kernels.losses.smooth_l1 import api as smooth_l1

FocalLossOfProbabilities = theirs.FocalLoss
QualityFocalLossOfProbabilities = theirs.QualityFocalLoss


class _NotBuilt(nn.Module):
    """Stands before the framework's loss among the bases, and does not call its constructor."""

    def __init__(self):
        nn.Module.__init__(self)


class _InPlaceOf(type):
    """Of a loss whose last base is the framework's: objects of either are instances of both.

    Heads ask `isinstance(self.loss_cls, QualityFocalLoss)` in every step, of what their module holds by this name at that time, whether
    the model was built before a patch, under it, or names the fused loss itself.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or (_NotBuilt in cls.__bases__ and isinstance(instance, cls.__bases__[-1]))


class _RankingLoss(nn.Module):
    """Calls the library's module `ranking_loss` as MMDetection calls its losses. The heads of this package call that one itself."""

    custom_cls_channels = True  # MMDetection then asks for `get_cls_channels` and `get_activation`

    def __init__(self, ranking_loss: nn.Module, use_sigmoid: bool):
        super().__init__()
        if not use_sigmoid:
            raise NotImplementedError(f"{type(self).__name__}: use_sigmoid must be True: there is one logit per class, none for background")
        self.use_sigmoid = use_sigmoid
        self.ranking_loss = ranking_loss

    def forward(
        self,
        pred: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss of all rows together, 0-d.

        Args:
            pred: [A, C], logits.
            target: labels [A], 0..C-1 foreground and C background, or `(labels, quality)`; see `rank_sort_loss` for dense targets. With
                ALRPLoss the quality is the regression loss of every row.
            weight: the shape of the labels; what has no weight above 0 is ignored, how large it is does not matter.
            avg_factor, reduction_override: have no effect: the loss is a mean over the positives.
        """
        labels, quality = target if isinstance(target, tuple) else (target, None)
        if weight is not None:
            labels = torch.where(weight > 0, labels, -1)
        return self._evaluate(pred, labels, quality)

    def get_cls_channels(self, num_classes: int) -> int:
        """Asked by MMDetection's own box heads, which would rank their background as one class more: raises TypeError."""
        raise TypeError(
            f"{type(self).__name__} ranks one sigmoid logit per foreground class: take RankSortBBoxHead in place of MMDetection's box heads"
        )

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores, for the dense heads."""
        return cls_score.sigmoid()

    def _evaluate(self, pred: Tensor, labels: Tensor, quality: Tensor | None) -> Tensor:
        raise NotImplementedError


@MODELS.register_module()
class RankSortLoss(_RankingLoss):
    """`rsloss_kernels.RankSortLoss` with its options; forward returns ranking + sorting."""

    def __init__(self, delta: float = 0.5, loss_weight: float = 1.0, use_sigmoid: bool = True, **options: object):
        super().__init__(rsloss_kernels.RankSortLoss(delta, loss_weight=loss_weight, **options), use_sigmoid)

    def _evaluate(self, pred: Tensor, labels: Tensor, quality: Tensor | None) -> Tensor:
        return sum(self.ranking_loss(pred, labels, quality))


@MODELS.register_module()
class APLoss(_RankingLoss):
    """`rsloss_kernels.APLoss` with its options; a quality has no effect."""

    def __init__(self, delta: float = 1.0, loss_weight: float = 1.0, use_sigmoid: bool = True, **options: object):
        super().__init__(rsloss_kernels.APLoss(delta, loss_weight=loss_weight, **options), use_sigmoid)

    def _evaluate(self, pred: Tensor, labels: Tensor, quality: Tensor | None) -> Tensor:
        return self.ranking_loss(pred, labels)


class _ALRPLoss(rsloss_kernels.ALRPLoss):
    """Ranks localisation errors: regression losses in units of that of a box with a GIoU of `iou_threshold`."""

    def __init__(self, delta: float, iou_threshold: float, **options: object):
        super().__init__(delta, **options)
        self.iou_threshold = iou_threshold

    def forward(self, logits: Tensor, targets: Tensor, regression_losses: Tensor) -> rsloss_kernels.ALRPLosses:
        return super().forward(logits, targets, regression_losses / (2 * (1 - self.iou_threshold)))


@MODELS.register_module()
class ALRPLoss(_RankingLoss):
    """`rsloss_kernels.ALRPLoss` with its options; forward needs `(labels, regression_losses)` and returns the classification loss.

    `iou_threshold`, in [0, 1): a GIoU loss counts as 1 where GIoU is 2 * iou_threshold - 1. As published 0.5, for an RPN 0.7.
    """

    def __init__(
        self, delta: float = 1.0, iou_threshold: float = 0.5, loss_weight: float = 1.0, use_sigmoid: bool = True, **options: object
    ):
        if not 0 <= iou_threshold < 1:
            raise ValueError(f"ALRPLoss: iou_threshold must be at least 0 and below 1, got {iou_threshold}")
        super().__init__(_ALRPLoss(delta, iou_threshold, loss_weight=loss_weight, **options), use_sigmoid)

    def _evaluate(self, pred: Tensor, labels: Tensor, quality: Tensor | None) -> Tensor:
        if quality is None:
            raise TypeError("ALRPLoss: target must be a tuple (labels, regression_losses), got labels alone")
        return self.ranking_loss(pred, labels, quality).classification


class _EqualizedFocus:
    """Mixin: MMDetection's dense heads read `use_sigmoid` from a configuration, and give it to the loss."""

    def __init__(self, *args: object, use_sigmoid: bool = True, **kwargs: object):
        if not use_sigmoid:
            raise NotImplementedError(f"{type(self).__name__}: use_sigmoid must be True (there is no softmax form), got False")
        super().__init__(*args, **kwargs)
        self.use_sigmoid = use_sigmoid


@MODELS.register_module()
class EqualizedFocalLoss(_EqualizedFocus, rsloss_kernels.EqualizedFocalLoss):
    """`rsloss_kernels.EqualizedFocalLoss`; give it `use_sigmoid=True` too. In FlatRetinaHead it is called once per step."""


@MODELS.register_module()
class EqualizedQualityFocalLoss(_EqualizedFocus, rsloss_kernels.EqualizedQualityFocalLoss):
    """`rsloss_kernels.EqualizedQualityFocalLoss`; give it `use_sigmoid=True` too."""


@MODELS.register_module()
class FusedFocalLoss(rsloss_kernels.SigmoidFocalLoss, _NotBuilt, theirs.FocalLoss, metaclass=_InPlaceOf):
    """FocalLoss. Probabilities (`activated=True`) are left to the framework's own code."""

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: float = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ):
        super().__init__(use_sigmoid, gamma, alpha, reduction, loss_weight)
        self.activated = activated

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        if self.activated:
            return FocalLossOfProbabilities.forward(self, pred, target, weight, avg_factor, reduction_override)
        return super().forward(pred, target, weight, avg_factor, reduction_override)


@MODELS.register_module()
class FusedQualityFocalLoss(rsloss_kernels.QualityFocalLoss, _NotBuilt, theirs.QualityFocalLoss, metaclass=_InPlaceOf):
    """QualityFocalLoss; a negative label is background as there. Probabilities (`activated=True`) are left to the framework's code."""

    def __init__(
        self,
        use_sigmoid: bool = True,
        beta: float = 2.0,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
    ):
        super().__init__(use_sigmoid, beta, reduction, loss_weight)
        self.activated = activated

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        if self.activated:
            return QualityFocalLossOfProbabilities.forward(self, pred, target, weight, avg_factor, reduction_override)
        if isinstance(target, (tuple, list)):
            labels, quality = target
            target = torch.where(labels >= 0, labels, pred.shape[-1]), quality
        return super().forward(pred, target, weight, avg_factor, reduction_override)


@MODELS.register_module()
class FusedVarifocalLoss(rsloss_kernels.VarifocalLoss, _NotBuilt, theirs.VarifocalLoss, metaclass=_InPlaceOf):
    """VarifocalLoss."""


@MODELS.register_module()
class FusedGHMC(rsloss_kernels.GHMC, _NotBuilt, theirs.GHMC, metaclass=_InPlaceOf):
    """GHMC; as there `reduction_override` stands fourth, and other keywords, `avg_factor` among them, have no effect."""

    def forward(self, pred, target, label_weight, reduction_override=None, **ignored):
        return super().forward(pred, target, label_weight, reduction_override=reduction_override)


@MODELS.register_module()
class FusedGHMR(rsloss_kernels.GHMR, _NotBuilt, theirs.GHMR, metaclass=_InPlaceOf):
    """GHMR."""


@MODELS.register_module()
class FusedEQLV2Loss(rsloss_kernels.EQLv2Loss, _NotBuilt, theirs.EQLV2Loss, metaclass=_InPlaceOf):
    """EQLV2Loss. `reduction`, `class_weight` and `vis_grad` have no effect, as there. `use_distributed` adds up the gradients of all
    processes, which they differ without."""

    def __init__(
        self,
        use_sigmoid: bool = True,
        reduction: str = "mean",
        class_weight: Tensor | None = None,
        loss_weight: float = 1.0,
        num_classes: int = 1203,
        use_distributed: bool = False,
        mu: float = 0.8,
        alpha: float = 4.0,
        gamma: float = 12,
        vis_grad: bool = False,
        test_with_obj: bool = True,
    ):
        group = "default" if use_distributed else None
        super().__init__(num_classes, gamma, mu, alpha, loss_weight, group, test_with_obj=test_with_obj)


@MODELS.register_module()
class FusedSeesawLoss(rsloss_kernels.SeesawLoss, _NotBuilt, theirs.SeesawLoss, metaclass=_InPlaceOf):
    """SeesawLoss."""

    def __init__(
        self,
        use_sigmoid: bool = False,
        p: float = 0.8,
        q: float = 2.0,
        num_classes: int = 1203,
        eps: float = 1e-2,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        return_dict: bool = True,
    ):
        options = {"reduction": reduction, "return_dict": return_dict, "use_sigmoid": use_sigmoid}
        super().__init__(num_classes, p, q, eps, loss_weight, **options)


@MODELS.register_module()
class FusedSmoothL1Loss(_NotBuilt, theirs.SmoothL1Loss, metaclass=_InPlaceOf):
    """SmoothL1Loss. `beta` may be changed between steps, as MMDetection's dynamic head does, and may be a Tensor."""

    def __init__(self, beta: float | Tensor = 1.0, reduction: str = "mean", loss_weight: float = 1.0):
        super().__init__()
        self.beta = beta
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
        reduction = reduction_override or self.reduction
        if avg_factor is not None and reduction == "sum":
            raise ValueError("FusedSmoothL1Loss: avg_factor must be None with reduction 'sum': only 'mean' divides")
        divisor = None if reduction == "none" else avg_factor
        return smooth_l1.evaluate("FusedSmoothL1Loss", pred, target, self.beta, weight, reduction, divisor, self.loss_weight, EPS)


FUSED = (
    *(FusedFocalLoss, FusedQualityFocalLoss, FusedVarifocalLoss, FusedGHMC, FusedGHMR, FusedEQLV2Loss, FusedSeesawLoss, FusedSmoothL1Loss),
)
