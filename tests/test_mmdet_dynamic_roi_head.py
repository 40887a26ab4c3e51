"""Dynamic R-CNN's RoI head against MMDetection's own, over windows of steps, and what that one lacks: checkpoints, nothing positive."""
import copy
import pathlib
import sys

import frameworks
import mmdet_two_stage as two_stage
import pytest
import rsloss_kernels
import torch

OPTIONS = {"iou_topk": 6, "beta_topk": 10, "update_iter_interval": 2, "initial_iou": 0.2, "initial_beta": 8.0}
BOXES = two_stage.SOFTMAX | {"loss_bbox": {"type": "SmoothL1Loss", "beta": 0.9, "loss_weight": 0.7}}


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


def dynamic(mm, kind: str = "FusedDynamicRoIHead", options: dict | None = None, seed: int = 0, boxes: dict | None = None, **training):
    training = {"sampler": two_stage.SOME, "dynamic_rcnn": OPTIONS | (options or {})} | training
    return two_stage.two_stage(mm, BOXES | (boxes or {}), kind=kind, training=training, seed=seed)


def run(mm, model, batches, parameters=None):
    """Losses and gradients of steps on these batches, threshold and beta after each, and the parameters before it; `parameters`: to take
    these before each step."""
    torch.manual_seed(5)
    optimiser = torch.optim.SGD(model.parameters(), 0.02)
    steps = []
    for number, batch in enumerate(batches):
        if parameters is not None:
            torch.nn.utils.vector_to_parameters(parameters[number], model.parameters())
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        loss, log = mm.losses_of(model, copy.deepcopy(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        head = model.roi_head
        if hasattr(head, "label_assignment"):
            values = head.label_assignment.iou_threshold, head.bbox_head.loss_bbox.beta
        else:
            values = head.bbox_assigner.pos_iou_thr, head.bbox_head.loss_bbox.beta
        steps.append((two_stage.numbers(log), model.roi_head.bbox_head.fc_reg.weight.grad.clone(), *map(float, values), before))
    return steps


@pytest.mark.parametrize("sampler", ["SOME", "ALL"])
def test_steps_of_the_frameworks_own_head(mm, generator, sampler):
    """Three windows: the same losses, gradients, thresholds and betas, from the same parameters in each step."""
    batches = [mm.make_batch(generator, boxes=boxes) for boxes in (3, 2, 4, 3, 1, 3)]
    sampler = getattr(two_stage, sampler)
    wanted = run(mm, dynamic(mm, "DynamicRoIHead", sampler=sampler), batches)
    got = run(mm, dynamic(mm, sampler=sampler), batches, [step[-1] for step in wanted])
    for (log, gradient, threshold, beta, _), (own, own_gradient, own_threshold, own_beta, _) in zip(wanted, got, strict=True):
        assert {key: own[key] for key in log} == pytest.approx(log, rel=1e-5)
        torch.testing.assert_close(own_gradient, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        assert (own_threshold, own_beta) == pytest.approx((threshold, beta), rel=1e-6)
    thresholds, betas = ([step[place] for step in got] for place in (2, 3))
    assert thresholds[0] == 0.5 and betas[0] == 0.9  # of the configuration
    assert len(set(thresholds)) >= 3 and len(set(betas)) >= 3
    assert all(gradient.any() for _, gradient, *_ in got)
    # A step logs what it used, not what it leaves to the next.
    assert [step[0]["dynamic_iou"] for step in got[1:]] == pytest.approx(thresholds[:-1])
    assert [step[0]["dynamic_beta"] for step in got[1:]] == pytest.approx(betas[:-1])


def test_assigner_is_the_frameworks(mm, generator):
    """Ignored boxes, no objects, no boxes; thresholds between two neighbouring numbers of float32."""
    from mmdet.models.task_modules.assigners import MaxIoUAssigner

    assigner = dynamic(mm).roi_head.bbox_assigner
    threshold = assigner.label_assignment.iou_threshold
    overlaps = torch.rand(4, 50, generator=generator)
    overlaps[:, :5] = -1  # what an ignored region covers
    overlaps[:, 5] = torch.tensor([0.1, 0.6, 0.2, 0.6])  # the first of equal objects
    labels = torch.tensor([3, 1, 4, 0])
    for value in (0.3, float(overlaps[0, 9].double()), float(overlaps[0, 9].double()) + 1e-12):
        threshold.fill_(value)
        own = MaxIoUAssigner(value, value, value, match_low_quality=False)
        for of_objects, of_labels in ((overlaps, labels), (overlaps[:0], labels[:0]), (overlaps[:, :0], labels)):
            wanted, got = own.assign_wrt_overlaps(of_objects, of_labels), assigner.assign_wrt_overlaps(of_objects, of_labels)
            for name in ("gt_inds", "max_overlaps", "labels"):
                assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    assert len(assigner.results) == 9 and (assigner.assign_wrt_overlaps(overlaps, labels).gt_inds == -1).sum() == 5


def test_windows_survive_checkpoints(mm, generator):
    """A run that stops within a window goes on with the same numbers."""
    batches = [mm.make_batch(generator) for _ in range(3)]
    model = dynamic(mm, options={"update_iter_interval": 3})
    run(mm, model, batches[:2])
    state = copy.deepcopy(model.state_dict())
    wanted = run(mm, model, batches[2:])
    again = dynamic(mm, options={"update_iter_interval": 3}, seed=1)
    again.load_state_dict(state, strict=True)
    assert run(mm, again, batches[2:])[0][2:4] == wanted[0][2:4] and wanted[0][2] != 0.5


def test_nothing_positive_and_evaluation(mm, generator):
    """Steps without objects do not break the windows; a loss of evaluation takes no step."""
    model = dynamic(mm)
    steps = run(mm, model, [mm.make_batch(generator, boxes=0) for _ in range(2)])
    assert steps[1][2:4] == (OPTIONS["initial_iou"], 0.9)  # IoUs of 0, no target
    assert all(torch.tensor(list(log.values())).isfinite().all() for log, *_ in steps)
    log = run(mm, model, [mm.make_batch(generator)])[0][0]
    assert log["loss_bbox"] > 0 and list(log) == list(steps[0][0])
    model.eval()
    before = model.roi_head.label_assignment.num_steps.clone()
    with torch.no_grad():
        mm.losses_of(model, mm.make_batch(generator))
    assert torch.equal(model.roi_head.label_assignment.num_steps, before) and before == 3
    assert all(0 < len(found) <= 20 for found in two_stage.predict(model, mm.make_batch(generator)))


def test_ten_steps_of_a_small_model(mm):
    losses, _ = two_stage.train(mm, dynamic(mm), mm.training_batch())
    assert losses[-1] < 0.8 * losses[0]


def test_nothing_is_read_on_the_host(mm, generator, monkeypatch):
    """In a step the framework reads tensors, this package none."""
    model, batch = dynamic(mm), mm.make_batch(generator)
    readers = []

    def watch(name):
        original = getattr(torch.Tensor, name)

        def read(*arguments, **options):
            readers.append(sys._getframe(1).f_code.co_filename)
            return original(*arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
        watch(name)
    mm.losses_of(model, batch)
    own = str(pathlib.Path(rsloss_kernels.__file__).parent)
    assert any("roi_heads" in name for name in readers) and not [name for name in readers if name.startswith(own)]


def test_bad_configurations(mm):
    with pytest.raises(TypeError, match="loss_bbox must be SmoothL1Loss, got L1Loss"):
        dynamic(mm, boxes={"loss_bbox": {"type": "L1Loss"}})
    for part in ({"match_low_quality": True}, {"neg_iou_thr": 0.4}):
        assigner = two_stage.region_training()["assigner"] | part
        with pytest.raises(ValueError, match="must be a MaxIoUAssigner with equal pos_iou_thr and neg_iou_thr"):
            dynamic(mm, assigner=assigner)
    with pytest.raises(ValueError, match="initial_beta and may have .*, got one unknown varaint"):
        dynamic(mm, options={"varaint": "original"})
    with pytest.raises(ValueError, match="dynamic_rcnn must have .*, got one without beta_topk, initial_beta, initial_iou, iou_topk"):
        dynamic(mm, dynamic_rcnn=None)
    model = dynamic(mm, boxes={"loss_bbox": {"type": "FusedSmoothL1Loss"}}, options={"variant": "original"})
    assert model.roi_head.label_assignment.variant == model.roi_head.bbox_head.loss_bbox.variant == "original"
