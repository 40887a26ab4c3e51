"""The losses of the library under the names that the torchvision adapters take, and how one is called on the rows of a dense head."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rsloss_kernels import (
    GHMC,
    ALRPLoss,
    APLoss,
    EQLv2Loss,
    EqualizedFocalLoss,
    EqualizedQualityFocalLoss,
    GroupSoftmaxLoss,
    QualityFocalLoss,
    RankSortLoss,
    SeesawLoss,
    SigmoidFocalLoss,
    VarifocalLoss,
    _checks,
)
from rsloss_kernels.integrations._ranking_head import RANKING_LOSSES, RankingHeadLoss

# How each is made for a head with that many channels per anchor. Channel 0 is the background of EQL v2, and not one of its classes.
DENSE_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "rank_sort": lambda channels, **options: RankSortLoss(**options),
    "ap": lambda channels, **options: APLoss(**options),
    "alrp": lambda channels, **options: ALRPLoss(**options),
    "focal": lambda channels, **options: SigmoidFocalLoss(**options),
    "quality_focal": lambda channels, **options: QualityFocalLoss(**options),
    "varifocal": lambda channels, **options: VarifocalLoss(**options),
    "ghm": lambda channels, **options: GHMC(**options),
    "efl": lambda channels, **options: EqualizedFocalLoss(channels, **options),
    "eqfl": lambda channels, **options: EqualizedQualityFocalLoss(channels, **options),
    "eqlv2": lambda channels, **options: EQLv2Loss(channels - 1, **options),
}
# For a box predictor of so many classes, without the background. Group softmax needs groups=ClassGroups(...).
ROI_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "group_softmax": lambda classes, **options: GroupSoftmaxLoss(**options),
    "eqlv2": lambda classes, **options: EQLv2Loss(classes, **options),
    "seesaw": lambda classes, **options: SeesawLoss(classes, **options),
    **{name: DENSE_LOSSES[name] for name in ("rank_sort", "ap", "alrp")},
}
# Their score is how good the box is, which a centre-ness would multiply once more.
QUALITY_LOSSES = (QualityFocalLoss, VarifocalLoss, EqualizedQualityFocalLoss)
DENSE_CLASSES = (*RANKING_LOSSES, SigmoidFocalLoss, *QUALITY_LOSSES, GHMC, EqualizedFocalLoss, EQLv2Loss)
ROI_CLASSES = (*RANKING_LOSSES, GroupSoftmaxLoss, EQLv2Loss, SeesawLoss)


def make_dense_loss(loss: str | nn.Module, channels: int, **options: object) -> nn.Module:
    """A RankingHeadLoss around a ranking loss, any other as it is."""
    made = _make(loss, DENSE_LOSSES, (RankingHeadLoss, *DENSE_CLASSES), channels, options)
    background = getattr(made, "background", "last")
    if background != "last":
        raise ValueError(f"use_loss: the background must be last in the labels of a dense head, got background={background!r}")
    return RankingHeadLoss(made) if isinstance(made, RANKING_LOSSES) else made


def make_roi_loss(loss: str | nn.Module, num_classes: int, **options: object) -> nn.Module:
    """A RankingHeadLoss around a ranking loss, any other as it is."""
    made = _make(loss, ROI_LOSSES, (RankingHeadLoss, *ROI_CLASSES), num_classes, options)
    if isinstance(made, RANKING_LOSSES):
        made = RankingHeadLoss(made)
    if isinstance(made, RankingHeadLoss):
        return made
    of_loss = made.groups.num_classes if isinstance(made, GroupSoftmaxLoss) else made.num_classes
    if of_loss != num_classes:
        raise ValueError(f"use_loss: the loss must be of the model's {num_classes} classes without the background, got {of_loss}")
    return made


def _make(
    loss: str | nn.Module, table: dict[str, Callable[..., nn.Module]], classes: tuple[type, ...], size: int, options: dict[str, object]
) -> nn.Module:
    if "num_classes" in options:
        raise ValueError(f"use_loss: num_classes is the model's own, {size}, and must not be given")
    if loss == "group_softmax" and loss in table and "groups" not in options:
        raise ValueError("use_loss: 'group_softmax' needs groups=ClassGroups(...)")
    if isinstance(loss, str) and loss in table:
        return table[loss](size, **options)
    if not isinstance(loss, classes):
        modules = ", ".join(one.__name__ for one in classes)
        raise ValueError(f"use_loss: loss must be one of {', '.join(map(repr, table))}, or a module {modules}, got {loss!r}")
    if options:
        raise ValueError(f"use_loss: {', '.join(options)} must be given to the module, which is made already")
    return loss


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Labels beyond the channels would be taken as background: the error of who forgets the background in num_classes."""
    if torch.compiler.is_compiling() or not labels.numel():
        return
    least, most = labels.aminmax()
    wanted = (
        f"labels of the targets must be within 0..{num_classes - 1} for a model of {num_classes} classes (torchvision counts the "
        "background in num_classes)"
    )
    if labels.device.type == "cpu" or _checks.debug_checks():
        if least < 0 or most >= num_classes:
            raise ValueError(f"{wanted}, got {int(least)}..{int(most)}")
    else:
        # The host does not wait: an assertion of the device, as torchvision's own loss has.
        torch._assert_async((least >= 0) & (most < num_classes), wanted)


def class_loss(
    loss: nn.Module, logits: Tensor, labels: Tensor, row_weights: Tensor | None, num_positives: int, quality: Callable[[], Tensor]
) -> Tensor:
    """The loss of the class logits, 0-d, in one call of the module `loss`, which is no ranking loss.

    Args:
        logits: [R, K], of all rows.
        labels: [R]: 0..K-1 the positives, K the background, negative: ignored.
        row_weights: [R], which normalise the focal loss; without them it is divided by the number of positives as the others are (but
            GHM, which normalises itself).
        num_positives: how many rows are positive.
        quality: gives [R], the IoU of each positive row's predicted box; called only for the losses that read it.
    """
    count = max(1, num_positives)
    if isinstance(loss, SigmoidFocalLoss):
        return loss(logits, labels, row_weights, reduction_override="sum") / (count if row_weights is None else 1)
    if isinstance(loss, QUALITY_LOSSES):
        return loss(logits, (labels, quality()), avg_factor=count)
    if isinstance(loss, GHMC):
        return loss(logits, labels, labels >= 0)
    if isinstance(loss, EQLv2Loss):
        # A mean over the rows, as published, would be next to nothing in a head with thousands of rows per object.
        return loss(logits.roll(-1, -1), torch.where(labels < 0, -1, labels - 1)) * (labels.numel() / count)
    return loss(logits, labels, avg_factor=count)
