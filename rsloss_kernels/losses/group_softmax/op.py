"""The operators of balanced group softmax: sampling of "others", one pass for all groups' losses, one for the gradient, and scores.

README.md beside this file has the mathematics and the layout of every tensor that passes between the operators.
"""
import torch

from rsloss_kernels import _library

_GROUPS = "int[] starts, int[] others"
SAMPLE_SCHEMA = (
    f"(Tensor labels, Tensor class_columns, Tensor? keys, {_GROUPS}, int background_group, bool background_first, "
    "float others_ratio) -> Tensor weights"
)
FORWARD_SCHEMA = (
    f"(Tensor logits, Tensor labels, Tensor class_columns, Tensor weights, {_GROUPS}, bool background_first) "
    "-> (Tensor losses, Tensor averages, Tensor row_tables)"
)
BACKWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor class_columns, Tensor weights, Tensor averages, Tensor row_tables, Tensor grad_losses, "
    f"{_GROUPS}, bool background_first) -> Tensor gradient"
)
SCORES_SCHEMA = (
    f"(Tensor logits, Tensor class_columns, {_GROUPS}, int background_group, bool background_first) -> Tensor scores"
)


def _sample_fake(labels, class_columns, keys, starts, others, *_):
    return labels.new_empty((len(others), labels.shape[0]), dtype=torch.float32)


def _forward_fake(logits, labels, class_columns, weights, starts, others, background_first):
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    groups = len(others)
    return (
        logits.new_empty((groups,), dtype=wide),
        logits.new_empty((groups,), dtype=torch.float64),
        logits.new_empty((3, groups, logits.shape[0]), dtype=wide),
    )


def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _scores_fake(logits, class_columns, *_):
    return logits.new_empty((logits.shape[0], class_columns.shape[0]))


def _save(ctx, inputs, output):
    logits, labels, class_columns, weights, *options = inputs
    ctx.options = options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, class_columns, weights, *output[1:])


def _make_backward(backend):
    group_softmax_backward = _library.operator("group_softmax_backward", backend)

    def backward(ctx, grad_losses, *_):
        no_gradients = [None] * 6
        if grad_losses is None:
            return None, *no_gradients
        return group_softmax_backward(*ctx.saved_tensors, grad_losses.contiguous(), *ctx.options), *no_gradients

    return backward


_library.define("group_softmax", "group_softmax_sample", SAMPLE_SCHEMA, _sample_fake)
_library.define(
    "group_softmax",
    "group_softmax_backward",
    BACKWARD_SCHEMA,
    _backward_fake,
    *_library.without_derivative("group softmax has no second derivative"),
)
_library.define(
    "group_softmax",
    "group_softmax_forward",
    FORWARD_SCHEMA,
    _forward_fake,
    _save,
    _make_backward,
    num_tables=2,
    num_saved_tables=2,
)
_library.define("group_softmax", "group_softmax_scores", SCORES_SCHEMA, _scores_fake)
