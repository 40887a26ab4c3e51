"""The last operator of the Rank & Sort forward: from ranked positives and bins to losses and gradient tables.

Only this one has an autograd formula; its backward is the shared gradient pass `ranking_backward`.
"""
import torch

from rsloss_kernels import _library
from rsloss_kernels.losses.ranking.op import GRADIENT_ROWS, LINE_ROWS

FINALIZE_SCHEMA = (
    "(Tensor[] logits, Tensor negatives, Tensor ranked, Tensor counts, Tensor bins, Tensor? segments, int num_segments, "
    "float delta, float gradient_scale, bool upstream_parity) "
    "-> (Tensor ranking, Tensor sorting, Tensor gradients, Tensor lines)"
)


def _finalize_fake(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, upstream_parity
):
    capacity = ranked.shape[1]
    loss_type = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    return (
        ranked.new_empty((), dtype=loss_type),
        ranked.new_empty((), dtype=loss_type),
        ranked.new_empty((GRADIENT_ROWS, capacity)),
        ranked.new_empty((LINE_ROWS, 2 * capacity)),
    )


def _setup_context(ctx, inputs, output):
    logits, negatives, _, counts, _, segments, ctx.num_segments, _, _, ctx.upstream_parity = inputs
    _, _, gradients, lines = output
    ctx.mark_non_differentiable(gradients, lines)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(negatives, counts, gradients, lines, segments, *logits)


def _make_backward(backend):
    ranking_backward = _library.operator("ranking_backward", backend)

    def backward(ctx, grad_ranking, grad_sorting, *_):
        negatives, counts, gradients, lines, segments, *logits = ctx.saved_tensors
        if ctx.upstream_parity:
            grad_sorting = grad_ranking
        grad_logits = ranking_backward(
            logits, negatives, gradients, lines, counts, segments, ctx.num_segments, grad_ranking, grad_sorting
        )
        return (grad_logits, *[None] * 9)

    return backward


_library.define("rank_sort", "rank_sort_finalize", FINALIZE_SCHEMA, _finalize_fake, _setup_context, _make_backward)
