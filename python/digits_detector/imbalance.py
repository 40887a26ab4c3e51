"""The table against imbalance: four losses for the classes with one for the boxes, three for the boxes with one for the classes, and
GHM for both.

Of a canvas's 1800 logits a handful are positive. Every run is kept as a file in the out folder, so that a stopped table goes on where
it was. Times are taken afterwards, step by step in turns: whatever slows the machine down slows all losses.
"""

import argparse
import dataclasses
import itertools
import statistics

import torch

from digits_detector import report
from digits_detector.ablation import cached_run
from digits_detector.class_and_box_loss import BOX_WEIGHTS, CLASS_LOSSES, LOSS_NAMES, PAIRS
from digits_detector.data import Canvases
from digits_detector.training import Settings, Trainer

FIXED_BOXES, FIXED_CLASSES = "smooth_l1", "focal"
WARM_UP_STEPS = 3


def names() -> list[str]:
    """Of the settings, in the order of the table: every loss for the classes, every other one for the boxes, and both of GHM."""
    pairs = [(classes, FIXED_BOXES) for classes in CLASS_LOSSES]
    pairs += [(FIXED_CLASSES, boxes) for boxes in BOX_WEIGHTS if boxes != FIXED_BOXES]
    of_pair = {pair: name for name, pair in PAIRS.items()}
    return [*(of_pair[pair] for pair in pairs), "ghm"]


def run(options: argparse.Namespace, pool: Canvases, held_out: Canvases) -> dict:
    results = report.surroundings(options.device) | {"table": []}
    batch_size = min(options.batch_size, len(pool))
    base = Settings("ghm", options.steps, options.seed, options.lr, batch_size, box_weight=options.box_weight)
    for name in names():
        seeds = range(options.seed, options.seed + options.seeds)
        runs = [cached_run(dataclasses.replace(base, loss=name, seed=seed), options, pool, held_out) for seed in seeds]
        classes, boxes = PAIRS[name]
        results["table"].append({"classes": classes, "boxes": boxes, "loss": name, "runs": runs})
    if options.time_steps:
        for row, times in zip(results["table"], _times(base, options, pool), strict=True):
            row.update(times)
    legend = (
        f"AP, AP50, AP75: COCO average precision on {len(held_out)} held-out canvases, percent, after {options.steps} steps of "
        f"{batch_size} canvases, {options.seeds} seed{'s' * (options.seeds > 1)}."
    )
    if options.time_steps:
        legend += f" Times: medians of {options.time_steps} steps that all losses took in turns, {torch.get_num_threads()} threads."
    print(f"{_table(results['table'])}\n{legend}")
    (options.out / "imbalance.md").write_text(f"{_table(results['table'], markdown=True)}\n\n{legend}\n")
    report.write_json(options.out / "imbalance.json", results)
    print(f"imbalance.json and imbalance.md are in {options.out}")
    return results


def _times(base: Settings, options: argparse.Namespace, pool: Canvases) -> list[dict]:
    """Medians of a step and of the loss in it, of all losses taking turns."""
    steps = WARM_UP_STEPS + options.time_steps
    trainers = [Trainer(dataclasses.replace(base, loss=name, steps=steps), pool, options.device) for name in names()]
    for _, trainer in itertools.product(range(steps), trainers):
        trainer.train_step()
    kept = [trainer.times[WARM_UP_STEPS:] for trainer in trainers]
    return [{key: statistics.median(getattr(step, key) for step in times) for key in ("step_ms", "loss_ms")} for times in kept]


def _table(rows: list[dict], markdown: bool = False) -> str:
    header = ["classes", "boxes", "AP", "AP50", "AP75"]
    with_times = "step_ms" in rows[0]
    cells = []
    for row in rows:
        found = [report.spread([100 * one[key] for one in row["runs"]]) for key in ("ap", "ap50", "ap75")]
        times = [f"{row[key]:.1f}" for key in ("step_ms", "loss_ms")] if with_times else []
        cells.append([LOSS_NAMES[row["classes"]], LOSS_NAMES[row["boxes"]], *found, *times])
    return report.table(header + ["ms per step", "ms in loss"] * with_times, cells, markdown)
