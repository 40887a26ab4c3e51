"""The CUDA kernels on the CPU: what the emulator adds to the tests that run on every backend.

Two orders of threads, one block for a million elements, tables that do not fit shared memory or one block, bins bit for bit those
of the reference, launches that do not depend on the data, and sanitizers. The values themselves are tested where the losses are,
with the backend `cuda-cpu`.
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

from rsloss_kernels import _library, alrp_loss, average_precision_loss

CUDA = Backend("cuda", "cpu")
REFERENCE = Backend("reference", "cpu")
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


@pytest.mark.parametrize("fault", ["divergent_barrier", "divergent_warp", "divergent_syncwarp", "too_many_threads", "impatient"])
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


@pytest.mark.parametrize("case", [*golden_vectors.params("aploss"), *golden_vectors.params("alrp")])
def test_the_order_of_threads_changes_nothing(case):
    """The golden values are asserted where the losses are; here that the other order gives their bits."""
    inputs = case.inputs()
    arguments = [inputs["logits"], torch.where((inputs["targets"] > 0) & (inputs["targets"] < 1), -1.0, inputs["targets"])]
    loss = average_precision_loss
    if case.family == "alrp":
        arguments, loss = [*arguments, inputs["regression_losses"]], alrp_loss
    forward = evaluate(CUDA, *arguments, loss=loss, delta=case.hyper["delta"])
    with emulated(reverse="1"):
        backward = evaluate(CUDA, *arguments, loss=loss, delta=case.hyper["delta"])
    assert forward == backward


def tables(
    backend: str, logits, targets, quality, capacity, delta, background_first=False, segments=None, num_segments=1, maps=False
) -> tuple[torch.Tensor, ...]:
    """Everything that the operators of the forward pass return up to the bins."""
    collect, bin_ = (_library.operator(name, backend) for name in ("ranking_collect", "ranking_bin"))
    positives, negatives, counts = collect(logits, targets, quality, segments, num_segments, capacity, maps, background_first)
    return positives, negatives, counts, *bin_(logits, negatives, positives, counts, segments, num_segments, delta)


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
        by_row = torch.randint(-1, 8, (971, 1), generator=generator, dtype=torch.int32)
        by_column = torch.tensor([[0, 2, -1, 2, 5]], dtype=torch.int32)
        for capacity in (3, 1000):
            # Ids of nobody, ids outside, segments without a positive, chunks.
            for segments, num_segments in ((None, 1), (by_row, 7), (by_column, 4), (None, 5), (by_row * 1000, 10_000)):
                arguments = (logits, targets, quality, capacity, delta, form == "labels", segments, num_segments)
                wanted = tables("reference", *arguments)
                with emulated(**settings):
                    assert_same_bits(tables("cuda", *arguments), wanted)


@pytest.mark.parametrize("settings", [{}, {"reverse": "1", "processors": "7"}], ids=str)
def test_tables_of_maps_are_those_of_the_reference(settings, generator):
    """Planes shorter and longer than a word of the mask, and than the words of a warp; ends inside of them; labels that mean nothing."""
    classes, shapes = 5, [(2, 15, 7, 9), (1, 5, 3), (3, 5, 0), (1, 10, 1, 1), (2, 5, 64), (1, 5, 40, 63), (2, 10, 31)]
    logits = [torch.randn(shape, generator=generator) for shape in shapes]
    rows = [(shape[0], shape[1] // classes, *shape[2:]) for shape in shapes]
    labels = [torch.randint(-6, 8, row, generator=generator) for row in rows]
    labels[0], labels[5] = labels[0].int(), torch.where(torch.rand(rows[5], generator=generator) < 0.98, 5, labels[5])
    labels[4].view(-1)[:2] = torch.tensor([2**63 - 1, -(2**63)])
    quality = [torch.rand(row, generator=generator).half() for row in rows]
    chunk = torch.randint(-1, 8, (len(labels[0].view(-1)) * classes, 1), generator=generator, dtype=torch.int32)
    for capacity, background_first in ((3, True), (3000, False)):
        arguments = (logits, labels, quality, capacity, 0.25, background_first, None, 1, True)
        with emulated(**settings):
            assert_same_bits(tables("cuda", *arguments), tables("reference", *arguments))
    # An id for each element: what no segment holds leaves the mask here too.
    arguments = (logits[:1], labels[:1], quality[:1], 500, 0.25, False, chunk, 7, True)
    with emulated(**settings):
        assert_same_bits(tables("cuda", *arguments), tables("reference", *arguments))


FINALIZERS = {
    "rank_sort_finalize": (False,),
    "average_precision_finalize": (True,),
    "alrp_finalize": (),
}


def assert_close_tables(logits, found, delta, finalizers=FINALIZERS, segments=None, num_segments=1) -> None:
    """Every table that a finalizer makes, against the reference. `found`: what `tables` returned."""
    _, negatives, counts, ranked, bins = found
    for name, options in finalizers.items():
        arguments = (logits, negatives, ranked, counts, bins, segments, num_segments, delta, 1.5, *options)
        got = _library.operator(name, "cuda")(*arguments)
        wanted = _library.operator(name, "reference")(*arguments)
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            gate = 1e-7 if one.dtype == torch.float32 else 1e-10
            for row, (mine, theirs) in enumerate(zip(torch.atleast_2d(one), torch.atleast_2d(other), strict=True)):
                label = f"{name}, output {number}, row {row}"
                infinite = theirs.isinf()
                assert torch.equal(mine[infinite], theirs[infinite]), label
                chosen = ~infinite
                if other is wanted[-1]:
                    # Of lines at equal breakpoints, which stand in an order of the backend's own, elements meet the last one alone.
                    chosen[:-1] &= other[0, 1:] != other[0, :-1]
                bound = gate * theirs[~infinite].nan_to_num().abs().double().amax()
                harness.assert_within(mine[chosen], theirs[chosen].double(), bound, label)


@pytest.mark.parametrize("num_segments", [1, 3, 700])
def test_finalizers_in_several_tiles(num_segments, generator):
    """Their scans run in tiles of 1024 positives: segments that end inside of a tile, at its end, or span several."""
    count, delta = 5000, 0.25
    logits = [torch.randn((count, 2), generator=generator)]
    targets = [torch.rand((count, 2), generator=generator)]
    targets[0][:, 1] = 0
    targets[0][3500:] = 0
    ids = (torch.rand((count, 1), generator=generator) ** 3 * num_segments).int()
    segments = None if num_segments == 1 else ids
    found = tables("cuda", logits, targets, [], 4000, delta, False, segments, num_segments)
    assert_same_bits(found, tables("reference", logits, targets, [], 4000, delta, False, segments, num_segments))
    assert_close_tables(logits, found, delta, FINALIZERS, segments, num_segments)


@pytest.mark.parametrize("num_segments", [1, 40])
def test_more_positives_than_one_sort_tile(num_segments, generator):
    """Three tiles of 16,384 records and two merges, ties across tiles and NaN among them; a capacity above the positives."""
    count, delta = 36_000, 1e-3
    logits = [(torch.randn(count + 3000, generator=generator) * 4096).round() / 4096]
    targets = [torch.zeros(count + 3000)]
    targets[0][:count] = (torch.rand(count, generator=generator) * 4).ceil() / 4
    logits[0][7], logits[0][20_000] = torch.nan, torch.inf
    found = tables("cuda", logits, targets, [], 40_000, delta, False, None, num_segments)
    assert_same_bits(found, tables("reference", logits, targets, [], 40_000, delta, False, None, num_segments))
    assert_close_tables(logits, found, delta, {"average_precision_finalize": (True,)}, None, num_segments)


# Room for a few counters, for a part of the values, and for all of them.
@pytest.mark.parametrize("settings", [{"shared_bytes": "16500"}, {}, {"shared_bytes": "270000", "reverse": "1"}], ids=str)
@pytest.mark.parametrize("dtype", harness.ROUNDING, ids=str)
def test_many_16_bit_logits_by_value(dtype, settings, generator):
    """A histogram instead of searches: the same bins bit for bit; the gradient from a table."""
    sizes, positives, delta = (1 << 20, 0, 7), 40, 0.25
    logits = [(torch.randn(size + 1, generator=generator) * 3).to(dtype)[1:] for size in sizes]
    logits[0] = logits[0].clone()
    logits[0][-5:] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 7.0])
    targets = [torch.zeros(size) for size in sizes]
    targets[0][:positives] = torch.rand(positives, generator=generator) + 0.1
    # The first edge is a zero, which comes with both signs.
    logits[0][:positives] = logits[0][:positives].abs() + delta
    logits[0][3] = delta
    targets[0][positives : positives + 1000] = -1
    before = launches()
    with emulated(**settings):
        got = harness.Pipeline(CUDA, logits, targets, delta=delta, capacity=64).run((0.5, 2.0))
    by_value, before = launches() - before, launches()
    few = [[level[:1000] for level in levels] for levels in (logits, targets)]
    harness.Pipeline(CUDA, *few, delta=delta, capacity=64).run()
    assert by_value == launches() - before + 2, "to spread the histogram, and to make the table"
    wanted = harness.Pipeline(REFERENCE, [level.double() for level in logits], targets, delta=delta, capacity=64).run((0.5, 2.0))
    assert_gates(CUDA, got, [float(loss) for loss in wanted.losses], wanted.gradient)
    logits[0][5000], logits[2][3] = torch.nan, torch.nan
    with emulated(**settings):
        found = tables("cuda", logits, targets, [], 64, delta)
        broken = harness.Pipeline(CUDA, logits, targets, delta=delta, capacity=64).run()
        overflow = harness.Pipeline(CUDA, logits, targets, delta=delta, capacity=positives - 1).run()
    assert_same_bits(found, tables("reference", logits, targets, [], 64, delta))
    assert found[-1][0, 0] == 2 and broken.gradient.isnan().nonzero().flatten().tolist() == [5000, (1 << 20) + 3]
    assert overflow.gradient.isnan().all()


@pytest.mark.parametrize("finalize", FINALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_processes_compute_the_bits_of_one(finalize, dtype, generator):
    """Records of another process have flat indices outside of the logits at hand; the unit comes from all elements."""
    whole = torch.randn(3001, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.where(torch.rand(3001, generator=generator) < 0.1, torch.rand(3001, generator=generator), 0.0)
    delta, options = 0.5, FINALIZERS[finalize]
    bin_, finish, backward = (_library.operator(name, "cuda") for name in ("ranking_bin", finalize, "ranking_backward"))
    positives, negatives, counts, ranked, bins = tables("cuda", [whole], [targets], [], 400, delta)
    *losses, gradients, lines = finish([whole], negatives, ranked, counts, bins, None, 1, delta, 1.0, *options)
    upstream = torch.tensor(0.5, dtype=dtype)
    (gradient,) = backward([whole], negatives, gradients, lines, counts, None, 1, upstream, upstream)

    pieces, sums, results = [(0, 1000), (1000, 1000), (1000, 3001)], torch.zeros_like(bins), []
    for first, last in pieces:
        logits = whole[first:last].clone()
        _, mask, _ = _library.operator("ranking_collect", "cuda")([logits], [targets[first:last]], [], None, 1, 400, False, False)
        moved = positives.clone()
        moved[3] -= first
        own_ranked, own_bins = bin_([logits], mask, moved, counts, None, 1, delta)
        sums += own_bins
        results.append((logits, mask, own_ranked))
    assert torch.equal(sums, bins)
    for (logits, mask, own_ranked), (first, last) in zip(results, pieces, strict=True):
        *own_losses, table, own_lines = finish([logits], mask, own_ranked, counts, sums, None, 1, delta, 1.0, *options)
        assert all(torch.equal(one, other) for one, other in zip(own_losses, losses, strict=True))
        (own,) = backward([logits], mask, table, own_lines, counts, None, 1, upstream, upstream)
        assert torch.equal(own, gradient[first:last])


@contextlib.contextmanager
def launched_with(is_programmatic: bool, blocks_per_processor: int, most_replicas: int) -> Iterator[None]:
    """csrc/common/launch_options.h"""
    change = ctypes.CDLL(str(build.build())).rsloss_set_launch_options
    change.restype, change.argtypes = ctypes.c_bool, (ctypes.c_bool, ctypes.c_int, ctypes.c_int)
    assert change(is_programmatic, blocks_per_processor, most_replicas)
    try:
        yield
    finally:
        assert not change(True, 3, 1) and not change(True, 1, 0) and change(False, 1, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ways_to_launch_give_the_same_bits(dtype, generator):
    """What bench/gpu_variants.py compares: bins and gradients by search (float32) and by value; with early starts every kernel
    behind the first waits for the one before it, or the emulator throws."""
    size = 20_000 if dtype == torch.float32 else 1 << 20
    logits = [(torch.randn(size, generator=generator) * 2).to(dtype)]
    targets = [torch.where(torch.rand(size, generator=generator) < 400 / size, torch.rand(size, generator=generator), 0.0)]
    finalizers = FINALIZERS if dtype == torch.float32 else {"rank_sort_finalize": (False,)}
    found = []
    for options in ((False, 1, 32), (True, 1, 32), (False, 2, 32), (False, 1, 1), (True, 2, 4)):
        with launched_with(*options):
            results = [tables("cuda", logits, targets, [], 1024, 0.5)[-1]]
            for finalize, own in finalizers.items():
                pipeline = harness.Pipeline(
                    CUDA, logits, targets, capacity=1024, finalize=finalize, finalize_options=own, num_segments=1
                )
                result = pipeline.run()
                results += [torch.stack(list(result.losses)), result.gradient]
        found.append(results)
        for one, other in zip(results, found[0], strict=True):
            assert torch.equal(one, other), options


def launches() -> int:
    """Kernels launched since the library was loaded."""
    count = ctypes.CDLL(str(build.build())).cuda_emulator_launches
    count.restype = ctypes.c_int64
    return count()


def test_launches_depend_on_capacities_alone(generator):
    logits = torch.randn((600, 5), generator=generator)
    draws = [torch.rand((600, 5), generator=generator) * scale - scale + 1 for scale in (2, 20, 4000)]
    for num_segments in (1, 10):
        counted = set()
        for targets in (*draws, -torch.ones(600, 5), torch.ones(600, 5), torch.zeros(600, 5)):
            before = launches()
            harness.Pipeline(CUDA, [logits], [targets.clamp(min=0)], capacity=1000, num_segments=num_segments).run()
            counted.add(launches() - before)
        assert len(counted) == 1 and counted.pop() > 5


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


@pytest.mark.parametrize("fault", ["past_the_end", "past_the_table"])
def test_sanitizers_find_a_planted_write_behind_the_end(fault):
    done = sanitized(fault)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "faults.cu" in done.stderr, done.stderr
