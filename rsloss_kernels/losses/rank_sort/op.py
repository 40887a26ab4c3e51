"""The operators of the Rank & Sort loss."""
from rsloss_kernels.losses.ranking.op import define_loss

define_loss("rank_sort", "rank_sort", ", bool upstream_parity", losses="ranking sorting")
