"""The shared ranking operators as Triton kernels: CUDA tensors, and CPU tensors under TRITON_INTERPRET=1.

One file per stage: `triton_collect`, `triton_bin`, `triton_backward`, and `triton_finalize` with everything that the last
operators of the losses have in common. Loops over positives end at their number, which stays on the device: no launch depends
on the data. Sums of floats have a fixed order. Layouts and derivation: README.md beside this file.
"""
from rsloss_kernels.losses.ranking.triton_backward import ranking_backward
from rsloss_kernels.losses.ranking.triton_bin import ranking_bin
from rsloss_kernels.losses.ranking.triton_collect import ranking_collect

__all__ = ["ranking_backward", "ranking_bin", "ranking_collect"]
