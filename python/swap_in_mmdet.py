"""MMDetection before and after: the time of a training step, and the loss's share of it.

    python python/swap_in_mmdet.py                     # ATSS with Rank & Sort, RetinaNet with GHM; half a minute on two cores
    python python/swap_in_mmdet.py --model atss --image-size 512 --images 4 --rounds 20 --out out

The Rank & Sort head is `rsloss_kernels.integrations.mmdet.RankSortATSSHead`, once with the loop over positives that was published, once
with the kernels. The RetinaNet with GHM is MMDetection's configuration as it is, built before and after `patch_mmdet()`.
Needs mmdet 3 with mmcv or mmcv-lite.
"""
import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from swaps import frameworks, mmdet_models, timing  # noqa: E402

from bench.peers.published_loop import published_rank_sort  # noqa: E402
from rsloss_kernels import RankSortLoss  # noqa: E402


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=("atss", "retinanet"), help="which; default both")
    parser.add_argument("--image-size", type=int, default=256, help="pixels, a multiple of 128; default 256")
    parser.add_argument("--images", type=int, default=2, help="per batch; default 2")
    parser.add_argument("--boxes", type=int, default=20, help="objects per image; default 20")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--depth", type=int, default=18, help="of the ResNet; default 18")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed; default 10")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the tables, mmdet_<model>.md")
    return parser.parse_args(arguments)


def variant(name: str, model: torch.nn.Module, batch: dict, losses: tuple[torch.nn.Module, ...]) -> timing.Variant:
    """A step of plain SGD; the rate is so small that the model stays what it is."""
    optimiser = torch.optim.SGD(model.parameters(), 1e-6)

    def step() -> None:
        loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return timing.Variant(name, step, losses)


def rank_sort_in_atss(settings: argparse.Namespace, batch: dict) -> list[timing.Variant]:
    class PublishedLoop(RankSortLoss):
        def forward(self, logits, labels, quality):
            """What the head gives the kernels, as the dense targets that were published."""
            targets = torch.zeros_like(logits)
            rows = ((labels >= 0) & (labels < logits.shape[1])).nonzero().squeeze(1)
            targets[rows, labels[rows]] = quality[rows].to(logits.dtype)
            return published_rank_sort(logits, targets.masked_fill(labels[:, None] < 0, -1), self.delta)

    variants = []
    for name in ("published loop", "this library"):
        model = mmdet_models.atss(settings.depth, settings.classes, {"type": "RankSortATSSHead"})
        if name == "published loop":
            model.bbox_head.ranking.classification = PublishedLoop()
        variants.append(variant(name, model, batch, (model.bbox_head.ranking.classification,)))
    return variants


def ghm_in_retinanet(settings: argparse.Namespace, batch: dict) -> list[timing.Variant]:
    from rsloss_kernels.integrations.mmdet import patch_mmdet

    def build(name: str) -> timing.Variant:
        model = mmdet_models.retinanet(settings.depth, settings.classes, mmdet_models.GHM)
        return variant(name, model, batch, (model.bbox_head.loss_cls, model.bbox_head.loss_bbox))

    before = build("MMDetection's")
    with patch_mmdet() as patch:
        print(patch, end="\n\n")
        return [before, build("patch_mmdet()")]


MODELS = {"atss": ("Rank & Sort in ATSS", rank_sort_in_atss), "retinanet": ("GHM-C and GHM-R in RetinaNet", ghm_in_retinanet)}


def main(arguments: list[str] | None = None) -> list[list[timing.Times]]:
    settings = parse(arguments)
    frameworks.use_mmdetection()
    import mmdet

    import rsloss_kernels.integrations.mmdet  # noqa: F401  registers losses and heads

    torch.manual_seed(0)
    batch = mmdet_models.batch(settings.images, settings.image_size, settings.boxes, settings.classes)
    scene = f"ResNet-{settings.depth}, {settings.images} x {settings.image_size} px, {settings.boxes} objects each, {settings.classes} classes"
    results = []
    for model in settings.model or MODELS:
        title, make = MODELS[model]
        results.append(timing.measure(make(settings, batch), settings.rounds))
        command = f"python/swap_in_mmdet.py --model {model}"
        timing.publish(f"{title}: {scene}", results[-1], settings, f"mmdet_{model}", command, mmdet)
    return results


if __name__ == "__main__":
    main()
