"""What train_detector.py does with its options: data, runs, comparison, tables, pictures."""

import argparse
import dataclasses
import statistics

import torch
from swaps.frameworks import use_torchvision

from digits_detector import ablation, comparison, evaluation, figures, imbalance, long_tail, processes, report, two_stage
from digits_detector.coco_folder import read_coco_folder
from digits_detector.data import Canvases, make_canvases
from digits_detector.losses import LOSSES
from digits_detector.training import Settings, Trainer

# Canvases on which thresholds are found are part of the training pool.
THRESHOLD_CANVASES = 300
SHOWN_CANVASES = 6
LEGEND = (
    "AP, AP50, AP75: COCO average precision on held-out canvases, percent. F1: percent, IoU 0.5, at the threshold of the score that\n"
    f"is best on training canvases. At {evaluation.FIXED_THRESHOLD}: of the detections that score at least as much. Times are\n"
    "medians of this run; on a busy machine they cannot be compared between losses that were trained one after the other."
)


@dataclasses.dataclass
class Run:
    """A finished run and what it is worth on held-out canvases."""

    settings: Settings
    trainer: Trainer
    held_out: evaluation.Detections
    found: evaluation.AveragePrecision
    ap_at_fixed_threshold: float
    threshold: float
    train_f1: float
    f1: float
    f1_at_fixed_threshold: float

    def summary(self) -> dict:
        times = self.trainer.times
        return {
            **dataclasses.asdict(self.settings),
            "lr": self.settings.learning_rate,
            "ap": self.found.ap,
            "ap50": self.found.ap50,
            "ap75": self.found.ap75,
            "ap_at_score_0.05": self.ap_at_fixed_threshold,
            "f1_threshold": self.threshold,
            "f1_on_training_canvases": self.train_f1,
            "f1": self.f1,
            "f1_at_score_0.05": self.f1_at_fixed_threshold,
            "step_ms": statistics.median(step.step_ms for step in times),
            "loss_ms": statistics.median(step.loss_ms for step in times),
            "peak_memory_mb": self.trainer.peak_memory_mb,
            "curves": self.trainer.curves,
            "precision": self.found.precision,
        }


def load_data(options: argparse.Namespace) -> tuple[Canvases, Canvases]:
    """(training pool, held-out canvases)."""
    if options.data is not None:
        return read_coco_folder(options.data, options.image_size)
    return make_canvases("train", options.pool), make_canvases("held_out", options.held_out)


def run_one(settings: Settings, pool: Canvases, held_out: Canvases, options: argparse.Namespace) -> Run | None:
    """Trains with all processes; the first one evaluates, for the others there is no result."""
    checkpoint = options.out / "checkpoints" / f"{settings.loss}_seed{settings.seed}.pt"
    trainer = Trainer(settings, pool, options.device).train(checkpoint, options.checkpoint_every, options.resume)
    if not processes.is_first():
        return None
    detections = evaluation.detect(trainer.model, held_out, trainer.score, options.device)
    known = pool.take(slice(0, THRESHOLD_CANVASES))
    threshold, f1 = evaluation.best_f1(evaluation.detect(trainer.model, known, trainer.score, options.device), known)
    fixed = evaluation.average_precision(detections.above(evaluation.FIXED_THRESHOLD), held_out)
    found = evaluation.average_precision(detections, held_out)
    found_f1, fixed_f1 = (evaluation.f1_at(detections, held_out, at) for at in (threshold, evaluation.FIXED_THRESHOLD))
    return Run(settings, trainer, detections, found, fixed.ap, threshold, f1, found_f1, fixed_f1)


def run(options: argparse.Namespace) -> dict | None:
    """The default job; returns what it writes to results.json. Of several processes only the first has results."""
    pool, held_out = load_data(options)
    base = Settings(
        "rank_sort", options.steps, options.seed, options.lr, min(options.batch_size, len(pool)),
        not options.no_score_weights, options.box_weight, options.group_norm, options.global_ranking,
    )  # fmt: skip
    if base.batch_size < base.processes:
        raise ValueError(f"--batch-size must be at least the number of processes, {base.processes}, got {base.batch_size}")
    settings = [
        dataclasses.replace(base, loss=name, seed=seed)
        for name in options.loss or LOSSES
        for seed in range(options.seed, options.seed + options.seeds)
    ]
    if not processes.is_first():
        for one in settings:
            run_one(one, pool, held_out, options)
        return None
    print(f"{len(pool)} training and {len(held_out)} held-out canvases, {len(pool.class_names)} classes", flush=True)
    results = report.surroundings(options.device) | {"runs": []}
    if options.compare_steps and base.processes == 1:
        compared = comparison.compare(base, options.compare_steps, pool, options.device, getattr(torch, options.loop_dtype))
        print(describe(compared), flush=True)
        results["comparison"] = dataclasses.asdict(compared) | {"largest_difference": compared.largest_difference}
        figures.draw_comparison(compared, options.out / "swap.png")

    runs = []
    for one in settings:
        runs.append(run_one(one, pool, held_out, options))
        results["runs"].append(runs[-1].summary())
        report.write_json(options.out / "results.json", results)

    text = results_table(results["runs"])
    print(text)
    print(LEGEND)
    for one in runs:
        print(
            f"{one.settings.loss} seed {one.settings.seed}: best F1 on training canvases {100 * one.train_f1:.1f} at score "
            f"{one.threshold:.4f}, which gives {100 * one.f1:.1f} on held-out canvases; score {evaluation.FIXED_THRESHOLD} gives "
            f"{100 * one.f1_at_fixed_threshold:.1f}"
        )
    print("For every loss the threshold has to be found. A ranking loss fixes the order of the scores, not their level,")
    print("and does not even suggest one.")
    figures.draw_loss_curves([one.summary() for one in runs], options.out / "loss_curves.png")
    figures.draw_precision_recall([one.summary() for one in runs], options.out / "precision_recall.png")
    first = [one for one in runs if one.settings.seed == options.seed]
    figures.draw_detections(first, held_out.take(slice(0, SHOWN_CANVASES)), options.out / "detections.png")
    (options.out / "results.md").write_text(results_table(results["runs"], markdown=True) + f"\n\n{LEGEND}\n")
    report.write_json(options.out / "results.json", results)
    print(f"pictures, results.json and results.md are in {options.out}")
    return results


def describe(compared: comparison.Comparison) -> str:
    return (
        f"published loop ({compared.loop_dtype}) and ours on the same logits, {len(compared.differences)} steps: largest gradient "
        f"difference {compared.largest_difference:.2e} of the largest entry (limit {comparison.GRADIENT_LIMIT:g})\n"
        f"  loss and gradient: loop {compared.loop_ms:.1f} ms, ours {compared.our_ms:.1f} ms ({compared.loop_ms / compared.our_ms:.1f}x)\n"
        f"  whole step:        loop {compared.loop_step_ms:.1f} ms, ours {compared.our_step_ms:.1f} ms "
        f"({compared.loop_step_ms / compared.our_step_ms:.1f}x)"
    )


def results_table(runs: list[dict], markdown: bool = False) -> str:
    header = ["loss", "AP", "AP50", "AP75", "AP at 0.05", "F1", "F1 at 0.05", "ms per step", "ms in loss", "peak MB"]
    rows = []
    for name in dict.fromkeys(one["loss"] for one in runs):
        same = [one for one in runs if one["loss"] == name]
        percent = [
            report.spread([100 * one[key] for one in same])
            for key in ("ap", "ap50", "ap75", "ap_at_score_0.05", "f1", "f1_at_score_0.05")
        ]
        times = [report.spread([one[key] for one in same]) for key in ("step_ms", "loss_ms")]
        rows.append([name, *percent, *times, f"{max(one['peak_memory_mb'] for one in same):.0f}"])
    return report.table(header, rows, markdown)


def run_ablation(options: argparse.Namespace) -> dict:
    pool, held_out = load_data(options)
    # The learning rate is chosen on neither the pool nor the held-out canvases.
    tuning = held_out if options.data is not None else make_canvases("tuning", options.held_out)
    return ablation.run(options, pool, tuning, held_out)


def run_long_tail(options: argparse.Namespace) -> dict:
    pool = make_canvases("train", options.pool, tail_ratio=options.tail_ratio)
    return long_tail.run(options, pool, make_canvases("held_out", options.held_out))


def run_two_stage(options: argparse.Namespace) -> dict:
    use_torchvision()
    return two_stage.run(options, *load_data(options))


def run_imbalance(options: argparse.Namespace) -> dict:
    return imbalance.run(options, *load_data(options))
