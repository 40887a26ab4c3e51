"""torchvision's models with losses of the library in two processes, of which one sees no objects."""
import pathlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torchvision_models as models
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss
from rsloss_kernels.integrations._ranking_head import LOGGED
from rsloss_kernels.integrations.torchvision import step_log, use_dynamic_rcnn, use_loss

# Images of each process; the last one has no objects.
SHARES = (slice(0, 2), slice(2, 3))


def make(case: str, group: str | None = None) -> nn.Module:
    kind, loss = case.split("+")
    model = models.make_model(kind)
    if kind == "faster_rcnn":
        use_dynamic_rcnn(
            model,
            DynamicLabelAssignment(3, update_iter_interval=1, process_group=group),
            DynamicSmoothL1Loss(4, update_iter_interval=1, initial_beta=100.0, process_group=group),
        )
    return use_loss(model, loss, process_group=group)


def step(model: nn.Module, images: slice) -> dict[str, dict[str, Tensor]]:
    pictures, targets = models.make_batch(empty=(2,))
    torch.manual_seed(0)
    losses = model(pictures[images], targets[images])
    own = model.module if isinstance(model, DistributedDataParallel) else model
    found = models.gradients(own, losses)
    return {"losses": {name: value.detach() for name, value in losses.items()}, "log": step_log(own), "gradients": found}


CASES = [(case, group) for case in ("retinanet+rank_sort", "fcos+rank_sort", "faster_rcnn+eqlv2") for group in (None, "default")]
CASES.remove(("fcos+rank_sort", None))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case, group in CASES:
        model = make(case, group)
        # Every parameter that requires a gradient gets one, on both.
        parallel = DistributedDataParallel(model)
        results[case, group] = step(parallel, SHARES[rank])
        results[case, group]["state"] = {name: value for name, value in model.named_buffers() if "roi_heads" in name}
    torch.save(results, pathlib.Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("torchvision")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], factor: float = 1.0) -> None:
    assert got.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], factor * value, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}")


def test_each_process_ranks_its_own(processes):
    case = "retinanet+rank_sort"
    first, second = (result[case, None] for result in processes)
    assert list(first["losses"]) == list(second["losses"]) and list(first["log"]) == list(second["log"])
    assert {*LOGGED} < first["log"].keys() and first["log"]["num_positives"] > 0 == second["log"]["num_positives"]
    assert all(value > 0 for value in first["losses"].values()) and all(value == 0 for value in second["losses"].values())
    assert_same_gradients(first["gradients"], second["gradients"])
    # DistributedDataParallel halves what only one of them has.
    assert_same_gradients(first["gradients"], step(make(case), SHARES[0])["gradients"], 0.5)


@pytest.mark.parametrize("case", ["retinanet+rank_sort", "fcos+rank_sort"])
def test_one_ranking_over_both(processes, case):
    first, second = (result[case, "default"] for result in processes)
    whole = step(make(case), slice(0, 3))
    assert list(first["log"]) == list(second["log"])
    for name, value in whole["losses"].items():
        torch.testing.assert_close(first["losses"][name], value)
        assert torch.equal(first["losses"][name], second["losses"][name])
    torch.testing.assert_close(first["log"]["SB_weight"], whole["log"]["SB_weight"], rtol=1e-6, atol=0)
    assert_same_gradients(first["gradients"], second["gradients"])
    assert_same_gradients(first["gradients"], whole["gradients"])


def test_two_stages(processes):
    case = "faster_rcnn+eqlv2"
    for group in (None, "default"):
        first, second = (result[case, group] for result in processes)
        assert list(first["losses"]) == list(second["losses"]) and first["log"].keys() == second["log"].keys() == {"iou_threshold", "beta"}
        assert all(value.isfinite() for result in (first, second) for value in result["losses"].values())
        assert second["losses"]["loss_box_reg"] == 0 and first["losses"]["loss_box_reg"] > 0
        assert_same_gradients(first["gradients"], second["gradients"])
        # The statistics are those of a process, or of both: the second one alone has no objects to learn from.
        names = ["roi_heads.class_loss.pos_grad", "roi_heads.smooth_l1.beta"]
        is_same = [torch.equal(first["state"][name], second["state"][name]) for name in names]
        assert is_same == [group is not None] * 2
        assert second["state"]["roi_heads.smooth_l1.beta"].isfinite()
