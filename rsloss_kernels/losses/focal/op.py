"""The operators of the element-wise sigmoid losses: focal, quality focal, varifocal, the equalized losses, weighted cross entropy.

README.md beside this file has the mathematics and the layout of every tensor.
"""
from enum import IntEnum

import torch

from rsloss_kernels import _library


class Modulator(IntEnum):
    """What multiplies the cross entropy of an element."""

    FOCAL = 0
    QUALITY = 1
    VARIFOCAL = 2
    VARIFOCAL_UNWEIGHTED = 3


_LEVELS = "Tensor[] logits, Tensor[] targets, Tensor[] qualities, Tensor[] weights, Tensor class_table, Tensor? normalizer"
_OPTIONS = "int modulator, bool maps, bool background_first, int? ignore_index, float scale"
FORWARD_SCHEMA = f"({_LEVELS}, {_OPTIONS}, bool class_sums) -> (Tensor loss, Tensor class_sums)"
ELEMENTS_SCHEMA = f"({_LEVELS}, {_OPTIONS}) -> Tensor[]"
BACKWARD_SCHEMA = f"({_LEVELS}, Tensor[] grads, {_OPTIONS}) -> Tensor[]"


def _forward_fake(logits, targets, qualities, weights, class_table, normalizer, *options):
    *_, class_sums = options
    loss_type = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    shape = (2, class_table.shape[1]) if class_sums else (0,)
    return logits[0].new_empty((), dtype=loss_type), logits[0].new_empty(shape, dtype=torch.float64)


def _levels_fake(logits, *_):
    return [torch.empty_like(level, memory_format=torch.contiguous_format) for level in logits]


def _save(ctx, inputs, output):
    logits, targets, qualities, weights, class_table, normalizer, *options = inputs
    ctx.options, ctx.num_options = options[:5], len(options)
    ctx.numbers = [len(logits), len(targets), len(qualities), len(weights)]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*logits, *targets, *qualities, *weights, normalizer, class_table)


def _make_backward(read_grads):
    def make_backward(backend):
        focal_backward = _library.operator("focal_backward", backend)

        def backward(ctx, *grads):
            *tensors, normalizer, class_table = ctx.saved_tensors
            levels, begin = [], 0
            for number in ctx.numbers:
                levels.append(tensors[begin : begin + number])
                begin += number
            no_gradients = *([None] * number for number in ctx.numbers[1:]), None, None, *[None] * ctx.num_options
            grads = read_grads(grads, levels[0])
            if grads is None:
                return [None] * len(levels[0]), *no_gradients
            return focal_backward(*levels, class_table, normalizer, grads, *ctx.options), *no_gradients

        return backward

    return make_backward


def _of_loss(grads, logits):
    return None if grads[0] is None else [grads[0]]


def _of_elements(grads, logits):
    """One per level; PyTorch's wrapper gives them as one list. A level that was not used has zeros."""
    grads = grads[0] if isinstance(grads[0], (list, tuple)) else grads
    if all(grad is None for grad in grads):
        return None
    return [
        torch.zeros_like(level) if grad is None else grad.contiguous() for grad, level in zip(grads, logits, strict=True)
    ]


_library.define(
    "focal",
    "focal_backward",
    BACKWARD_SCHEMA,
    _levels_fake,
    *_library.without_derivative("an element-wise sigmoid loss of this library has no second derivative"),
)
# The table of the classes is never the caller's: a loss with state makes it from that.
_library.define("focal", "focal_forward", FORWARD_SCHEMA, _forward_fake, _save, _make_backward(_of_loss), num_saved_tables=1)
_library.define("focal", "focal_elements", ELEMENTS_SCHEMA, _levels_fake, _save, _make_backward(_of_elements), num_saved_tables=1)
