"""The operators that every ranking loss shares: collect the positives, bin the negatives, and the gradient pass.

    collect -> (all-gather of `positives`) -> bin -> (all-reduce of `bins`) -> a loss's own finalize -> backward

The forward of a ranking loss is cut at the two places where a process group communicates. README.md beside this file has the
derivation, and the layout of every tensor that passes between the operators.
"""
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rsloss_kernels import _library

RECORD_ROWS = 4
GRADIENT_ROWS = 4
LINE_ROWS = 3
COUNT_ENTRIES = 3
MOST_POSITIVES = 2**29  # kernels number slots in 32 bits, three to a positive

COLLECT_SCHEMA = (
    "(Tensor[] logits, Tensor[] targets, Tensor[] quality, Tensor? segments, int num_segments, "
    "SymInt? max_positives, bool maps, bool background_first) -> (Tensor positives, Tensor negatives, Tensor counts)"
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


def count_elements(logits: list[Tensor]) -> int:
    return sum(level.numel() for level in logits)


def index_shape(logits: Tensor, labels: Tensor, maps: bool) -> tuple[int, int]:
    """Classes and places of a level with class indices: it is [outer, classes, places], its labels are [outer, places]."""
    if maps:
        return logits.shape[1] // max(labels.shape[1], 1), max(math.prod(logits.shape[2:]), 1)
    return logits.shape[-1], 1


def _collect_fake(logits, targets, quality, segments, num_segments, max_positives, maps, background_first):
    capacity = torch.library.get_ctx().new_dynamic_size() if max_positives is None else max_positives
    first = logits[0]
    return (
        first.new_empty((RECORD_ROWS, capacity), dtype=torch.float64),
        first.new_empty((mask_bytes(logits),), dtype=torch.uint8),
        first.new_empty((COUNT_ENTRIES,), dtype=torch.int64),
    )


def _bin_fake(logits, negatives, positives, counts, segments, num_segments, delta):
    capacity = positives.shape[1]
    return torch.empty_like(positives), positives.new_empty((2, 2 * capacity + 1), dtype=torch.int64)


def _backward_fake(logits, negatives, gradients, lines, counts, segments, num_segments, grad_first, grad_second):
    return [torch.empty_like(level, memory_format=torch.contiguous_format) for level in logits]


def table_shapes(capacity: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the gradients and lines that a finalize leaves for backward."""
    return (GRADIENT_ROWS, capacity), (LINE_ROWS, 2 * capacity)


def loss_type(logits: list[Tensor]) -> torch.dtype:
    return torch.float64 if logits[0].dtype == torch.float64 else torch.float32


def save_for_gradient(
    ctx, logits, output, negatives, counts, *, num_losses, segments=None, num_segments=1, upstream_parity=False
):
    """`output`: the losses come first, gradients and lines last."""
    ctx.num_segments = num_segments
    ctx.upstream_parity = upstream_parity
    ctx.mark_non_differentiable(*output[num_losses:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*logits, segments, negatives, counts, *output[-2:])


def make_backward_of(num_losses: int) -> Callable[[str], Callable[..., Any]]:
    """The formula of an operator whose context `save_for_gradient` filled, and which has its `no_gradients`."""

    def make_backward(backend):
        ranking_backward = _library.operator("ranking_backward", backend)

        def backward(ctx, grad_first, grad_second, *_):
            *logits, segments, negatives, counts, gradients, lines = ctx.saved_tensors
            if ctx.upstream_parity:
                grad_second = grad_first
            elif num_losses == 1:
                grad_second = None
            grad_logits = ranking_backward(
                logits, negatives, gradients, lines, counts, segments, ctx.num_segments, grad_first, grad_second
            )
            return grad_logits, *ctx.no_gradients

        return backward

    return make_backward


def define_loss(stem: str, loss: str, options: str, losses: str, statistics: str = "") -> None:
    """Defines the operators of a ranking loss that have an autograd formula; backward of both is the gradient pass
    `ranking_backward`.

    - `<loss>_finalize`, the last step, from ranked positives and bins to losses and gradient tables.
    - `<loss>_forward`, all steps in one call, for where nothing happens between them. Only of losses without statistics.

    The second loss has its own upstream gradient; with an option named `upstream_parity`, always the last one, that of the first.

    Args:
        options: the schema's own arguments of the loss, each with a leading comma, or "".
        losses: names of the one or two losses, 0-d, separated by blanks.
        statistics: name of a float64 `[cap]` output in the order of `ranked`, without a gradient, or "".
    """
    num_losses, has_statistics = len(losses.split()), bool(statistics)
    has_parity = "upstream_parity" in options
    outputs = [f"Tensor {output}" for output in [*losses.split(), *statistics.split()]]

    def new_outputs(logits: list[Tensor], capacity: int) -> tuple[list[Tensor], list[Tensor]]:
        """Losses and statistics; gradients and lines."""
        returned = [logits[0].new_empty((), dtype=loss_type(logits)) for _ in range(num_losses)]
        returned += [logits[0].new_empty((capacity,), dtype=torch.float64) for _ in range(has_statistics)]
        return returned, [logits[0].new_empty(shape, dtype=torch.float64) for shape in table_shapes(capacity)]

    def finalize_fake(logits, negatives, ranked, *_):
        return tuple(itertools.chain(*new_outputs(logits, ranked.shape[1])))

    def save_for_finalize(ctx, inputs, output):
        logits, negatives, _, counts, _, segments, num_segments, *_, last = inputs
        options = {"segments": segments, "num_segments": num_segments, "upstream_parity": has_parity and last}
        save_for_gradient(ctx, logits, output, negatives, counts, num_losses=num_losses, **options)
        ctx.no_gradients = [None] * (len(inputs) - 1)

    _library.define(
        stem,
        f"{loss}_finalize",
        "(Tensor[] logits, Tensor negatives, Tensor ranked, Tensor counts, Tensor bins, Tensor? segments, int num_segments, "
        f"float delta, float gradient_scale{options}) -> ({', '.join([*outputs, 'Tensor gradients', 'Tensor lines'])})",
        finalize_fake,
        save_for_finalize,
        make_backward_of(num_losses),
        num_tables=2,
        num_saved_tables=4,
    )
    if has_statistics:
        return

    def forward_fake(logits, targets, quality, segments, num_segments, max_positives, *_):
        positives, negatives, counts = _collect_fake(logits, targets, quality, segments, num_segments, max_positives, None, None)
        returned, tables = new_outputs(logits, positives.shape[1])
        return *returned, negatives, counts, *tables

    def save_for_forward(ctx, inputs, output):
        logits, targets, quality, segments, num_segments, *_, last = inputs
        options = {"segments": segments, "num_segments": num_segments, "upstream_parity": has_parity and last}
        save_for_gradient(ctx, logits, output, *output[-4:-2], num_losses=num_losses, **options)
        # A list of tensors has a list of gradients.
        ctx.no_gradients = [[None] * len(targets), [None] * len(quality), *[None] * (len(inputs) - 3)]

    _library.define(
        stem,
        f"{loss}_forward",
        "(Tensor[] logits, Tensor[] targets, Tensor[] quality, Tensor? segments, int num_segments, SymInt? max_positives, "
        f"bool maps, bool background_first, float delta, float gradient_scale{options}) -> "
        f"({', '.join([*outputs, 'Tensor negatives', 'Tensor counts', 'Tensor gradients', 'Tensor lines'])})",
        forward_fake,
        save_for_forward,
        make_backward_of(num_losses),
        num_tables=4,
        num_saved_tables=4,
        compose=functools.partial(_compose_forward, loss),
    )


def _compose_forward(loss: str, backend: str) -> Callable[..., Any]:
    """The steps one after the other, for the Python backends."""
    names = "ranking_collect", "ranking_bin", f"{loss}_finalize"

    def forward(
        logits, targets, quality, segments, num_segments, max_positives, maps, background_first, delta, gradient_scale, *options
    ):
        collect, bin_negatives, finalize = [_library.operator(name, backend) for name in names]
        positives, negatives, counts = collect(
            logits, targets, quality, segments, num_segments, max_positives, maps, background_first
        )
        ranked, bins = bin_negatives(logits, negatives, positives, counts, segments, num_segments, delta)
        *returned, gradients, lines = finalize(
            logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, *options
        )
        return *returned, negatives, counts, gradients, lines

    return forward


_library.define("ranking", "ranking_collect", COLLECT_SCHEMA, _collect_fake)
_library.define("ranking", "ranking_bin", BIN_SCHEMA, _bin_fake)
_library.define(
    "ranking",
    "ranking_backward",
    BACKWARD_SCHEMA,
    _backward_fake,
    *_library.without_derivative(
        "a ranking loss has no second derivative: its gradient is the identity update, not the derivative of its value"
    ),
)
