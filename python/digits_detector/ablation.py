"""The ablation: every loss at its best of three learning rates, over seeds; score weights off; a fixed box weight.

Every run is kept as a file in the out folder, so that a stopped ablation goes on where it was. The learning rate is chosen by AP on
canvases made of training material that the pool does not hold.
"""

import argparse
import dataclasses
import hashlib
import json

from digits_detector import evaluation, report
from digits_detector.data import Canvases
from digits_detector.losses import LOSSES
from digits_detector.training import Settings, Trainer

GRID = (5e-3, 1e-2, 2e-2)
BOX_WEIGHTS = (1.0, 2.0)


def run(options: argparse.Namespace, pool: Canvases, tuning: Canvases, held_out: Canvases) -> dict:
    results = report.surroundings(options.device) | {"tuning": {}, "table": []}
    batch_size = min(options.batch_size, len(pool))
    best = {}
    names = options.loss or LOSSES
    for name in names:
        scores = {}
        for rate in GRID if options.lr is None else (options.lr,):
            settings = Settings(name, options.steps, options.seed, rate, batch_size)
            scores[rate] = cached_run(settings, options, pool, held_out, tuning)["tuning_ap"]
        best[name] = max(scores, key=scores.get)
        results["tuning"][name] = {f"{rate:g}": ap for rate, ap in scores.items()}

    rows = [(name, Settings(name, options.steps, options.seed, best[name], batch_size)) for name in names]
    if "rank_sort" in names:
        ranked = dict(rows)["rank_sort"]
        rows.append(("rank_sort, no score weights", dataclasses.replace(ranked, use_score_weights=False)))
        rows += [
            (f"rank_sort, box weight {weight:g}", dataclasses.replace(ranked, box_weight=weight)) for weight in BOX_WEIGHTS
        ]
    for title, settings in rows:
        runs = [
            cached_run(dataclasses.replace(settings, seed=seed), options, pool, held_out, tuning)
            for seed in range(options.seed, options.seed + options.seeds)
        ]
        results["table"].append({"configuration": title, "lr": settings.learning_rate, "runs": runs})

    print(_table(results["table"]))
    gaps = _gaps(results["table"])
    results["gaps"] = gaps
    for other, gap in gaps.items():
        print(f"rank_sort - {other}: {gap:+.1f} AP")
    markdown = [_table(results["table"], markdown=True), ""]
    markdown += [f"rank_sort - {other}: {gap:+.1f} AP" for other, gap in gaps.items()]
    tuned = [[name, *(f"{100 * ap:.1f}" for ap in scores.values())] for name, scores in results["tuning"].items()]
    rates = list(next(iter(results["tuning"].values())))
    markdown += ["", "AP on tuning canvases by learning rate:", "", report.table(["loss", *rates], tuned, markdown=True), ""]
    (options.out / "ablation.md").write_text("\n".join(markdown))
    report.write_json(options.out / "ablation.json", results)
    print(f"ablation.json and ablation.md are in {options.out}")
    return results


def cached_run(
    settings: Settings, options: argparse.Namespace, pool: Canvases, held_out: Canvases, tuning: Canvases | None = None
) -> dict:
    """The result of one run, AP on the canvases given: from its file if it was finished before, else trained now."""
    data = str(options.data.resolve()) if options.data is not None else "digits"
    key = {
        **dataclasses.asdict(settings), "data": data, "pool": len(pool), "held_out": len(held_out), "image": pool.images.shape[-1]
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = options.out / ("ablation" if options.ablation else "imbalance") / f"{settings.loss}_{digest}.json"
    if path.exists():
        return json.loads(path.read_text())
    checkpoint = path.with_suffix(".pt")
    trainer = Trainer(settings, pool, options.device).train(checkpoint, options.checkpoint_every, resume=True)
    result = {"settings": key}
    if tuning is not None:
        result["tuning_ap"] = _average_precision(trainer, tuning).ap
    found = _average_precision(trainer, held_out)
    result |= {"ap": found.ap, "ap50": found.ap50, "ap75": found.ap75}
    report.write_json(path, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _average_precision(trainer: Trainer, canvases: Canvases) -> evaluation.AveragePrecision:
    found = evaluation.detect(trainer.model, canvases, trainer.score, trainer.device)
    return evaluation.average_precision(found, canvases)


def _table(rows: list[dict], markdown: bool = False) -> str:
    cells = [
        [
            row["configuration"],
            f"{row['lr']:g}",
            *(report.spread([100 * one[key] for one in row["runs"]]) for key in ("ap", "ap50", "ap75")),
        ]
        for row in rows
    ]
    return report.table(["configuration", "lr", "AP", "AP50", "AP75"], cells, markdown)


def _gaps(rows: list[dict]) -> dict[str, float]:
    """Mean held-out AP of Rank & Sort less that of every other row, in points."""
    means = {row["configuration"]: 100 * sum(one["ap"] for one in row["runs"]) / len(row["runs"]) for row in rows}
    if "rank_sort" not in means:
        return {}
    return {name: means["rank_sort"] - mean for name, mean in means.items() if name != "rank_sort"}
