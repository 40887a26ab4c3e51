"""RoI heads of MMDetection under DistributedDataParallel: Dynamic R-CNN and balanced group softmax, one process without objects."""
import pathlib

import frameworks
import mmdet_two_stage as two_stage
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 4
WINDOW = {"iou_topk": 4, "beta_topk": 6, "update_iter_interval": 2, "initial_iou": 0.2, "initial_beta": 8.0}
COUNTS = [3, 2000, 50, 7, 150]


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


def dynamic(mm, group: str | None) -> nn.Module:
    boxes = two_stage.SOFTMAX | {"loss_bbox": {"type": "SmoothL1Loss", "beta": 0.9}}
    training = {"sampler": two_stage.ALL, "dynamic_rcnn": WINDOW | {"process_group": group}}
    return mm.fix_norms(two_stage.two_stage(mm, boxes, kind="FusedDynamicRoIHead", training=training))


def with_groups(mm) -> nn.Module:
    boxes = two_stage.SOFTMAX | {"loss_cls": {"type": "GroupSoftmaxLoss", "counts": COUNTS}}
    return two_stage.two_stage(mm, boxes, training={"sampler": two_stage.SOME}, cascade=True)


def batch_of(mm, rank: int, step: int) -> dict:
    return mm.make_batch(torch.Generator().manual_seed(10 * step + rank), boxes=3 if rank == 0 else 0)


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([value.grad.flatten() for value in model.roi_head.parameters()])


def state_of(model: nn.Module) -> tuple[float, float]:
    return float(model.roi_head.label_assignment.iou_threshold), float(model.roi_head.bbox_head.loss_bbox.beta)


def steps_of(mm, rank: int, model: nn.Module) -> list[tuple[dict, Tensor, tuple[float, float] | None]]:
    # As MMDetection's runner: buffers are each process's own.
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    steps = []
    for step in range(STEPS):
        losses = parallel(**model.data_preprocessor(batch_of(mm, rank, step), True), mode="loss")
        loss, log = model.parse_losses(losses)
        model.zero_grad()
        loss.backward()
        steps.append((two_stage.numbers(log), gradient_of(model), state_of(model) if hasattr(model.roi_head, "label_assignment") else None))
    return steps


def train_in_process(rank: int, folder: str) -> None:
    mm = frameworks.mmdetection()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    models = {"groups": with_groups(mm), "local": dynamic(mm, None), "global": dynamic(mm, "default")}
    torch.save({name: steps_of(mm, rank, model) for name, model in models.items()}, pathlib.Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(mm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(train_in_process, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ["groups", "local", "global"])
def test_same_gradients_and_names(processes, name):
    for (log, gradient, _), (other_log, other_gradient, _) in zip(processes[0][name], processes[1][name], strict=True):
        assert list(log) == list(other_log) and torch.equal(gradient, other_gradient)
        assert gradient.isfinite().all() and gradient.any()
        prefix = "s0." if name == "groups" else ""
        # Without objects everything is background, and no box is regressed.
        assert log[f"{prefix}loss_bbox"] > 0 == other_log[f"{prefix}loss_bbox"] and other_log[f"{prefix}loss_cls"] > 0


def test_statistics_of_each_process(processes):
    (*_, (_, _, first)), (*_, (_, _, second)) = (process["local"] for process in processes)
    assert first[0] > second[0] == WINDOW["initial_iou"] and first[1] != second[1]


def test_statistics_of_both_processes(mm, processes):
    """Thresholds and betas are those of one process that has the images of both."""
    states = [[state for _, _, state in process["global"]] for process in processes]
    assert states[0] == states[1] and len(set(states[0])) == 1 + STEPS // WINDOW["update_iter_interval"]
    model, wanted = dynamic(mm, None), []
    for step in range(STEPS):
        parts = [batch_of(mm, rank, step) for rank in range(2)]
        mm.losses_of(model, {key: parts[0][key] + parts[1][key] for key in parts[0]})
        wanted.append(state_of(model))
    assert states[0] == [pytest.approx(state, rel=1e-5) for state in wanted]
