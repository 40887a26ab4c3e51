"""Ultralytics' YOLO with losses of the library."""
import copy
import functools
import io

import frameworks
import pytest
import torch

frameworks.use_ultralytics()

from ultralytics.cfg import get_cfg  # noqa: E402
from ultralytics.models.yolo.detect import DetectionTrainer  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402

from rsloss_kernels import _library, quality_focal_loss, rank_sort_loss  # noqa: E402
from rsloss_kernels.integrations.ultralytics import LOSSES, trainer_with, use_loss  # noqa: E402

CLASSES = 5
SMALL = {
    "nc": CLASSES,
    "backbone": [[-1, 1, "Conv", [16, 3, 4]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[[1, 2], 1, "Detect", [CLASSES]]],
}


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = DetectionModel(copy.deepcopy(SMALL), nc=CLASSES, verbose=False)
    model.args = get_cfg()
    return model.train()


def make_batch(objects: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.rand(2, 3, 64, 64, generator=generator),
        "batch_idx": torch.arange(objects) * 2 // max(objects, 1) * 1.0,
        "cls": torch.randint(0, CLASSES, (objects,), generator=generator).float(),
        "bboxes": torch.rand(objects, 4, generator=generator) * 0.3 + 0.3,
    }


def class_loss(model, batch) -> tuple:
    """The class loss of a step, without its gain and the batch size, and what the criterion gave the term."""
    given = []
    model.criterion = criterion = model.init_criterion()
    term = criterion.bce
    criterion.bce = lambda *tensors: given.append(tensors) or term(*tensors)
    loss, items = model(batch)
    torch.testing.assert_close(loss.detach().sum(), 2 * sum(items.values()))
    return loss[1] / (2 * model.args.cls), *given[0]


@pytest.mark.parametrize("objects", [4, 0])
def test_the_class_term_is_the_librarys(plain, objects):
    batch = make_batch(objects)
    model = use_loss(copy.deepcopy(plain), "rank_sort", delta=0.4)
    loss, logits, targets = class_loss(model, batch)
    assert (targets > 0).any() == (objects > 0)
    wanted = sum(rank_sort_loss(logits, targets, delta=0.4))
    torch.testing.assert_close(loss, wanted)
    got, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, wanted))
    torch.testing.assert_close(got, wanted)

    loss, logits, targets = class_loss(use_loss(model, "quality_focal"), batch)
    torch.testing.assert_close(loss, quality_focal_loss(logits, targets, reduction="sum") / targets.sum().clamp(min=1))
    for name in LOSSES:
        loss, *_ = class_loss(use_loss(model, name), batch)
        assert loss.isfinite() and loss.requires_grad
    assert plain.init_criterion().bce(logits, targets).shape == logits.shape, "the model it was copied from is as it was"


@pytest.mark.parametrize("loss", ["rank_sort", "ghm", "varifocal"])
def test_one_call_per_step_and_ten_steps_reduce_the_loss(plain, loss, monkeypatch):
    calls = []
    evaluate = _library.differentiable
    monkeypatch.setattr(_library, "differentiable", lambda name, *given: calls.append(name) or evaluate(name, *given))
    model, batch = use_loss(copy.deepcopy(plain), loss), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(11):
        calls.clear()
        parts, items = model(batch)
        assert len(calls) == 1, calls
        assert items.keys() == {"box_loss", "cls_loss", "dfl_loss"} and parts.isfinite().all()
        history.append(float(parts.detach().sum()))
        optimizer.zero_grad()
        parts.sum().backward()
        optimizer.step()
    assert history[-1] < 0.95 * history[0], history


def test_under_autocast_and_in_checkpoints(plain):
    model = use_loss(copy.deepcopy(plain), "rank_sort")
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(make_batch())
    loss.sum().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)
    # What the trainer does for its average of the weights, and for a checkpoint.
    copied = copy.deepcopy(model)
    assert copied.init_criterion.args[0] is copied and copied.init_criterion().bce.loss.delta == 0.5
    copied.criterion = None
    saved = io.BytesIO()
    torch.save(copied, saved)
    assert b"rsloss_kernels" not in saved.getvalue(), "who loads it may not have the library"
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert loaded.init_criterion.args[0] is loaded and isinstance(loaded.init_criterion().bce, torch.nn.BCEWithLogitsLoss)


def test_end_to_end_models_have_two_criteria(plain):
    model = copy.deepcopy(plain)
    torch.manual_seed(0)
    detect = DetectionModel({**copy.deepcopy(SMALL), "end2end": True}, nc=CLASSES, verbose=False)
    detect.args = model.args
    criterion = use_loss(detect, "varifocal").init_criterion()
    assert [type(part.bce.loss).__name__ for part in (criterion.one2many, criterion.one2one)] == ["VarifocalLoss"] * 2


def test_the_trainer_makes_models_with_the_loss(monkeypatch, plain):
    monkeypatch.setattr(DetectionTrainer, "get_model", lambda self, *arguments, **keywords: copy.deepcopy(plain))
    trainer = trainer_with("ghm", bins=7)
    model = trainer.get_model(trainer.__new__(trainer), cfg=None)
    assert issubclass(trainer, DetectionTrainer) and model.init_criterion().bce.loss.bins == 7


def test_bad_arguments(plain):
    model = copy.deepcopy(plain)
    with pytest.raises(ValueError, match="'rank_sort', 'ap'.*got 'alrp'"):
        use_loss(model, "alrp")
    with pytest.raises(ValueError, match="trainer_with: loss must be one of"):
        trainer_with("bce")
    for take in (functools.partial(use_loss, model), trainer_with):
        with pytest.raises(TypeError, match="delta"):
            take("focal", delta=1)
    with pytest.raises(TypeError, match="DetectionModel with its own criterion, got Linear"):
        use_loss(torch.nn.Linear(1, 1))
    model.class_weights = torch.ones(CLASSES)
    with pytest.raises(ValueError, match="cls_pw must be 0"):
        use_loss(model, "rank_sort").init_criterion()
