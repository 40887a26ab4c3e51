"""The operators of GHM-C and GHM-R: one histogram pass, a finalize over the bins, and one gradient pass.

    histogram -> (sum over the process group) -> finalize -> backward

Without a group the first two are one, forward.

README.md beside this file has the mathematics and the layout of every tensor that passes between the operators.
"""
import functools

import torch

from rsloss_kernels import _library
from rsloss_kernels.losses.ghm import op_checks

HISTOGRAM_SCHEMA = (
    "(Tensor[] preds, Tensor[] targets, Tensor[] weights, int bins, float? mu, bool background_first) -> Tensor histogram"
)
FINALIZE_SCHEMA = (
    "(Tensor[] preds, Tensor[] targets, Tensor[] weights, Tensor histogram, Tensor? acc_sum, Tensor? num_updates, int bins, "
    "float? mu, bool background_first, float momentum, bool count_empty_bins, float gradient_scale) "
    "-> (Tensor loss, Tensor acc_sum, Tensor num_updates, Tensor bin_weights)"
)
FORWARD_SCHEMA = (
    "(Tensor[] preds, Tensor[] targets, Tensor[] weights, Tensor? acc_sum, Tensor? num_updates, int bins, float? mu, "
    "bool background_first, float momentum, bool count_empty_bins) "
    "-> (Tensor loss, Tensor acc_sum, Tensor num_updates, Tensor bin_weights)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] preds, Tensor[] targets, Tensor[] weights, Tensor bin_weights, Tensor grad_loss, float? mu, "
    "bool background_first) -> Tensor[]"
)


def _histogram_fake(preds, targets, weights, bins, mu, background_first):
    return preds[0].new_empty((2, bins + 1), dtype=torch.float64)


def _finalize_fake(preds, targets, weights, histogram, acc_sum, num_updates, bins, *_):
    loss_type = torch.float64 if preds[0].dtype == torch.float64 else torch.float32
    return (
        preds[0].new_empty((), dtype=loss_type),
        preds[0].new_empty((bins,), dtype=torch.float64 if acc_sum is None else acc_sum.dtype),
        preds[0].new_empty((0 if num_updates is None else bins,), dtype=torch.int64),
        preds[0].new_empty((bins,), dtype=torch.float64),
    )


def _backward_fake(preds, *_):
    return [torch.empty_like(level, memory_format=torch.contiguous_format) for level in preds]


def _forward_fake(preds, targets, weights, *options):
    return _finalize_fake(preds, targets, weights, None, *options)


def _save(ctx, inputs, output, mu_at):
    preds, targets, weights, *others = inputs
    ctx.mu, ctx.background_first = inputs[mu_at : mu_at + 2]
    ctx.levels, ctx.others = len(preds), len(others)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*preds, *targets, *weights, output[-1])


def _make_backward(backend):
    ghm_backward = _library.operator("ghm_backward", backend)

    def backward(ctx, grad_loss, *_):
        *tensors, bin_weights = ctx.saved_tensors
        preds, targets, weights = [tensors[i * ctx.levels : (i + 1) * ctx.levels] for i in range(3)]
        no_gradients = [None] * ctx.levels, [None] * len(weights), *[None] * ctx.others
        if grad_loss is None:
            return [None] * ctx.levels, *no_gradients
        return ghm_backward(preds, targets, weights, bin_weights, grad_loss, ctx.mu, ctx.background_first), *no_gradients

    return backward


def _compose_forward(backend):
    histogram_of, finalize = [_library.operator(name, backend) for name in ("ghm_histogram", "ghm_finalize")]

    def forward(preds, targets, weights, acc_sum, num_updates, *options):
        op_checks.ghm_forward(preds, targets, weights, acc_sum, num_updates, *options)
        bins, mu, background_first, *_ = options
        histogram = histogram_of(preds, targets, weights, bins, mu, background_first)
        return finalize(preds, targets, weights, histogram, acc_sum, num_updates, *options, 1.0)

    return forward


_library.define("ghm", "ghm_histogram", HISTOGRAM_SCHEMA, _histogram_fake)
_library.define(
    "ghm",
    "ghm_backward",
    BACKWARD_SCHEMA,
    _backward_fake,
    *_library.without_derivative("a GHM loss has no second derivative: its weights are constants of the density"),
)
_library.define(
    "ghm",
    "ghm_finalize",
    FINALIZE_SCHEMA,
    _finalize_fake,
    functools.partial(_save, mu_at=7),
    _make_backward,
    num_tables=1,
    num_saved_tables=1,
)
_library.define(
    "ghm",
    "ghm_forward",
    FORWARD_SCHEMA,
    _forward_fake,
    functools.partial(_save, mu_at=6),
    _make_backward,
    num_tables=1,
    num_saved_tables=1,
    compose=_compose_forward,
)
