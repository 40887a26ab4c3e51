"""The table of a long tail: digits of which the most frequent occurs a hundred times as often as the rarest, AP by frequency.

Losses that are trained from the beginning stand against each other; so do the ways to go on from a detector that was trained with a
plain softmax, as published for group softmax: its classifier is converted, everything else is frozen, batch norm's statistics too.
Held-out canvases show all digits equally often. Every run is kept as a file in the out folder, so that a stopped table goes on where
it was.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib

import torch
from torch import Tensor, nn

from digits_detector import evaluation, figures, report
from digits_detector.data import Canvases
from digits_detector.long_tail_losses import HEADS, NAMES, TUNED_HEADS, GroupSoftmaxHead, LongTailLoss, Tail
from digits_detector.model import Detector, Predictions
from digits_detector.training import Settings, Trainer
from rsloss_kernels import convert_classifier

LEARNING_RATE = 1e-2
CURVE_STEPS = 10  # from one point of a curve to the next
# A converted classifier is near its goal; all layers of a trained detector are nearer still.
TUNING_RATES = {True: 5e-3, False: 2e-3}  # classifier only, all layers
ALL_LAYERS = ("bags_all_layers",)


class LongTailTrainer(Trainer):
    """A detector with one of the heads, from its first step on."""

    def _make_loss(self) -> nn.Module:
        return LongTailLoss(HEADS[self.settings.loss](len(self.pool.class_names)))

    def _make_model(self) -> Detector:
        first_logits = self.loss.head.first_logits
        return Detector(len(first_logits), first_logits, self.settings.group_norm)

    def score(self, predictions: Predictions) -> Tensor:
        logits = predictions.logits
        return self.loss.head.scores(logits.flatten(0, -2)).unflatten(0, logits.shape[:-1])

    def train_step(self, loss: nn.Module | None = None) -> dict[str, Tensor]:
        parts = super().train_step(loss)
        state = getattr(getattr(self.loss.head, "loss", None), "pos_neg", None)
        for number, value in enumerate([] if state is None else state[: len(self.pool.class_names)].tolist()):
            self.curves.setdefault(f"pos_neg of {number}", []).append(value)
        return parts

    def classifier_norms(self) -> list[float]:
        """Of each class's weights."""
        columns = torch.arange(len(self.pool.class_names))
        if isinstance(self.loss.head, GroupSoftmaxHead):
            columns = self.loss.head.groups.class_columns[:-1].long().cpu()
        return self.model.classify.weight.detach().cpu()[columns].flatten(1).norm(dim=1).tolist()


class TunedTrainer(LongTailTrainer):
    """Goes on from a detector with softmax: its classifier, converted where the head is another, or all layers."""

    def __init__(self, settings: Settings, pool: Canvases, device: str, base: LongTailTrainer):
        self.base = base
        super().__init__(settings, pool, device)

    @property
    def is_classifier_only(self) -> bool:
        return self.settings.loss not in ALL_LAYERS

    def _make_loss(self) -> nn.Module:
        tail = Tail(count_classes(self.pool))
        return LongTailLoss(TUNED_HEADS[self.settings.loss](tail), with_boxes=not self.is_classifier_only)

    def _make_model(self) -> Detector:
        state = dict(self.base.model.state_dict())
        if isinstance(self.loss.head, GroupSoftmaxHead):
            names = ("classify.weight", "classify.bias")
            converted = convert_classifier(*(state[name].cpu() for name in names), self.loss.head.groups, background="last")
            state.update(zip(names, converted, strict=True))
        model = Detector(state["classify.weight"].shape[0], group_norm=self.settings.group_norm)
        model.load_state_dict(state)
        if self.is_classifier_only:
            model.requires_grad_(False)
            model.classify.requires_grad_(True)
        return model

    def _set_mode(self) -> None:
        self.model.train(not self.is_classifier_only)


def count_classes(canvases: Canvases) -> tuple[int, ...]:
    """How many objects of each class there are."""
    labels = canvases.labels[canvases.labels >= 0].cpu()
    return tuple(torch.bincount(labels, minlength=len(canvases.class_names)).tolist())


def run(options: argparse.Namespace, pool: Canvases, held_out: Canvases) -> dict:
    tail = Tail(count_classes(pool))
    if min(tail.counts) == 0:
        raise ValueError(f"--pool must hold every digit, got counts {tail.counts}; take more canvases or a smaller --tail-ratio")
    kinds = tail.kinds()
    results = report.surroundings(options.device)
    results |= {"counts": tail.counts, "kinds": kinds, "groups": tail.groups().groups, "curve_steps": CURVE_STEPS, "table": []}
    print(f"{len(pool)} training canvases, objects per class: {', '.join(map(str, tail.counts))}", flush=True)
    runs = {name: [] for name in (*HEADS, *TUNED_HEADS)}
    for seed in range(options.seed, options.seed + options.seeds):
        for name in HEADS:
            runs[name].append(_trained(_settings(name, seed, options, pool), options, pool, held_out)[0])
        for name in TUNED_HEADS:
            runs[name].append(_tuned(name, seed, options, pool, held_out))
    for name, of_seeds in runs.items():
        results["table"].append({"loss": name, "name": NAMES[name], "runs": of_seeds})
    legend = (
        f"COCO average precision on {len(held_out)} held-out canvases with all digits equally often, percent, of all classes and of the "
        f"{', '.join(f'{len(classes)} {kind}' for kind, classes in kinds.items())} ones (fewer than {tail.boundaries[1]} training objects: "
        f"common, than {tail.boundaries[0]}: rare). {options.steps} steps of {min(options.batch_size, len(pool))} canvases, those trained "
        f"on {options.tune_steps} more; {options.seeds} seed{'s' * (options.seeds > 1)}. Objects per class: {', '.join(map(str, tail.counts))}."
    )
    print(f"{_table(results['table'], kinds)}\n{legend}")
    (options.out / "long_tail.md").write_text(f"{_table(results['table'], kinds, markdown=True)}\n\n{legend}\n")
    report.write_json(options.out / "long_tail.json", results)
    figures.draw_long_tail(results, options.out / "long_tail.png")
    print(f"long_tail.json, long_tail.md and long_tail.png are in {options.out}")
    return results


def _settings(name: str, seed: int, options: argparse.Namespace, pool: Canvases) -> Settings:
    rate = LEARNING_RATE if options.lr is None else options.lr
    return Settings(name, options.steps, seed, rate, min(options.batch_size, len(pool)))


def _path(settings: Settings, options: argparse.Namespace, pool: Canvases, held_out: Canvases, **more) -> tuple[pathlib.Path, dict]:
    """The file of a run's result, and all that the run depends on."""
    key = dataclasses.asdict(settings) | {"counts": count_classes(pool), "pool": len(pool), "held_out": len(held_out)} | more
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return options.out / "long_tail" / f"{settings.loss}_{digest}.json", key


def _trained(
    settings: Settings, options: argparse.Namespace, pool: Canvases, held_out: Canvases, needs_model: bool = False
) -> tuple[dict, LongTailTrainer | None]:
    """The result, from its file if there is one; the trained detector, too, if it is needed or was trained just now."""
    path, key = _path(settings, options, pool, held_out)
    if path.exists() and not needs_model:
        return json.loads(path.read_text()), None
    # Of softmax the last checkpoint stays: others go on from it.
    trainer = LongTailTrainer(settings, pool, options.device).train(path.with_suffix(".pt"), options.checkpoint_every, resume=True)
    if not path.exists():
        report.write_json(path, _result(trainer, key, held_out))
    if settings.loss != "softmax":
        path.with_suffix(".pt").unlink(missing_ok=True)
    return json.loads(path.read_text()), trainer


def _tuned(name: str, seed: int, options: argparse.Namespace, pool: Canvases, held_out: Canvases) -> dict:
    base_settings = _settings("softmax", seed, options, pool)
    rate = TUNING_RATES[name not in ALL_LAYERS]
    settings = dataclasses.replace(base_settings, loss=name, steps=options.tune_steps, lr=rate)
    path, key = _path(settings, options, pool, held_out, base=dataclasses.asdict(base_settings))
    if path.exists():
        return json.loads(path.read_text())
    _, base = _trained(base_settings, options, pool, held_out, needs_model=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the sampling
        trainer = TunedTrainer(settings, pool, options.device, base).train()
    report.write_json(path, _result(trainer, key, held_out) | {"classifier_norms_before": base.classifier_norms()})
    return json.loads(path.read_text())


def _result(trainer: LongTailTrainer, key: dict, held_out: Canvases) -> dict:
    found = evaluation.average_precision(evaluation.detect(trainer.model, held_out, trainer.score, trainer.device), held_out)
    curves = {name: values[::CURVE_STEPS] for name, values in trainer.curves.items() if name.startswith("pos_neg")}
    return {
        "settings": key,
        "ap": found.ap,
        "ap_per_class": found.per_class,
        "classifier_norms": trainer.classifier_norms(),
        "curves": curves,
    }


def _table(rows: list[dict], kinds: dict[str, list[int]], markdown: bool = False) -> str:
    cells = []
    for row in rows:
        found = [report.spread([100 * one["ap"] for one in row["runs"]])]
        for classes in kinds.values():
            means = [100 * sum(one["ap_per_class"][number] for number in classes) / max(1, len(classes)) for one in row["runs"]]
            found.append(report.spread(means))
        cells.append([row["name"], *found])
    return report.table(["loss", "AP", *kinds], cells, markdown)
