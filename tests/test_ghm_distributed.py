"""GHM with process groups: what 1, 2, 3 and 4 processes compute together is what one computes on their batches put together.

The processes are those of test_distributed.py; what they do is in distributed_ghm.py.
"""

import re

import distributed_ghm
import distributed_worker as worker
import pytest
import torch

WORLDS = pytest.mark.parametrize("world", worker.WORLDS)
SEVERAL = pytest.mark.parametrize("world", [world for world in worker.WORLDS if world > 1])


def of_world(results: list[dict], world: int, name) -> list:
    return [of_process[world]["ghm"][name] for of_process in results[:world]]


@WORLDS
@pytest.mark.parametrize("name", distributed_ghm.CASES)
def test_losses_gradients_and_state_are_those_of_one_process(process_results, name, world):
    case, parts = distributed_ghm.CASES[name], of_world(process_results, world, name)
    whole = process_results[0][world]["ghm"][name, "whole"]
    for part in parts:
        # Counts are whole numbers, whose sums are exact; what follows from them alone is the same to the last bit.
        assert all(torch.equal(got, wanted) for got, wanted in zip(part["density"], whole["density"], strict=True))
        for got, wanted in zip(part["state"], whole["state"], strict=True):
            assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)
    for step in range(distributed_ghm.STEPS):
        losses = [part["loss"][step] for part in parts]
        wanted = whole["loss"][step]
        if case.reduction == "none":
            torch.testing.assert_close(torch.cat(losses), wanted, rtol=1e-6, atol=0)
        else:
            # The order of the additions depends on how the batch is cut.
            assert len({loss.item() for loss in losses if not loss.isnan()}) <= 1
            torch.testing.assert_close(torch.stack(losses), wanted.expand(world), rtol=1e-6, atol=0, equal_nan=case.nan)
        joined, gradient = torch.cat([part["gradient"][step] for part in parts]), whole["gradient"][step]
        if not case.average:
            torch.testing.assert_close(joined, gradient, rtol=0, atol=0, equal_nan=case.nan)
        else:
            # The factor rounds once more where the number of processes is no power of two, or the type has 16 bits.
            rtol = 2.0**-7 if gradient.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(joined, gradient * world, rtol=rtol if world == 3 else 0, atol=0)
        assert gradient.nan_to_num(0).any() and (wanted.isnan().any() or not case.nan)
    if case.sample.momentum > 0:
        assert bool(whole["state"][-1]["acc_sum"].any()) is not case.nan


@SEVERAL
@pytest.mark.parametrize(
    "kind, message",
    [
        ("bins", "ValueError: ghm_classification_loss: bins must be the same .* got 10, 11"),
        ("mu", "ValueError: ghm_regression_loss: mu must be the same .* got 0.5, 1.5"),
        ("momentum", "ValueError: ghm_classification_loss: momentum must be the same .* got 0.25, 0.375"),
        ("empty_bins", "ValueError: ghm_regression_loss: empty_bins must be the same .* got 0, 1"),
        ("loss", r"ValueError: ghm_(classification|regression)_loss: mu must be the same .* got 0, 0.02"),
        ("average", "ValueError: ghm_classification_loss: average_gradients must be the same .* got 1, 0"),
        ("correction", "ValueError: ghm_classification_loss: bias correction must be the same .* got 0, 1"),
        ("density", "ValueError: gradient_density: bins must be the same .* got 5, 6"),
        ("afterwards", "nothing was raised"),
    ],
)
def test_processes_that_do_not_agree_all_raise(process_results, kind, message, world):
    for found in of_world(process_results, world, "mismatches"):
        assert re.match(message, found[kind]), found[kind]


def test_compiled_steps_with_a_group(process_results):
    parts = of_world(process_results, 2, "compiled")
    whole = process_results[0][2]["ghm"][parts[0]["case"], "whole"]
    for step in range(distributed_ghm.STEPS):
        for part in parts:
            torch.testing.assert_close(part["loss"][step], whole["loss"][step], rtol=1e-6, atol=0)
        joined = torch.cat([part["gradient"][step] for part in parts])
        torch.testing.assert_close(joined, whole["gradient"][step], rtol=0, atol=0)
    for part in parts:
        assert part["state"].keys() == whole["state"][-1].keys()
        assert all(torch.equal(part["state"][key], value) for key, value in whole["state"][-1].items())


def test_processes_that_do_not_agree_in_a_graph_all_get_nan(process_results):
    """As on a GPU, nothing is read on the host; the state stays."""
    for part in of_world(process_results, 2, "compiled"):
        found = part["disagreeing"]
        assert found["loss"].isnan() and torch.equal(found["gradient"].isnan(), found["weight"] > 0)
        assert not found["gradient"][found["weight"] <= 0].any()
        assert all(torch.equal(found["state"][key], value) for key, value in part["state"].items())
