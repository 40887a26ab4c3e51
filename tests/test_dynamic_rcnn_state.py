"""What Dynamic R-CNN remembers: statistics against the definition in numpy, windows, checkpoints, compiled steps, processes."""
import copy
import warnings

import distributed_dynamic
import distributed_worker as worker
import numpy as np
import pytest
import torch
from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss, assign_by_iou
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

VARIANTS = ("mmdet", "original")


def draw_step(generator: torch.Generator, images: int = 2, most: int = 40):
    """IoUs of each image, regression targets and weights of all: any number of boxes, none too."""
    ious = [torch.rand(int(torch.randint(0, most, (), generator=generator)), generator=generator).double() for _ in range(images)]
    rows = int(torch.randint(0, most, (), generator=generator))
    targets = torch.randn((rows, 4), generator=generator, dtype=torch.float64)
    return ious, targets, (torch.rand((rows, 1), generator=generator) < 0.4).double().expand(rows, 4)


class Definition:
    """Both schedules written out with lists, as the publications have them, where those do not raise."""

    def __init__(self, variant: str, iou_topk: int, beta_topk: int, interval: int):
        self.variant, self.iou_topk, self.beta_topk, self.interval = variant, iou_topk, beta_topk, interval
        self.ious, self.errors = [], []
        self.threshold, self.beta = 0.5 if variant == "mmdet" else 0.4, 1.0
        self.steps, self.thresholds, self.betas = 0, [], []

    def step(self, ious, targets, weights):
        self.steps += 1
        is_due = self.steps % self.interval == 0
        ious, errors = [image.numpy() for image in ious], targets[:, :2].abs().mean(1).numpy()
        images = len(ious)
        if self.variant == "mmdet":
            errors = errors[weights[:, 0].numpy() > 0]
            kth = [np.sort(image)[::-1][min(self.iou_topk, len(image)) - 1] for image in ious if len(image)]
            self.ious += [np.mean(kth)] if kth else []
        else:
            joined = np.sort(np.concatenate(ious))[::-1] if ious else np.zeros(0)
            self.ious += [joined[min(self.iou_topk * images, len(joined)) - 1]] if len(joined) else []
        has_boxes = self.variant == "mmdet" or any(len(image) for image in ious)
        has_errors = self.variant == "mmdet" or len(errors) > 0
        if len(errors):
            self.errors.append(np.sort(errors)[min(self.beta_topk * images, len(errors)) - 1])
        if is_due and has_boxes:
            if self.ious:
                divisor = len(self.ious) if self.variant == "mmdet" else self.interval
                self.threshold = max(0.4, sum(self.ious) / divisor)
            self.ious = []
            self.thresholds.append((self.steps, self.threshold))
        if is_due and has_errors:
            found = 0.0
            if self.variant == "mmdet" and self.errors:
                found = np.median(self.errors)
            elif len(self.errors) > self.interval // 2:
                found = sorted(self.errors)[self.interval // 2]
            self.beta = self.beta if found < 1e-15 else min(1.0, found)
            self.errors = []
            self.betas.append((self.steps, self.beta))


def modules(variant: str, iou_topk=5, beta_topk=2, interval=3, **options):
    shared = {"update_iter_interval": interval, "variant": variant, **options}
    return torch.nn.ModuleList([DynamicLabelAssignment(iou_topk, **shared), DynamicSmoothL1Loss(beta_topk, **shared)])


def take(pair, ious, targets, weights) -> None:
    pair[0].update(ious)
    pair[1].update(targets, weights, num_images=len(ious))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interval", [1, 3, 4])
def test_random_steps_as_defined(variant, interval, generator):
    """Images without boxes, steps without positives, windows of few records and postponed ones."""
    for iou_topk, beta_topk, images, most in ((5, 2, 2, 40), (1, 1, 1, 3), (75, 10, 3, 9)):
        wanted, pair = Definition(variant, iou_topk, beta_topk, interval), modules(variant, iou_topk, beta_topk, interval)
        for _ in range(14):
            step = draw_step(generator, images, most)
            wanted.step(*step)
            take(pair, *step)
            torch.testing.assert_close(float(pair[0].iou_threshold), float(wanted.threshold), rtol=1e-14, atol=0)
            torch.testing.assert_close(float(pair[1].beta), float(wanted.beta), rtol=1e-14, atol=0)
        for module, values in zip(pair, (wanted.thresholds, wanted.betas), strict=True):
            steps, found = module.schedule()
            assert steps.tolist() == [step for step, _ in values]
            np.testing.assert_allclose(found, [value for _, value in values], rtol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forms_of_arguments(variant, generator):
    """A list per image, one tensor for all, weights of rows or elements, bool; 16-bit numbers; a batch of equal images."""
    ious, targets, weights = draw_step(generator)[0], torch.randn((30, 4), generator=generator), torch.rand(30, generator=generator) < 0.5
    wanted = modules(variant)
    for step in (([ious[0], ious[0]], targets, weights), ([ious[1]] * 2, targets, weights)):
        take(wanted, *step)
    got = modules(variant)
    got[0].update(torch.stack([ious[0]] * 2))
    got[0].update([ious[1]] * 2)
    got[1].update([targets[:11], targets[11:]], [weights[:11], weights[11:]])
    got[1].update(targets[:, :3], weights[:, None].expand(30, 3).to(torch.int8), 2)
    assert_same(got, wanted)
    got[1].update([targets.half()])
    assert got[1].num_steps == 3
    # Without weights every row counts, for either variant.
    alone = modules("original")[1], modules("mmdet")[1]
    for module in alone:
        module.update(targets, num_images=2)
    assert torch.equal(alone[0].beta_history, alone[1].beta_history) and alone[0].beta_history.any()


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    mine, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_training_goes_on_bit_by_bit(variant, generator):
    steps = [draw_step(generator) for _ in range(11)]
    whole, first = modules(variant, interval=4), modules(variant, interval=4)
    for step in steps:
        take(whole, *step)
    for step in steps[:6]:
        take(first, *step)
    resumed = modules(variant, interval=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for twin in (resumed, copy.deepcopy(first), first.half().bfloat16().to("cpu")):
        for step in steps[6:]:
            take(twin, *step)
        assert_same(twin, whole)
    assert whole[0].num_updates >= 1 and whole[0].iou_threshold.dtype == whole[1].beta.dtype == torch.float64
    assert first.to("meta")[1].beta.device.type == "meta"
    with pytest.warns(UserWarning, match="has no beta, .*beta_history"):
        DynamicSmoothL1Loss().load_state_dict({})


@pytest.mark.parametrize("variant", VARIANTS)
def test_changes_in_training_alone_and_not_by_what_is_not_finite(variant, generator):
    ious, targets, _ = draw_step(generator)
    ious, targets, weights = [torch.cat([image, torch.ones(1)]) for image in ious], torch.cat([targets, torch.ones(1, 4)]), None
    pair = modules(variant, interval=1)
    before = copy.deepcopy(pair)
    take(pair.eval(), ious, targets, weights)
    assert_same(pair, before)
    pair.train()
    for poison in (torch.nan, torch.inf, -torch.inf):
        broken, wild = [ious[0], ious[1].clone()], targets.clone()
        broken[1][-1], wild[-1, 1] = poison, poison
        take(pair, broken, wild, weights)
        assert_same(pair, before)
    # What does not count may hold anything: sizes, and in MMDetection's variant rows without weight.
    wild = targets.clone()
    wild[:, 2:] = torch.nan
    wild[0] = torch.nan if variant == "mmdet" else wild[0]
    weights = torch.ones(len(targets))
    weights[0] = 0
    with torch.no_grad():
        take(pair, ious, wild, weights)
    assert pair[0].num_updates == pair[1].num_updates == 1 and pair[1].beta.isfinite()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_tolerated(variant):
    pair = modules(variant, interval=2)
    for nothing in ([], [torch.empty(0)], [torch.empty(0)] * 3):
        take(pair, nothing, torch.empty(0, 4), torch.empty(0, 4))
    take(pair, [torch.empty(0)], torch.zeros(4, 4), torch.zeros(4, 4))
    assert pair[0].num_steps == 4 and pair[0].num_recorded == 0 and pair[0].iou_threshold == (0.5 if variant == "mmdet" else 0.4)
    assert pair[1].beta == 1 and pair[1].num_steps == 4
    # A window of zeros leaves beta; one in which the least counts does not.
    for value, wanted in ((0.0, 1.0), (1e-16, 1.0), (1e-14, 1e-14)):
        for _ in range(2):
            take(pair, [torch.full((3,), 0.7)], torch.full((4, 4), value, dtype=torch.float64), torch.ones(4, 4))
        assert pair[1].beta == wanted
    torch.testing.assert_close(pair[0].iou_threshold.item(), torch.tensor(0.7).item(), rtol=1e-15, atol=0)


def test_the_schedule_keeps_the_last_updates(generator):
    pair = modules("mmdet", interval=1, schedule_length=3)
    values = []
    for _ in range(5):
        take(pair, *draw_step(generator))
        values.append(float(pair[0].iou_threshold))
    steps, found = pair[0].schedule()
    assert steps.tolist() == [3, 4, 5] and found.tolist() == values[2:]
    assert len(DynamicLabelAssignment().schedule().values) == 0


def test_a_hundred_compiled_steps_in_one_graph(generator):
    """One variant of each module: both ways to select."""
    torch._dynamo.reset()
    pair = torch.nn.ModuleList([modules("original", interval=7)[0], modules("mmdet", interval=7)[1]])
    eager = copy.deepcopy(pair)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda *arguments: take(pair, *arguments), backend=counter, fullgraph=True)
    frames = set()
    for _ in range(100):
        ious, targets = [torch.rand(20, generator=generator) for _ in range(2)], torch.randn(16, 4, generator=generator) * 0.3
        weights = (torch.rand((16, 1), generator=generator) < 0.2).float().expand(16, 4).contiguous()
        step(ious, targets, weights)
        take(eager, ious, targets, weights)
        frames.add(counter.frame_count)
    # Tracing may start over within the first step; later ones must find its graph.
    assert len(frames) == 1 and frames.pop() > 0
    assert_same(pair, eager)
    assert pair[1].num_updates == 14 and pair[0].iou_threshold > 0.5 and pair[1].beta < 1


@pytest.mark.parametrize("world", worker.WORLDS[:3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_processes_follow_all_images_together(process_results, world, variant):
    """One of them without images, one without positives; those of test_distributed.py."""
    parts = [of_process[world]["dynamic"][variant] for of_process in process_results[:world]]
    for part in parts:
        for name, value in part["whole"].items():
            if name.endswith("iou_sum") or "iou_threshold" in name or "schedule_values" in name:
                # Sums of the order of the processes.
                torch.testing.assert_close(part["together"][name], value, rtol=1e-14, atol=0)
            else:
                assert torch.equal(part["together"][name], value), name
        assert all(torch.equal(part["together"][name], parts[0]["together"][name]) for name in part["whole"])
        assert part["whole"]["0.num_updates"] == distributed_dynamic.STEPS // distributed_dynamic.INTERVAL
    is_alone = torch.equal(parts[0]["alone"]["1.beta"], parts[0]["together"]["1.beta"])
    assert is_alone == (world == 1)
    assert all("max_images must be at least the images of every process in a step, 3, got 2" in part["too many"] for part in parts)


def test_labels_by_iou():
    overlaps = torch.tensor([0.0, 0.3, 0.4, 0.5, 0.7, -1.0, torch.nan])
    assert assign_by_iou(overlaps, 0.5).tolist() == [0, 0, 0, 1, 1, -1, -1]
    for thresholds in ((0.5, 0.4), (torch.tensor(0.5), torch.tensor([0.4], dtype=torch.float64))):
        labels = assign_by_iou(overlaps, *thresholds)
        assert labels.dtype == torch.int64 and labels.tolist() == [0, 0, -1, 1, 1, -1, -1]
    # A threshold is rounded as the overlaps are.
    third = torch.tensor(1 / 3)
    for dtype in (torch.float32, torch.bfloat16):
        assert assign_by_iou(third[None].to(dtype), 1 / 3) == assign_by_iou(third.to(dtype), torch.tensor(1 / 3, dtype=torch.float64)) == 1
    assert assign_by_iou(torch.zeros(2, 0), 0.5).shape == (2, 0)
    compiled = torch.compile(assign_by_iou, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(overlaps, torch.tensor(0.5)), assign_by_iou(overlaps, 0.5))


BAD = {
    "iou_topk": (DynamicLabelAssignment, {"iou_topk": 0}, ValueError, "iou_topk must be at least 1 and below 2.31, got 0"),
    "iou_topk_type": (DynamicLabelAssignment, {"iou_topk": 7.5}, TypeError, "iou_topk must be an int, got float"),
    "interval": (DynamicLabelAssignment, {"update_iter_interval": 0}, ValueError, "update_iter_interval must be at least 1"),
    "initial_iou": (DynamicLabelAssignment, {"initial_iou": 1.5}, ValueError, r"initial_iou must be within \[0, 1\], got 1.5"),
    "first_iou": (DynamicLabelAssignment, {"first_iou": "0"}, TypeError, "first_iou must be a number, got str"),
    "variant": (DynamicLabelAssignment, {"variant": "new"}, ValueError, "variant must be one of 'mmdet', 'original', got 'new'"),
    "group": (DynamicSmoothL1Loss, {"process_group": 3}, TypeError, "process_group must be None"),
    "initial_beta": (DynamicSmoothL1Loss, {"initial_beta": 0.0}, ValueError, "initial_beta must be at least 1e-15, got 0.0"),
    "initial_beta_nan": (DynamicSmoothL1Loss, {"initial_beta": float("nan")}, ValueError, "initial_beta must be 0 or within"),
    "reduction": (DynamicSmoothL1Loss, {"reduction": "all"}, ValueError, "reduction must be one of"),
    "loss_weight": (DynamicSmoothL1Loss, {"loss_weight": "1"}, TypeError, "loss_weight must be a number"),
    "length": (DynamicSmoothL1Loss, {"schedule_length": 0}, ValueError, "schedule_length must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name):
    module, settings, error, message = BAD[name]
    with pytest.raises(error, match=f"{module.__name__}: {message}"):
        module(**settings)


def test_bad_input_changes_nothing():
    pair = modules("mmdet")
    before = copy.deepcopy(pair)
    ious, targets = [torch.rand(3)], torch.rand(5, 4)
    calls = [
        (pair[0], ("0.5",), TypeError, "ious_per_image must be a list of Tensors or a Tensor, got str"),
        (pair[0], ([0.5],), TypeError, "ious_per_image must be a Tensor, got float"),
        (pair[0], ([torch.rand(2, 3)],), ValueError, r"one Tensor \[n\] per image, got shape \[2, 3\]"),
        (pair[0], ([torch.ones(3).long()],), TypeError, "floating dtype"),
        (pair[0], ([torch.ones(3, device="meta")],), ValueError, "on the device of the module, cpu, got meta"),
        (pair[1], (None,), TypeError, "bbox_targets must be a Tensor or a list of Tensors, got NoneType"),
        (pair[1], (torch.rand(5),), ValueError, r"bbox_targets must have shape \[N, 4\], got \[5\]"),
        (pair[1], ([targets, torch.rand(2, 3)],), ValueError, r"must be \[N, 4\], or a list of these, one per image, got \[5, 4\], \[2, 3\]"),
        (pair[1], (targets.long(),), TypeError, "floating dtype"),
        (pair[1], (targets, torch.ones(4)), ValueError, r"bbox_weights must have one number per row or the shape \[5, 4\], \[5\], got \[4\]"),
        (pair[1], (targets, None, -1), ValueError, "num_images must be an int of at least 0, got -1"),
        (pair[1], (targets, None, 0), ValueError, r"num_images must be at least 1 for targets of shape \[5, 4\], got 0"),
    ]
    for module, arguments, error, message in calls:
        with pytest.raises(error, match=f"{type(module).__name__}: .*{message}" if "must be a list" not in message else message):
            module.update(*arguments)
    for arguments, error, message in (
        ((ious[0].long(), 0.5), TypeError, "max_overlaps must have a floating dtype"),
        ((ious[0], "0.5"), TypeError, "pos_thr must be a number or a Tensor of one number, got str"),
        ((ious[0], 0.5, torch.ones(2)), ValueError, "neg_thr must be a number or a floating Tensor of one number"),
        ((ious[0], torch.ones((), device="meta")), ValueError, "pos_thr must be on the device of max_overlaps, cpu, got meta"),
    ):
        with pytest.raises(error, match=f"assign_by_iou: {message}"):
            assign_by_iou(*arguments)
    with pytest.raises(ValueError, match="reduction_override must be one of"):
        pair[1](targets, targets, reduction_override="all")
    assert_same(pair, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_read_on_the_host(variant):
    """On tensors that hold no numbers, whose reading raises: the assignment, the loss and its gradient, both updates."""
    with FakeTensorMode():
        pair = modules(variant)
        ious, targets, weights = [torch.empty(9), torch.empty(0)], torch.empty(5, 4), torch.empty(5, 4)
        labels = assign_by_iou(ious[0], pair[0].iou_threshold)
        pred = torch.empty(5, 4, requires_grad=True)
        pair[1](pred, targets, weights, avg_factor=weights.sum()).backward()
        take(pair, ious, targets, weights)
        assert labels.shape == (9,) and pred.grad.shape == (5, 4) and isinstance(pair[1].beta, FakeTensor)
        with pytest.raises(DataDependentOutputException):
            pair[0].schedule()
