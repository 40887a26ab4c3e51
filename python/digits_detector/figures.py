"""The pictures: loss curves, the swap, precision-recall, detections."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from digits_detector.class_and_box_loss import LOSS_NAMES, PAIRS  # noqa: E402
from digits_detector.data import Canvases  # noqa: E402
from digits_detector.evaluation import FIXED_THRESHOLD  # noqa: E402

# A palette that stays distinct for colour-blind readers.
COLOURS = {"focal": "#0072B2", "focal_centerness": "#E69F00", "rank_sort": "#D55E00", "ap": "#009E73", "alrp": "#CC79A7"}
NAMES = {"focal": "focal", "focal_centerness": "focal + centerness", "rank_sort": "Rank & Sort", "ap": "AP", "alrp": "aLRP"}
# Pairs of a loss for the classes and one for the boxes are told apart by colour only where they are few.
COLOURS = {name: plt.get_cmap("tab20")(number) for number, name in enumerate(PAIRS)} | COLOURS | {"ghm": "#56B4E9"}
NAMES |= {name: " + ".join(LOSS_NAMES[part] for part in pair) for name, pair in PAIRS.items()}
SCALED_TO = {"rank_sort": "ranking + sorting", "ap": "ap"}
PARTS = ("#444444", "#009E73", "#CC79A7")
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"axes.axisbelow": True, "legend.frameon": False}
BOX_COLOURS = plt.get_cmap("tab10")
MOST_BOXES_DRAWN = 60
# Labels stand on their box, or inside where the canvas ends; in pixels of the canvas.
LABEL_HEIGHT = 9
# Of what is drawn on a logarithmic scale: a class without a positive so far has a ratio of 0.
SMALLEST_RATIO = 1e-2


def _smoothed(values: list[float], window: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, running mean over `window`), where the window is full."""
    window = max(1, min(window, len(values)))
    return np.arange(window, len(values) + 1), np.convolve(values, np.ones(window) / window, mode="valid")


def _save(figure, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_loss_curves(runs: list[dict], path: pathlib.Path) -> None:
    """One panel per loss, its parts smoothed; the losses themselves cannot be compared with each other."""
    names = list(dict.fromkeys(run["loss"] for run in runs))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(names), figsize=(4.4 * len(names), 3.6), squeeze=False, layout="constrained")
        for axis, name in zip(axes[0], names, strict=True):
            for run in (run for run in runs if run["loss"] == name):
                # Self-balancing gives the box loss the value of the reference, so its curve says nothing of the boxes.
                reference = SCALED_TO.get(name) if run["box_weight"] is None else None
                for (part, values), colour in zip(run["curves"].items(), PARTS, strict=False):
                    is_first = run["seed"] == runs[0]["seed"]
                    title = f"box, scaled to {reference}" if reference and part == "box" else part
                    axis.plot(
                        *_smoothed(values, 25),
                        color=colour,
                        lw=1.4,
                        label=title if is_first else None,
                        alpha=1 if is_first else 0.4,
                    )
            axis.set(title=NAMES[name], xlabel="step", ylim=(0, None))
            axis.legend()
        axes[0, 0].set_ylabel("loss, mean of 25 steps")
        _save(figure, path)


def draw_comparison(compared, path: pathlib.Path) -> None:
    with plt.rc_context(STYLE):
        figure, (curves, gradients, times) = plt.subplots(
            1, 3, figsize=(13.5, 3.8), layout="constrained", width_ratios=(1.3, 1.3, 1)
        )
        steps = np.arange(1, len(compared.differences) + 1)
        curves.plot(steps, compared.loop_loss, color="#999999", lw=4, label="published loop")
        curves.plot(steps, compared.our_loss, color=COLOURS["rank_sort"], lw=1.2, label="rsloss_kernels")
        curves.set(title="Trained apart from one seed (rounding adds up)", xlabel="step", ylabel="ranking + sorting loss")
        curves.legend()
        gradients.semilogy(steps, np.maximum(compared.differences, 1e-9), ".", color=COLOURS["rank_sort"], ms=4)
        gradients.axhline(1e-5, color="#444444", lw=1, ls="--")
        gradients.text(steps[-1], 1e-5, "limit", ha="right", va="bottom", color="#444444")
        gradients.set(
            title="Gradients on the same logits", xlabel="step", ylabel="difference / largest entry", ylim=(1e-9, 1e-4)
        )
        bars = {
            "loss,\npublished loop": compared.loop_ms,
            "loss,\nrsloss_kernels": compared.our_ms,
            "whole step,\npublished loop": compared.loop_step_ms,
            "whole step,\nrsloss_kernels": compared.our_step_ms,
        }
        colours = ["#999999", COLOURS["rank_sort"]] * 2
        drawn = times.barh(list(bars)[::-1], list(bars.values())[::-1], color=colours[::-1])
        times.bar_label(drawn, fmt="%.1f ms", padding=3)
        times.set(title="Median time of a step", xlabel="ms", xlim=(0, 1.3 * max(bars.values())))
        times.grid(axis="y", visible=False)
        _save(figure, path)


def draw_precision_recall(runs: list[dict], path: pathlib.Path) -> None:
    recall = np.linspace(0, 1, 101)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
        for axis, threshold in zip(axes, ("0.50", "0.75"), strict=True):
            for name in dict.fromkeys(run["loss"] for run in runs):
                curves = np.array([run["precision"][threshold] for run in runs if run["loss"] == name])
                label = f"{NAMES[name]} (AP{threshold[2:]} {100 * curves.mean():.1f})"
                axis.plot(recall, curves.mean(0), color=COLOURS[name], lw=1.8, label=label)
                if len(curves) > 1:
                    axis.fill_between(recall, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.15, lw=0)
            axis.set(title=f"held-out canvases, IoU {threshold}", xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
            axis.legend(loc="best")
        axes[0].set_ylabel("precision, mean over classes")
        _save(figure, path)


def draw_detections(runs: list, canvases: Canvases, path: pathlib.Path) -> None:
    """Held-out canvases: the truth, each loss at its own threshold, and Rank & Sort at a fixed one."""
    rows = [("truth", None, None)]
    rows += [(f"{NAMES[run.settings.loss]}\nscore ≥ {run.threshold:.3f}", run, run.threshold) for run in runs]
    rows += [
        (f"{NAMES[run.settings.loss]}\nscore ≥ {FIXED_THRESHOLD}", run, FIXED_THRESHOLD)
        for run in runs
        if run.settings.loss == "rank_sort"
    ]
    figure, axes = plt.subplots(
        len(rows), len(canvases), figsize=(2 * len(canvases) + 0.5, 2 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (title, run, threshold) in zip(axes, rows, strict=True):
        for column, axis in enumerate(line):
            axis.imshow(canvases.images[column].permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if run is None:
                is_object = canvases.labels[column] >= 0
                boxes, labels = canvases.boxes[column][is_object], canvases.labels[column][is_object]
            else:
                found = run.held_out.above(threshold)
                kept = found.keep[column]
                boxes, labels = found.boxes[column][kept], found.labels[column][kept]
                cut = f", the best {MOST_BOXES_DRAWN} drawn" if len(boxes) > MOST_BOXES_DRAWN else ""
                axis.set_xlabel(f"{len(boxes)} box{'' if len(boxes) == 1 else 'es'}{cut}", fontsize=8, labelpad=2)
            # By falling score: the best are drawn last, on top.
            for (x1, y1, x2, y2), label in list(zip(boxes.tolist(), labels.tolist(), strict=True))[:MOST_BOXES_DRAWN][::-1]:
                colour = BOX_COLOURS(label % 10)
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=1.5))
                axis.text(
                    x1, max(y1, LABEL_HEIGHT), canvases.class_names[label], fontsize=7, color="white", va="bottom",
                    bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8}, clip_on=True,
                )  # fmt: skip
        line[0].set_ylabel(title, fontsize=9)
    _save(figure, path)


def draw_long_tail(results: dict, path: pathlib.Path) -> None:
    """AP of each class, `pos_neg` of each class over a training with EFL, and the norms of the classifier's weights; means over seeds."""
    rows = {row["loss"]: row for row in results["table"]}
    counts = np.array(results["counts"])
    order = np.argsort(-counts, kind="stable")

    def mean(loss: str, key: str) -> np.ndarray:
        return np.mean([one[key] for one in rows[loss]["runs"]], axis=0)[order]

    with plt.rc_context(STYLE):
        figure, ((ap, norm), ratios) = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
        for number, loss in enumerate(("focal", "eqlv2", "efl", "seesaw", "softmax", "bags")):
            ap.plot(counts[order], 100 * mean(loss, "ap_per_class"), "o-", color=BOX_COLOURS(number), lw=1.3, ms=4, label=rows[loss]["name"])
        ap.set(xscale="log", xlabel="objects of the class in training", ylabel="AP, percent", title="held-out AP of each class")
        ap.invert_xaxis()
        ap.legend(fontsize=8, loc="lower left")

        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(counts)))
        for axis, loss in zip(ratios, ("efl", "eqlv2"), strict=True):
            curves = rows[loss]["runs"][0]["curves"]
            for number, shade in zip(order, shades, strict=True):
                values = np.maximum(curves[f"pos_neg of {number}"], SMALLEST_RATIO)
                axis.plot(results["curve_steps"] * np.arange(len(values)), values, color=shade, lw=1.3, label=f"{counts[number]}")
            axis.set(yscale="log", xlabel="step", ylabel="pos_neg", title=f"{rows[loss]['name']}: gradient of positives over that of negatives")
            axis.legend(title="objects", fontsize=8, title_fontsize=8, ncol=2)

        norm.plot(counts[order], mean("softmax", "classifier_norms"), "o-", color="#444444", lw=1.3, ms=4, label="softmax, before")
        for number, loss in enumerate(("softmax_tuned", "softmax_reweighted", "bags", "bags_no_others")):
            norm.plot(
                counts[order], mean(loss, "classifier_norms"), "o-", color=BOX_COLOURS(number), lw=1.3, ms=4, label=rows[loss]["name"]
            )
        norm.set(xscale="log", xlabel="objects of the class in training", ylabel="norm", title="norm of each class's classifier weights")
        norm.invert_xaxis()
        norm.legend(fontsize=8)
        _save(figure, path)


def draw_two_stage(results: dict, path: pathlib.Path) -> None:
    """Dynamic R-CNN's IoU threshold and beta over training, every seed of the run in which both follow it."""
    runs = next(row["runs"] for row in results["rows"] if row["row"] == "both")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
        for axis, name, title in zip(axes, ("iou_threshold", "beta"), ("IoU threshold", "beta of smooth L1"), strict=True):
            for number, run in enumerate(runs):
                steps, values = run["schedules"][name]["steps"], run["schedules"][name]["values"]
                axis.step(steps, values, where="post", color=BOX_COLOURS(number), lw=1.5, label=f"seed {run['settings']['seed']}")
            axis.set(title=title, xlabel="step", ylim=(0, None))
        axes[0].legend()
        _save(figure, path)
