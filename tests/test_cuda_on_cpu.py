"""The CUDA kernels on the CPU: what the emulator adds to the tests that run on every backend.

Two orders of threads, one block for a million elements, tables that do not fit shared memory, bins bit for bit those of the
reference, and sanitizers. The values themselves are tested where the losses are, with the backend `cuda-cpu`.
"""
import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator

import golden_vectors
import harness
import pytest
import torch
from cuda_on_cpu import build
from harness import NOISE, Backend, assert_gates, evaluate
from test_rank_sort import published

from rsloss_kernels import _library

CUDA = Backend("cuda", "cpu")
# Just the cell table and a few edges.
LITTLE_SHARED_MEMORY = "16500"


@pytest.fixture(scope="module", autouse=True)
def emulator():
    build.load_emulated_cuda()


@contextlib.contextmanager
def emulated(**settings: str) -> Iterator[None]:
    """Sets RSL_EMULATOR_<NAME>, which every launch reads."""
    names = {f"RSL_EMULATOR_{name.upper()}": value for name, value in settings.items()}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]


@pytest.fixture(scope="module")
def faults():
    return ctypes.CDLL(str(build.compile_library("faults", [build.HERE / "faults.cu"])))


def call(function, *arguments) -> str | None:
    """The message of a failed run, None if it went well."""
    text = ctypes.create_string_buffer(256)
    converted = [ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else value for value in arguments]
    return text.value.decode() if function(*converted, text) else None


@pytest.mark.parametrize("fault", ["divergent_barrier", "divergent_warp", "too_many_threads"])
def test_emulator_reports_what_would_hang(faults, fault):
    out = torch.zeros(64, dtype=torch.int32)
    assert call(getattr(faults, fault), out)
    numbers = torch.arange(64, dtype=torch.int32)
    assert call(faults.reverse, numbers, out, True) is None, "the emulator works on after an error"
    assert torch.equal(out, numbers.flip(0))


def test_missing_barrier_gives_a_wrong_result(faults):
    numbers, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for order in ("0", "1"):
        with emulated(reverse=order):
            assert call(faults.reverse, numbers, out, True) is None
            assert torch.equal(out, numbers.flip(0))
            assert call(faults.reverse, numbers, out, False) is None
            assert not torch.equal(out, numbers.flip(0)), f"order {order}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", golden_vectors.params("ranksort"))
def test_golden_vectors_in_both_orders_of_threads(case, dtype):
    inputs, hyper = case.inputs(), case.hyper
    upstream = (hyper["gout_rank"], hyper["gout_sort"])

    def run():
        logits = inputs["logits"].to(dtype)
        return evaluate(CUDA, logits, inputs["targets"], delta=hyper["delta"], upstream=upstream, upstream_parity=True)

    forward = run()
    with emulated(reverse="1"):
        backward = run()
    losses, gradient = published(case)
    assert_gates(CUDA, forward, losses, gradient, case.name, NOISE)
    assert forward == backward, "the order of threads changed the result"


def tables(backend: str, logits, targets, quality, capacity, delta, background_first=False) -> tuple[torch.Tensor, ...]:
    """Everything that the operators of the forward pass return up to the bins."""
    collect, bin_ = (_library.operator(name, backend) for name in ("ranking_collect", "ranking_bin"))
    positives, negatives, counts = collect(logits, targets, quality, None, 1, capacity, background_first)
    return positives, negatives, counts, *bin_(logits, negatives, positives, counts, None, 1, delta)


def assert_same_bits(got, wanted) -> None:
    names = ("positives", "negatives", "counts", "ranked", "bins")
    for name, one, other in zip(names, got, wanted, strict=True):
        assert torch.equal(one.nan_to_num(-3e300), other.nan_to_num(-3e300)), name


@pytest.mark.parametrize(
    "settings", [{}, {"reverse": "1"}, {"shared_bytes": LITTLE_SHARED_MEMORY}, {"processors": "7"}], ids=str
)
@pytest.mark.parametrize("dtype", [*harness.ROUNDING, torch.float32, torch.float64], ids=str)
def test_tables_are_those_of_the_reference(dtype, settings, generator):
    for form, delta in (("dense", 0.5), ("labels", 0.25), ("dense", 0.0)):
        shapes = [(70, 5), (1, 5), (0, 5), (900, 5)]
        # One tensor is not aligned to 16 bytes.
        logits = [torch.randn(rows * 5 + 1, generator=generator).to(dtype)[1:].view(rows, classes) for rows, classes in shapes]
        logits[0][3, 0], logits[0][4] = torch.nan, torch.tensor([torch.inf, -torch.inf, 0, -0.0, 7])
        if form == "dense":
            targets = [(torch.rand(shape, generator=generator) * 30 - 29).clamp(-0.05).to(dtype) for shape in shapes]
            targets[0][0, 0], targets[0][1, 1] = torch.nan, torch.inf
            quality = []
        else:
            labels = [torch.randint(-8, 8, shape[:1], generator=generator) for shape in shapes]
            targets = [labels[0].int(), labels[1], labels[2].int(), labels[3]]
            quality = [torch.rand(shape[:1], generator=generator).to(dtype) for shape in shapes]
        for capacity in (3, 1000):
            arguments = (logits, targets, quality, capacity, delta, form == "labels")
            wanted = tables("reference", *arguments)
            with emulated(**settings):
                assert_same_bits(tables("cuda", *arguments), wanted)


def test_a_million_equal_logits_in_one_block():
    """Neither counters nor the halves of the sums may wrap."""
    count = 1_000_000
    logits = torch.full((count,), -1.0)
    logits[0] = -0.6875
    targets = torch.zeros(count)
    targets[0] = 0.75
    with emulated(processors="1"):
        got = tables("cuda", [logits], [targets], [], 4, 0.5)
    wanted = tables("reference", [logits], [targets], [], 4, 0.5)
    assert_same_bits(got, wanted)
    bins = got[-1]
    assert bins[0, 1] == count - 1 and bins[1, 1] > 2**32 * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tables_that_do_not_fit_shared_memory(dtype, generator):
    """Bins and lines in global memory instead: the same losses bit for bit, the gradient to its gate."""
    logits = torch.randn(4000, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.where(torch.rand(4000, generator=generator) < 0.1, torch.rand(4000, generator=generator), 0.0)
    fits = evaluate(CUDA, logits, targets)
    with emulated(shared_bytes=LITTLE_SHARED_MEMORY):
        spills = evaluate(CUDA, logits, targets)
    assert_gates(CUDA, spills, [float(loss) for loss in fits.losses], fits.gradient.double())
    assert spills.losses == fits.losses


def test_a_capacity_below_the_positives_gives_nan_everywhere(generator):
    logits, targets = torch.randn(500, generator=generator), (torch.rand(500, generator=generator) < 0.2).float()
    found = harness.Pipeline(CUDA, [logits], [targets], capacity=int(targets.sum())).run()
    assert not found.gradient.isnan().any() and not any(loss.isnan() for loss in found.losses)
    overflow = harness.Pipeline(CUDA, [logits], [targets], capacity=int(targets.sum()) - 1).run()
    assert overflow.gradient.isnan().all() and all(loss.isnan() for loss in overflow.losses)


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    # Here, because the compiler itself would run under the sanitizers there.
    build.build(sanitize=True)
    build.compile_library("faults", [build.HERE / "faults.cu"], sanitize=True)
    command = [sys.executable, str(build.HERE / "sanitized.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=build.sanitizer_environment(), check=False)


def test_sanitizers_find_nothing():
    done = sanitized()
    assert done.returncode == 0 and "clean" in done.stdout, done.stdout + done.stderr
    assert "runtime error" not in done.stderr and "AddressSanitizer:" not in done.stderr, done.stderr


def test_sanitizers_find_a_planted_write_behind_the_end():
    done = sanitized("plant")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "faults.cu" in done.stderr, done.stderr
