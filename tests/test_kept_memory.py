"""Large gradients of the C++ backend lie in memory that is kept from step to step: nobody may notice but the clock."""
import os
import subprocess
import sys
import threading

import pytest
import torch

import rsloss_kernels
from rsloss_kernels import _backends

SHAPE = (2048, 80)  # 640 KiB of float32

pytestmark = pytest.mark.skipif("cpp" not in _backends.usable("focal_forward", "cpu"), reason="the C++ library is not there")


def gradient(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(SHAPE, generator=generator, requires_grad=True)
    labels = torch.randint(0, SHAPE[1] + 1, SHAPE[:1], generator=generator)
    with rsloss_kernels.use_backend("cpp"):
        rsloss_kernels.sigmoid_focal_loss(logits, labels, reduction="sum").backward()
    return logits.grad


def test_memory_comes_back_and_what_was_in_it_does_not():
    first = gradient(0)
    expected, address = first.clone(), first.data_ptr()
    first.fill_(float("nan"))
    del first
    second = gradient(0)
    assert second.data_ptr() == address
    assert torch.equal(second, expected)


def test_gradients_that_live_together_lie_apart():
    gradients = [gradient(seed) for seed in range(4)]
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in gradients)
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:], strict=False))
    assert all(torch.equal(tensor, gradient(seed)) for seed, tensor in enumerate(gradients))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in gradients)


def test_threads_do_not_share_blocks():
    expected = [gradient(seed) for seed in range(4)]
    wrong = []

    def work(seed):
        wrong.extend(step for step in range(20) if not torch.equal(gradient(seed), expected[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("mebibytes", ["8", "64"])
def test_no_more_stays_than_is_allowed(mebibytes):
    """32 gradients of 4 MiB let go at once: what stays of them is at most the limit, within what else a process allocates."""
    program = """
import torch, rsloss_kernels
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024
logits = torch.randn(1 << 20, requires_grad=True)
targets = torch.zeros(1 << 20)
def step(): return torch.autograd.grad(rsloss_kernels.sigmoid_focal_loss(logits, targets, reduction="sum"), logits)[0]
for _ in range(3): step()
before = resident()
kept = [step() for _ in range(32)]
held = resident()
del kept
print(held - before, resident() - before)
"""
    environment = {**os.environ, "RSLOSS_KEPT_MEMORY_MIB": mebibytes, "RSLOSS_BACKEND": "cpp"}
    output = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout
    held, stays = map(int, output.split())
    assert held >= 110
    assert stays <= int(mebibytes) + 12
