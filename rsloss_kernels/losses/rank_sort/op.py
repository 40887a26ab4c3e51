"""The last operator of the Rank & Sort forward."""
from rsloss_kernels.losses.ranking.op import define_finalize

define_finalize("rank_sort", "rank_sort_finalize", ", bool upstream_parity", losses="ranking sorting")
