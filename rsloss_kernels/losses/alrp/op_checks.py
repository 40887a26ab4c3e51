"""Checks of the arguments of `alrp_finalize`, for the backends written in Python."""
from rsloss_kernels.losses.ranking import op_checks as ranking


def alrp_finalize(logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale) -> None:
    ranking.check_finalize("alrp_finalize", logits, negatives, ranked, counts, bins, segments, num_segments, delta)
