"""Checks of the arguments of `rank_sort_finalize`, for the backends written in Python."""
from rsloss_kernels.losses.ranking import op_checks as ranking


def rank_sort_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, upstream_parity
) -> None:
    ranking.check_finalize("rank_sort_finalize", logits, negatives, ranked, counts, bins, segments, num_segments, delta)
