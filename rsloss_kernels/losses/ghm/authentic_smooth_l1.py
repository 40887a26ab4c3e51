"""The authentic smooth L1 loss of the GHM paper, without the harmonizing: plain PyTorch on every backend."""
import torch
from torch import Tensor

from rsloss_kernels import _checks
from rsloss_kernels.losses.ghm import op_checks, reference


def authentic_smooth_l1_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    mu: float = 0.02,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """ASL1: `sqrt(d^2 + mu^2) - mu` with `d = pred - target`: smooth everywhere, square near 0 and linear far from it.

    Li, Liu, Wang, "Gradient Harmonized Single-stage Detector", AAAI 2019, eq. 11. Free of cancellation for small `d` and of overflow.

    Args:
        pred: any shape; float16, bfloat16, float32 or float64.
        target: the shape of `pred`, any real dtype; detached.
        weight: floating or bool, the shape of `pred`: a factor of each element; detached. Where it is 0, `pred` and `target` may hold
            anything.
        mu: where the loss turns from square to linear, in the units of `pred`, within [1e-30, 1e30].
        reduction: "mean" over all elements, "sum" or "none".
        avg_factor: a number or a tensor of one number (0-d on the CPU, or on the device of `pred`) that divides, in place of the number
            of elements in "mean", and in every other reduction.

    Returns:
        "none": the shape and dtype of `pred`; else 0-d, float64 for float64 `pred`, else float32. The mean of nothing is an exact zero,
        connected to the graph.

    Raises:
        TypeError, ValueError: wrong types, shapes, devices, mu, reduction.
    """
    name = "authentic_smooth_l1_loss"
    _checks.check_tensor(name, "pred", pred)
    _checks.check_floating(name, "pred", pred)
    op_checks.check_mu(name, mu)
    _checks.check_choice(name, "reduction", reduction, ("none", "mean", "sum"))
    for argument, value in (("target", target), *([] if weight is None else [("weight", weight)])):
        _checks.check_tensor(name, argument, value)
        if value.is_complex():
            raise TypeError(f"{name}: {argument} must be real, got {value.dtype}")
        _checks.check_device(name, argument, value, pred, "pred")
        _checks.check_shape(name, argument, value, pred.shape, "the shape of pred")
    if isinstance(avg_factor, Tensor):
        if avg_factor.dim() == 0 and avg_factor.is_cpu:
            # As a number, which goes with any device.
            avg_factor = avg_factor.to(pred.device)
        _checks.check_device(name, "avg_factor", avg_factor, pred, "pred")
        if avg_factor.numel() != 1 or avg_factor.is_complex():
            wanted = "a number or a real Tensor of one number"
            raise ValueError(f"{name}: avg_factor must be {wanted}, got {avg_factor.dtype} of shape {list(avg_factor.shape)}")
        avg_factor = avg_factor.reshape(())
    elif avg_factor is not None and getattr(avg_factor, "shape", None) == ():
        avg_factor = float(avg_factor)  # NumPy's
    elif avg_factor is not None and not _checks.is_number(avg_factor):
        raise TypeError(f"{name}: avg_factor must be a number or a Tensor of one number, got {type(avg_factor).__name__}")

    values, target = pred.double(), target.detach().double()
    if weight is None:
        losses = reference.element_losses(values, target, float(mu))
    else:
        weight = weight.detach().double()
        values, target = (torch.where(weight == 0, 0.0, value) for value in (values, target))
        losses = reference.element_losses(values, target, float(mu)) * weight
    if avg_factor is not None:
        losses = losses / avg_factor
    elif reduction == "mean":
        losses = losses / max(pred.numel(), 1)
    if reduction == "none":
        return losses.to(pred.dtype)
    return losses.sum().to(torch.promote_types(pred.dtype, torch.float32))
