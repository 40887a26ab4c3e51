"""The last operator of the AP loss's forward."""
from rsloss_kernels.losses.ranking.op import define_finalize

define_finalize("ap", "average_precision_finalize", ", bool interpolated", losses="loss")
