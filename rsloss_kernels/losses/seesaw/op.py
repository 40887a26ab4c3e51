"""The operators of Seesaw loss. README.md beside this file has the mathematics and the layout of every tensor."""
import torch

from rsloss_kernels import _library

# CUDA tensors take Triton.
BACKENDS = ("reference", "cpp", "triton")
FORWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? weights, Tensor log_counts, float p, float q, float eps) -> (Tensor losses, Tensor row_tables)"
)
BACKWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? weights, Tensor log_counts, Tensor row_tables, Tensor grad_losses, float p, float q) "
    "-> Tensor gradient"
)


def _forward_fake(logits, *_):
    rows = logits.shape[0]
    return logits.new_empty((2, rows), dtype=torch.float64), logits.new_empty((4, rows), dtype=torch.float64)


def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, labels, weights, log_counts, p, q, _ = inputs
    ctx.powers = (p, q)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, weights, log_counts, output[1])


def _make_backward(backend):
    seesaw_backward = _library.operator("seesaw_backward", backend)

    def backward(ctx, grad_losses, *_):
        no_gradients = [None] * 6
        if grad_losses is None:
            return None, *no_gradients
        return seesaw_backward(*ctx.saved_tensors, grad_losses.contiguous(), *ctx.powers), *no_gradients

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
    num_tables=1,
    num_saved_tables=1,
    backends=BACKENDS,
)
