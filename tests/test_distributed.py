"""Process groups: what 1, 2, 3 and 4 processes compute together is bitwise what one computes on their batches put together.

Four processes are started once and go through all cases (distributed_worker.py); each test looks at one of their results.
"""

import math
import re

import distributed_worker as worker
import harness
import pytest
import torch

from rsloss_kernels import SelfBalancing, distributed, score_weighted_mean

WORLDS = pytest.mark.parametrize("world", worker.WORLDS)
SEVERAL = pytest.mark.parametrize("world", [world for world in worker.WORLDS if world > 1])


@pytest.fixture(scope="module")
def results(process_results) -> list[dict]:
    return process_results


def of_world(results: list[dict], world: int, name) -> list:
    return [of_process[world][name] for of_process in results[:world]]


def assert_bitwise(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, what
    differs = harness.bits(got) != harness.bits(wanted)
    assert not differs.any(), f"{what}: {int(differs.sum())} differ, got {got[differs][:4]}, wanted {wanted[differs][:4]}"


@WORLDS
@pytest.mark.parametrize("name", worker.CASES)
def test_losses_and_gradients_are_those_of_one_process(results, name, world):
    case, parts = worker.CASES[name], of_world(results, world, name)
    assert not any("error" in part for part in parts), next(part["error"] for part in parts if "error" in part)
    whole = results[0][world][name, "whole"]
    for rank, part in enumerate(parts):
        for number, (got, wanted) in enumerate(zip(part["losses"], whole["losses"], strict=True)):
            assert_bitwise(got, wanted, f"loss {number} of process {rank}")
    assert whole["losses"][0].isnan() == (case.nan is not None) and whole["gradient"].nan_to_num(0).abs().max() > 0
    for key in whole.keys() - {"losses"}:
        joined = torch.cat([part[key] for part in parts], 1 if case.segments == "chunks" and key == "gradient" else 0)
        if case.average and key != "rank":
            scaled = whole[key].double() * world
            assert (joined - scaled).abs().max() <= (1e-6 if world == 3 else 0) * scaled.abs().max(), key
        else:
            assert_bitwise(joined, whole[key], key)


@SEVERAL
def test_maps_of_all_processes_are_ranked_together(results, world):
    parts = of_world(results, world, "maps")
    whole = parts[0]["whole"]
    for name, loss in whole["losses"].items():
        for part in parts:
            assert_bitwise(part["own"]["losses"][name], loss, f"{name} loss")
        joined = torch.cat([part["own"]["gradients"][name] for part in parts])
        assert_bitwise(joined, whole["gradients"][name], f"{name} gradient")
    for name, rank in whole["ranks"].items():
        assert rank.count_nonzero() > 4
        joined, wanted = torch.cat([part["own"]["ranks"][name] for part in parts]), rank
        assert joined.shape == wanted.shape and torch.allclose(joined, wanted, rtol=1e-12, atol=0)


@SEVERAL
@pytest.mark.parametrize("name", [*worker.OVERFLOWS, "wrong number"])
def test_overflow_of_any_process_is_nan_on_all(results, name, world):
    for part in of_world(results, world, name):
        assert part["losses"][0].isnan() and part["gradient"].isnan().all() and part["gradient"].numel() > 0


@SEVERAL
@pytest.mark.parametrize(
    "kind, message",
    [
        ("dtype", "ValueError: rank_sort_loss: the dtype of logits must be the same .* got torch.float32, torch.float64"),
        ("capacity", "ValueError: rank_sort_loss: max_positives must be the same .* got 8, 9"),
        ("delta", "ValueError: rank_sort_loss: delta must be the same .* got 0.5, 1.5"),
        ("segments", "ValueError: rank_sort_loss: num_segments must be the same .* got 1, 2"),
        ("overflow", "RuntimeError: rank_sort_loss: max_positives must be at least .*, 3, got 2"),
        ("afterwards", "nothing was raised"),
    ],
)
def test_processes_that_do_not_fit_together_all_raise(results, kind, message, world):
    for found in of_world(results, world, "mismatches"):
        assert re.match(message, found[kind]), found[kind]


def test_a_process_that_does_not_come_is_an_error_after_the_timeout_of_the_group(results):
    assert results[0]["late"].startswith(("RuntimeError", "DistBackendError")) and results[1]["late"] == "absent"


def test_default_is_the_group_of_all_processes(results):
    whole = results[0][max(worker.WORLDS)][worker.BY_NAME.name, "whole"]
    assert_bitwise(torch.cat([of_process["default"]["gradient"] for of_process in results]), whole["gradient"], "gradient")


@WORLDS
@pytest.mark.parametrize("how", ["ddp", "sum"])
def test_a_training_step_of_a_detector_equals_that_of_one_process_in_its_parameters(results, how, world):
    alone = of_world(results, world, ("step", "alone"))[0]
    states = [step["state"] for step in of_world(results, world, ("step", how))]
    assert torch.tensor([step["loss"] for step in of_world(results, world, ("step", how))]).unique().numel() == 1
    start = worker.Detector(None, True).state_dict()
    for name, wanted in alone["state"].items():
        assert torch.allclose(states[0][name], wanted, rtol=1e-12, atol=1e-13), name
        assert all(torch.equal(state[name], states[0][name]) for state in states), name
        assert not torch.allclose(start[name], wanted, rtol=1e-6), f"{name} was not trained"


@WORLDS
@pytest.mark.parametrize("mode", ["step", "running"])
def test_balancing_by_means_over_the_processes(results, mode, world):
    all_steps = [balancing[mode] for balancing in of_world(results, world, "balancing")]
    assert len(all_steps[0]) == 8
    for steps in zip(*all_steps, strict=True):
        factors, together, alone = zip(*steps, strict=True)
        for name, wanted in alone[0].items():
            assert all(torch.equal(state[name], together[0][name]) for state in together), name
            assert torch.allclose(together[0][name].double(), wanted.double(), rtol=1e-14), name
        assert torch.stack(factors).nan_to_num(-1).unique().numel() == 1


@WORLDS
def test_weighted_mean_over_the_processes(results, world):
    found = of_world(results, world, "mean")
    value, gradient = found[0]["whole"]
    for name, factor in (("together", 1), ("average", world)):
        assert {one[name][0].item() for one in found} == {found[0][name][0].item()}
        assert found[0][name][0].item() == pytest.approx(value.item(), rel=1e-6)
        joined = torch.cat([one[name][1] for one in found])
        assert torch.allclose(joined, gradient * factor, rtol=1e-6, atol=0) and (joined != 0).any() and joined.isfinite().all()
    assert all(one["zero"][0] == 0 and (one["zero"][1] == 0).all() for one in found)


@WORLDS
def test_rows_of_different_lengths_one_after_the_other(results, world):
    expected = [float(value) for rank in range(world) for value in range(rank)]
    for rank, (rows, offset) in enumerate(of_world(results, world, "rows")):
        assert rows.tolist() == expected and offset == sum(range(rank))


@WORLDS
def test_a_copy_of_a_module_has_the_same_group(results, world):
    assert all(of_world(results, world, "copies"))


@WORLDS
def test_a_group_is_described_without_an_address(results, world):
    assert all(f", process_group=<group of {world} processes>, " in text for text in of_world(results, world, "repr"))
    for rank in range(1, max(worker.WORLDS)):
        assert results[rank]["outside"].endswith("this process is in, got a group that this process is not in")


def test_compiled_as_one_graph_with_a_group(results):
    case = worker.Case("rank_sort", worker.BACKENDS[0], form="dense")
    parts, whole = of_world(results, 2, "compiled"), results[0][2][case.name, "whole"]
    for part in parts:
        for got, wanted in zip(part["losses"], whole["losses"], strict=True):
            assert_bitwise(got, wanted, "loss")
    assert_bitwise(torch.cat([part["gradient"] for part in parts]), whole["gradient"], "gradient")


def test_processes_of_different_dtypes_in_a_graph_all_get_nan(results):
    for found in of_world(results, 2, "graph_mismatch"):
        assert all(loss.isnan() for loss in found["losses"]) and found["gradient"].isnan().all()


def test_capacities_are_compared_when_a_group_sees_one_for_the_first_time(results):
    first, second = of_world(results, 2, "graph_mismatch")
    for found in (first, second):
        assert re.match("ValueError: f: max_positives must be the same .* got 8, 9", found["first"])
        assert found["equal"] == "nothing was raised"
    assert first["again"] == "nothing was raised"


def test_splits_are_what_they_are_named_after():
    assert worker.sizes("even", 4) == [15] * 4 and sum(worker.sizes("uneven", 3)) == worker.ROWS
    assert len(set(worker.sizes("uneven", 3))) == 3 and worker.sizes("empty", 3)[0] == 0
    batch = worker.draw(worker.Case("ap", "cpp", split="no_positives"), 0)
    first = batch.part(0, 0, worker.sizes("no_positives", 2)[0])
    assert not first.is_positive.any() and batch.is_positive.any()


def test_group_arguments():
    assert distributed.resolve_group("f", None) is None and distributed.resolve_group("f", "default") is None
    for wrong in ("world", 3, [0, 1]):
        with pytest.raises(TypeError, match="f: process_group must be None, 'default' or .* got"):
            distributed.resolve_group("f", wrong)
    with pytest.raises(TypeError, match="SelfBalancing: process_group must be"):
        SelfBalancing(process_group="all")
    with pytest.raises(ValueError, match=r"score_weighted_mean: weights must have the shape of losses, \[2\], got \[3\]"):
        score_weighted_mean(torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weighted_mean_by_hand(dtype):
    losses = torch.tensor([1.0, 3.0, math.nan], dtype=dtype, requires_grad=True)
    mean = score_weighted_mean(losses, torch.tensor([0.25, 0.5, 0.0]))
    mean.backward()
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert mean.item() == pytest.approx(1.75 / 0.75, rel=1e-7)
    assert losses.grad.tolist() == pytest.approx([1 / 3, 2 / 3, 0.0], rel=4e-3 if dtype == torch.bfloat16 else 1e-7)
    nothing = score_weighted_mean(losses[:0], torch.zeros(0))
    assert nothing.item() == 0 and nothing.requires_grad
