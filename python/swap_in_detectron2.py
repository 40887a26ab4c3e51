"""Detectron2 before and after: the time of a training step, and the loss's share of it. UNTESTED.

Detectron2 is not in the package index, so that this program, unlike its neighbours, is run by no test: it is written against the
`RetinaNet` of Detectron2 0.6 and of its main branch, whose method `losses` gets what a ranking loss needs.

    python python/swap_in_detectron2.py                   # RetinaNet on random images
    python python/swap_in_detectron2.py --config COCO-Detection/retinanet_R_50_FPN_1x.yaml --image-size 800 --images 2

In a configuration: MODEL.META_ARCHITECTURE "RankSortRetinaNet", MODEL.RETINANET.SCORE_THRESH_TEST 0.0.
"""
import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from swaps import timing  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="COCO-Detection/retinanet_R_50_FPN_1x.yaml", help="of Detectron2's model zoo")
    parser.add_argument("--image-size", type=int, default=512, help="pixels; default 512")
    parser.add_argument("--images", type=int, default=2, help="per batch; default 2")
    parser.add_argument("--boxes", type=int, default=10, help="objects per image; default 10")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed; default 10")
    return parser.parse_args(arguments)


def register() -> None:
    """Makes the architecture "RankSortRetinaNet" known."""
    from detectron2.modeling import META_ARCH_REGISTRY
    from detectron2.modeling.meta_arch.retinanet import RetinaNet
    from detectron2.utils.events import get_event_storage

    from rsloss_kernels import RankSortLoss
    from rsloss_kernels.integrations._ranking_head import RankingHeadLoss, giou_losses

    @META_ARCH_REGISTRY.register()
    class RankSortRetinaNet(RetinaNet):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            self.ranking = RankingHeadLoss(RankSortLoss())

        def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
            """One call over all images and levels. Labels are 0..K-1, K the background, -1 ignored, here as there."""
            logits, labels = torch.cat(pred_logits, 1).flatten(0, 1), torch.cat(gt_labels)
            positives = ((labels >= 0) & (labels < self.num_classes)).nonzero().squeeze(1)
            # The anchors are those of every image.
            boxes = torch.cat([level.tensor for level in anchors]).repeat(len(gt_labels), 1)[positives]
            deltas = torch.cat(pred_anchor_deltas, 1).flatten(0, 1)[positives].float()
            box_losses, ious = giou_losses(self.box2box_transform.apply_deltas(deltas, boxes), torch.cat(gt_boxes)[positives])
            result = self.ranking(logits, labels, positives, box_losses, ious)
            for name, value in result.log.items():
                get_event_storage().put_scalar(name, float(value))
            return {**{f"loss_{name}": loss for name, loss in result.classification.items()}, "loss_box_reg": result.box}


class Losses(nn.Module):
    """The losses of the model as a module, so that their time can be taken apart from the step's."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def forward(self, predictions: list[list[Tensor]], anchors: list, gt_labels: list[Tensor], gt_boxes: list[Tensor]) -> dict[str, Tensor]:
        logits, deltas = predictions
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)


def variant(architecture: str, settings: argparse.Namespace) -> timing.Variant:
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances

    cfg = model_zoo.get_config(settings.config)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).train()
    size, batch = settings.image_size, []
    for _ in range(settings.images):
        corner = torch.rand(settings.boxes, 2) * size / 2
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + 16 + torch.rand(settings.boxes, 2) * (size / 2 - 16)], 1))
        instances.gt_classes = torch.randint(0, cfg.MODEL.RETINANET.NUM_CLASSES, (settings.boxes,))
        batch.append({"image": torch.randint(0, 256, (3, size, size)).float(), "instances": instances})
    losses = Losses(model.losses)
    model.losses = lambda anchors, logits, labels, deltas, boxes: losses([logits, deltas], anchors, labels, boxes)
    optimiser = torch.optim.SGD(model.parameters(), 1e-6)

    def step() -> None:
        optimiser.zero_grad()
        sum(model(batch).values()).backward()
        optimiser.step()

    return timing.Variant(architecture, step, (losses,))


def main(arguments: list[str] | None = None) -> list[timing.Times]:
    settings = parse(arguments)
    try:
        from detectron2.utils.events import EventStorage
    except ImportError as error:
        raise SystemExit(f"swap_in_detectron2.py needs Detectron2, which pip does not find: see its own page. {error}") from error
    register()
    with EventStorage():
        times = timing.measure([variant(name, settings) for name in ("RetinaNet", "RankSortRetinaNet")], settings.rounds)
    print(timing.table(f"{settings.config}, {settings.images} x {settings.image_size} px", times))
    return times


if __name__ == "__main__":
    main()
