"""The authentic smooth L1 loss of the GHM paper, on its own."""
import numpy as np
import pytest
import torch

from rsloss_kernels import authentic_smooth_l1_loss

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def truth(pred, target, mu):
    d = pred.detach().double() - target.double()
    root = torch.hypot(d, torch.tensor(mu, dtype=torch.float64))
    return d * (d / (root + mu)), d / root


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mu", [1e-30, 0.02, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e4])
def test_values_and_gradients(dtype, mu, scale):
    generator = torch.Generator().manual_seed(3)
    pred = (torch.randn((30, 4), generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    target = (torch.randn((30, 4), generator=generator) * scale).to(dtype)
    losses, slopes = truth(pred, target, mu)
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float64 else 1e-14
    smallest = torch.finfo(dtype).smallest_normal * rounding
    got = authentic_smooth_l1_loss(pred, target, mu=mu, reduction="none")
    assert got.dtype == dtype and (got.double() - losses).abs().le(rounding * losses + smallest).all()
    for reduction, wanted, factor in (("sum", losses.sum(), 1), ("mean", losses.mean(), 120)):
        value = authentic_smooth_l1_loss(pred, target, mu=mu, reduction=reduction)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.shape == ()
        assert abs(value.item() - wanted.item()) <= 1e-7 * wanted.item() + 1e-45
        (gradient,) = torch.autograd.grad(value, pred)
        assert (gradient.double() - slopes / factor).abs().le(1.01 * rounding * slopes.abs() / factor + smallest).all()


def test_weights_and_normalisation():
    pred, target = torch.tensor([0.1, torch.nan, -2.0], requires_grad=True), torch.tensor([0.0, torch.inf, 0.0])
    weight = torch.tensor([2.0, 0.0, 0.5])
    losses, slopes = truth(torch.tensor([0.1, 0.0, -2.0]), torch.zeros(3), 0.02)
    wanted = (losses * weight.double()).sum()
    for options, divisor in (
        ({}, 3), ({"reduction": "sum"}, 1), ({"avg_factor": 7.0}, 7), ({"reduction": "sum", "avg_factor": torch.tensor(4.0)}, 4),
    ):  # fmt: skip
        value = authentic_smooth_l1_loss(pred, target, weight, **options)
        torch.testing.assert_close(value, (wanted / divisor).float())
        (gradient,) = torch.autograd.grad(value, pred)
        torch.testing.assert_close(gradient, (slopes * weight / divisor).float(), rtol=1e-6, atol=0)
    each = authentic_smooth_l1_loss(pred, target, weight, reduction="none", avg_factor=2.0)
    torch.testing.assert_close(each, (losses * weight / 2).float())
    assert authentic_smooth_l1_loss(pred, target, weight > 0, reduction="sum") == losses.sum().float()


def test_limits():
    pred = torch.tensor([0.0, torch.inf, -torch.inf, 3e38, -3e38], requires_grad=True)
    losses = authentic_smooth_l1_loss(pred, torch.zeros(5), reduction="none")
    assert losses.tolist() == [0.0, torch.inf, torch.inf, *[float(torch.tensor(3e38))] * 2]
    losses.sum().backward()
    assert pred.grad.tolist() == [0.0, 1.0, -1.0, 1.0, -1.0]
    empty = torch.zeros((0, 4), requires_grad=True)
    value = authentic_smooth_l1_loss(empty, empty.detach())
    assert value.item() == 0 and torch.autograd.grad(value, empty)[0].shape == (0, 4)


def test_derivatives_are_those_of_the_value():
    generator = torch.Generator().manual_seed(5)
    pred = (torch.randn(6, generator=generator, dtype=torch.float64) / 30).requires_grad_()
    target = torch.randn(6, generator=generator, dtype=torch.float64) / 30
    assert torch.autograd.gradcheck(lambda x: authentic_smooth_l1_loss(x, target), pred)
    assert torch.autograd.gradgradcheck(lambda x: authentic_smooth_l1_loss(x, target), pred)


def test_compiles_as_one_graph():
    pred, target = torch.randn(9, 4), torch.randn(9, 4)
    compiled = torch.compile(authentic_smooth_l1_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pred, target), authentic_smooth_l1_loss(pred, target))


@pytest.mark.parametrize("factor", [torch.tensor(4.0), torch.tensor([4.0]), torch.tensor([[4]]), np.array(4.0), np.float32(4)], ids=repr)
def test_whatever_is_one_number_divides(factor):
    pred, target = torch.linspace(-1, 1, 6), torch.zeros(6)
    for reduction in ("mean", "none"):
        expected = authentic_smooth_l1_loss(pred, target, reduction=reduction, avg_factor=4.0)
        divided = authentic_smooth_l1_loss(pred, target, reduction=reduction, avg_factor=factor)
        assert divided.shape == expected.shape and torch.equal(divided, expected)


def test_a_number_on_the_cpu_divides_on_every_device():
    pred = torch.zeros(6, device="meta")
    assert authentic_smooth_l1_loss(pred, pred, avg_factor=torch.tensor(4.0)).is_meta
    with pytest.raises(ValueError, match="avg_factor must be on the device of pred"):
        authentic_smooth_l1_loss(pred, pred, avg_factor=torch.tensor([4.0]))
