"""The equalized losses with process groups: the state of 1, 2, 3 and 4 processes is that of one on their batches put together.

The processes are those of test_distributed.py; what they do is in distributed_equalized.py.
"""

import distributed_equalized
import distributed_worker as worker
import pytest
import torch

WORLDS = pytest.mark.parametrize("world", worker.WORLDS)


def of_world(results: list[dict], world: int, name) -> list:
    return [of_process[world]["equalized"][name] for of_process in results[:world]]


def assert_close(got: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=0, equal_nan=True)


@WORLDS
@pytest.mark.parametrize("name", distributed_equalized.CASES)
def test_state_losses_and_gradients_are_those_of_one_process(process_results, name, world):
    case, parts = distributed_equalized.CASES[name], of_world(process_results, world, name)
    whole = process_results[0][world]["equalized"][name, "whole"]
    for step in range(distributed_equalized.STEPS):
        wanted = whole["state"][step]
        for part in parts:
            # Added in the order of the ranks: the same bits on all.
            assert all(torch.equal(part["state"][step][key], value) for key, value in parts[0]["state"][step].items())
            for key in wanted:
                assert_close(part["state"][step][key], wanted[key])
        joined = torch.cat([part["gradient"][step] for part in parts])
        assert torch.equal(joined.isnan(), whole["gradient"][step].isnan())
        # A state with other last bits makes other last bits of a table.
        torch.testing.assert_close(joined, whole["gradient"][step], rtol=1e-5, atol=1e-9, equal_nan=True)
        total = torch.stack([part["loss"][step].double() for part in parts]).sum()
        assert_close(total, whole["loss"][step].double(), rtol=1e-6)
    before, after, last = whole["state"]
    assert all(torch.equal(before[key], after[key]) is case.nan for key in before)
    largest = 5 if case.loss == "eqlv2" else 1
    assert whole["gradient"][1].isnan().any() == case.nan and ((last["pos_neg"] > 0) & (last["pos_neg"] < largest)).any()


@WORLDS
def test_evaluation_and_inference_leave_the_state_and_communicate_nothing(process_results, world):
    assert all(all(found.values()) and len(found) == 3 for found in of_world(process_results, world, "frozen"))


def test_compiled_steps_with_a_group(process_results):
    parts = of_world(process_results, 2, "compiled")
    eager = of_world(process_results, 2, of_world(process_results, 2, ("compiled", "case"))[0])
    for got, wanted in zip(parts, eager, strict=True):
        for step in range(distributed_equalized.STEPS):
            assert torch.equal(got["gradient"][step], wanted["gradient"][step])
            for key, value in wanted["state"][step].items():
                found = {name.removeprefix("_orig_mod."): buffer for name, buffer in got["state"][step].items()}
                assert torch.equal(found[key], value)
