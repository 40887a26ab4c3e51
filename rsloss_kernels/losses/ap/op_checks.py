"""Checks of the arguments of `average_precision_finalize`, for the backends written in Python."""
from rsloss_kernels.losses.ranking import op_checks as ranking


def average_precision_finalize(
    logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, interpolated
) -> None:
    ranking.check_finalize(
        "average_precision_finalize", logits, negatives, ranked, counts, bins, segments, num_segments, delta
    )
