"""Dynamic R-CNN's RoI head without waiting for the device: threshold and beta are tensors that change where they are."""
import torch
from mmdet.models.losses import SmoothL1Loss
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import ConfigType, InstanceList
from torch import Tensor

from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss, assign_by_iou
from rsloss_kernels.integrations.mmdet.losses import FusedSmoothL1Loss

# Keys of `train_cfg.rcnn.dynamic_rcnn`: MMDetection's, and those for both modules.
OWN_OPTIONS = ("iou_topk", "beta_topk", "initial_iou", "initial_beta")
SHARED_OPTIONS = ("update_iter_interval", "variant", "process_group", "max_images", "schedule_length")


class DynamicIoUAssigner(MaxIoUAssigner):
    """`MaxIoUAssigner` of RoI heads with the one threshold of a DynamicLabelAssignment, which it asks anew each time.

    `results` gathers what it returns, until it is emptied: samplers that add the objects to the proposals add their IoUs of 1 there.
    Takes the arguments of `MaxIoUAssigner` without thresholds. No low-quality matches.
    """

    def __init__(self, label_assignment: DynamicLabelAssignment, **kwargs: object):
        super().__init__(pos_iou_thr=None, neg_iou_thr=None, match_low_quality=False, **kwargs)
        self.label_assignment = label_assignment
        self.results: list[AssignResult] = []

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """As in `MaxIoUAssigner`: `overlaps` is [objects, boxes]. A box whose overlaps are all negative is ignored."""
        if overlaps.numel() == 0:
            result = super().assign_wrt_overlaps(overlaps, gt_labels)
        else:
            max_overlaps, objects = overlaps.max(0)
            assigned = assign_by_iou(max_overlaps, self.label_assignment.iou_threshold.to(overlaps.device))
            labels = torch.where(assigned == 1, gt_labels[objects], -1)
            result = AssignResult(len(overlaps), torch.where(assigned == 1, objects + 1, assigned), max_overlaps, labels)
        self.results.append(result)
        return result


@MODELS.register_module()
class FusedDynamicRoIHead(StandardRoIHead):
    """MMDetection's `DynamicRoIHead` with the same configuration and numbers, its statistics left on the device.

    `train_cfg.rcnn.dynamic_rcnn` may also hold the library's `variant`, `process_group`, `max_images` and `schedule_length`.
    Thresholds and beta start as the configuration's `assigner` and `loss_bbox` have them. Windows and values are buffers, so that
    they survive checkpoints, which MMDetection's do not.

    Logged beside the losses: "dynamic_iou" and "dynamic_beta", those of this step.
    """

    def _dynamic_options(self) -> ConfigType:
        """`train_cfg.rcnn.dynamic_rcnn`, checked."""
        options = self.train_cfg.get("dynamic_rcnn") or {}
        missing, unknown = set(OWN_OPTIONS) - set(options), set(options) - {*OWN_OPTIONS, *SHARED_OPTIONS}
        if missing or unknown:
            found = "; ".join(f"{what} {', '.join(sorted(names))}" for what, names in (("without", missing), ("unknown", unknown)) if names)
            raise ValueError(
                f"FusedDynamicRoIHead: train_cfg.rcnn.dynamic_rcnn must have {', '.join(OWN_OPTIONS)} and may have "
                f"{', '.join(SHARED_OPTIONS)}, got one {found}"
            )
        return options

    def init_bbox_head(self, bbox_roi_extractor: ConfigType, bbox_head: ConfigType) -> None:
        """As in `StandardRoIHead`; the box loss becomes a DynamicSmoothL1Loss if there is a `train_cfg`."""
        super().init_bbox_head(bbox_roi_extractor, bbox_head)
        built = self.bbox_head.loss_bbox
        if not isinstance(built, (SmoothL1Loss, FusedSmoothL1Loss)):
            raise TypeError(f"FusedDynamicRoIHead: loss_bbox must be SmoothL1Loss, got {type(built).__name__}")
        if self.train_cfg:
            options = self._dynamic_options()
            loss = DynamicSmoothL1Loss(
                options.beta_topk,
                initial_beta=options.initial_beta,
                loss_weight=built.loss_weight,
                reduction=built.reduction,
                **{name: options[name] for name in SHARED_OPTIONS if name in options},
            )
            loss.beta.fill_(built.beta)
            self.bbox_head.loss_bbox = loss

    def init_assigner_sampler(self) -> None:
        """As in `StandardRoIHead`; the assigner's threshold becomes that of `label_assignment`."""
        super().init_assigner_sampler()
        if not self.train_cfg:
            return
        built, options = self.bbox_assigner, self._dynamic_options()
        if type(built) is not MaxIoUAssigner or built.match_low_quality or built.pos_iou_thr != built.neg_iou_thr:
            raise ValueError(
                "FusedDynamicRoIHead: assigner must be a MaxIoUAssigner with equal pos_iou_thr and neg_iou_thr and "
                "match_low_quality=False"
            )
        self.label_assignment = DynamicLabelAssignment(
            options.iou_topk,
            initial_iou=options.initial_iou,
            first_iou=built.pos_iou_thr,
            **{name: options[name] for name in SHARED_OPTIONS if name in options},
        )
        replaced = ("type", "pos_iou_thr", "neg_iou_thr", "min_pos_iou", "match_low_quality")
        arguments = {name: value for name, value in self.train_cfg.assigner.items() if name not in replaced}
        self.bbox_assigner = DynamicIoUAssigner(self.label_assignment, **arguments)

    def loss(self, x: tuple[Tensor, ...], rpn_results_list: InstanceList, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """As in `StandardRoIHead`; in training mode it takes a step of the threshold and of beta, which count from the next step on."""
        threshold, beta = self.label_assignment.iou_threshold.clone(), self.bbox_head.loss_bbox.beta.clone()
        self.bbox_assigner.results = []
        losses = super().loss(x, rpn_results_list, batch_data_samples)
        self.label_assignment.update([result.max_overlaps for result in self.bbox_assigner.results])
        self.bbox_assigner.results = []
        return losses | {"dynamic_iou": threshold.float(), "dynamic_beta": beta.float()}

    def bbox_loss(self, x: tuple[Tensor, ...], sampling_results: list[SamplingResult]) -> dict:
        """As in `StandardRoIHead`."""
        rois = bbox2roi([result.priors for result in sampling_results])
        results = self._bbox_forward(x, rois)
        computed = self.bbox_head.loss_and_target(
            cls_score=results["cls_score"],
            bbox_pred=results["bbox_pred"],
            rois=rois,
            sampling_results=sampling_results,
            rcnn_train_cfg=self.train_cfg,
        )
        _, _, targets, weights = computed["bbox_targets"]
        self.bbox_head.loss_bbox.update(targets, weights, num_images=len(sampling_results))
        return results | {"loss_bbox": computed["loss_bbox"]}
