"""A tiny Faster R-CNN of torchvision on the digits, and the tables of what Dynamic R-CNN and a sampler are worth in it.

Every run is kept as a file in the out folder, so that a stopped table goes on where it was.
"""

import argparse
import dataclasses
import hashlib
import json
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from digits_detector import evaluation, figures, report
from digits_detector.data import Canvases, batch_rows
from digits_detector.model import STRIDES, Pyramid
from digits_detector.training import Settings, Trainer
from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss

LEARNING_RATE = 5e-3
# Sides of the anchors by level; objects have 3 to 44 pixels.
ANCHORS = ((12.0, 20.0), (28.0, 40.0))
PROPOSALS = 200
SAMPLED, POSITIVE_SHARE = 64, 0.25
# Published: 75 of 2000 proposals of an image, here in proportion. And 10 errors of 512 sampled proposals; of these here, the objects
# themselves are among them without an error, so it must be more than an image has objects, and less than it has positives.
IOU_TOPK, BETA_TOPK = 8, 5
FIXED_IOU, FIRST_IOU, FIRST_BETA = 0.5, 0.4, 1.0
MOST_GRADIENT_NORM = 10.0


class Row(NamedTuple):
    """What a run does in its second stage."""

    title: str
    dynamic_assignment: bool = False
    dynamic_smooth_l1: bool = False
    loss: str = "cross_entropy"
    has_sampler: bool = True


DYNAMIC_ROWS = {
    "fixed": Row("fixed"),
    "assignment": Row("dynamic label assignment", dynamic_assignment=True),
    "smooth_l1": Row("dynamic smooth L1", dynamic_smooth_l1=True),
    "both": Row("both: Dynamic R-CNN", dynamic_assignment=True, dynamic_smooth_l1=True),
}
SAMPLER_ROWS = {
    "fixed": Row("cross entropy, random sampler"),
    "no_sampler": Row("cross entropy, no sampler", has_sampler=False),
    "rank_sort_sampler": Row("Rank & Sort, random sampler", loss="rank_sort"),
    "rank_sort": Row("Rank & Sort, no sampler", loss="rank_sort", has_sampler=False),
}
ROWS = SAMPLER_ROWS | DYNAMIC_ROWS


class Backbone(nn.Module):
    """The pyramid under the names by which torchvision asks for its levels."""

    def __init__(self, group_norm: bool, width: int = 32):
        super().__init__()
        self.pyramid = Pyramid(width, group_norm)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(stride): level for stride, level in zip(STRIDES, self.pyramid(images), strict=True)}


def inputs(canvases: Canvases) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and objects as torchvision takes them, the classes from 1 on."""
    objects = [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
        for boxes, labels in zip(canvases.boxes, canvases.labels, strict=True)
    ]
    return list(canvases.images.float() / 255), objects


class TwoStageTrainer(Trainer):
    """The model computes its losses itself; they are not timed apart."""

    @property
    def row(self) -> Row:
        return ROWS[self.settings.loss]

    def _make_loss(self) -> nn.Module:
        return nn.Identity()

    def _make_model(self) -> nn.Module:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.ops import MultiScaleRoIAlign

        from rsloss_kernels.integrations.torchvision import use_dynamic_rcnn, use_loss

        side, width, size, features = self.pool.images.shape[-1], 32, 5, 128
        backbone = Backbone(self.settings.group_norm, width)
        num_classes = len(self.pool.class_names)
        model = FasterRCNN(
            backbone,
            min_size=side,
            max_size=side,
            image_mean=[0.5] * 3,
            image_std=[1.0] * 3,
            rpn_anchor_generator=AnchorGenerator(ANCHORS, ((0.7, 1.4),) * len(ANCHORS)),
            rpn_pre_nms_top_n_train=PROPOSALS,
            rpn_pre_nms_top_n_test=PROPOSALS,
            rpn_post_nms_top_n_train=PROPOSALS,
            rpn_post_nms_top_n_test=PROPOSALS,
            rpn_batch_size_per_image=SAMPLED,
            box_roi_pool=MultiScaleRoIAlign([str(stride) for stride in STRIDES], size, sampling_ratio=2),
            box_head=TwoMLPHead(width * size**2, features),
            box_predictor=FastRCNNPredictor(features, num_classes + 1),
            box_score_thresh=0.0,
            box_nms_thresh=evaluation.NMS_THRESHOLD,
            box_detections_per_img=evaluation.MOST_DETECTIONS,
            box_fg_iou_thresh=FIXED_IOU,
            box_bg_iou_thresh=FIXED_IOU,
            # More than there are takes them all.
            box_batch_size_per_image=SAMPLED if self.row.has_sampler else 2 * PROPOSALS,
            box_positive_fraction=POSITIVE_SHARE if self.row.has_sampler else 1.0,
        )
        if self.row.loss == "rank_sort":
            return use_loss(model, "rank_sort")
        window = _window(self.settings.steps)
        # Fixed, beta is what it starts from: its window never ends.
        beta_window = window if self.row.dynamic_smooth_l1 else self.settings.steps + 1
        return use_dynamic_rcnn(
            model,
            DynamicLabelAssignment(IOU_TOPK, window, FIRST_IOU) if self.row.dynamic_assignment else False,
            DynamicSmoothL1Loss(BETA_TOPK, beta_window, FIRST_BETA),
        )

    def _set_gradients(self, loss: nn.Module) -> tuple[dict[str, Tensor], float]:
        rows = batch_rows(len(self.pool), self.settings.batch_size, self.settings.seed, self.step)
        # torchvision's samplers draw from the global generator: of a resumed run too, the same for the same step.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
            parts = self.network(*inputs(self.pool.take(rows)))
        self.optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MOST_GRADIENT_NORM)
        return parts, math.nan

    @torch.no_grad()
    def detect(self, canvases: Canvases) -> evaluation.Detections:
        self.model.eval()
        found = []
        for rows in torch.arange(len(canvases)).split(evaluation.BATCH):
            found += self.model(inputs(canvases.take(rows).to(self.device))[0])
        boxes, scores, labels = (
            nn.utils.rnn.pad_sequence([one[name].cpu() for one in found], batch_first=True) for name in ("boxes", "scores", "labels")
        )
        keep = torch.arange(boxes.shape[1]) < torch.tensor([len(one["scores"]) for one in found])[:, None]
        return evaluation.Detections(boxes, scores, labels - 1, keep)

    def schedules(self) -> dict[str, dict[str, list[float]]]:
        """What Dynamic R-CNN's values became, by the step from which on."""
        heads = self.model.roi_heads
        followed = {"iou_threshold": heads.label_assignment, "beta": heads.smooth_l1}
        found = {name: module.schedule() for name, module in followed.items() if module is not None}
        return {name: {"steps": one.steps.tolist(), "values": one.values.tolist()} for name, one in found.items()}


def run(options: argparse.Namespace, pool: Canvases, held_out: Canvases) -> dict:
    """Both tables; the row that they share is trained once."""
    results = report.surroundings(options.device) | {"window": _window(options.steps), "rows": []}
    for name in ROWS:
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [_cached_run(_settings(name, seed, options, pool), options, pool, held_out) for seed in seeds]
        results["rows"].append({"row": name, **ROWS[name]._asdict(), "runs": runs})
    legend = (
        f"COCO average precision on {len(held_out)} held-out canvases, percent, after {options.steps} steps of "
        f"{min(options.batch_size, len(pool))} canvases, {options.seeds} seed{'s' * (options.seeds > 1)}. "
    )
    dynamic = (
        f"The IoU threshold follows the {IOU_TOPK}th largest IoU per image from {FIRST_IOU}, beta the {BETA_TOPK}th smallest error per image "
        f"from {FIRST_BETA}, every {_window(options.steps)} steps; fixed they are {FIXED_IOU} and {FIRST_BETA}."
    )
    sampler = (
        f"The sampler of the second stage takes {SAMPLED} proposals per image, at most a quarter positive; without it all {PROPOSALS} and the "
        "objects are taken. Nothing else differs, the learning rate neither."
    )
    tables = (("Dynamic R-CNN", DYNAMIC_ROWS, dynamic), ("Robustness to imbalance", SAMPLER_ROWS, sampler))
    markdown = []
    for title, names, explained in tables:
        rows = [{**row, "title": names[row["row"]].title} for row in results["rows"] if row["row"] in names]
        rows.sort(key=lambda row: list(names).index(row["row"]))
        print(f"{title}\n{_table(rows)}\n{legend}{explained}\n")
        markdown += [f"{title}:", "", _table(rows, markdown=True), "", legend + explained, ""]
    (options.out / "two_stage.md").write_text("\n".join(markdown))
    report.write_json(options.out / "two_stage.json", results)
    figures.draw_two_stage(results, options.out / "two_stage.png")
    print(f"two_stage.json, two_stage.md and two_stage.png are in {options.out}")
    return results


def _window(steps: int) -> int:
    """Steps between two values of Dynamic R-CNN: twenty values in a run."""
    return max(1, steps // 20)


def _settings(name: str, seed: int, options: argparse.Namespace, pool: Canvases) -> Settings:
    rate = LEARNING_RATE if options.lr is None else options.lr
    return Settings(name, options.steps, seed, rate, min(options.batch_size, len(pool)), group_norm=options.group_norm)


def _cached_run(settings: Settings, options: argparse.Namespace, pool: Canvases, held_out: Canvases) -> dict:
    data = str(options.data.resolve()) if options.data is not None else "digits"
    key = dataclasses.asdict(settings) | {"data": data, "pool": len(pool), "held_out": len(held_out)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = options.out / "two_stage" / f"{settings.loss}_{digest}.json"
    if path.exists():
        return json.loads(path.read_text())
    checkpoint = path.with_suffix(".pt")
    trainer = TwoStageTrainer(settings, pool, options.device).train(checkpoint, options.checkpoint_every, resume=True)
    found = evaluation.average_precision(trainer.detect(held_out), held_out)
    result = {"settings": key, "ap": found.ap, "ap50": found.ap50, "ap75": found.ap75, "schedules": trainer.schedules()}
    report.write_json(path, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _table(rows: list[dict], markdown: bool = False) -> str:
    cells = [
        [row["title"], *(report.spread([100 * one[key] for one in row["runs"]]) for key in ("ap", "ap50", "ap75"))] for row in rows
    ]
    return report.table(["second stage", "AP", "AP50", "AP75"], cells, markdown)
