"""Many positives, and 16-bit logits in large numbers: against other ways to the same truth, and within memory."""
import subprocess
import sys

import oracles
import pytest
import torch
from harness import Backend, assert_gates, evaluate
from rsloss_kernels import _library, rank_sort_loss, use_backend
from samples import LOSSES, RankingSample

# Few enough that the pairs of a block stay in the cache.
BLOCK = 16
SCRIPT = """
import torch, rsloss_kernels
P = N = 1_000_000
logits, targets = torch.full((P + N,), -4.6), torch.zeros(P + N)
targets[::2] = 1.0
{prepare}
logits.requires_grad_()
loss = {call}
loss.backward()
assert logits.grad.isfinite().all()
# Of this program alone: the maximum of getrusage is inherited from the process that started it.
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
print(float(loss), float(logits.grad.double().clamp(min=0).sum()), peak)
"""
CALLS = {
    "rank_sort": "sum(rsloss_kernels.rank_sort_loss(logits, targets, delta=0.5))",
    "ap": "rsloss_kernels.average_precision_loss(logits, targets, delta=0.5)",
    "alrp": "rsloss_kernels.alrp_loss(logits, targets, torch.zeros(P), delta=0.5)[0]",
}


def measured(loss: str, prepare: str = "") -> tuple[float, float, int]:
    """Loss, sum of the positive gradients, and peak of the memory in bytes, of a process of its own."""
    script = SCRIPT.format(prepare=prepare, call=CALLS[loss])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value, moved, kilobytes = done.stdout.split()
    return float(value), float(moved), int(kilobytes) * 1024


@pytest.mark.parametrize("name", LOSSES)
def test_a_million_positives_of_equal_logits(name):
    """Analytic: every positive has P / 2 positives and N / 2 negatives above it, a tie counting half."""
    half = 500_000.0
    self_term = 0.0 if name == "rank_sort" else 0.5
    wanted = half / (half + self_term + half)
    value, moved, peak = measured(name)
    assert value == pytest.approx(wanted, rel=1e-6)
    # What the negatives get is what the positives lose: the error, in aLRP the same as its boxes are perfect.
    assert moved == pytest.approx(wanted, rel=1e-4)
    assert peak < 1.5e9, f"{peak / 1e9:.2f} GB"


@pytest.mark.parametrize("name", LOSSES)
def test_a_million_positives_of_different_logits(name):
    """Against sums of a sorted array; float32 logits and the same numbers in float64 take different breakpoints, grids and units."""
    count, delta = 1_000_000, 0.5
    logits = torch.randn(2 * count, generator=torch.Generator().manual_seed(1))
    logits[::2] += 1
    positives, negatives = (half.double().sort().values for half in (logits[::2], logits[1::2]))
    above, false_positives = (smoothed_counts(others, positives, delta) for others in (positives, negatives))
    error = false_positives / (above + (0.0 if name == "rank_sort" else 0.5) + false_positives)
    if name == "ap":
        error = error.cummin(0).values
    wanted = float(error.mean())
    assert 0.1 < wanted < 0.9
    prepare = "logits.copy_(torch.randn(P + N, generator=torch.Generator().manual_seed(1)) + targets)"
    for cast, gate in (("", 1e-7), ("; logits = logits.double()", 1e-10)):
        value, moved, peak = measured(name, prepare + cast)
        assert value == pytest.approx(wanted, rel=gate)
        # What the positives lose, rounded to the logits' type a million times.
        assert moved == pytest.approx(wanted, rel=1e-6)
        assert cast or peak < 1.5e9, f"{peak / 1e9:.2f} GB"


def smoothed_counts(others: torch.Tensor, positives: torch.Tensor, delta: float) -> torch.Tensor:
    """Sum of H(s_j - s_i) over `others`, sorted float64, for every positive i."""
    lower, upper = torch.searchsorted(others, positives - delta), torch.searchsorted(others, positives + delta)
    sums = torch.nn.functional.pad(others.cumsum(0), (1, 0))
    inside = (upper - lower).double()
    return len(others) - upper + 0.5 * inside + (sums[upper] - sums[lower] - inside * positives) / (2 * delta)


def in_blocks(logits: torch.Tensor, targets: torch.Tensor, delta: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over positives and negatives of H of every positive, in float64, pair by pair but never all pairs at once."""
    positives, negatives = logits[targets > 0].double(), logits[targets == 0].double()
    sums = [[oracles.step(others - part[:, None], delta).sum(1) for part in positives.split(BLOCK)] for others in (positives, negatives)]
    return positives, *map(torch.cat, sums)


def test_thirty_thousand_positives(generator):
    """AP and aLRP on every compiled path of the CPU against all 1.8e9 pairs."""
    count, delta = 30_000, 0.5
    logits = torch.randn(2 * count, generator=generator)
    targets = torch.zeros(2 * count)
    targets[:count] = torch.rand(count, generator=generator) * 0.9 + 0.1
    positives, above, false_positives = in_blocks(logits, targets, delta)
    rank = above + 0.5 + false_positives
    error = false_positives / rank
    ascending = positives.sort()
    interpolated = error[ascending.indices].cummin(0).values
    wanted = {
        "ap": float(interpolated.mean()),
        "alrp": float(error.mean()),
        "rank_sort": float((false_positives / (above + false_positives)).mean()),
    }
    for name, loss in LOSSES.items():
        got = loss.evaluate(Backend("cpp", "cpu"), *loss.arguments(logits, targets), delta=delta)
        assert abs(float(got.losses[0].double()) - wanted[name]) <= 1e-7 * wanted[name], name
        if name == "ap":
            of_positives = torch.empty(count, dtype=torch.float64)
            of_positives[ascending.indices] = -interpolated / count
            largest = got.gradient.abs().max().double()
            assert (got.gradient[:count] - of_positives).abs().max() <= 1e-6 * largest
        if name == "alrp":
            assert ((got.statistics[0] - rank).abs() <= 1e-7 * rank).all()


@pytest.mark.slow_interpreter
def test_capacity_above_one_block(backend, loss, generator):
    """Tables in several tiles, with few positives in them: as with just enough room."""
    values = RankingSample("capacity", 60, 400).draw(generator)[:2]
    arguments = [[value.to(backend.device)] for value in values]
    expected = loss.pipeline(backend, *arguments, capacity=60).run()
    for capacity in (4097, 20_000, 65_536):
        got = loss.pipeline(backend, *arguments, capacity=capacity).run()
        assert got.losses == expected.losses and torch.equal(got.gradient, expected.gradient), capacity


@pytest.mark.slow_interpreter
def test_positives_above_one_block(backend, loss, generator):
    sample = RankingSample("many", 4500, 1500, delta=0.5, dtype=torch.float32, quality_levels=50)
    arguments = loss.draw(sample, generator).arguments
    got = loss.evaluate(backend, *arguments, delta=0.5, max_positives=5000)
    truth = loss.truth(*arguments, delta=0.5)
    assert_gates(backend, got, truth.losses, truth.gradient())


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_16_bit_logits_are_those_in_float32(backend, loss, generator, dtype):
    """Enough for the path over distinct values, with all that 16 bits can hold."""
    count = 300_000
    logits = (torch.randn(count, generator=generator) * 2 - 3).to(dtype)
    targets = torch.zeros(count)
    targets[torch.randperm(count, generator=generator)[:400]] = torch.rand(400, generator=generator) * 0.9 + 0.1
    targets[torch.rand(count, generator=generator) < 0.05] = -1
    largest, subnormal = torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, subnormal, -subnormal, largest])
    places = (targets == 0).nonzero().squeeze(1)[:7000]
    logits[places] = special.repeat(1000).to(dtype)
    logits[targets < 0] = torch.nan
    for has_nan in (False, True):
        if has_nan:
            logits[places[3]] = torch.nan
        arguments = loss.arguments(logits, targets)
        narrow = evaluate(backend, *arguments, loss=loss.function, delta=0.5)
        wide = evaluate(backend, logits.float(), *arguments[1:], loss=loss.function, delta=0.5)
        assert_gates(backend, narrow, [float(value) for value in wide.losses], wide.gradient.double())
        assert narrow.losses[0].isnan() == has_nan and narrow.gradient.isnan().sum() == has_nan


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_16_bit_logits_of_few_exponents(backend, generator, dtype):
    """Nearly all between -16 and -2, as in a detector, whose gradients are looked up in registers; the others alone, or whole words of
    them. What one call counted is gone in the next."""
    count = 300_000
    targets = torch.zeros(count)
    targets[torch.randperm(count, generator=generator)[:400]] = torch.rand(400, generator=generator) * 0.9 + 0.1
    usual = -2 - 13 * torch.rand(count, generator=generator)
    others = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-3, 4, (count,), generator=generator)
    is_alone = torch.rand(count, generator=generator) < 0.02
    is_in_word = (torch.rand(count // 60 + 1, generator=generator) < 0.04).repeat_interleave(60)[:count]
    for is_other in (is_alone | is_in_word, torch.zeros(count, dtype=torch.bool), is_in_word, ~is_in_word, is_alone):
        logits = torch.where(is_other, others, usual).to(dtype)
        narrow = evaluate(backend, logits, targets, loss=rank_sort_loss, delta=0.5)
        wide = evaluate(backend, logits.float(), targets, loss=rank_sort_loss, delta=0.5)
        assert_gates(backend, narrow, [float(value) for value in wide.losses], wide.gradient.double())
        # Looked up in registers or in the table, by vector or alone: negatives of one logit have one gradient.
        bits, gradient = logits[targets == 0].view(torch.int16).long() + 2**15, narrow.gradient[targets == 0].view(torch.int16)
        of_logit = torch.zeros(2**16, dtype=torch.int16).scatter_(0, bits, gradient)
        assert torch.equal(of_logit[bits], gradient)


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_16_bit_logits_of_levels_are_those_of_one_tensor(backend, generator, dtype, threads):
    """Levels of which one is empty and one ends within the first word of the mask; ignored elements among the negatives."""
    rows = [0, 5, 60_000, 39_995]
    logits = (torch.randn(sum(rows), 3, generator=generator) * 2 - 3).to(dtype).to(backend.device)
    targets = torch.zeros(sum(rows), 3)
    targets.view(-1)[torch.randperm(targets.numel(), generator=generator)[:400]] = torch.rand(400, generator=generator) * 0.9 + 0.1
    targets[torch.rand(targets.shape, generator=generator) < 0.6] = -1
    targets[0, 0] = 0.5
    targets = targets.to(backend.device)
    levels, wanted = [level.requires_grad_() for level in logits.split(rows)], logits.clone().requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend(backend.name):
            of_one = rank_sort_loss(wanted, targets)
            of_levels = rank_sort_loss(levels, list(targets.split(rows)), num_classes=3)
            sum(of_one).backward()
            sum(of_levels).backward()
    finally:
        torch.set_num_threads(before)
    assert of_levels == of_one and of_one.ranking > 0
    assert torch.equal(torch.cat([level.grad for level in levels]), wanted.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_elements", [31, 33, 40])
def test_sums_leave_room_for_the_elements_of_all_processes(backend, dtype, log_elements):
    """A group may hold more elements than 32 bits can count: if all shared one bin, its sum would still fit 62 bits."""
    logits = [torch.tensor([0.0, 0.9], dtype=dtype, device=backend.device)]
    targets = [torch.tensor([1.0, 0.0], device=backend.device)]
    collect, bin_negatives = (_library.operator(name, backend.name) for name in ("ranking_collect", "ranking_bin"))
    positives, negatives, counts = collect(logits, targets, [], None, 1, 1, False, False)
    counts[2] = 2**log_elements
    bins = bin_negatives(logits, negatives, positives, counts, None, 1, 1.0)[1].cpu()
    assert bins[0].tolist() == [0, 1, 0]
    # 0.95 of the window.
    assert float(bins[1, 1]) == pytest.approx(0.95 * 2 ** (62 - log_elements), rel=1e-5)
