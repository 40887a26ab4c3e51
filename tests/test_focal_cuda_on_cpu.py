"""The CUDA kernels of the element-wise sigmoid losses on the CPU: what the emulator adds to their tests that run on every backend.

Two orders of threads, all ways to cut a problem into blocks, launches that do not depend on the data, the float32 arithmetic of single
elements. The sanitizers run over these kernels in test_cuda_on_cpu.py.
"""
import itertools

import pytest
import torch
from cuda_on_cpu import build
from test_cuda_on_cpu import emulated, launches

from rsloss_kernels import _library

# Rows across and along, with few classes, with more than a block has threads; maps whose places are no multiple of four; one class.
LAYOUTS = {
    "rows of 8": ([(431, 8), (0, 8), (3, 8)], False, 8),
    "rows of 7": ([(300, 7), (1, 7)], False, 7),
    "rows of 91": ([(70, 91)], False, 91),
    "rows of 1204": ([(4, 1204)], False, 1204),
    "rows of 301": ([(5, 301)], False, 301),
    "one class": ([(700,), (3,)], False, 1),
    "maps": ([(2, 33, 5, 5), (1, 22, 4, 4)], True, 11),
    "many levels": ([(3, 5)] * 18, False, 5),
}


@pytest.fixture(scope="module", autouse=True)
def emulator():
    build.load_emulated_cuda()


def outputs(backend: str, arguments: tuple, options: tuple) -> list[torch.Tensor]:
    """Losses with and without sums over classes, the sums, single losses and gradients of both kinds."""
    forward, elements, backward = (_library.operator(f"focal_{name}", backend) for name in ("forward", "elements", "backward"))
    loss, class_sums = forward(*arguments, *options, True)
    losses = elements(*arguments, *options)
    gradients = backward(*arguments, [torch.tensor(-0.7)], *options)
    of_elements = backward(*arguments, [torch.full_like(level, 0.25) for level in arguments[0]], *options)
    return [loss, forward(*arguments, *options, False)[0], class_sums, *losses, *gradients, *of_elements]


def problem(layout: str, form: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple, tuple]:
    """Data that is not aligned to 16 bytes in the last level; logits that float32 arithmetic leaves to float64."""
    shapes, maps, classes = LAYOUTS[layout]
    rows = [(shape[0], shape[1] // classes, *shape[2:]) if maps else shape[: len(shape) - 1] for shape in shapes]
    if layout == "one class":
        shapes = [(*shape, 1) for shape in shapes]
        rows = [shape[:1] for shape in shapes]
    logits = [torch.randn(shape, generator=generator).mul(4).to(dtype) for shape in shapes]
    flat = torch.randn(logits[-1].numel() + 1, generator=generator).to(dtype)
    logits[-1] = flat[1:].view(shapes[-1])
    logits[0].view(-1)[:4] = torch.tensor([-torch.inf, -50.0, 90.0, 0.0])
    draws = [torch.rand(shape, generator=generator) for shape in shapes]
    of_rows = [torch.rand(row, generator=generator) for row in rows]
    qualities, weights = [], []
    if form == "dense":
        targets = [torch.where(draw < 0.4, (draw < 0.1).float(), torch.where(draw < 0.9, 0.0, draw)) for draw in draws]
        weights = [(draw.flip(0) - 0.3).clamp(min=-0.1) for draw in draws]
    else:
        targets = [torch.randint(-1, classes + 2, row, generator=generator) for row in rows]
        if form == "quality":
            qualities = [torch.where(draw > 0.7, 1.0, draw) for draw in of_rows]
            weights = [draw.flip(0) - 0.2 for draw in of_rows]
    # Of the logit of minus infinity.
    targets[0].view(-1)[0] = 0 if form == "dense" else classes + 1
    table = torch.rand((3, classes), generator=generator, dtype=torch.float64) + 0.1
    return (logits, targets, qualities, weights, table, torch.tensor(3.5)), (maps, form == "quality", 2, 1.25)


def assert_close(got: list[torch.Tensor], wanted: list[torch.Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-7
    narrow = {torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float64: 1e-9}[dtype]
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if other.numel() == 0:
            continue
        bound = (tolerance if number < 2 else 1e-6 if number == 2 else narrow) * other.abs().max()
        assert (one.double() - other).abs().max() <= bound, f"output {number}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["labels", "quality", "dense"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_and_any_order(layout, form, dtype, generator):
    arguments, (maps, *options) = problem(layout, form, dtype, generator)
    number = list(LAYOUTS).index(layout) + len(form)
    # 0, 1, 2: of all classes alike; else as drawn.
    gamma, modulator = number % 4, number % 3
    if gamma < 3:
        arguments[4][0] = gamma
    wide = [level.double() for level in arguments[0]]
    wanted = outputs("reference", (wide, *arguments[1:]), (modulator, maps, *options))
    forward = outputs("cuda", arguments, (modulator, maps, *options))
    assert_close(forward, wanted, dtype)
    with emulated(reverse="1"):
        backward = outputs("cuda", arguments, (modulator, maps, *options))
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True)), "the order of threads"
    with emulated(processors="1"):
        few = outputs("cuda", arguments, (modulator, maps, *options))
    torch.testing.assert_close(few[2], forward[2], rtol=1e-12, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(few[3:], forward[3:], strict=True)), "the number of blocks"


def softplus(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 16.0])
def test_losses_of_single_elements(gamma):
    """Two at a time, of which one takes the other away, so that nothing averages out and the rounding of the loss does not show."""
    grid = torch.cat([torch.logspace(-6, 1.4, 50), torch.arange(1, 40) * 0.25 * torch.log(torch.tensor(2.0))])
    x = torch.cat([grid, -grid[grid < 25 / (1 + gamma)]])
    other = torch.tensor(-1.25, dtype=torch.float64)
    forward = _library.operator("focal_forward", "cuda")
    table = torch.tensor([[gamma], [1.0], [1.0]], dtype=torch.float64)
    losses = torch.exp(-gamma * softplus(-x.double())) * softplus(x.double())
    of_other = torch.exp(-gamma * softplus(-other)) * softplus(other)
    factors = (-losses / of_other).float()
    for logit, loss, factor in zip(x.tolist(), losses, factors, strict=True):
        logits, weights = torch.tensor([[logit], [other.item()]]), torch.tensor([1.0, factor])
        got, _ = forward([logits], [torch.zeros(2, 1)], [], [weights], table, None, 0, False, False, None, 1.0, False)
        assert abs(float(got) - (loss + factor.double() * of_other)) <= 3e-8 * loss, logit


def test_launches_depend_on_shapes_alone(generator):
    """A pass over all levels and one to add up; a pass for losses or gradients; one more pass each for more than 16 levels."""
    for layout, passes in (("rows of 8", 1), ("maps", 1), ("many levels", 2)):
        for form, gamma in itertools.product(("labels", "dense"), (2.0, 0.3)):
            arguments, (maps, *options) = problem(layout, form, torch.float32, generator)
            arguments[4][0] = gamma
            before = launches()
            outputs("cuda", arguments, (0, maps, *options))
            assert launches() - before == 2 * (passes + 1) + 3 * passes
    nothing = [torch.zeros(0, 3)], [torch.zeros(0, dtype=torch.int64)], [], [], torch.ones(3, 3, dtype=torch.float64), None
    before = launches()
    loss, _, class_sums, *_ = outputs("cuda", nothing, (0, False, False, None, 1.0))
    assert launches() - before == 2 and loss == 0 and torch.equal(class_sums, torch.zeros(2, 3, dtype=torch.float64))
