"""The operators of smooth L1 loss: one pass for the loss or for single losses, one for the gradient.

README.md beside this file has the mathematics and the layout of every tensor.
"""
import torch

from rsloss_kernels import _library

_TENSORS = "Tensor pred, Tensor target, Tensor? weight, Tensor? beta, Tensor? normalizer"
# Lists of one: an operator with a formula returns several tensors.
FORWARD_SCHEMA = f"({_TENSORS}, float fixed_beta, float scale) -> Tensor[]"
BACKWARD_SCHEMA = f"({_TENSORS}, Tensor grad, float fixed_beta, float scale) -> Tensor gradient"


def _forward_fake(pred, *_):
    return [pred.new_empty((), dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)]


def _elements_fake(pred, *_):
    return [torch.empty_like(pred, memory_format=torch.contiguous_format)]


def _backward_fake(pred, *_):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, ctx.fixed_beta, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _make_backward(backend):
    smooth_l1_backward = _library.operator("smooth_l1_backward", backend)

    def backward(ctx, grad):
        grad = grad[0] if isinstance(grad, (list, tuple)) else grad
        no_gradients = [None] * 6
        if grad is None:
            return None, *no_gradients
        return smooth_l1_backward(*ctx.saved_tensors, grad.contiguous(), ctx.fixed_beta, ctx.scale), *no_gradients

    return backward


_library.define(
    "smooth_l1",
    "smooth_l1_backward",
    BACKWARD_SCHEMA,
    _backward_fake,
    *_library.without_derivative("smooth L1 loss has no second derivative here"),
)
_library.define("smooth_l1", "smooth_l1_forward", FORWARD_SCHEMA, _forward_fake, _save, _make_backward)
_library.define("smooth_l1", "smooth_l1_elements", FORWARD_SCHEMA, _elements_fake, _save, _make_backward)
