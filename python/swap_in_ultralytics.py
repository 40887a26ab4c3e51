"""Ultralytics' YOLO before and after: the time of a training step, and the class loss's share of it.

    python python/swap_in_ultralytics.py                  # YOLOv8n on digits, a minute or so on two cores
    python python/swap_in_ultralytics.py --config yolo26n.yaml --image-size 640 --images 16 --rounds 20 --loss varifocal

The whole swap is one line, `use_loss(model, "rank_sort")` for a model, or `YOLO(...).train(trainer=trainer_with("rank_sort"), ...)`.
Needs Ultralytics, torchvision and scikit-learn, whose digits are the images. Downloads nothing, and leaves nothing behind.
"""
import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from digits_detector.data import CANVAS_SIZE, make_canvases  # noqa: E402
from swaps import frameworks, timing  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="yolov8n.yaml", help="of the model; default yolov8n.yaml")
    parser.add_argument("--loss", action="append", help="see LOSSES of the adapter; may be given more than once (default: rank_sort)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels, a multiple of 32; default 256")
    parser.add_argument("--images", type=int, default=8, help="per batch; default 8")
    parser.add_argument("--classes", type=int, default=80, help="at least 10; default 80")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed; default 10")
    parser.add_argument("--out", type=pathlib.Path, help="a folder for the table, in Markdown")
    settings = parser.parse_args(arguments)
    if settings.classes < 10:
        parser.error(f"--classes must be at least 10, the digits, got {settings.classes}")
    return settings


def digits(count: int, size: int) -> dict[str, Tensor]:
    """A batch as Ultralytics' data loader makes it: boxes are centre and size, as shares of the image."""
    canvases = make_canvases("train", count)
    images, places = (canvases.labels >= 0).nonzero(as_tuple=True)
    corners = canvases.boxes[images, places] / CANVAS_SIZE
    return {
        "img": nn.functional.interpolate(canvases.images.float() / 255, (size, size), mode="bilinear"),
        "batch_idx": images.float(),
        "cls": canvases.labels[images, places].float(),
        "bboxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
    }


def make_model(settings: argparse.Namespace) -> nn.Module:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel(settings.config, nc=settings.classes, verbose=False)
    model.args = get_cfg()
    return model.train()


def variant(name: str, model: nn.Module, batch: dict[str, Tensor]) -> timing.Variant:
    """A step of plain SGD; the rate is so small that the model stays what it is."""
    optimiser = torch.optim.SGD(model.parameters(), 1e-6)
    model.criterion = criterion = model.init_criterion()
    # End-to-end models have a criterion for each of their two heads.
    parts = (criterion.one2many, criterion.one2one) if hasattr(criterion, "one2many") else (criterion,)

    def step() -> None:
        loss, _ = model(batch)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()

    return timing.Variant(name, step, tuple(part.bce for part in parts))


def main(arguments: list[str] | None = None) -> list[timing.Times]:
    settings = parse(arguments)
    frameworks.use_ultralytics()
    import ultralytics

    from rsloss_kernels.integrations.ultralytics import use_loss

    batch = digits(settings.images, settings.image_size)
    variants = [variant("binary cross entropy", make_model(settings), batch)]
    for name in settings.loss or ("rank_sort",):
        variants.append(variant(f'use_loss(model, "{name}")', use_loss(make_model(settings), name), batch))
    times = timing.measure(variants, settings.rounds)
    model = settings.config.removesuffix(".yaml")
    title = f"{model}, {settings.images} x {settings.image_size} px, {settings.classes} classes"
    command = f"python/swap_in_ultralytics.py --config {settings.config}"
    timing.publish(title, times, settings, f"ultralytics_{model}", command, ultralytics)
    return times


if __name__ == "__main__":
    main()
