"""Losses of the library in Ultralytics' YOLO detectors, in the place of their binary cross entropy.

    from rsloss_kernels.integrations.ultralytics import trainer_with

    YOLO("yolov8n.yaml").train(trainer=trainer_with("rank_sort"), data="coco128.yaml")

The criterion hands its class logits and targets, of all images and levels at once, to one term and divides what that returns by
the sum of the targets. Only the term is replaced: the assigner, the box losses and the gains stay (`cls=`, `box=`, `dfl=` of a training).
"""
import copy
import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from rsloss_kernels.integrations._frameworks import check_installed

check_installed("ultralytics", "ultralytics")

from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import E2ELoss, v8DetectionLoss

from rsloss_kernels import GHMC, APLoss, QualityFocalLoss, RankSortLoss, SigmoidFocalLoss, VarifocalLoss

# The targets are dense: how good a box is for its class, 0 for all others.
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "rank_sort": RankSortLoss,
    "ap": APLoss,
    "focal": SigmoidFocalLoss,
    "quality_focal": QualityFocalLoss,
    "varifocal": VarifocalLoss,
    "ghm": GHMC,
}
ELEMENTWISE = (SigmoidFocalLoss, QualityFocalLoss, VarifocalLoss)
Model = TypeVar("Model", bound=DetectionModel)


class ClassTerm(nn.Module):
    """Stands where the criterion has its BCEWithLogitsLoss: the sum of what it returns is divided by the sum of the targets.

    Focal losses are divided so as they are. Ranking losses and GHM normalise themselves, so here they are multiplied by that sum.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[B, A, C] logits and targets within [0, 1] -> 0-d."""
        if isinstance(self.loss, ELEMENTWISE):
            return self.loss(logits, targets, reduction_override="sum")
        result = self.loss(logits, targets)
        losses = result if isinstance(result, tuple) else (result,)
        return sum(losses) * targets.sum(dtype=torch.float32).clamp(min=1)


def use_loss(model: Model, loss: str = "rank_sort", **options: object) -> Model:
    """Trains a DetectionModel with a loss of this library in place of binary cross entropy, from its next step on.

    Scores of "rank_sort" and "ap" have an order but no level: give `predict` and `val` a `conf` of 0.001 or one of your own, since
    its default of 0.25 may drop any share of the detections. The state of "ghm" with a momentum is the criterion's, in no checkpoint.
    Checkpoints hold whole models: loaded, one has Ultralytics' own criterion and needs this library only if it is to `use_loss` again.

    Args:
        model: a DetectionModel, one with a v8DetectionLoss or, in end-to-end models, two.
        loss: "rank_sort", "ap", "focal", "quality_focal", "varifocal" or "ghm".
        options: keywords of the loss.

    Returns the model. Raises TypeError for another model; ValueError for an unknown loss, and in the first step of a training whose
    classes have weights (`cls_pw`).
    """
    if getattr(type(model), "init_criterion", None) is not DetectionModel.init_criterion:
        raise TypeError(f"use_loss: model must be a DetectionModel with its own criterion, got {type(model).__name__}")
    if loss not in LOSSES:
        raise ValueError(f"use_loss: loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    LOSSES[loss](**options)  # errors are told here rather than in the first step
    # The criterion is made in the first step, when the model is where it trains.
    model.init_criterion = Criterion(make_criterion, model, loss, options)
    model.criterion = None
    return model


class Criterion(functools.partial):
    """Makes a model's criterion, of its copies theirs; pickled it is Ultralytics' own, for whom loads the checkpoint may lack this library."""

    def __deepcopy__(self, memo: dict) -> "Criterion":
        return Criterion(self.func, *copy.deepcopy(self.args, memo))

    def __reduce__(self):
        return functools.partial, (DetectionModel.init_criterion, self.args[0])


def make_criterion(model: DetectionModel, loss: str, options: dict[str, object]) -> v8DetectionLoss | E2ELoss:
    """The model's own criterion with another class term."""
    criterion = DetectionModel.init_criterion(model)
    for part in (criterion.one2many, criterion.one2one) if isinstance(criterion, E2ELoss) else (criterion,):
        if part.class_weights is not None:
            raise ValueError(f"use_loss: cls_pw must be 0, the criterion cannot weigh the classes of loss {loss!r}")
        part.bce = ClassTerm(LOSSES[loss](**options).to(part.device))
    return criterion


def trainer_with(loss: str = "rank_sort", **options: object) -> type[DetectionTrainer]:
    """A trainer for `YOLO(...).train(trainer=...)` whose models `use_loss`. Raises ValueError for an unknown loss."""
    if loss not in LOSSES:
        raise ValueError(f"trainer_with: loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    LOSSES[loss](**options)  # errors are told here rather than in the training

    class Trainer(DetectionTrainer):
        def get_model(self, *arguments, **keywords):
            return use_loss(super().get_model(*arguments, **keywords), loss, **options)

    return Trainer
