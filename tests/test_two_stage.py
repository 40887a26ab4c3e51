"""The two-stage model of the training program: its second stage, resume, detections, the tables."""

import json
import pathlib
import sys

import pytest
import torch

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[1] / folder) for folder in ("python", "")]

import train_detector  # noqa: E402
from digits_detector import evaluation, two_stage  # noqa: E402
from digits_detector.data import make_canvases  # noqa: E402
from digits_detector.training import Settings  # noqa: E402
from swaps.frameworks import use_torchvision  # noqa: E402


@pytest.fixture(scope="module")
def pool():
    use_torchvision()
    return make_canvases("train", 16)


def trainer(name, pool, steps):
    return two_stage.TwoStageTrainer(Settings(name, steps, lr=two_stage.LEARNING_RATE, batch_size=4), pool)


@pytest.mark.parametrize("name", ["both", "rank_sort"])
def test_a_few_steps_on_four_canvases_reduce_the_loss(pool, name):
    trained = trainer(name, pool.take(slice(0, 4)), 30).train()
    totals = torch.tensor(list(trained.curves.values())).sum(0)
    assert totals.isfinite().all() and totals[-5:].mean() < 0.75 * totals[:5].mean()
    detections = trained.detect(pool)
    assert detections.boxes.shape == (*detections.scores.shape, 4) and len(detections.boxes) == len(pool)
    assert detections.keep.any() and (detections.labels[detections.keep] >= 0).all() and detections.labels.max() < 10
    assert (detections.scores.diff(dim=1)[detections.keep[:, 1:]] <= 0).all()
    assert 0 <= evaluation.average_precision(detections, pool).ap <= 1


def test_what_is_fixed_stays_and_what_is_dynamic_moves(pool):
    fixed, both = (trainer(name, pool, 12).train() for name in ("fixed", "both"))
    assert fixed.model.roi_heads.label_assignment is None
    assert fixed.model.roi_heads.smooth_l1.beta == two_stage.FIRST_BETA and fixed.schedules()["beta"]["steps"] == []
    schedules = both.schedules()
    assert schedules["iou_threshold"]["steps"] == schedules["beta"]["steps"] == list(range(1, 13))
    assert all(value >= two_stage.FIRST_IOU for value in schedules["iou_threshold"]["values"])
    assert all(0 < value <= two_stage.FIRST_BETA for value in schedules["beta"]["values"])
    assert len({*schedules["iou_threshold"]["values"]}) > 1


def test_without_a_sampler_every_proposal_counts(pool, monkeypatch):
    rows = {}
    for name in ("fixed", "no_sampler"):
        model = trainer(name, pool, 1).model
        losses = model.roi_heads.box_head_losses

        def counted(logits, *others, name=name, losses=losses):
            rows[name] = len(logits)
            return losses(logits, *others)

        monkeypatch.setattr(model.roi_heads, "box_head_losses", counted)
        model(*two_stage.inputs(pool.take(slice(0, 2))))
    assert rows["fixed"] == 2 * two_stage.SAMPLED < rows["no_sampler"] <= 2 * two_stage.PROPOSALS + (pool.labels[:2] >= 0).sum()


def test_resumed_training_equals_uninterrupted_training_bit_by_bit(pool, tmp_path):
    whole = trainer("both", pool, 6).train()
    part = trainer("both", pool, 6)
    for _ in range(3):
        part.train_step()
    part.save(tmp_path / "part.pt")
    resumed = trainer("both", pool, 6).train(tmp_path / "part.pt", resume=True)
    assert resumed.curves == whole.curves and resumed.schedules() == whole.schedules()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_tables_go_on_from_finished_runs(pool, tmp_path, monkeypatch):
    arguments = ["--model", "two_stage", "--steps", "2", "--pool", "8", "--held-out", "4", "--batch-size", "4", "--out", str(tmp_path)]
    first = train_detector.main(arguments)
    assert [row["row"] for row in first["rows"]] == list(two_stage.ROWS)
    monkeypatch.setattr(two_stage.TwoStageTrainer, "train", lambda *arguments: pytest.fail("trained again"))
    assert train_detector.main(arguments)["rows"] == first["rows"]
    text = (tmp_path / "two_stage.md").read_text()
    assert all(row.title in text for table in (two_stage.DYNAMIC_ROWS, two_stage.SAMPLER_ROWS) for row in table.values())
    assert json.loads((tmp_path / "two_stage.json").read_text())["window"] == 1
    assert (tmp_path / "two_stage.png").stat().st_size > 5000


def test_bad_options_are_refused(capsys):
    for other in (["--imbalance"], ["--loss", "focal"], ["--ablation"]):
        with pytest.raises(SystemExit):
            train_detector.parse(["--model", "two_stage", *other])
        assert "--model two_stage" in capsys.readouterr().err
