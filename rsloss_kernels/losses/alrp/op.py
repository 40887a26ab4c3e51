"""The last operator of the aLRP loss's forward. The quality of a positive is its regression loss here."""
from rsloss_kernels.losses.ranking.op import define_finalize

define_finalize("alrp", "alrp_finalize", "", losses="classification", statistics="rank")
