"""Draws what GHM sees: how the gradient norms of a trained detector are distributed, and what each loss makes of them.

    python python/plot_gradient_density.py                                  # trains with CE and smooth L1 first, a minute on two cores
    python python/plot_gradient_density.py --checkpoint out/checkpoints/ghm_seed0.pt    # of train_detector.py

As in figures 2 to 4 of Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019: above the class logits with CE, focal
and GHM-C, below the boxes with smooth L1, ASL1 and GHM-R. From left to right: elements by gradient norm; the gradient that an element
gets; what each gradient norm contributes to all gradient. Writes gradient_density.png and gradient_density.json to --out.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from digits_detector import report  # noqa: E402
from digits_detector.assignment import assign  # noqa: E402
from digits_detector.boxes import relative_corners  # noqa: E402
from digits_detector.class_and_box_loss import MU, SMOOTH_L1_BETA  # noqa: E402
from digits_detector.class_losses import cross_entropy_sum, focal_loss_sum  # noqa: E402
from digits_detector.data import make_canvases  # noqa: E402
from digits_detector.figures import NAMES  # noqa: E402
from digits_detector.training import Settings, Trainer  # noqa: E402

from rsloss_kernels import (  # noqa: E402
    authentic_smooth_l1_loss,
    ghm_classification_loss,
    ghm_regression_loss,
    gradient_density,
)

BATCH = 50
COLOURS = ("#777777", "#0072B2", "#D55E00")
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="of train_detector.py, on the digits; default: a new run")
    parser.add_argument("--steps", type=int, default=1000, help="of the new run (default: 1000)")
    parser.add_argument("--canvases", type=int, default=300, help="training canvases that are looked at (default: 300)")
    parser.add_argument("--bins", type=int, default=30, help="of the gradient norm, at most 256 (default: 30)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of the picture (default: out)")
    options = parser.parse_args(arguments)
    for name in ("steps", "canvases", "bins"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def trained(options: argparse.Namespace) -> Trainer:
    """From the checkpoint, else newly trained with CE and smooth L1: harmonized by no loss."""
    if options.checkpoint is None:
        pool = make_canvases("train", max(options.canvases, 16 * min(options.steps, 400)))
        return Trainer(Settings("ce+smooth_l1", options.steps), pool).train()
    settings = torch.load(options.checkpoint, weights_only=True)["settings"]
    trainer = Trainer(Settings(**settings), make_canvases("train", max(options.canvases, settings["batch_size"])))
    trainer.load(options.checkpoint)
    return trainer


@torch.no_grad()
def outputs(trainer: Trainer, canvases: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, A, C], labels [n, A], and the errors of the boxes of the positives [P, 4]."""
    trainer.model.eval()
    parts = []
    for rows in torch.arange(canvases).split(BATCH):
        pool = trainer.pool.take(rows)
        predictions = trainer.model(pool.images)
        assigned = assign(pool.boxes, pool.labels, len(pool.class_names), *pool.images.shape[-2:])
        is_positive = assigned.labels < len(pool.class_names)
        errors = relative_corners(predictions.boxes, assigned.boxes)[is_positive]
        parts.append((predictions.logits, assigned.labels, errors))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def gradients(elements: Tensor, losses: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Magnitudes of the gradient of each loss, with a mean of 1 over all elements: losses are scaled to each other anyway."""
    found = {}
    for name, loss in losses.items():
        leaf = elements.detach().double().requires_grad_()
        size = torch.autograd.grad(loss(leaf), leaf)[0].abs().flatten()
        found[name] = size / size.mean()
    return found


def of_bins(norm: Tensor, gradient: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Mean gradient in each bin of the gradient norm, NaN in empty ones, and the share of the whole, percent."""
    place = (norm.flatten() * bins).long().clamp(max=bins - 1)
    total = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gradient)
    return total / torch.bincount(place, minlength=bins), 100 * total / total.sum()


def describe(logits: Tensor, labels: Tensor, errors: Tensor, bins: int) -> dict[str, dict]:
    """For the classes and for the boxes: edges, counts, GHM's weights, and of every loss the gradient and the share by bin."""
    logits, errors = logits.double(), errors.double()
    zero = torch.zeros_like(errors)
    is_positive = torch.zeros(*labels.shape, logits.shape[-1] + 1).scatter_(-1, labels[..., None], 1.0)[..., :-1]
    rows = {
        "classes": (
            gradient_density(logits, labels, bins=bins),
            (logits.sigmoid() - is_positive).abs(),
            gradients(
                logits,
                {
                    "CE": lambda leaf: cross_entropy_sum(leaf, labels),
                    "focal": lambda leaf: focal_loss_sum(leaf, labels),
                    "GHM-C": lambda leaf: ghm_classification_loss(leaf, labels, bins=bins),
                },
            ),
            gradient_density(logits, labels, is_positive, bins=bins).counts,
        ),
        "boxes": (
            gradient_density(errors, zero, bins=bins, mu=MU),
            errors.abs() / (errors**2 + MU**2).sqrt(),
            gradients(
                errors,
                {
                    "smooth L1": lambda leaf: torch.nn.functional.smooth_l1_loss(leaf, zero, beta=SMOOTH_L1_BETA),
                    "ASL1": lambda leaf: authentic_smooth_l1_loss(leaf, zero, mu=MU),
                    "GHM-R": lambda leaf: ghm_regression_loss(leaf, zero, mu=MU, bins=bins),
                },
            ),
            None,
        ),
    }
    described = {}
    for name, (density, norm, sizes, positives) in rows.items():
        by_loss = {loss: [part.tolist() for part in of_bins(norm, size, bins)] for loss, size in sizes.items()}
        described[name] = {
            "edges": density.edges.tolist(),
            "counts": density.counts.tolist(),
            "positives": None if positives is None else positives.tolist(),
            "weights": density.weights.tolist(),
            "gradient": {loss: mean for loss, (mean, _) in by_loss.items()},
            "share": {loss: share for loss, (_, share) in by_loss.items()},
        }
    return described


def draw(described: dict[str, dict], title: str, path: pathlib.Path) -> None:
    norms = {"classes": "gradient norm of a logit, |σ(z) − t|", "boxes": f"gradient norm of a box side, |d| / √(d² + {MU:g}²)"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13.5, 7), layout="constrained")
        for line, (row, found) in zip(axes, described.items(), strict=True):
            counts, sizes, shares = line
            edges, middle = found["edges"], [(a + b) / 2 for a, b in zip(found["edges"], found["edges"][1:], strict=False)]
            counts.stairs(found["counts"], edges, fill=True, color="#bbbbbb", label="all", baseline=0.5)
            if found["positives"]:
                counts.stairs(found["positives"], edges, color="#009E73", lw=1.6, label="positives", baseline=0.5)
                counts.legend()
            counts.set(yscale="log", ylabel="elements" if row == "classes" else "box sides", ylim=(0.5, None), title=f"{row}: how many")
            for loss, colour in zip(found["gradient"], COLOURS, strict=True):
                sizes.plot(middle, found["gradient"][loss], color=colour, marker=".", lw=1.4, label=loss)
                shares.stairs(found["share"][loss], edges, color=colour, lw=1.8, label=loss)
            sizes.set(yscale="log", ylabel="gradient, mean of all elements = 1", title=f"{row}: gradient of an element")
            shares.set(ylabel="percent of all gradient", ylim=(0, None), title=f"{row}: what each gradient norm contributes")
            for axis in line:
                axis.set(xlabel=norms[row], xlim=(0, 1))
                axis.set_axisbelow(True)
            sizes.legend()
            shares.legend()
        figure.suptitle(title, fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    options = parse(arguments)
    trainer = trained(options)
    found = describe(*outputs(trainer, options.canvases), options.bins)
    name = NAMES[trainer.settings.loss]
    title = f"A detector trained with {name} for {trainer.step} steps, on {options.canvases} of its training canvases"
    draw(found, title, options.out / "gradient_density.png")
    report.write_json(options.out / "gradient_density.json", found)
    for row, figures in found.items():
        easiest = {loss: f"{share[0]:.1f}" for loss, share in figures["share"].items()}
        hardest = {loss: f"{share[-1]:.1f}" for loss, share in figures["share"].items()}
        fraction = 100 * figures["counts"][0] / sum(figures["counts"])
        print(f"{row}: {fraction:.1f} % of all elements are in the lowest bin; percent of the gradient in the lowest and highest bin:")
        print("  " + ", ".join(f"{loss} {easiest[loss]} and {hardest[loss]}" for loss in easiest))
    print(f"gradient_density.png and gradient_density.json are in {options.out}")
    return found


if __name__ == "__main__":
    main()
