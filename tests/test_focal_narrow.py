"""The element-wise sigmoid losses of narrow numbers: so many 16-bit logits that the CPU's kernels take the losses of targets of 0 from
a table, and gradients at the end of the range of float."""

import dataclasses

import pytest
import torch
from harness import assert_within
from sigmoid_samples import FOCAL, PLAIN_LOSSES, QUALITY

# So many elements that there is a table. float16 has more numbers.
ENOUGH = {torch.bfloat16: 110_000, torch.float16: 840_000}
NARROW = pytest.mark.parametrize("dtype", ENOUGH, ids=str)
PLAIN = pytest.mark.parametrize("loss", PLAIN_LOSSES.values(), ids=PLAIN_LOSSES)
# The table begins and ends at -2^-8 and -28; what lies beside it, and beyond the range of single floats.
EDGES = [-(2.0**-8), -28.0, -(2.0**-8) * (1 - 2.0**-8), -28.125, -0.0, 0.0, 1e-3, -1e-3, -90.0, -1000.0, 3.0]


def draw(backend, generator, dtype, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C] as of a trained detector, edges among them, and labels: background, classes, dropped rows."""
    size = 600 if backend.is_interpreted or backend.is_slow else ENOUGH[dtype]
    rows = -(-size // num_classes)
    logits = (torch.randn(rows, num_classes, generator=generator) * 2 - 5).to(dtype)
    places = torch.randint(logits.numel(), (100,), generator=generator)
    logits.view(-1)[places] = torch.tensor(EDGES, dtype=dtype)[torch.randint(len(EDGES), (100,), generator=generator)]
    labels = torch.full((rows,), num_classes)
    labels[::5] = torch.randint(num_classes, (len(labels[::5]),), generator=generator)
    labels[3::17] = -1
    return logits, labels


def exponent(loss, gamma: float) -> dict[str, float]:
    return {"beta" if loss is QUALITY else "gamma": gamma}


@pytest.mark.parametrize("num_classes", [1, 7, 80, 1500])
@pytest.mark.parametrize("dtype, gamma", [*((torch.bfloat16, gamma) for gamma in (0.0, 1.0, 2.0, 1.5)), (torch.float16, 2.0)])
def test_labels(backend, generator, dtype, gamma, num_classes):
    logits, labels = draw(backend, generator, dtype, num_classes)
    FOCAL.assert_agrees(backend, logits, labels, gamma=gamma)


@PLAIN
@NARROW
def test_dense_targets(backend, loss, generator, dtype):
    """Soft ones, 1 and elements that are dropped, alone and in runs."""
    logits, _ = draw(backend, generator, dtype, 9)
    targets = torch.zeros(logits.shape)
    chosen = torch.rand(logits.shape, generator=generator)
    targets[chosen < 0.02] = 1.0
    targets[chosen > 0.98] = torch.rand(logits.shape, generator=generator)[chosen > 0.98]
    targets[len(targets) // 3 : len(targets) // 3 + 20] = -1.0
    loss.assert_agrees(backend, logits, targets)


@NARROW
def test_blocks_of_many_kinds(backend, generator, dtype):
    """Runs of logits above 0, of 0 and far below it, in which few or none have a loss in the table."""
    logits, labels = draw(backend, generator, dtype, 16)
    rows = len(logits) // 4
    logits[:rows] = logits[:rows].abs()
    logits[rows : 2 * rows] = 0
    logits[2 * rows : 2 * rows + rows // 2] = -30
    FOCAL.assert_agrees(backend, logits, labels)


@NARROW
def test_maps(backend, generator, dtype):
    logits, labels = draw(backend, generator, dtype, 6)
    rows = len(logits) // 30 * 30
    logits, labels = logits[:rows], labels[:rows]
    maps = logits.T.reshape(1, 6, rows // 30, 30).contiguous()
    got = FOCAL.evaluate(backend, maps, labels[None], layout="class_major")
    FOCAL.assert_true(backend, dataclasses.replace(got, gradient=got.gradient.reshape(6, rows).T), FOCAL.truth(logits, labels))


@NARROW
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_equal_logits(backend, generator, dtype, gamma):
    """What an entry of the table is wrong by stays in the sum."""
    size = 600 if backend.is_interpreted or backend.is_slow else ENOUGH[dtype]
    for logit in [*EDGES[:2], *(-28 * torch.rand(12, generator=generator)).tolist()]:
        logits, labels = torch.full((size, 1), logit, dtype=dtype), torch.full((size,), 1)
        truth = size * FOCAL.truth(logits[:1], labels[:1], gamma=gamma).losses[0]
        got = FOCAL.evaluate(backend, logits, labels, gamma=gamma)
        assert_within(got.losses[0], truth, backend.loss_gate(dtype) * truth, f"loss at {logit}")


@NARROW
def test_not_a_number_is_not_lost(backend, generator, dtype):
    logits, labels = draw(backend, generator, dtype, 8)
    for value in (float("nan"), float("inf")):
        spoilt = logits.clone()
        spoilt[len(spoilt) // 2, 3] = value
        labels[len(spoilt) // 2] = 8
        got = FOCAL.evaluate(backend, spoilt, labels)
        assert not got.losses[0].isfinite()
        labels[len(spoilt) // 2] = -1
        assert FOCAL.evaluate(backend, spoilt, labels).losses[0].isfinite()


@NARROW
def test_an_element_has_the_gradient_that_it_has_alone(backend, generator, dtype):
    """In vectors and behind the last whole one, where the processor rounds and where the kernel does."""
    logits, labels = draw(backend, generator, dtype, 1)
    for gamma in (0.0, 2.0, 1.5):
        whole = FOCAL.evaluate(backend, logits, labels, gamma=gamma).gradient
        for first, size in ((0, 1), (3, 15), (13, 64), (5, 401)):
            part = slice(first, first + size)
            got = FOCAL.evaluate(backend, logits[part], labels[part], gamma=gamma).gradient
            assert torch.equal(got.view(torch.int16), whole[part].view(torch.int16)), (gamma, first, size)


SMALL = [(0.0, 85.9, 1.0), (1.0, 43.0, 1.0), (2.0, 28.7, 1.0), (6.0, 12.0, 1.0)]
WITH_WEIGHT = [(0.0, 85.9, 1e20), (1.0, 44.2, 1e20), (2.0, 29.4, 1e20), (6.0, 12.5, 1e20)]


@pytest.mark.parametrize("gamma, deepest, upstream", SMALL + WITH_WEIGHT)
def test_small_gradients_are_right(backend, gamma, deepest, upstream):
    """Beside others as small: factors of a gradient may leave the range of float before it does."""
    logits = -torch.linspace(deepest - 0.5, deepest, 64)[:, None]
    FOCAL.assert_agrees(backend, logits, torch.full((64,), 1), gamma=gamma, alpha=-1.0, upstream=upstream)


@pytest.mark.parametrize("gamma, deepest", [(3.0, 20.9), (6.0, 12.1), (8.0, 9.4), (10.0, 7.8), (12.0, 6.5)])
def test_gradients_of_any_gamma_are_right_one_by_one(backend, gamma, deepest):
    """Down to the end of the normal range, where products may leave it that should add to a digit that counts."""
    size = 200 if backend.is_slow or backend.is_interpreted else 20_000
    logits = -torch.linspace(deepest / 2, deepest, size)[:, None]
    labels = torch.full((size,), 1)
    truth = FOCAL.truth(logits, labels, gamma=gamma, alpha=-1.0).gradient()
    got = FOCAL.evaluate(backend, logits, labels, gamma=gamma, alpha=-1.0).gradient
    assert_within(got, truth, 2e-6 * truth.abs(), "gradient")


@pytest.mark.parametrize("gamma, deepest", [(0.0, 86.0), (1.0, 50.0), (2.0, 34.0), (6.0, 14.0), (10.0, 8.5)])
@pytest.mark.parametrize("upstream", [1.0, 1e-3, 1e-36])
def test_gradients_below_the_normal_range(backend, gamma, deepest, upstream):
    """As multiples of the smallest float, beside whatever stands with them."""
    logits = -torch.linspace(deepest - 8 / (gamma + 1), deepest, 200)[:, None]
    labels = torch.full((200,), 1)
    truth = upstream * FOCAL.truth(logits, labels, gamma=gamma, alpha=-1.0).gradient()
    got = FOCAL.evaluate(backend, logits, labels, gamma=gamma, alpha=-1.0, upstream=[upstream]).gradient
    assert_within(got, truth, 5e-6 * truth.abs() + 2 * 2.0**-149, "gradient")


@pytest.mark.parametrize("gamma, farthest", [(2.0, 28.0), (3.0, 21.0)])
def test_infinite_weights_of_small_gradients(backend, gamma, farthest):
    logits = -torch.linspace(farthest / 2, farthest, 64)[:, None]
    got = FOCAL.evaluate(backend, logits, torch.full((64,), 1), weight=torch.full((64,), torch.inf), alpha=-1.0, gamma=gamma)
    assert (got.gradient == torch.inf).all()


def test_numbers_below_the_normal_range_remain_for_others(backend, generator):
    """The mode of the processor is that of one pass: for the threads of torch it is as it was."""
    logits, labels = draw(backend, generator, torch.bfloat16, 4)
    FOCAL.evaluate(backend, logits, labels, gamma=1.5)
    assert (torch.full((100_000,), 2e-40) * 0.5 > 0).all()
