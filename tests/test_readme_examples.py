"""The Python of the READMEs runs as it stands there, on inputs of the shapes that it names."""
import functools
import pathlib
import re

import frameworks
import pytest
import rsloss_kernels
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
TORCHVISION = ROOT / "rsloss_kernels" / "integrations" / "torchvision" / "README.md"
ANCHORS, CLASSES = 60, 7


def blocks_of(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def random_inputs(generator: torch.Generator) -> dict:
    """Labels with the background last: 0..C-1, C."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    labels = torch.randint(0, CLASSES + 1, (ANCHORS,), generator=generator)
    ious = torch.rand(ANCHORS, generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, CLASSES + 1)[:, :CLASSES]
    return {
        "flat_logits": normal(ANCHORS * CLASSES),
        "flat_targets": (one_hot * ious[:, None]).flatten(),
        "logits": normal(ANCHORS, CLASSES),
        "labels": labels,
        "label_weights": torch.ones(ANCHORS),
        "ious": ious,
        "giou_losses": torch.rand(ANCHORS, generator=generator).requires_grad_(),
        "deltas": normal(ANCHORS, 4),
        "delta_targets": torch.randn(ANCHORS, 4, generator=generator),
        "delta_weights": torch.ones(ANCHORS, 4),
    }


def of_maps(generator: torch.Generator) -> dict:
    labels = torch.randint(0, 81, (2, 16 + 4), generator=generator)
    return {
        "rank_sort_loss": rsloss_kernels.rank_sort_loss,
        "maps": [torch.randn(2, 80, side, side, generator=generator).requires_grad_() for side in (4, 2)],
        "labels": labels,
        "ious": torch.rand(labels.shape, generator=generator),
    }


def of_equalized_focal(generator: torch.Generator) -> dict:
    maps = [torch.randn(2, 3 * 1203, side, side, generator=generator).requires_grad_() for side in (4, 2)]
    labels = torch.randint(0, 1204, (2, 3 * (16 + 4)), generator=generator)
    return {"cls_scores": maps, "labels": labels, "num_positives": 5.0}


def of_group_softmax(generator: torch.Generator) -> dict:
    counts = [3, 2000, 50, 7, 150, 12, 900]
    groups = rsloss_kernels.ClassGroups.from_counts(counts, boundaries=(10, 100, 1000))
    return {
        "instances_per_class": counts,
        "labels": torch.randint(0, CLASSES + 1, (ANCHORS,), generator=generator),
        "classifier": torch.nn.Linear(16, CLASSES + 1),
        "logits": torch.randn(ANCHORS, groups.num_logits, generator=generator).requires_grad_(),
    }


def of_dynamic_rcnn(generator: torch.Generator) -> dict:
    per_image = [torch.randn(count, 4, generator=generator) for count in (20, 0, 30)]
    return {
        "max_overlaps": torch.rand(ANCHORS, generator=generator),
        "overlaps_per_image": [torch.rand(count, generator=generator) for count in (20, 0, 30)],
        "targets_per_image": per_image,
        "targets": torch.cat(per_image),
        "deltas": torch.randn(50, 4, generator=generator).requires_grad_(),
        "num_sampled": 50,
    }


def in_mmdetection(generator: torch.Generator) -> dict:
    frameworks.use_mmdetection()
    return random_inputs(generator)


# What begins each block, what it needs, and the name of the scalar that it ends with (None: there is none). The blocks that show the
# originals have no entry; the one that replaces classes in MMDetection's registry is tested with the losses themselves.
EXAMPLES = {
    "from rsloss_kernels import rank_sort_loss": (random_inputs, "sorting_loss"),
    "from rsloss_kernels import RankSortLoss, SelfBalancing": (random_inputs, "loss"),
    "from rsloss_kernels import SelfBalancing, alrp_loss": (random_inputs, "loss"),
    "# maps: one": (of_maps, "sorting"),
    "from mmdet.models.losses import GHMC, GHMR": (in_mmdetection, "loss"),
    "from rsloss_kernels import EqualizedFocalLoss": (of_equalized_focal, "loss"),
    "from rsloss_kernels import ClassGroups": (of_group_softmax, "loss"),
    "from rsloss_kernels import DynamicLabelAssignment": (of_dynamic_rcnn, "loss"),
}
UNTESTED = ("ranking_loss, sorting_loss = RankSort.apply", "# ghm_kernels.py", "criterion = EqualizedFocalLoss(num_classes=1204")


def test_every_example_is_known():
    beginnings = (*EXAMPLES, *UNTESTED)
    unknown = [block for block in blocks_of(ROOT / "README.md") if not block.startswith(beginnings)]
    assert not unknown and len(blocks_of(ROOT / "README.md")) == len(beginnings)


@pytest.mark.parametrize("beginning", EXAMPLES)
def test_example(generator, beginning):
    (block,) = (block for block in blocks_of(ROOT / "README.md") if block.startswith(beginning))
    make_inputs, result = EXAMPLES[beginning]
    names = make_inputs(generator)
    inputs = [value for value in names.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    exec(block, names)
    loss = names[result]
    assert loss.shape == () and loss.isfinite() and loss > 0
    loss.backward()
    assert not inputs or any(value.grad is not None and value.grad.isfinite().all() and value.grad.any() for value in inputs)


def test_torchvision(monkeypatch):
    """The models without the weights of their backbones, which would be fetched."""
    frameworks.use_torchvision()
    import torchvision

    for name in ("retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn"):
        build = functools.partial(getattr(torchvision.models.detection, name), weights_backbone=None)
        monkeypatch.setattr(torchvision.models.detection, name, build)
    names = {"torchvision": torchvision, "steps_per_epoch": 10}
    before, after, ranking, dynamic = blocks_of(TORCHVISION)
    exec(before, names)
    plain = [name for name, _ in names["model"].named_parameters()]
    exec(after, names)
    assert [name for name, _ in names["model"].named_parameters()] == plain and names["model"].score_thresh == 0
    exec(ranking, names)
    criterion = names["model"].head.loss
    assert isinstance(criterion.classification, rsloss_kernels.ALRPLoss)
    exec(dynamic, names)
    assignment = names["model"].roi_heads.label_assignment
    assert isinstance(assignment, rsloss_kernels.DynamicLabelAssignment) and assignment.variant == "original"
