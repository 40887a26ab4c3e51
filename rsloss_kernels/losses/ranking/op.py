"""The operators that every ranking loss shares: collect the positives, bin the negatives, and the gradient pass.

    collect -> (all-gather of `positives`) -> bin -> (all-reduce of `bins`) -> a loss's own finalize -> backward

The forward of a ranking loss is cut at the two places where a process group communicates. README.md beside this file has the
derivation, and the layout of every tensor that passes between the operators.
"""
import torch
from torch import Tensor

from rsloss_kernels import _library

RECORD_ROWS = 4
GRADIENT_ROWS = 4
LINE_ROWS = 3
COUNT_ENTRIES = 3

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
        first.new_empty((COUNT_ENTRIES,), dtype=torch.int64),
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


def define_finalize(stem: str, name: str, options: str, losses: str, statistics: str = "") -> None:
    """Defines the last operator of a ranking loss, from ranked positives and bins to losses and gradient tables.

    The only operator of a forward with an autograd formula: its backward is the gradient pass `ranking_backward`. All take
    `(logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale)` first and return `gradients` and
    `lines` last, tables for backward alone. With an option named `upstream_parity`, always the last one, the second loss has
    the upstream gradient of the first.

    Args:
        options: the rest of the schema's arguments, each with a leading comma, or "".
        losses: names of the one or two losses, 0-d, separated by blanks.
        statistics: name of a float64 `[cap]` output in the order of `ranked`, without a gradient, or "".
    """
    num_losses, has_statistics = len(losses.split()), bool(statistics)
    has_parity = "upstream_parity" in options
    returns = ", ".join(f"Tensor {output}" for output in [*losses.split(), *statistics.split(), "gradients", "lines"])
    schema = (
        "(Tensor[] logits, Tensor negatives, Tensor ranked, Tensor counts, Tensor bins, Tensor? segments, int num_segments, "
        f"float delta, float gradient_scale{options}) -> ({returns})"
    )

    def fake(logits, negatives, ranked, *_):
        capacity = ranked.shape[1]
        loss_type = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
        return (
            *[ranked.new_empty((), dtype=loss_type) for _ in range(num_losses)],
            *[ranked.new_empty((capacity,)) for _ in range(has_statistics)],
            ranked.new_empty((GRADIENT_ROWS, capacity)),
            ranked.new_empty((LINE_ROWS, 2 * capacity)),
        )

    def setup_context(ctx, inputs, output):
        logits, negatives, _, counts, _, segments, ctx.num_segments, *_, last = inputs
        ctx.upstream_parity = has_parity and last
        ctx.mark_non_differentiable(*output[num_losses:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*logits, segments, negatives, counts, *output[-2:])

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
            return (grad_logits, *[None] * (8 + options.count(",")))

        return backward

    _library.define(stem, name, schema, fake, setup_context, make_backward, num_tables=2, num_saved_tables=4)


_library.define("ranking", "ranking_collect", COLLECT_SCHEMA, _collect_fake)
_library.define("ranking", "ranking_bin", BIN_SCHEMA, _bin_fake)
_library.define(
    "ranking", "ranking_backward", BACKWARD_SCHEMA, _backward_fake, _nothing_to_save, _refuse_double_backward
)
