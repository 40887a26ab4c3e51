"""Detections and what they are worth: COCO AP by pycocotools, precision-recall curves, the threshold of the best F1."""

import contextlib
import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from digits_detector.boxes import batched_nms
from digits_detector.coco_folder import coco_annotations
from digits_detector.data import Canvases
from digits_detector.model import Detector, Predictions

MOST_DETECTIONS = 100
CANDIDATES = 200
NMS_THRESHOLD = 0.6
BATCH = 32
FIXED_THRESHOLD = 0.05


class Detections(NamedTuple):
    """K detections per image, by falling score; where `keep` is False there is none."""

    boxes: Tensor  # [n, K, 4]
    scores: Tensor  # [n, K]
    labels: Tensor  # [n, K]
    keep: Tensor  # [n, K]

    def above(self, threshold: float) -> "Detections":
        return self._replace(keep=self.keep & (self.scores >= threshold))


class AveragePrecision(NamedTuple):
    ap: float
    ap50: float
    ap75: float
    per_class: list[float]  # AP of each class; 0 without objects
    precision: dict[str, list[float]]  # at IoU 0.5 and 0.75, mean over classes, for recall 0, 0.01, ..., 1


@torch.no_grad()
def detect(
    model: Detector,
    canvases: Canvases,
    score: Callable[[Predictions], Tensor],
    device: str | torch.device = "cpu",
) -> Detections:
    """Detections on all canvases, whatever their score: a threshold is the caller's. `score` gives scores [B, A, C]."""
    model.eval()
    found = []
    for rows in torch.arange(len(canvases)).split(BATCH):
        predictions = model(canvases.images[rows].to(device))
        scores = score(predictions)
        num_classes = scores.shape[-1]
        best, flat = scores.flatten(1).topk(min(CANDIDATES, scores[0].numel()))
        labels, place = flat % num_classes, flat // num_classes
        boxes = predictions.boxes.gather(1, place[..., None].expand(-1, -1, 4))
        side = torch.tensor(canvases.images.shape[:-3:-1] * 2, device=boxes.device)
        boxes = torch.minimum(boxes.clamp(min=0), side)
        keep = batched_nms(boxes, labels, NMS_THRESHOLD)
        keep &= keep.cumsum(1) <= MOST_DETECTIONS
        found.append(Detections(boxes.cpu(), best.cpu(), labels.cpu(), keep.cpu()))
    return Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _coco_eval(detections: Detections, canvases: Canvases):
    """pycocotools' evaluation, accumulated; None if there is nothing detected."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows, slots = detections.keep.nonzero(as_tuple=True)
    if len(rows) == 0:
        return None
    boxes = detections.boxes[rows, slots]
    table = torch.cat(
        [
            (rows + 1)[:, None],
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            detections.scores[rows, slots][:, None],
            (detections.labels[rows, slots] + 1)[:, None],
        ],
        1,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_annotations(canvases)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(table.double().numpy()), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def average_precision(detections: Detections, canvases: Canvases) -> AveragePrecision:
    """COCO AP over all areas, at most 100 detections per image. Values in [0, 1]."""
    evaluation = _coco_eval(detections, canvases)
    if evaluation is None:
        return AveragePrecision(0.0, 0.0, 0.0, [0.0] * len(canvases.class_names), {"0.50": [0.0] * 101, "0.75": [0.0] * 101})
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]; -1 for classes without objects
    per_class = precision.clip(min=0).mean((0, 1)).tolist()
    precision = precision[:, :, (precision > -1).all((0, 1))]
    return AveragePrecision(
        float(precision.mean()),
        float(precision[0].mean()),
        float(precision[5].mean()),
        per_class,
        {"0.50": precision[0].mean(-1).tolist(), "0.75": precision[5].mean(-1).tolist()},
    )


def f1_at(detections: Detections, canvases: Canvases, threshold: float) -> float:
    """F1 over all classes at IoU 0.5 of the detections with at least that score."""
    scores, f1 = _f1_curve(detections, canvases)
    count = int((scores >= threshold).sum())
    return float(f1[count - 1]) if count else 0.0


def best_f1(detections: Detections, canvases: Canvases) -> tuple[float, float]:
    """(threshold, F1 there): the score threshold with the best F1 over all classes at IoU 0.5."""
    scores, f1 = _f1_curve(detections, canvases)
    if len(f1) == 0:
        return 0.0, 0.0
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def _f1_curve(detections: Detections, canvases: Canvases) -> tuple[np.ndarray, np.ndarray]:
    """(scores, falling; F1 of all detections up to each of them)."""
    evaluation = _coco_eval(detections, canvases)
    if evaluation is None:
        return np.zeros(0), np.zeros(0)
    objects = int((canvases.labels >= 0).sum())
    images = [image for image in evaluation.evalImgs if image is not None]
    scores = np.concatenate([image["dtScores"] for image in images])
    is_hit = np.concatenate([image["dtMatches"][0] > 0 for image in images])
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(is_hit[order])
    return scores, 2 * hits / (np.arange(1, len(hits) + 1) + objects)
