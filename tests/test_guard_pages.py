"""No Triton kernel touches anything outside of its tensors: see guard_pages.py."""
import pathlib
import re
import sys

import processes
import pytest
from harness import Backend, backends_under_test

PROGRAM = pathlib.Path(__file__).with_name("guard_pages.py")
INTERPRETED = [backend for backend in backends_under_test() if backend == Backend("triton", "cpu")]


@pytest.mark.parametrize("kernels", INTERPRETED, ids=lambda backend: backend.id)
def test_no_kernel_leaves_its_tensors(kernels):
    """Kernels that read or write one element too far die there, on both sides; all of the library's live."""
    done = processes.run([sys.executable, str(PROGRAM), "--quick"], 600)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    for side, words in (("end", "too far"), ("start", "too early")):
        for what in ("reads", "writes"):
            assert f"ok   {side}, a kernel that {what} one {words}: status -11" in done.stdout
        assert f"ok   {side}, a kernel that is right: lives" in done.stdout
        calls, launched = map(int, re.search(rf"{side}: (\d+) calls of losses, (\d+) kernels", done.stdout).groups())
        assert calls >= (4 if side == "end" else 2) * 19 and launched >= 43
