"""The CUDA kernels of balanced group softmax on the CPU: what the emulator adds to their tests that run on every backend.

Two orders of threads, few and many blocks, keys that agree in most digits or are equal, launches that do not depend on the data. The
sanitizers run over these kernels in test_cuda_on_cpu.py.
"""
import math

import pytest
import torch
from cuda_on_cpu import build
from test_cuda_on_cpu import emulated, launches

from rsloss_kernels import _library

# Groups of 2, 1, 40 and 90 columns; the background group first, or last with the constant 0 as its others.
LAYOUTS = {
    "background first": ([0, 2, 3, 43, 133], [1, -1, 3, 43], 0),
    "background last": ([0, 1, 41, 131, 132], [-1, 1, 41, -1], 3),
}


@pytest.fixture(scope="module", autouse=True)
def emulator():
    build.load_emulated_cuda()


def class_columns(layout: str) -> torch.Tensor:
    starts, others, background = LAYOUTS[layout]
    own = [column for column in range(starts[-1]) if column not in others]
    of_background = next(column for column in own if starts[background] <= column < starts[background + 1])
    return torch.tensor([*(column for column in own if column != of_background), of_background], dtype=torch.int32)


def problem(layout: str, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, among them ignored rows and those beyond all classes, and keys of which many are equal or NaN."""
    starts, others, _ = LAYOUTS[layout]
    logits = torch.randn((rows, starts[-1]), generator=generator) * 5
    labels = torch.randint(-1, class_columns(layout).numel() + 1, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.6] = 0
    keys = torch.rand((len(others), rows), generator=generator)
    keys[1] = (keys[1] * 8).floor() - 4
    keys[2] = 1 + keys[2].mul(300).floor() * 2**-23
    keys[-1, ::5] = math.nan
    return logits, labels, keys


def outputs(backend: str, layout: str, logits, labels, keys, ratio: float = 0.7, weights=None) -> list[torch.Tensor]:
    starts, others, background = LAYOUTS[layout]
    sample, forward, backward, scores = (
        _library.operator(f"group_softmax_{name}", backend) for name in ("sample", "forward", "backward", "scores")
    )
    columns, groups = class_columns(layout), (starts, others)
    sampled = sample(labels, columns, keys, *groups, background, True, ratio)
    weights = sampled if weights is None else weights
    losses, averages, tables = forward(logits, labels, columns, weights, *groups, True)
    grads = torch.linspace(-1, 2, len(others))
    gradient = backward(logits, labels, columns, weights, averages, tables, grads, *groups, True)
    return [sampled, losses, averages, gradient, scores(logits, columns, *groups, background, True), tables]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 63, 1500])  # fewer and more than a block has threads
def test_any_order_and_any_number_of_blocks(layout, rows, dtype, generator):
    logits, labels, keys = problem(layout, rows, generator)
    logits = logits.to(dtype)
    wanted = outputs("reference", layout, logits.double(), labels, keys)
    forward = outputs("cuda", layout, logits, labels, keys)
    with emulated(reverse="1"):
        backward = outputs("cuda", layout, logits, labels, keys)
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True)), "the order of threads"
    with emulated(processors="1"):
        few = outputs("cuda", layout, logits, labels, keys)
    assert all(torch.equal(forward[i], few[i]) for i in (0, 2, 3, 4)), "the number of blocks"
    assert torch.equal(forward[0], wanted[0]), "sampled weights"
    assert torch.equal(forward[2], wanted[2]), "averages"
    is_double = dtype == torch.float64
    rounding = 2**-11 if dtype == torch.float16 else 0
    torch.testing.assert_close(forward[1].double(), wanted[1], rtol=1e-12 if is_double else 1e-7, atol=0)
    for i, gate in ((3, 1e-12 if is_double else 2e-6), (4, 1e-12 if is_double else 2e-6)):
        bound = gate * wanted[i].abs().max() + rounding * wanted[i].abs() + (2**-25 if rounding else 0)
        assert ((forward[i].double() - wanted[i]).abs() <= bound).all(), i


@pytest.mark.parametrize("kept", [1, 255, 256, 257, 1023, 1998])
def test_sampling_keeps_exactly_the_smallest(kept, generator):
    """One row of foreground, so that the ratio is the number of others that are kept."""
    starts, others, background = LAYOUTS["background first"]
    labels = torch.zeros(2000, dtype=torch.int32)
    labels[1234] = 30
    for keys in (torch.rand(2000, generator=generator), torch.zeros(2000), -torch.rand(2000, generator=generator).mul(3).floor()):
        sample = _library.operator("group_softmax_sample", "cuda")
        columns = class_columns("background first")
        weights = sample(labels, columns, keys.expand(4, -1).contiguous(), starts, others, background, True, float(kept))
        group = next(g for g in range(4) if starts[g] <= columns[29] < starts[g + 1])
        order = [row for row in torch.argsort(keys, stable=True).tolist() if row != 1234]
        assert sorted(order[:kept]) == [row for row in weights[group].nonzero().flatten().tolist() if row != 1234]
        assert weights[group, 1234] == 1 and weights[0].min() == 1
        assert all(weights[g].max() == 0 for g in range(1, 4) if g != group)


def test_launches_depend_on_shapes_alone(generator):
    """One to sample, two forward, one back, one for scores."""
    logits, labels, keys = problem("background first", 70, generator)
    nothing, all_of_them = torch.zeros(4, 70), torch.ones(4, 70)
    for ratio, weights in ((0.7, None), (0.0, nothing), (math.inf, all_of_them)):
        before = launches()
        outputs("cuda", "background first", logits, labels, keys, ratio, weights)
        assert launches() - before == 1 + 2 + 1 + 1
    before = launches()
    _, losses, averages, *_ = outputs("cuda", "background first", logits[:0], labels[:0], keys[:, :0].contiguous())
    assert launches() - before == 1
    assert torch.equal(losses, torch.zeros(4)) and torch.equal(averages, torch.ones(4, dtype=torch.float64))
