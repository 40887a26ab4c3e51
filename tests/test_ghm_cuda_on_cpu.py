"""The CUDA kernels of GHM on the CPU: what the emulator adds to the tests of GHM that run on every backend.

Two orders of threads, columns of shared memory that threads share, several blocks, launches that do not depend on the data, the
float32 arithmetic of single elements. The sanitizers run over these kernels in test_cuda_on_cpu.py.
"""
import math

import pytest
import torch
from cuda_on_cpu import build
from test_cuda_on_cpu import emulated, launches

from rsloss_kernels import _library

# Room for the columns of few threads, of some, of all.
SHARED_MEMORY = ("9000", "40000", "230000")


@pytest.fixture(scope="module", autouse=True)
def emulator():
    build.load_emulated_cuda()


def outputs(backend: str, preds, targets, weights=(), bins=10, mu=None, background_first=False) -> list[torch.Tensor]:
    """The histogram, what finalize returns with a state, and the gradients."""
    histogram_of, finalize, backward = (_library.operator(f"ghm_{name}", backend) for name in ("histogram", "finalize", "backward"))
    arguments = (preds, targets, list(weights))
    histogram = histogram_of(*arguments, bins, mu, background_first)
    state = torch.linspace(0, 100, bins), torch.arange(bins)
    loss, *tables = finalize(*arguments, histogram, *state, bins, mu, background_first, 0.75, False, 1.5)
    gradients = backward(*arguments, tables[-1], torch.full_like(loss, 0.7), mu, background_first)
    return [histogram, loss, *tables, *gradients]


def problem(form: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[list, list, list]:
    """Several blocks, single elements, nothing; rows that end inside of what a thread loads; data not aligned to 16 bytes."""
    shapes = [(431, 7), (1, 1), (0, 3), (40, 80)]
    preds = [(torch.randn(rows * row + 1, generator=generator) * 3).to(dtype)[1:].view(rows, row) for rows, row in shapes]
    preds[0][0, :2] = torch.tensor([torch.inf, -torch.inf])
    draws = [torch.rand(shape, generator=generator) for shape in shapes]
    if form == "labels":
        targets = [torch.randint(-2, row + 2, (rows,), generator=generator) for rows, row in shapes]
        return preds, targets, [draw[:, 0] - 0.2 for draw in draws]
    # A part is neither 0 nor 1.
    targets = [torch.where(draw < 0.4, (draw < 0.1).float(), draw).to(dtype) for draw in draws]
    return preds, targets, [draw.flip(0) - 0.2 for draw in draws]


@pytest.mark.parametrize("bins", [1, 30, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["dense", "labels", "regression"])
def test_any_order_and_any_shared_memory(form, dtype, bins, generator):
    arguments = *problem(form, dtype, generator), bins, 0.02 if form == "regression" else None
    wanted = outputs("reference", *arguments)
    for shared_bytes in SHARED_MEMORY[0 if bins < 100 else 1 :]:
        with emulated(shared_bytes=shared_bytes):
            forward = outputs("cuda", *arguments)
        with emulated(shared_bytes=shared_bytes, reverse="1"):
            backward = outputs("cuda", *arguments)
        assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True)), "the order of threads"
        assert torch.equal(forward[0][0], wanted[0][0]), "counts"
        torch.testing.assert_close(forward[0][1], wanted[0][1], rtol=3e-8 if dtype != torch.float64 else 1e-13, atol=0)


def test_blocks_change_the_order_of_sums_alone(generator):
    arguments = problem("dense", torch.float32, generator)
    with emulated(processors="1", shared_bytes="20000"):
        few = outputs("cuda", *arguments)
    with emulated(processors="50"):
        many = outputs("cuda", *arguments)
    assert torch.equal(few[0][0], many[0][0])
    torch.testing.assert_close(few[0][1], many[0][1], rtol=1e-14, atol=0)
    assert torch.equal(few[1], many[1])


@pytest.mark.parametrize("processors", ["1", "70"])
def test_many_equal_elements_in_one_block_or_in_more_than_a_warp_has_lanes(processors):
    """No counter is too narrow, no error of one element is averaged out, no block is left out."""
    pred, target = torch.full((300_000,), 0.7), torch.zeros(300_000)
    with emulated(processors=processors):
        histogram = outputs("cuda", [pred], [target], bins=30)[0]
    at = histogram[0].nonzero().item()
    assert histogram[0, at] == pred.numel()
    wanted = pred.numel() * math.log1p(math.exp(float(pred[0])))
    assert abs(histogram[1, at] - wanted) < 3e-8 * wanted


def test_losses_of_single_elements():
    """One at a time, so that nothing averages out: around powers of two and multiples of log 2, where roundings change."""
    grid = torch.cat([torch.logspace(-30, 2.8, 60), torch.arange(1, 12) * math.log(2) / 2, torch.tensor([87.3, 103.9, 0.0])]).float()
    for u in torch.cat([grid, -grid]).tolist():
        total = _library.operator("ghm_histogram", "cuda")([torch.tensor([u])], [torch.zeros(1)], [], 1, None, False)[1, 0]
        wanted = max(u, 0.0) + math.log1p(math.exp(-abs(u)))
        assert abs(float(total) - wanted) <= 3e-8 * wanted + 1e-300, u
    for mu in (1e-30, 0.02, 1e25):
        for r in torch.logspace(-15, 12, 40).tolist():
            d = float(torch.tensor(r * mu).float())
            total = _library.operator("ghm_histogram", "cuda")([torch.tensor([d])], [torch.zeros(1)], [], 1, mu, False)[1, 0]
            wanted = d * (d / (math.hypot(d, mu) + mu))
            assert abs(float(total) - wanted) <= 3e-8 * wanted, (mu, r)


def test_launches_depend_on_shapes_alone(generator):
    """A pass over each level that is not empty, and one to add up; one finalize; a pass over each such level."""
    preds, targets, weights = problem("dense", torch.float32, generator)
    nothing = [torch.zeros_like(weight) for weight in weights]
    broken = [torch.full_like(pred, torch.nan) for pred in preds]
    for data in ((preds, targets, weights), (preds, targets, nothing), (broken, targets, weights)):
        before = launches()
        outputs("cuda", *data)
        assert launches() - before == (3 + 1) + 1 + 3
    before = launches()
    outputs("cuda", [preds[2]], [targets[2]])
    assert launches() - before == 2
