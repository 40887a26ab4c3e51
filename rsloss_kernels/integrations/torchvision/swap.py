"""Puts a loss of the library into a model of torchvision, and Dynamic R-CNN into a Faster R-CNN."""
import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos, retinanet
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss, EQLv2Loss, GroupSoftmaxLoss, convert_classifier
from rsloss_kernels.integrations._ranking_head import RankingHeadLoss
from rsloss_kernels.integrations.torchvision.calibration import threshold_holder
from rsloss_kernels.integrations.torchvision.class_losses import make_roi_loss
from rsloss_kernels.integrations.torchvision.dense_heads import FIRST_BACKGROUND_LOGIT, FCOSHead, RetinaNetHead
from rsloss_kernels.integrations.torchvision.roi_heads import RoIHeads

TWO_BOX_LOSSES = "a ranking loss has a box loss of its own, take use_dynamic_rcnn(model, smooth_l1=False)"
Model = TypeVar("Model", bound=nn.Module)
DENSE_HEADS = {
    retinanet.RetinaNetHead: RetinaNetHead,
    RetinaNetHead: RetinaNetHead,
    fcos.FCOSHead: FCOSHead,
    FCOSHead: FCOSHead,
}


def use_loss(model: Model, loss: str | nn.Module = "rank_sort", *, score_thresh: float | str | None = "auto", **options: object) -> Model:
    """Trains a model of torchvision with a loss of this library: one call per step over all images and levels.

    The head is replaced in place, around the same parameters under the same names; its state (of losses that have one) joins the
    state_dict as `head.loss.*`, and a checkpoint without it loads. A new loss may replace the one that was put in before. In a Faster
    R-CNN (and a Mask or Keypoint R-CNN) the classifier gets the channels that the loss asks for, so do it before an optimiser is made:
    group softmax starts from the classifier that is there, EQL v2 and Seesaw from a new one.

    Args:
        model: RetinaNet or FCOS with torchvision's head; or a Faster R-CNN with torchvision's FastRCNNPredictor.
        loss: for RetinaNet and FCOS "rank_sort", "ap", "alrp", "focal", "quality_focal", "varifocal", "ghm", "efl", "eqfl", "eqlv2";
            for Faster R-CNN "rank_sort", "ap", "alrp", "group_softmax" (with `groups=ClassGroups(...)`), "eqlv2", "seesaw". Or a module of
            the library, or for a ranking loss a RankingHeadLoss, which has the options of its box loss. See RetinaNetHead, FCOSHead,
            RoIHeads. A ranking loss wants no sampler: make the Faster R-CNN with a `box_batch_size_per_image` above the number of
            proposals and `box_positive_fraction=1.0`. Its RPN stays as it is.
        score_thresh: of the detections. "auto": 0 for a ranking loss, which orders the scores but gives them no level, so that only the
            number of detections limits them (`calibrate_score_thresh` finds a better one after training); else the model's own. A
            number: that. None: the model's own, with a warning for a ranking loss if it is above 0.
        options: keywords of the loss that `loss` names.

    Returns the model.

    Raises TypeError, ValueError: another model or head, an unknown loss, options that the loss does not take.
    """
    if isinstance(score_thresh, str) and score_thresh != "auto":
        raise ValueError(f"use_loss: score_thresh must be 'auto', a number or None, got {score_thresh!r}")
    if isinstance(model, GeneralizedRCNN):
        is_ranking = _use_roi_loss(model, loss, options)
    else:
        head = getattr(model, "head", None)
        if not isinstance(model, (retinanet.RetinaNet, fcos.FCOS)) or type(head) not in DENSE_HEADS:
            wanted = "a RetinaNet or FCOS with the head of torchvision or of this library, or a Faster R-CNN"
            raise TypeError(f"use_loss: model must be {wanted}, got {type(model).__name__} with head {type(head).__name__}")
        new_head = _around(DENSE_HEADS[type(head)], head)
        new_head.set_loss(loss, **options)
        model.head = new_head
        is_ranking = new_head.is_ranking
    _set_threshold(model, score_thresh, is_ranking)
    return model


def use_dynamic_rcnn(
    model: Model,
    label_assignment: DynamicLabelAssignment | bool = True,
    smooth_l1: DynamicSmoothL1Loss | bool = True,
) -> Model:
    """Dynamic R-CNN in a Faster R-CNN of torchvision, in place: an IoU threshold and a beta of smooth L1 that follow the training.

    Zhang et al., "Dynamic R-CNN: Towards High Quality Object Detection via Dynamic Training", ECCV 2020. Both are modules of the
    model from then on, `roi_heads.label_assignment` and `roi_heads.smooth_l1`, and their windows are in its checkpoints. It goes
    together with `use_loss`.

    Args:
        model: FasterRCNN, MaskRCNN or KeypointRCNN.
        label_assignment, smooth_l1: modules; True for those with the published settings, False for torchvision's fixed ones.

    Returns the model. Raises TypeError for another model, ValueError for a smooth L1 beside the box loss of a ranking loss.
    """
    heads = _roi_heads_of(model, "use_dynamic_rcnn")
    if isinstance(getattr(heads, "class_loss", None), RankingHeadLoss) and smooth_l1 is not False:
        raise ValueError(f"use_dynamic_rcnn: {TWO_BOX_LOSSES}")
    device, modules = heads.box_predictor.cls_score.weight.device, {}
    for name, value, make in (
        ("label_assignment", label_assignment, DynamicLabelAssignment),
        ("smooth_l1", smooth_l1, DynamicSmoothL1Loss),
    ):
        module = make() if value is True else value or None
        if module is not None and not isinstance(module, make):
            raise TypeError(f"use_dynamic_rcnn: {name} must be a {make.__name__}, True or False, got {type(module).__name__}")
        modules[name] = None if module is None else module.to(device)
    heads = _as_own(model)
    for name, module in modules.items():
        setattr(heads, name, module)
    return model


def step_log(model: nn.Module) -> dict[str, Tensor]:
    """What the last training step of a model with a loss of this library is worth logging, 0-d and detached; see the heads' `log`.

    It is not among the losses that the model returns, because training scripts add those up.
    """
    head = model.roi_heads if isinstance(model, GeneralizedRCNN) else getattr(model, "head", None)
    if not isinstance(head, (RetinaNetHead, FCOSHead, RoIHeads)):
        raise TypeError("step_log: model must have been given a loss by use_loss or use_dynamic_rcnn")
    return dict(head.log)


def _around(kind: type, module: nn.Module) -> nn.Module:
    """A `kind`, which derives from the type of `module`, with everything that `module` holds."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    # Submodules are added to the new one alone.
    made.__dict__["_modules"] = dict(module._modules)
    return made


def _roi_heads_of(model: nn.Module, function: str) -> torchvision_roi_heads.RoIHeads:
    """The model's RoIHeads, checked; `_as_own` makes them this library's."""
    heads = getattr(model, "roi_heads", None)
    is_known = type(heads) in (torchvision_roi_heads.RoIHeads, RoIHeads)
    predictor = getattr(heads, "box_predictor", None)
    is_linear = all(isinstance(getattr(predictor, name, None), nn.Linear) for name in ("cls_score", "bbox_pred"))
    if not (isinstance(model, GeneralizedRCNN) and is_known and is_linear):
        raise TypeError(
            f"{function}: model must be a FasterRCNN, MaskRCNN or KeypointRCNN with torchvision's RoIHeads and FastRCNNPredictor, got "
            f"{type(model).__name__} with {type(heads).__name__} and {type(predictor).__name__}"
        )
    return heads


def _as_own(model: nn.Module) -> RoIHeads:
    heads = model.roi_heads
    if not isinstance(heads, RoIHeads):
        model.roi_heads = heads = _around(RoIHeads, heads)
        heads.log = {}
        for name in ("class_loss", "label_assignment", "smooth_l1"):
            heads.register_module(name, None)
    return heads


def _use_roi_loss(model: GeneralizedRCNN, loss: str | nn.Module, options: dict[str, object]) -> bool:
    """Whether it is a ranking loss."""
    heads = _roi_heads_of(model, "use_loss")
    predictor = heads.box_predictor
    num_classes = predictor.bbox_pred.out_features // 4 - 1
    loss = make_roi_loss(loss, num_classes, **options)
    old = predictor.cls_score
    is_ranking = isinstance(loss, RankingHeadLoss)
    if is_ranking and getattr(heads, "smooth_l1", None) is not None:
        raise ValueError(f"use_loss: {TWO_BOX_LOSSES}")
    heads = _as_own(model)
    is_plain_softmax = heads.class_loss is None
    heads.class_loss = loss.to(old.weight.device)
    channels = num_classes if is_ranking else loss.get_cls_channels(num_classes)
    predictor.cls_score = nn.Linear(old.in_features, channels, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        if isinstance(loss, GroupSoftmaxLoss) and is_plain_softmax:
            weight, bias = convert_classifier(old.weight, old.bias, loss.groups, background="first")
            predictor.cls_score.weight.copy_(weight)
            predictor.cls_score.bias.copy_(bias)
        else:
            nn.init.normal_(predictor.cls_score.weight, std=0.01)
            nn.init.zeros_(predictor.cls_score.bias)
            if isinstance(loss, EQLv2Loss):
                # Sigmoids: objects start out rare, the background, which is last, is sure of itself.
                predictor.cls_score.bias[:-1] = -FIRST_BACKGROUND_LOGIT
                predictor.cls_score.bias[-1] = FIRST_BACKGROUND_LOGIT
    return is_ranking


def _set_threshold(model: nn.Module, score_thresh: float | str | None, is_ranking: bool) -> None:
    holder = threshold_holder(model)
    if score_thresh is None:
        if is_ranking and holder.score_thresh > 0:
            warnings.warn(
                f"use_loss: a ranking loss orders the scores but gives them no level, so the model's score_thresh of {holder.score_thresh} may "
                "drop any share of the detections: set it to 0, or let calibrate_score_thresh find one after training",
                stacklevel=3,
            )
    elif score_thresh != "auto":
        holder.score_thresh = float(score_thresh)
    elif is_ranking:
        holder.own_score_thresh = getattr(holder, "own_score_thresh", holder.score_thresh)
        holder.score_thresh = 0.0
    elif hasattr(holder, "own_score_thresh"):  # after a ranking loss
        holder.score_thresh = holder.own_score_thresh
