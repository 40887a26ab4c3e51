"""torchvision before and after: the time of a training step, and the loss's share of it.

    python python/swap_in_torchvision.py                   # RetinaNet on digits, a minute or so on two cores
    python python/swap_in_torchvision.py --model fcos --image-size 512 --images 4 --rounds 20 --loss rank_sort --loss varifocal

The whole swap is one line, `use_loss(model, "rank_sort")`. Needs torchvision and scikit-learn, whose digits are the images.
"""
import argparse
import pathlib
import sys
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from digits_detector.data import make_canvases  # noqa: E402
from swaps import frameworks, timing  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("retinanet", "fcos"), default="retinanet")
    parser.add_argument("--loss", action="append", help="see DENSE_LOSSES; may be given more than once (default: focal and rank_sort)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels; default 256")
    parser.add_argument("--images", type=int, default=4, help="per batch; default 4")
    parser.add_argument("--classes", type=int, default=91, help="as torchvision counts them, at least 11; default 91")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed; default 10")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the table, in Markdown")
    settings = parser.parse_args(arguments)
    if settings.classes < 11:
        parser.error(f"--classes must be at least 11, ten digits and the background, got {settings.classes}")
    return settings


def digits(count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets as torchvision's models take them; labels start at 1."""
    canvases = make_canvases("train", count)
    targets = []
    for boxes, labels in zip(canvases.boxes, canvases.labels, strict=True):
        targets.append({"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1})
    return [image.float() / 255 for image in canvases.images], targets


def make_model(settings: argparse.Namespace) -> nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    torch.manual_seed(0)
    layers = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256), "trainable_layers": 5}
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, **layers)
    kind = detection.RetinaNet if settings.model == "retinanet" else detection.FCOS
    options = {}
    if settings.model == "retinanet":
        options["anchor_generator"] = detection.anchor_utils.AnchorGenerator(
            tuple((4 * stride, int(5.04 * stride), int(6.35 * stride)) for stride in (8, 16, 32, 64, 128)), ((0.5, 1.0, 2.0),) * 5
        )
    return kind(backbone, settings.classes, min_size=settings.image_size, max_size=settings.image_size, **options)


class HeadLoss(nn.Module):
    """The losses of the model's head as a module, so that their time can be taken apart from the step's."""

    def __init__(self, compute_loss: Callable):
        super().__init__()
        self.compute_loss = compute_loss

    def forward(self, outputs: list[Tensor], names: tuple[str, ...], *others: object) -> dict[str, Tensor]:
        targets, anchors, matched_idxs = others
        return self.compute_loss(targets, dict(zip(names, outputs, strict=True)), anchors, matched_idxs)


def variant(name: str, model: nn.Module, batch: tuple) -> timing.Variant:
    """A step of plain SGD; the rate is so small that the model stays what it is."""
    head_loss = HeadLoss(model.head.compute_loss)
    model.head.compute_loss = lambda targets, outputs, *others: head_loss([*outputs.values()], tuple(outputs), targets, *others)
    optimiser = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], 1e-6)

    def step() -> None:
        losses = model(*batch)
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()

    return timing.Variant(name, step, (head_loss,))


def main(arguments: list[str] | None = None) -> list[timing.Times]:
    settings = parse(arguments)
    frameworks.use_torchvision()
    import torchvision

    from rsloss_kernels.integrations.torchvision import step_log, use_loss

    batch = digits(settings.images)
    variants = [variant("torchvision's focal", make_model(settings), batch)]
    swapped = {name: use_loss(make_model(settings), name) for name in settings.loss or ("focal", "rank_sort")}
    variants += [variant(f'use_loss(model, "{name}")', model, batch) for name, model in swapped.items()]
    times = timing.measure(variants, settings.rounds)
    title = f"{settings.model}, ResNet-18, {settings.images} x {settings.image_size} px, {settings.classes} classes"
    command = f"python/swap_in_torchvision.py --model {settings.model}"
    timing.publish(title, times, settings, f"torchvision_{settings.model}", command, torchvision)
    for name, model in swapped.items():
        print(f"{name} logs", ", ".join(f"{key} {float(value):.3g}" for key, value in step_log(model).items()))
    return times


if __name__ == "__main__":
    main()
