"""The operator of the aLRP loss. The quality of a positive is its regression loss here."""
from rsloss_kernels.losses.ranking.op import define_loss

define_loss("alrp", "alrp", "", losses="classification", statistics="rank")
