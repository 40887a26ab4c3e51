"""What a classification loss takes of a training step, as published and as this library computes it, at the sizes of real heads.

    python bench/whole_step.py --out bench/results/<machine>     both tables, about three minutes
    python bench/whole_step.py --part heads --budget 0.5         the losses alone, at full size

heads: forward + backward of the loss alone on as many logits as the head has at 800 x 1333 pixels. steps: the share of a whole step
of ResNet-50 with a feature pyramid and RetinaNet's towers, run at the image size that the table tells, with the anchors that belong to
that size, and of the detector of digits in python/; nothing is extrapolated. Writes whole_step.json. On a CPU.
"""
import argparse
import functools
import importlib
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
BENCH = pathlib.Path(__file__).resolve().parent
sys.path += [str(BENCH.parent), str(BENCH.parent / "python")]

import torch  # noqa: E402
from swaps import frameworks, timing  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench import harness, loss_bench, measures, results  # noqa: E402
from bench.focal_problems import EFL  # noqa: E402
from bench.ghm_problems import CLASSES as GHM_C  # noqa: E402
from bench.logits import NUM_CLASSES  # noqa: E402
from bench.peers.focal import focal_loss  # noqa: E402
from bench.peers.ghm import PublishedGHMC, one_hot_targets  # noqa: E402
from bench.peers.published_loop import published_rank_sort  # noqa: E402
from bench.providers import FOCAL  # noqa: E402
from bench.ranking_providers import LOOP, PER_SEGMENT  # noqa: E402
from rsloss_kernels import ghm_classification_loss, rank_sort_loss  # noqa: E402

STEM = "whole_step"
CANVASES = 64


@dataclass(frozen=True)
class Head:
    """One loss of a real head. entry: of the loss's problems; before: as published; anyway: what such a head is trained with else."""

    name: str
    stem: str
    loss: str
    entry: tuple
    before: str
    anyway: str = FOCAL


def dense_head(name: str, rows: int, positives: int, segments: int = 1) -> Iterable[Head]:
    """All rows of 80 classes, labels as class indices. The published loops take no segments: they are called for each."""
    entry = ("trained", positives, rows * NUM_CLASSES - positives, "index", segments)
    before = LOOP if segments == 1 else f"{LOOP}{PER_SEGMENT}"
    yield Head(name, "rank_sort", "Rank & Sort", entry, before)
    yield Head(name, "ap", "AP", entry, before)


HEADS = [
    *dense_head("ATSS, 4 images of 22,400 anchors", 4 * 22_400, 280),
    *dense_head("RetinaNet, 201,600 anchors", 201_600, 80),
    Head("RetinaNet, 201,600 anchors", "ghm", "GHM-C", (GHM_C, 201_600 * NUM_CLASSES, 30, "index"), "MMDetection's"),
    *dense_head("DETR, 2 images, 6 decoder layers of 900 queries", 2 * 6 * 900, 84, segments=6),
    Head("LVIS, 22,400 anchors, 1203 classes", "focal", "EFL", (EFL, 22_400 * 1203, 1203), "published EFL"),
    Head("LVIS, 4 x 512 RoIs, 1203 classes", "seesaw", "Seesaw", (2048, 1203), "published Seesaw", "plain softmax, eager"),
    Head("LVIS, 4 x 512 RoIs, 1236 logits", "group_softmax", "group softmax", (2048,), "published groups", "plain softmax, eager"),
]


def measure_head(head: Head, arguments: argparse.Namespace) -> list[dict]:
    """As published, what such a head pays anyway, and ours."""
    loss = importlib.import_module(f"bench.bench_{head.stem}").LOSS
    case = loss.problems.make_case(arguments, *head.entry)
    ours = loss.name(loss.backends("cpu")[0]) + (", chunks" if getattr(case, "segments", 1) > 1 else "")
    roles = {head.before: "before", head.anyway: "anyway", ours: "ours"}
    chosen = argparse.Namespace(**vars(arguments), providers=list(roles))
    records, _ = measures.measure_speed(loss, chosen, case, "full", capture=False)
    loss_bench.show(records, f"{head.name}, {head.loss}: {case.title}")
    of_head = {"head": head.name, "loss": head.loss, "elements": records[0]["elements"]}
    names = ("provider", "skipped", "median_ms", "q1_ms", "q3_ms", "repetitions")
    by_name = {record["provider"]: {name: record[name] for name in names} for record in records}
    return [of_head | {"role": role} | by_name[name] for name, role in roles.items()]


class ClassificationLoss(nn.Module):
    """A loss of the logits [A, C] as the module whose calls are timed."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor) -> Tensor:
        return self.function(logits)


def losses_of_step(labels: Tensor) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """{provider: (loss, function of the logits)}."""
    dense = one_hot_targets(labels, NUM_CLASSES).float()
    published, weights = PublishedGHMC(bins=30), torch.ones(len(labels))
    return {
        FOCAL: ("focal", lambda logits: focal_loss(logits, dense) / dense.sum()),
        LOOP: ("Rank & Sort", lambda logits: sum(published_rank_sort(logits.flatten(), dense.flatten()))),
        "rank_sort_loss": ("Rank & Sort", lambda logits: sum(rank_sort_loss(logits, labels))),
        "MMDetection's": ("GHM-C", lambda logits: published(logits, dense, weights[:, None].expand_as(dense))),
        "ghm_classification_loss": ("GHM-C", lambda logits: ghm_classification_loss(logits, labels, weights, bins=30)),
    }


def detector(anchors: int) -> nn.Module:
    """Class and box logits of a batch [B, A, C], [B, A, 4]: ResNet-50, a pyramid of five levels and RetinaNet's two towers."""
    frameworks.use_torchvision()
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256), "trainable_layers": 5}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=nn.BatchNorm2d, **levels)
    head = RetinaNetHead(256, anchors, NUM_CLASSES)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = backbone, head

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.head(list(self.backbone(images).values()))
            return outputs["cls_logits"], outputs["bbox_regression"]

    return Detector()


def measure_step(anchors: int, arguments: argparse.Namespace) -> list[dict]:
    """All losses take turns on one model, whose step moves it by next to nothing."""
    torch.manual_seed(0)
    model = detector(anchors)
    images = torch.randn(arguments.images, 3, arguments.pixels, arguments.pixels)
    with torch.no_grad():
        rows = model(images)[0].shape[:2].numel()
    labels = torch.full((rows,), NUM_CLASSES)
    labels[torch.randperm(rows)[: arguments.objects * arguments.images]] = 3
    optimiser = torch.optim.SGD(model.parameters(), 1e-6)

    def step(loss: nn.Module) -> None:
        logits, boxes = model(images)
        optimiser.zero_grad()
        (loss(logits.flatten(0, 1)) + boxes.abs().mean()).backward()
        optimiser.step()

    variants, of = [], losses_of_step(labels)
    for name, (_, function) in of.items():
        loss = ClassificationLoss(function)
        variants.append(timing.Variant(name, functools.partial(step, loss), (loss,)))
    times = timing.measure(variants, arguments.rounds)
    model_name = f"ResNet-50-FPN, {anchors} anchor{'s' * (anchors > 1)} per place"
    size = f"{arguments.images} x {arguments.pixels} px"
    print(f"\n{timing.table(f'{model_name}, {size}, {rows} rows', times)}", flush=True)
    shared = {"model": model_name, "images": size, "rows": rows, "positives": arguments.objects * arguments.images}
    figures = [{"loss": of[row.name][0], "provider": row.name, "step_ms": row.step, "loss_ms": row.loss} for row in times]
    return [shared | {name: measures.rounded(value) if name.endswith("_ms") else value for name, value in row.items()} for row in figures]


class PublishedRankSort(nn.Module):
    """In place of `RankSortLoss` in a detection loss."""

    def forward(self, logits: Tensor, labels: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        dense = one_hot_targets(labels.flatten(), logits.shape[-1]).to(logits.dtype) * quality.flatten()[:, None]
        return published_rank_sort(logits.flatten(), dense.flatten())


def measure_digits(arguments: argparse.Namespace) -> list[dict]:
    """The detector of python/train_detector.py on its canvases: the whole loss, boxes included, of steps that take turns."""
    from digits_detector.data import make_canvases
    from digits_detector.losses import make_loss
    from digits_detector.training import Settings, Trainer

    canvases = make_canvases("train", CANVASES)
    trainer = Trainer(Settings("rank_sort", batch_size=min(Settings.batch_size, CANVASES)), canvases)
    published = make_loss("rank_sort")
    published.classification = PublishedRankSort()
    of = {FOCAL: ("focal", make_loss("focal")), LOOP: ("Rank & Sort", published), "rank_sort_loss": ("Rank & Sort", make_loss("rank_sort"))}
    labels = trainer.predict_batch()[1].labels
    times = {name: [] for name in of}
    for _ in range(1 + arguments.rounds):
        for name, (_, loss) in of.items():
            trainer.train_step(loss)
            times[name].append(trainer.times[-1])
    shared = {"model": "digits detector, whole loss", "images": f"{trainer.settings.batch_size} x {canvases.images.shape[-1]} px"}
    shared |= {"rows": labels.numel(), "positives": int((labels < len(canvases.class_names)).sum())}
    # The first round sets up whatever is set up once.
    figures = {
        name: {key: measures.rounded(statistics.median(getattr(step, key) for step in steps[1:])) for key in ("step_ms", "loss_ms")}
        for name, steps in times.items()
    }
    return [shared | {"loss": loss, "provider": name} | figures[name] for name, (loss, _) in of.items()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("heads", "steps", "both"), default="both")
    parser.add_argument("--budget", type=float, default=1.0, help="heads: seconds per provider")
    parser.add_argument("--pixels", type=int, default=256, help="steps: of a side of the images, a multiple of 32; default 256")
    parser.add_argument("--images", type=int, default=2, help="steps: per batch; default 2")
    parser.add_argument("--objects", type=int, default=40, help="steps: positives per image; default 40")
    parser.add_argument("--rounds", type=int, default=5, help="steps: that are timed; default 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; nothing is written without it")
    arguments = parser.parse_args(argv)
    for name, value in {"device": "cpu", "dtype": "float32", "seeds": [0], "cache": "cold", "must_show": False}.items():
        setattr(arguments, name, value)
    torch.set_num_threads(arguments.threads)
    parts = {
        "heads": lambda: [record for head in HEADS for record in measure_head(head, arguments)],
        "steps": lambda: [*measure_digits(arguments), *measure_step(1, arguments), *measure_step(9, arguments)],
    }
    for name in parts if arguments.part == "both" else [arguments.part]:
        load = harness.ForeignLoad()
        section = {"records": parts[name](), "settings": loss_bench.settings(arguments, load.fraction())}
        if arguments.out:
            print(f"wrote {results.update(arguments.out, STEM, harness.machine('cpu'), {name: section})}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
