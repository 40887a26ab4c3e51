"""Stateful losses in a training of several processes: inside of DistributedDataParallel, and where processes die.

The first part looks at what the processes of test_distributed.py did (distributed_survival.py)."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import distributed_survival
import processes
import pytest
import survival_worker
import torch
from distributed_survival import STEPS, Head, batches
from stateful_modules import STATEFUL, same_bits, state_of

WORKER = pathlib.Path(__file__).with_name("survival_worker.py")
GROUPED = [name for name, one in STATEFUL.items() if one.takes_group]


@pytest.fixture(scope="module")
def results(process_results) -> list[dict]:
    return [of_process[2]["survival"] for of_process in process_results[:2]]


def alone(name: str, state: dict, batch) -> dict:
    """A step of a process by itself, from a state."""
    head = Head(STATEFUL[name])
    head.loss.load_state_dict(state)
    head(batch).backward()
    return state_of(head.loss)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("name", GROUPED)
def test_with_a_group_the_state_is_one_for_all_processes(results, name, broadcast):
    """Whatever becomes of buffers; a process without elements takes part."""
    first, second = (of_process[name, True, broadcast] for of_process in results)
    for step in range(STEPS):
        assert same_bits(first[step]["after"], second[step]["after"]), step
        assert torch.equal(first[step]["gradient"], second[step]["gradient"]) and first[step]["gradient"].isfinite().all()
    assert not same_bits(first[0]["before"], first[-1]["after"])
    assert all(map(same_bits, *([step["after"] for step in of_process[name, True, not broadcast]] for of_process in results)))


@pytest.mark.parametrize("name", GROUPED)
def test_without_a_group_broadcast_buffers_decide_whose_state_goes_on(results, seed, name):
    """True, DDP's default: every step begins with the state of the first process, and what the others gathered is lost. False: each goes
    on with its own."""
    for broadcast in (True, False):
        begun_by = []
        for rank, of_process in enumerate(results):
            state = state_of(STATEFUL[name].make())
            for step, batch in zip(of_process[name, False, broadcast], batches(seed, rank), strict=True):
                before = begun_by[len(begun_by) % STEPS] if rank and broadcast else state
                begun_by.append(before)
                state = alone(name, before, batch)
                assert same_bits(step["after"], state), (broadcast, rank)
    assert not same_bits(results[0][name, False, False][-1]["after"], results[1][name, False, False][-1]["after"])


def test_tables_do_not_change_in_a_broadcast(results):
    for of_process in results:
        for broadcast in (True, False):
            for step in of_process["group_softmax", False, broadcast]:
                assert same_bits(step["before"], step["after"]) and step["loss"].isfinite()


@pytest.mark.parametrize("name", GROUPED)
def test_gradients_of_several_batches_add_and_each_moves_the_state(results, name):
    for of_process in results:
        (together, state), (apart, wanted) = (of_process[name, "accumulate"][how] for how in ("together", "apart"))
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)
        assert same_bits(state, wanted) and together.any()


@pytest.mark.parametrize("name", GROUPED)
def test_what_is_not_finite_on_one_process_leaves_the_state_of_all(results, name):
    for of_process in results:
        good, broken, again = of_process[name, "broken"]
        assert same_bits(broken, good) and not same_bits(again, good)
        assert same_bits(again, results[0][name, "broken"][-1])


def test_compiled_data_parallel_steps(results):
    for of_process in results:
        (gradient, state), (wanted, wanted_state) = (of_process["compiled"][how] for how in ("compiled", "eager"))
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
        assert gradient.any() and all(torch.equal(state[key], wanted_state[key]) for key in wanted_state)
    assert all(of_process["copy"] for of_process in results) and distributed_survival.STEPS == 3


# --- processes that die ---


def test_when_a_process_is_killed_the_others_raise_and_nothing_stays(tmp_path):
    """One is killed where the others wait for it in the collective of a loss. Each of them ends with an error by itself."""
    command = [sys.executable, str(WORKER), str(tmp_path), "--die-step", "1", "--processes", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        done = processes.communicate(process, 300)
    assert done.returncode == 0, done.stderr[-6000:]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    ends = json.loads((tmp_path / "ends.json").read_text())
    assert ends[1]["status"] == -signal.SIGKILL
    for rank in (0, 2):
        errors = (tmp_path / f"{rank}.errors").read_text()
        assert ends[rank]["status"] == 1, errors[-2000:]
        assert "RuntimeError" in errors or "DistBackendError" in errors, errors[-2000:]
        waited = ends[rank]["at"] - ends[1]["at"]
        assert waited < 60, "they see the closed connection, long before the timeout of the group, 240 s"
    # What was saved before goes on, with another number of processes too.
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 1
    detector = survival_worker.Detector()
    detector.load_state_dict(checkpoint["model"], strict=True)
    before = state_of(detector.losses)
    loss = detector(batches(0, 0)[0])
    loss.backward()
    assert loss.isfinite() and detector.linear.weight.grad.isfinite().all() and not same_bits(state_of(detector.losses), before)


def test_a_restarted_training_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    """Under torchrun one of two processes kills itself in the middle of a step of the first attempt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--monitor-interval", "0.1", str(WORKER), str(tmp_path), "--die-step", "1", "--steps", "3"]
    done = processes.run(command, 300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-12000:]
    disturbed, undisturbed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("checkpoint", "undisturbed"))
    assert (tmp_path / "resumed_at").read_text() == "1" and disturbed["step"] == undisturbed["step"] == 3
    for part in ("model", "momentum"):
        assert same_bits(disturbed[part], undisturbed[part])
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    assert not torch.equal(start["linear.weight"], disturbed["model"]["linear.weight"])


def test_what_hangs_ends_with_all_that_it_started():
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as ended:
        processes.run(["sh", "-c", "echo begun; sleep 100 & wait"], 0.2)
    # Its output is read to the end, which comes when nobody holds it open.
    assert ended.value.stdout == "begun\n" and time.monotonic() - start < 50
