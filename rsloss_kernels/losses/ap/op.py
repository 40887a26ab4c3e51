"""The operators of the AP loss."""
from rsloss_kernels.losses.ranking.op import define_loss

define_loss("ap", "average_precision", ", bool interpolated", losses="loss")
