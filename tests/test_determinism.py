"""The same bits: in every run, for every number of threads, in every process, and under PyTorch's own switch for determinism. Between numbers
of processes in a group see test_distributed.py, between orders of blocks the tests of emulated kernels."""
import contextlib
import json

import harness
import output_hashes
import pytest
import rsloss_kernels
import torch

RUNS = 50
THREADS = (1, 2, 3, 4)
LARGE = [name for name, *_ in output_hashes.problems(True)]


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(name: str, backend: harness.Backend, logits, losses_of) -> tuple[torch.Tensor, ...]:
    leaf = logits.to(backend.device, copy=True).requires_grad_()
    with rsloss_kernels.use_backend(backend.name):
        losses = losses_of(leaf)
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses), leaf)
    return *(loss.detach() for loss in losses), gradient


def same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(harness.bits(one), harness.bits(other)) for one, other in zip(first, second, strict=True))


def supported(backend: harness.Backend, are_large: bool = False):
    from rsloss_kernels import _library

    return [problem for problem in output_hashes.problems(are_large) if backend.name in _library.implemented_by(problem[3])]


@pytest.mark.slow_interpreter
def test_fifty_runs_have_the_same_bits(backend):
    """Every loss, with one to four threads; fewer runs of plain PyTorch and of GPU kernels on the CPU."""
    if not backend.is_deterministic:
        pytest.skip("the reference on a GPU is plain PyTorch there")
    for name, logits, losses_of, _ in supported(backend):
        wanted = outcome(name, backend, logits.float(), losses_of)
        for run in range(RUNS - 1 if backend.is_compiled and not backend.is_slow else 1 if backend.is_slow else RUNS // 5):
            with threads(THREADS[(run + 1) % len(THREADS)]):
                assert same(outcome(name, backend, logits.float(), losses_of), wanted), f"{name}, run {run}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks_have_the_same_bits_for_any_number_of_threads(dtype):
    """As many elements as make several tasks of each pass."""
    backend = harness.Backend("cpp", "cpu")
    for name, logits, losses_of, _ in supported(backend, are_large=True):
        found = []
        for count in THREADS:
            with threads(count):
                found.append(outcome(name, backend, logits.to(dtype), losses_of))
        assert all(same(one, found[0]) for one in found[1:]), name


def test_under_deterministic_algorithms(backend):
    """Nothing raises, in forward and backward, and no bit changes; memory that is not written first is filled with NaN."""
    # The interpreter takes a third of a second for a case.
    problems = supported(backend)[:: 3 if backend.is_interpreted else 1]
    wanted = [outcome(name, backend, logits.bfloat16(), losses_of) for name, logits, losses_of, _ in problems]
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        found = [outcome(name, backend, logits.bfloat16(), losses_of) for name, logits, losses_of, _ in problems]
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    for (name, *_), one, other in zip(problems, found, wanted, strict=True):
        if backend.is_deterministic:
            assert same(one, other), name


def test_processes_and_threads_have_the_same_hashes(tmp_path, capsys, monkeypatch):
    """The command in a process of its own, beside what this one wrote."""
    best = output_hashes.CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ("plain",))[0]
    with threads(1):
        here = output_hashes.work("cpp", 1, narrow=True)
    assert set(LARGE) < set(here)
    here = {name: {"inputs": found["inputs"], f"cpp, {best}": found["cpp"]} for name, found in here.items()}
    path = tmp_path / "hashes.json"
    output_hashes.write({"schema": output_hashes.SCHEMA, "machine": output_hashes.platform(), "hashes": here}, path)
    document = json.loads(path.read_text())
    assert document["hashes"] == here and document["machine"]["torch"] == torch.__version__ and document["machine"]["compiler"]
    # One set of instructions is enough.
    monkeypatch.setattr(output_hashes, "CAPABILITIES", dict.fromkeys(output_hashes.CAPABILITIES, (best,)))
    assert output_hashes.main(["--backends", "cpp", "--narrow", "--threads", "3", "--compare", str(path)]) == 0
    assert f"{2 * len(here)} hashes are the same, 0 differ" in capsys.readouterr().out


def test_what_differs_is_told():
    ones, twos = "1" * output_hashes.DIGITS, "2" * output_hashes.DIGITS
    here = {"a": {"inputs": ones, "cpp": {"float32": f"{ones} {ones}", "float64": f"{ones} {twos}"}}, "b": {"inputs": ones, "cpp": {}}}
    there = {"a": {"inputs": ones, "cpp": {"float32": f"{ones} {twos}", "float64": f"{ones} {twos}"}}, "b": {"inputs": twos, "cpp": {}}}
    assert output_hashes.compare(here, there) == (["a, cpp, float32: gradient", "b: other inputs"], 3)
    assert output_hashes.compare(here, here) == ([], 4)
    assert output_hashes.uncompared(here, there) == 0
    del there["a"]["cpp"]["float64"]
    assert output_hashes.uncompared(here, there) == 2
    values = (torch.zeros(3), torch.zeros(4), -torch.zeros(3), torch.zeros(3).half(), torch.zeros(3, 1))
    assert len({output_hashes.digest(value) for value in values}) == len(values)
