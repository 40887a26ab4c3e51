"""The training program: its data, its parts against slow twins, a few steps of every loss, resume, a COCO folder, the live comparison."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1] / folder) for folder in ("python", "")]

import plot_gradient_density  # noqa: E402
import train_detector  # noqa: E402
from digits_detector import boxes, comparison, evaluation, imbalance, long_tail, long_tail_losses  # noqa: E402
from digits_detector.assignment import assign  # noqa: E402
from digits_detector.class_losses import hard_example_sum  # noqa: E402
from digits_detector.coco_folder import read_coco_folder, write_coco_folder  # noqa: E402
from digits_detector.data import DIGIT_RANGES, batch_rows, make_canvases  # noqa: E402
from digits_detector.losses import LOSSES, focal_loss_sum  # noqa: E402
from digits_detector.model import Detector  # noqa: E402
from digits_detector.training import Settings, Trainer  # noqa: E402

PHOTO_WIDTH = 640
PROGRAM = pathlib.Path(train_detector.__file__)


@pytest.fixture(scope="module")
def pool():
    return make_canvases("train", 64)


@pytest.mark.parametrize("split", ["train", "held_out", "tuning"])
def test_canvases_are_the_same_for_the_same_seed_and_differ_for_others(split):
    first, again, other = (make_canvases(split, 6, seed) for seed in (3, 3, 4))
    for field in ("images", "boxes", "labels", "digits", "crops"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert not torch.equal(first.images, other.images)
    longer = make_canvases(split, 8, 3)
    assert torch.equal(longer.images[:6], first.images)


def test_no_held_out_digit_or_photo_part_in_training():
    border = int(0.7 * PHOTO_WIDTH)
    for split in ("train", "tuning", "held_out"):
        canvases = make_canvases(split, 200)
        digits = canvases.digits[canvases.digits >= 0]
        low, high = (1400, 1797) if split == "held_out" else (0, 1400)
        assert digits.min() >= low and digits.max() < high and len(digits) > 300
        columns = (border, PHOTO_WIDTH) if split == "held_out" else (0, border)
        assert canvases.crops[:, 1].min() >= columns[0] and canvases.crops[:, 2].max() <= columns[1]
        assert set(canvases.crops[:, 0].tolist()) == {0, 1}
    assert DIGIT_RANGES == {"train": (0, 1400), "held_out": (1400, 1797)}
    assert not torch.equal(make_canvases("train", 2).images, make_canvases("tuning", 2).images)


def test_boxes_enclose_the_ink(pool):
    is_object = pool.labels >= 0
    found = pool.boxes[is_object]
    assert (found[:, :2] >= 0).all() and (found[:, 2:] <= 96).all()
    sides = found[:, 2:] - found[:, :2]
    assert sides.min() >= 3 and sides.max() <= 44
    overlaps = boxes.iou(pool.boxes[:, :, None], pool.boxes[:, None])
    assert overlaps.triu(1)[is_object[:, :, None] & is_object[:, None]].max() <= 1  # own pairs are 1 at most
    apart = overlaps.masked_fill(torch.eye(pool.labels.shape[1], dtype=torch.bool), 0)
    assert apart[is_object[:, :, None] & is_object[:, None]].max() == 0


def test_every_epoch_is_a_permutation_of_the_pool():
    rows = torch.cat([batch_rows(50, 10, seed=1, step=step) for step in range(10)])
    assert sorted(rows[:50].tolist()) == sorted(rows[50:].tolist()) == list(range(50))
    assert rows[:50].tolist() != rows[50:].tolist()


def test_model_size():
    assert 140_000 < sum(parameter.numel() for parameter in Detector(10).parameters()) < 180_000


def test_assignment_against_a_loop(pool):
    labels, targets, centerness = assign(pool.boxes, pool.labels, 10, 96, 96)
    points = [
        ((x + 0.5) * stride, (y + 0.5) * stride, stride)
        for stride in (8, 16)
        for y in range(96 // stride)
        for x in range(96 // stride)
    ]
    for image in range(8):
        for place, (x, y, stride) in enumerate(points):
            best = None
            for (x1, y1, x2, y2), label in zip(pool.boxes[image].tolist(), pool.labels[image].tolist(), strict=True):
                longest, distance = max(x2 - x1, y2 - y1), max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                fits = longest < 26 if stride == 8 else longest >= 20
                if (
                    label >= 0
                    and fits
                    and x1 < x < x2
                    and y1 < y < y2
                    and distance < 1.5 * stride
                    and (best is None or distance < best[0])
                ):
                    left, right, up, down = x - x1, x2 - x, y - y1, y2 - y
                    quality = (min(left, right) / max(left, right) * min(up, down) / max(up, down)) ** 0.5
                    best = distance, label, (x1, y1, x2, y2), quality
            if best is None:
                assert labels[image, place] == 10
            else:
                assert labels[image, place] == best[1] and tuple(targets[image, place].tolist()) == best[2]
                assert centerness[image, place].item() == pytest.approx(best[3], abs=1e-5)
    assert (labels < 10).sum() > 200


def test_nms_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(5, 60, 2, generator=generator) * 50
    candidates = torch.cat([corner, corner + 5 + torch.rand(5, 60, 2, generator=generator) * 30], -1)
    labels = torch.randint(0, 3, (5, 60), generator=generator)
    keep = boxes.batched_nms(candidates, labels, 0.4)
    for image in range(5):
        kept = []
        for rank in range(60):
            rivals = [other for other in kept if labels[image, other] == labels[image, rank]]
            if all(_plain_iou(candidates[image, rank].tolist(), candidates[image, other].tolist()) <= 0.4 for other in rivals):
                kept.append(rank)
        assert keep[image].nonzero().flatten().tolist() == kept
    assert 0 < keep.float().mean() < 1


def _plain_iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def test_focal_loss_by_hand():
    logits, labels = torch.tensor([[0.3, -1.2], [2.0, 0.1]]), torch.tensor([1, 2])
    expected = 0.0
    for row, target in ((0, 1), (1, 2)):
        for column in range(2):
            p = 1 / (1 + np.exp(-float(logits[row, column])))
            expected += -0.25 * (1 - p) ** 2 * np.log(p) if column == target else -0.75 * p**2 * np.log(1 - p)
    assert focal_loss_sum(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def test_hard_examples_by_hand():
    logits = torch.tensor([[0.3, -1.2, 0.9], [2.0, 0.1, -3.0], [-0.5, 1.5, 0.7]])
    labels = torch.tensor([1, 3, 3])
    negatives = sorted(np.log1p(np.exp(value)) for value in [0.3, 0.9, 2.0, 0.1, -3.0, -0.5, 1.5, 0.7])
    # One positive, and three negatives with it.
    assert hard_example_sum(logits, labels).item() == pytest.approx(np.log1p(np.exp(1.2)) + sum(negatives[-3:]), rel=1e-6)
    assert hard_example_sum(logits, torch.full((3,), 3)).item() == 0


def test_relative_corners_by_hand():
    target = torch.tensor([[10.0, 20.0, 30.0, 25.0], [4.0, 4.0, 4.0, 4.0]])
    got = boxes.relative_corners(target + torch.tensor([1.0, -1.0, 4.0, 2.0]), target)
    assert torch.allclose(got, torch.tensor([[0.05, -0.2, 0.2, 0.4], [1.0, -1.0, 4.0, 2.0]]))


def test_perfect_detections_have_ap_one_and_half_found_about_half(pool):
    count = pool.labels.shape[1]
    scores = torch.full(pool.labels.shape, 0.9)
    perfect = evaluation.Detections(pool.boxes, scores, pool.labels.clamp(min=0), pool.labels >= 0)
    assert evaluation.average_precision(perfect, pool)[:3] == (1.0, 1.0, 1.0)
    assert evaluation.best_f1(perfect, pool) == (pytest.approx(0.9), 1.0)
    # Three false boxes below every true one: the best F1 is where only the true ones are in.
    noisy = evaluation.Detections(
        torch.cat([pool.boxes, torch.tensor([0.0, 0.0, 2.0, 2.0]).expand(len(pool), 3, 4)], 1),
        torch.cat([scores, torch.tensor([0.3, 0.2, 0.1]).expand(len(pool), 3)], 1),
        torch.cat([pool.labels.clamp(min=0), torch.zeros(len(pool), 3, dtype=torch.int64)], 1),
        torch.cat([pool.labels >= 0, torch.ones(len(pool), 3, dtype=torch.bool)], 1),
    )
    assert evaluation.best_f1(noisy, pool) == (pytest.approx(0.9), 1.0)
    objects = int((pool.labels >= 0).sum())
    assert evaluation.f1_at(noisy, pool, 0.15) == pytest.approx(2 * objects / (2 * objects + 2 * len(pool)))
    assert evaluation.f1_at(noisy, pool, 0.95) == 0
    assert evaluation.average_precision(noisy.above(2.0), pool).ap == 0 and count == 5


@pytest.mark.parametrize("name", [*LOSSES, "ce+smooth_l1", "ohem+asl1"])
def test_a_few_steps_on_eight_canvases_reduce_the_loss(pool, name):
    trainer = Trainer(Settings(name, steps=40, lr=1e-2, batch_size=8), pool.take(slice(0, 8))).train()
    total = np.sum(list(trainer.curves.values()), axis=0)
    assert np.isfinite(total).all() and total[-5:].mean() < 0.8 * total[:5].mean()


@pytest.mark.parametrize("name", ["ghm", "ghm_c+smooth_l1", "focal+ghm_r"])
def test_a_few_steps_of_ghm_bring_scores_and_boxes_nearer_to_the_truth(pool, name):
    trainer = Trainer(Settings(name, steps=60, lr=1e-2, batch_size=8), pool.take(slice(0, 8)))

    def errors():
        # Not the loss: harmonized, it says little of how far training is.
        predictions, assigned = trainer.predict_batch()
        is_positive = assigned.labels < 10
        scores = predictions.logits.sigmoid()[is_positive].gather(1, assigned.labels[is_positive][:, None])
        corners = boxes.relative_corners(predictions.boxes, assigned.boxes)[is_positive]
        return (1 - scores).mean().item(), corners.abs().mean().item()

    before = errors()
    trainer.train()
    assert all(late < 0.6 * early for late, early in zip(errors(), before, strict=True))


@pytest.mark.parametrize(
    "settings", [
        Settings("rank_sort", 8, 1),
        Settings("focal_centerness", 8, 1),
        Settings("rank_sort", 8, 1, box_weight=1.0),
        Settings("alrp", 8, 1),
        Settings("ghm", 8, 1),
    ],
)
def test_resumed_training_equals_uninterrupted_training_bit_by_bit(pool, settings, tmp_path):
    settings = dataclasses.replace(settings, batch_size=4)
    whole = Trainer(settings, pool).train()
    first = Trainer(settings, pool)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / "run.pt")
    resumed = Trainer(settings, pool).train(tmp_path / "run.pt", resume=True)
    assert resumed.step == whole.step == 8 and resumed.curves == whole.curves
    for module in ("model", "loss"):
        expected = getattr(whole, module).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in getattr(resumed, module).state_dict().items())
    if settings.loss == "ghm":
        state = torch.load(tmp_path / "run.pt", weights_only=True)["loss"]
        for module, bins in (("ghm_c", 30), ("ghm_r", 10)):
            assert state[f"{module}.acc_sum"].shape == (bins,) and state[f"{module}.acc_sum"].max() > 0
            assert state[f"{module}.num_updates"].max() == 8
    finished = Trainer(settings, pool).train(tmp_path / "run.pt", resume=True)
    assert finished.step == 8 and finished.curves == whole.curves
    with pytest.raises(ValueError, match="other settings"):
        Trainer(dataclasses.replace(settings, seed=9), pool).load(tmp_path / "run.pt")


def test_coco_folder_holds_what_was_written(pool, tmp_path):
    write_coco_folder(pool.take(slice(0, 12)), tmp_path)
    train, held_out = read_coco_folder(tmp_path, 96)
    assert len(train) == 10 and len(held_out) == 2
    rows = [row for row in range(12) if row % 5 != 4]
    assert torch.equal(train.images, pool.images[rows])
    most = train.labels.shape[1]
    # Category ids of the folder are those that occur in the file, all ten.
    assert torch.equal(train.labels, pool.labels[rows][:, :most])
    is_object = train.labels >= 0
    assert torch.allclose(train.boxes[is_object], pool.boxes[rows][:, :most][is_object], atol=1e-4)
    smaller, _ = read_coco_folder(tmp_path, 48)
    assert smaller.images.shape[-2:] == (48, 48) and torch.allclose(smaller.boxes, train.boxes / 2, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="instances.json"):
        read_coco_folder(tmp_path / "images", 96)


def test_program_on_a_coco_folder_of_twelve_canvases(pool, tmp_path):
    write_coco_folder(pool.take(slice(0, 12)), tmp_path / "data")
    arguments = f"--data {tmp_path / 'data'} --out {tmp_path / 'out'} --steps 3 --batch-size 4 --compare-steps 2".split()
    results = train_detector.main(arguments)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["loss"] for run in written["runs"]] == list(LOSSES) == [run["loss"] for run in results["runs"]]
    for run in written["runs"]:
        assert len(run["curves"]["box"]) == 3 and 0 <= run["ap"] <= 1 and run["step_ms"] > run["loss_ms"] > 0
    assert len(written["comparison"]["differences"]) == 2 and written["comparison"]["largest_difference"] <= 1e-5
    assert written["versions"]["torch"] == torch.__version__
    for picture in ("loss_curves", "swap", "precision_recall", "detections"):
        assert (tmp_path / "out" / f"{picture}.png").stat().st_size > 5000
    again = train_detector.main([*arguments, "--resume"])
    assert [run["curves"] for run in again["runs"]] == [run["curves"] for run in results["runs"]]


def test_ablation_goes_on_from_finished_runs(pool, tmp_path, monkeypatch):
    write_coco_folder(pool.take(slice(0, 12)), tmp_path / "data")
    arguments = f"--data {tmp_path / 'data'} --out {tmp_path / 'out'} --steps 2 --batch-size 4 --ablation --loss rank_sort --lr 1e-3".split()
    first = train_detector.main(arguments)
    assert [row["configuration"] for row in first["table"]][:2] == ["rank_sort", "rank_sort, no score weights"]
    assert len(first["table"]) == 4 and len(list((tmp_path / "out" / "ablation").glob("*.json"))) == 4
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a finished run was trained again"))
    assert train_detector.main(arguments)["table"] == first["table"]
    assert "rank_sort, box weight 1" in (tmp_path / "out" / "ablation.md").read_text()


def test_table_of_imbalance_goes_on_from_finished_runs(pool, tmp_path, monkeypatch):
    write_coco_folder(pool.take(slice(0, 12)), tmp_path / "data")
    arguments = f"--data {tmp_path / 'data'} --out {tmp_path / 'out'} --steps 2 --batch-size 4 --imbalance --time-steps".split()
    first = train_detector.main([*arguments, "2"])
    pairs = [(row["classes"], row["boxes"]) for row in first["table"]]
    assert pairs == [
        *((classes, "smooth_l1") for classes in ("ce", "ohem", "focal", "ghm_c")),
        ("focal", "asl1"), ("focal", "ghm_r"), ("ghm_c", "ghm_r"),
    ]  # fmt: skip
    assert [row["loss"] for row in first["table"]] == imbalance.names() and imbalance.names()[-1] == "ghm"
    assert all(row["step_ms"] > row["loss_ms"] > 0 for row in first["table"])
    text = (tmp_path / "out" / "imbalance.md").read_text()
    assert "ms in loss" in text and "medians of 2 steps" in text and len([line for line in text.splitlines() if "GHM-C" in line]) == 2
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a finished run was trained again"))
    again = train_detector.main([*arguments, "0"])
    assert [row["runs"] for row in again["table"]] == [row["runs"] for row in first["table"]]
    text = (tmp_path / "out" / "imbalance.md").read_text()
    assert "ms in loss" not in text and "2 steps of 4 canvases" in text


def test_frequencies_of_a_tail_fall_geometrically():
    labels = make_canvases("train", 600, tail_ratio=100.0).labels
    counts = torch.bincount(labels[labels >= 0], minlength=10).double()
    share = 100.0 ** -torch.linspace(0, 1, 10, dtype=torch.float64)
    expected = share / share.sum() * counts.sum()
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), counts
    kinds = long_tail_losses.Tail((7000, 1750, 1749, 350, 349)).kinds()
    assert kinds == {"frequent": [0, 1], "common": [2, 3], "rare": [4]}


@pytest.mark.parametrize("name", long_tail_losses.HEADS)
def test_a_few_steps_with_every_head_reduce_the_loss(pool, name):
    trainer = long_tail.LongTailTrainer(Settings(name, steps=40, lr=1e-2, batch_size=8), pool.take(slice(0, 8))).train()
    classes, boxes = (np.array(trainer.curves[part]) for part in ("classification", "box"))
    # The weights of an equalized loss change as it goes on; its scores must come nearer to the truth all the same.
    assert np.isfinite(classes).all() and boxes[-5:].mean() < 0.8 * boxes[:5].mean()
    predictions, assigned = trainer.predict_batch()
    is_positive = assigned.labels < 10
    scores = trainer.score(predictions)
    assert scores.shape == (8, 180, 10) and (scores >= 0).all() and (scores <= 1).all()
    found = scores[is_positive].gather(1, assigned.labels[is_positive][:, None])
    assert found.mean() > 2 * scores[~is_positive].max(-1).values.mean()
    has_state = name.startswith(("efl", "eqlv2"))
    assert ("pos_neg of 9" in trainer.curves) == has_state


def test_a_detector_that_is_trained_on_keeps_what_is_frozen(pool):
    base = long_tail.LongTailTrainer(Settings("softmax", steps=3, lr=1e-2, batch_size=8), pool).train()
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    for name in ("bags", "softmax_reweighted", "bags_all_layers"):
        trainer = long_tail.TunedTrainer(Settings(name, steps=2, lr=1e-2, batch_size=8), pool, "cpu", base)
        state = trainer.model.state_dict()
        if name.startswith("bags"):
            groups = trainer.loss.head.groups
            columns = groups.class_columns.long()
            assert torch.equal(state["classify.weight"][columns], before["classify.weight"])
            assert state["classify.bias"].shape == (groups.num_logits,)
        trainer.train()
        changed = {key for key, value in trainer.model.state_dict().items() if "classify" in key or not torch.equal(value, before[key])}
        assert (changed == {"classify.weight", "classify.bias"}) == (name != "bags_all_layers")
        assert len(trainer.classifier_norms()) == 10
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_table_of_the_long_tail_goes_on_from_finished_runs(tmp_path, monkeypatch):
    arguments = "--long-tail --pool 80 --held-out 3 --steps 2 --tune-steps 2 --batch-size 4 --tail-ratio 5".split()
    arguments += ["--out", str(tmp_path)]
    first = train_detector.main(arguments)
    assert [row["loss"] for row in first["table"]] == list(long_tail_losses.NAMES)
    assert sum(map(len, first["kinds"].values())) == 10 and sum(first["counts"]) > 80
    for row in first["table"]:
        (run,) = row["runs"]
        assert len(run["ap_per_class"]) == len(run["classifier_norms"]) == 10 and 0 <= run["ap"] <= 1
    text = (tmp_path / "long_tail.md").read_text()
    assert all(name in text for name in long_tail_losses.NAMES.values()) and "trained on 2 more" in text
    assert (tmp_path / "long_tail.png").stat().st_size > 5000
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a finished run was trained again"))
    assert train_detector.main(arguments)["table"] == json.loads(json.dumps(first["table"]))


def test_plot_of_the_gradient_density(pool, tmp_path):
    trainer = Trainer(Settings("ghm", steps=3, batch_size=4), pool).train(tmp_path / "run.pt")
    assert trainer.step == 3
    arguments = f"--checkpoint {tmp_path / 'run.pt'} --canvases 8 --bins 20 --out {tmp_path}".split()
    found = plot_gradient_density.main(arguments)
    assert sum(found["classes"]["counts"]) == 8 * 180 * 10 and sum(found["boxes"]["counts"]) % 4 == 0
    labels = assign(pool.boxes[:8], pool.labels[:8], 10, 96, 96).labels
    assert sum(found["classes"]["positives"]) == int((labels < 10).sum()) == sum(found["boxes"]["counts"]) // 4
    for row, plain in (("classes", "CE"), ("boxes", "ASL1")):
        counts, weights = (np.array(found[row][name], dtype=float) for name in ("counts", "weights"))
        gradient, share = ({loss: np.array(values) for loss, values in found[row][name].items()} for name in ("gradient", "share"))
        is_filled = counts > 0
        for loss, values in share.items():
            assert values.sum() == pytest.approx(100) and (values[~is_filled] == 0).all()
            assert counts[is_filled] @ gradient[loss][is_filled] == pytest.approx(counts.sum())
        # The gradient of the plain loss is the gradient norm itself, the harmonized one that times the weights of the bins.
        ghm = {"classes": "GHM-C", "boxes": "GHM-R"}[row]
        harmonized = (gradient[plain] * weights)[is_filled]
        np.testing.assert_allclose(gradient[ghm][is_filled], harmonized * counts.sum() / (counts[is_filled] @ harmonized), rtol=1e-6)
    assert (tmp_path / "gradient_density.png").stat().st_size > 5000
    assert json.loads((tmp_path / "gradient_density.json").read_text()).keys() == {"classes", "boxes"}


def test_comparison_trains_with_the_loop_and_agrees(pool):
    compared = comparison.compare(Settings("rank_sort", batch_size=4), 4, pool, loop_dtype=torch.float64)
    assert 0 < compared.largest_difference <= 1e-5
    assert compared.loop_loss == pytest.approx(compared.our_loss, rel=1e-3) and len(set(compared.loop_loss)) == 4


def test_comparison_fails_on_a_wrong_gradient(pool, monkeypatch):
    theirs = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert comparison.check_gradients(theirs, theirs * (1 + 1e-6), step=0) < 2e-6
    for wrong in (theirs + 2e-5 * theirs.abs().max(), theirs * float("nan")):
        with pytest.raises(AssertionError, match="step 7: gradients"):
            comparison.check_gradients(theirs, wrong, step=7)
    published = comparison.published_rank_sort
    monkeypatch.setattr(comparison, "published_rank_sort", lambda logits, targets: published(logits, targets, 0.501))
    with pytest.raises(AssertionError, match="step 0: gradients"):
        comparison.compare(Settings("rank_sort", batch_size=4), 1, pool)


def torchrun(arguments: str, out: pathlib.Path) -> subprocess.CompletedProcess:
    """The program on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]
    return subprocess.run([*command, *arguments.split(), "--out", out], capture_output=True, text=True, timeout=300, check=False)


def curves(out: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    return {run["loss"]: run["curves"] for run in json.loads((out / "results.json").read_text())["runs"]}


def test_two_processes_train_as_one_with_global_ranking_and_otherwise_each_for_itself(tmp_path):
    arguments = "--pool 24 --held-out 4 --steps 3 --batch-size 7 --compare-steps 0 --group-norm"
    arguments += "".join(f" --loss {name}" for name in (*LOSSES, "ghm"))
    train_detector.main([*arguments.split(), "--out", str(tmp_path / "one")])
    for out, more in (("together", "--global-ranking"), ("apart", "")):
        done = torchrun(f"{arguments} {more}", tmp_path / out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("training and") == 1  # only the first process prints
    one, together, apart = (curves(tmp_path / out) for out in ("one", "together", "apart"))
    assert list(one) == list(together) == [*LOSSES, "ghm"]
    for name, parts in one.items():
        for part, values in parts.items():
            # Adam's first steps make rounding errors of gradients near 0 grow.
            assert together[name][part] == pytest.approx(values, rel=1e-3), (name, part)
            assert together[name][part][0] == pytest.approx(values[0], rel=1e-6), (name, part)
    for name in ("rank_sort", "ap", "alrp", "ghm"):
        parts = apart[name]
        assert any(abs(values[0] / one[name][part][0] - 1) > 1e-5 for part, values in parts.items()), name
    # The state of balancing and of the densities, too: a run that two processes began ends as it did.
    for loss in ("alrp", "ghm"):
        state = [torch.load(tmp_path / out / "checkpoints" / f"{loss}_seed0.pt", weights_only=True) for out in ("one", "together")]
        assert state[0]["loss"]
        for name, value in state[0]["loss"].items():
            # A density may differ by an element or two that rounding moved across an edge.
            moved = 2.0 if loss == "ghm" else 0.0
            torch.testing.assert_close(state[1]["loss"][name].double(), value.double(), rtol=1e-3, atol=moved)


def test_two_processes_refuse_what_takes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train_detector.parse(["--ablation"])
    assert "--ablation takes one process" in capsys.readouterr().err


def test_bad_options_are_refused(capsys):
    for arguments in (["--steps", "0"], ["--image-size", "50"], ["--loss", "l2"], ["--compare-steps", "-1"], ["--time-steps", "-1"]):
        with pytest.raises(SystemExit):
            train_detector.parse(arguments)
        assert arguments[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_detector.parse(["--imbalance", "--loss", "ap"])
    assert "--imbalance has losses of its own" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_detector.parse(["--long-tail", "--data", "folder"])
    assert "--long-tail makes its own canvases" in capsys.readouterr().err


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train_detector.parse(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for default in ("0", "1500", "16", "out", "6400", "300", "float32", "500", "the first 5"):
        assert f"(default: {default})" in words, default
    assert "None" not in words and "(default: False)" not in words
