"""Smooth L1 loss as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

The loss is a pass over the elements by a fixed number of programs, whose sums another program adds in order; single losses and
gradients are one pass. `beta` and what divides are read by the kernels. Everything is float64 inside. Formulas and layouts: README.md
beside this file.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from rsloss_kernels.losses.smooth_l1.op_checks import LARGEST_BETA, SMALLEST_BETA
from rsloss_kernels.losses.triton_common import Configuration, configuration, float_bits, float_of, launching_on, rounded_to

# Arguments that change from call to call without a gain from code of their own; floats travel as the bits of a float64.
PLAIN_INTEGERS = ("fixed_beta_bits", "scale_bits", "programs")
SMALLEST, LARGEST = tl.constexpr(SMALLEST_BETA), tl.constexpr(LARGEST_BETA)


@triton.jit
def smooth_l1_beta(beta_ptr, fixed_beta_bits):
    """0 below the smallest, NaN where it is out of range."""
    beta = float_of(fixed_beta_bits)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr).to(tl.float64)
    valid = (beta >= 0) & (beta <= LARGEST)
    return tl.where(valid, tl.where(beta < SMALLEST, 0.0, beta), float("nan"))


@triton.jit
def smooth_l1_inverse(beta):
    """Of any number where `beta` is not used."""
    return 1.0 / tl.where(beta > 0, beta, 1.0)


@triton.jit
def smooth_l1_factor(normalizer_ptr, scale_bits):
    factor = float_of(scale_bits)
    if normalizer_ptr is not None:
        factor = factor / tl.load(normalizer_ptr).to(tl.float64)
    return factor


@triton.jit
def smooth_l1_differences(pred_ptr, target_ptr, weight_ptr, start, lane, size, row, BY_ROW: tl.constexpr):
    """`d` and the weights of the elements start + lane; both are 0 where an element does not count."""
    inside = lane < size - start
    pred = tl.load(pred_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
    target = tl.load(target_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
    weight = inside.to(tl.float64)
    if weight_ptr is not None:
        place = start + lane
        if BY_ROW:
            # Only the first row needs a 64-bit division.
            first_row = start // row
            place = first_row + ((start - first_row * row).to(tl.int32) + lane) // row
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float64)
    return tl.where(weight == 0, 0.0, pred - target), weight


@triton.jit
def smooth_l1_losses(d, weight, beta):
    """`w l`."""
    distance = tl.abs(d)
    is_near = distance < beta
    # The other form is not computed where it could overflow or divide by 0.
    near = tl.where(is_near, distance, 0.0)
    losses = tl.where(is_near, near * (0.5 * near * smooth_l1_inverse(beta)), distance - 0.5 * beta)
    return tl.where(weight == 0, 0.0, weight * losses)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def smooth_l1_forward_kernel(
    pred_ptr, target_ptr, weight_ptr, beta_ptr, sums_ptr, size, row, fixed_beta_bits, BY_ROW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    beta = smooth_l1_beta(beta_ptr, fixed_beta_bits)
    sums = tl.zeros([BLOCK], tl.float64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < size:
        d, weight = smooth_l1_differences(pred_ptr, target_ptr, weight_ptr, start, lane, size, row, BY_ROW)
        sums += smooth_l1_losses(d, weight, beta)
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def smooth_l1_combine_kernel(sums_ptr, normalizer_ptr, result_ptr, programs, scale_bits, PROGRAMS: tl.constexpr):
    lane = tl.arange(0, PROGRAMS)
    total = tl.sum(tl.load(sums_ptr + lane, mask=lane < programs, other=0.0))
    loss = total * smooth_l1_factor(normalizer_ptr, scale_bits)
    tl.store(result_ptr, loss.to(result_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def smooth_l1_elements_kernel(
    pred_ptr, target_ptr, weight_ptr, beta_ptr, normalizer_ptr, result_ptr, size, row, fixed_beta_bits, scale_bits,
    BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    d, weight = smooth_l1_differences(pred_ptr, target_ptr, weight_ptr, start, lane, size, row, BY_ROW)
    losses = smooth_l1_losses(d, weight, smooth_l1_beta(beta_ptr, fixed_beta_bits)) * smooth_l1_factor(normalizer_ptr, scale_bits)
    losses = rounded_to(tl.where(weight == 0, 0.0, losses), result_ptr.dtype.element_ty)
    tl.store(result_ptr + start + lane, losses, mask=lane < size - start)


@triton.jit(do_not_specialize=PLAIN_INTEGERS)
def smooth_l1_backward_kernel(
    pred_ptr, target_ptr, weight_ptr, beta_ptr, normalizer_ptr, grad_ptr, result_ptr, size, row, fixed_beta_bits, scale_bits,
    BY_ROW: tl.constexpr, GRAD_OF_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = lane < size - start
    d, weight = smooth_l1_differences(pred_ptr, target_ptr, weight_ptr, start, lane, size, row, BY_ROW)
    beta = smooth_l1_beta(beta_ptr, fixed_beta_bits)
    is_near = tl.abs(d) < beta
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    slope = tl.where(is_near, tl.where(is_near, d, 0.0) * smooth_l1_inverse(beta), sign)
    # NaN of a beta out of range.
    slope = tl.where(beta == beta, slope, beta)
    if GRAD_OF_LOSS:
        upstream = tl.load(grad_ptr).to(tl.float64)
    else:
        upstream = tl.load(grad_ptr + start + lane, mask=inside, other=0.0).to(tl.float64)
    gradient = weight * slope * (upstream * smooth_l1_factor(normalizer_ptr, scale_bits))
    gradient = rounded_to(tl.where(weight == 0, 0.0, gradient), result_ptr.dtype.element_ty)
    tl.store(result_ptr + start + lane, gradient, mask=inside)


def _elements(
    run: Configuration, pred: Tensor, target: Tensor, weight: Tensor | None, beta: Tensor | None, fixed_beta: float
) -> dict:
    """What all passes take, as keyword arguments."""
    by_row = weight is not None and weight.dim() < pred.dim()
    return {
        "pred_ptr": pred,
        "target_ptr": target,
        "weight_ptr": weight,
        "beta_ptr": beta,
        "size": pred.numel(),
        "row": pred.shape[-1] if by_row else 1,
        "fixed_beta_bits": float_bits(fixed_beta),
        "BY_ROW": by_row,
        **run.arguments,
    }


def smooth_l1_forward(pred, target, weight, beta, normalizer, fixed_beta, scale) -> list[Tensor]:
    run = configuration("smooth l1 sums", pred.numel(), pred.device)
    arguments = _elements(run, pred, target, weight, beta, fixed_beta)
    programs = max(1, min(triton.cdiv(pred.numel(), run.block), run.programs))
    sums = torch.empty(programs, dtype=torch.float64, device=pred.device)
    loss = pred.new_empty((), dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)
    with launching_on(pred):
        smooth_l1_forward_kernel[programs,](sums_ptr=sums, **arguments)
        smooth_l1_combine_kernel[1,](
            *(sums, normalizer, loss, programs, float_bits(scale)), PROGRAMS=triton.next_power_of_2(programs), **run.options
        )
    return [loss]


def smooth_l1_elements(pred, target, weight, beta, normalizer, fixed_beta, scale) -> list[Tensor]:
    losses = torch.empty_like(pred, memory_format=torch.contiguous_format)
    if pred.numel():
        run = configuration("smooth l1 elements", pred.numel(), pred.device)
        arguments = _elements(run, pred, target, weight, beta, fixed_beta)
        with launching_on(pred):
            smooth_l1_elements_kernel[triton.cdiv(pred.numel(), run.block),](
                normalizer_ptr=normalizer, result_ptr=losses, scale_bits=float_bits(scale), **arguments
            )
    return [losses]


def smooth_l1_backward(pred, target, weight, beta, normalizer, grad, fixed_beta, scale) -> Tensor:
    gradient = torch.empty_like(pred, memory_format=torch.contiguous_format)
    if pred.numel():
        run = configuration("smooth l1 elements", pred.numel(), pred.device)
        arguments = _elements(run, pred, target, weight, beta, fixed_beta)
        with launching_on(pred):
            smooth_l1_backward_kernel[triton.cdiv(pred.numel(), run.block),](
                normalizer_ptr=normalizer,
                grad_ptr=grad,
                result_ptr=gradient,
                scale_bits=float_bits(scale),
                GRAD_OF_LOSS=grad.dim() == 0,
                **arguments,
            )
    return gradient
