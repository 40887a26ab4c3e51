"""The operators that every ranking loss shares: collect the positives, bin the negatives, and the gradient pass.

    collect -> (all-gather of `positives`) -> bin -> (all-reduce of `bins`) -> a loss's own finalize -> backward

The forward of a ranking loss is cut at the two places where a process group communicates. README.md beside this file has the
derivation, and the layout of every tensor that passes between the operators.
"""
import torch
from torch import Tensor

from rsloss_kernels import _library

RECORD_ROWS = 4
GRADIENT_ROWS = 3
LINE_ROWS = 3

COLLECT_SCHEMA = (
    "(Tensor[] logits, Tensor[] targets, Tensor[] quality, Tensor? segments, int num_segments, "
    "SymInt? max_positives, bool background_first) -> (Tensor positives, Tensor negatives, Tensor counts)"
)
BIN_SCHEMA = (
    "(Tensor[] logits, Tensor negatives, Tensor positives, Tensor counts, Tensor? segments, int num_segments, "
    "float delta) -> (Tensor ranked, Tensor bins)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] logits, Tensor negatives, Tensor gradients, Tensor lines, Tensor counts, Tensor? segments, "
    "int num_segments, Tensor? grad_first, Tensor? grad_second) -> Tensor[]"
)


def mask_bytes(logits: list[Tensor]) -> int:
    """Bytes of the bit mask: every tensor of `logits` starts at a 64-bit word of its own."""
    return sum((level.numel() + 63) // 64 * 8 for level in logits)


def _collect_fake(logits, targets, quality, segments, num_segments, max_positives, background_first):
    capacity = torch.library.get_ctx().new_dynamic_size() if max_positives is None else max_positives
    first = logits[0]
    return (
        first.new_empty((RECORD_ROWS, capacity), dtype=torch.float64),
        first.new_empty((mask_bytes(logits),), dtype=torch.uint8),
        first.new_empty((2,), dtype=torch.int64),
    )


def _bin_fake(logits, negatives, positives, counts, segments, num_segments, delta):
    capacity = positives.shape[1]
    return torch.empty_like(positives), positives.new_empty((2, 2 * capacity + 1), dtype=torch.int64)


def _backward_fake(logits, negatives, gradients, lines, counts, segments, num_segments, grad_first, grad_second):
    return [torch.empty_like(level, memory_format=torch.contiguous_format) for level in logits]


def _refuse_double_backward(backend):
    def backward(ctx, *grads):
        raise RuntimeError(
            "rsloss_kernels: a ranking loss has no second derivative (its gradient is the identity update, not the derivative "
            "of its value); call backward without create_graph=True"
        )

    return backward


def _nothing_to_save(ctx, inputs, output):
    pass


_library.define("ranking", "ranking_collect", COLLECT_SCHEMA, _collect_fake)
_library.define("ranking", "ranking_bin", BIN_SCHEMA, _bin_fake)
_library.define(
    "ranking", "ranking_backward", BACKWARD_SCHEMA, _backward_fake, _nothing_to_save, _refuse_double_backward
)
