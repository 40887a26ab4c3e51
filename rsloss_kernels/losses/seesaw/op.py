"""The operators of Seesaw loss. README.md beside this file has the mathematics and the layout of every tensor."""
import torch

from rsloss_kernels import _library

# CUDA tensors take Triton.
BACKENDS = ("reference", "cpp", "triton")
FORWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? weights, Tensor log_counts, float p, float q, float eps, int reduction, Tensor? avg_factor) "
    "-> (Tensor objectness, Tensor classes, Tensor divisors, Tensor row_tables)"
)
BACKWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? weights, Tensor log_counts, Tensor divisors, Tensor row_tables, Tensor? grad_objectness, "
    "Tensor? grad_classes, float p, float q) -> Tensor gradient"
)


def _forward_fake(logits, labels, weights, log_counts, p, q, eps, reduction, avg_factor):
    rows = logits.shape[0]
    is_wide = reduction == 0 or logits.dtype == torch.float64
    shape, dtype = (rows,) if reduction == 0 else (), torch.float64 if is_wide else torch.float32
    losses = [logits.new_empty(shape, dtype=dtype) for _ in range(2)]
    return *losses, logits.new_empty((2,), dtype=torch.float64), logits.new_empty((4, rows), dtype=torch.float64)


def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, labels, weights, log_counts, p, q, *_ = inputs
    ctx.powers = (p, q)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, weights, log_counts, *output[2:])


def _make_backward(backend):
    seesaw_backward = _library.operator("seesaw_backward", backend)

    def backward(ctx, grad_objectness, grad_classes, *_):
        no_gradients = [None] * 8
        if grad_objectness is None and grad_classes is None:
            return None, *no_gradients
        upstream = [grad if grad is None else grad.contiguous() for grad in (grad_objectness, grad_classes)]
        return seesaw_backward(*ctx.saved_tensors, *upstream, *ctx.powers), *no_gradients

    return backward


_library.define(
    "seesaw",
    "seesaw_backward",
    BACKWARD_SCHEMA,
    _backward_fake,
    *_library.without_derivative("Seesaw loss has no second derivative"),
    backends=BACKENDS,
)
_library.define(
    "seesaw",
    "seesaw_forward",
    FORWARD_SCHEMA,
    _forward_fake,
    _save,
    _make_backward,
    num_tables=2,
    # The counts, of which it gets the logarithms, are never the caller's own.
    num_saved_tables=3,
    backends=BACKENDS,
)
