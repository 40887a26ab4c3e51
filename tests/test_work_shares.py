"""Pieces of work that tasks share (csrc/common/parallel.h): each is taken once, whichever task comes when."""
import pathlib
import shutil
import subprocess

import pytest
import torch
from rsloss_kernels import _build
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
#include <cstdio>
#include <cstdlib>

#include "common/parallel.h"

using rsloss::Shares;

void expect(bool holds, const char* what, long items, long tasks, long piece) {
  if (holds) return;
  std::printf("%s: %ld items, %ld tasks, pieces of %ld\\n", what, items, tasks, piece);
  std::exit(1);
}

// Tasks one after the other, from `first` on or back.
void take_all(Shares& shares, long items, long tasks, long piece, long first, long step) {
  std::vector<int> taken(items);
  std::vector<long> of_task(tasks);
  for (long i = 0; i < tasks; ++i) {
    const long task = ((first + i * step) % tasks + tasks) % tasks;
    shares.take(task, [&](int64_t begin, int64_t end) {
      expect(begin < end && end <= items && (end - 1) / piece == begin / piece, "no piece", items, tasks, piece);
      for (int64_t item = begin; item < end; ++item) ++taken[item], ++of_task[task];
    });
  }
  for (long item = 0; item < items; ++item) expect(taken[item] == 1, "not once", items, tasks, piece);
  if (items >= 4 * tasks * piece && tasks > 1) expect(of_task[first] > items / tasks + 1, "nothing taken over", items, tasks, piece);
}

int main() {
  for (long items = 0; items <= 60; ++items)
    for (long tasks = 1; tasks <= 9; ++tasks)
      for (long piece = 1; piece <= 5; ++piece)
        for (long first = 0; first < tasks; ++first)
          for (long step = -1; step <= 1; step += 2) {
            Shares shares(items, tasks, piece);
            take_all(shares, items, tasks, piece, first, step);
          }
  std::puts("done");
}
"""


@pytest.mark.skipif(shutil.which(_build.compiler()) is None, reason="needs a C++ compiler")
def test_every_piece_is_taken_once(tmp_path):
    (tmp_path / "shares.cpp").write_text(PROGRAM)
    includes = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    flags = ["-O1", "-std=c++17", "-DRSL_OWN_THREADS", *_build.STABLE_ABI, *includes]
    libraries = [f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-pthread"]
    command = [_build.compiler(), *flags, "shares.cpp", "-o", "shares", *libraries]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = {"LD_LIBRARY_PATH": str(pathlib.Path(torch.__file__).parent / "lib")}
    done = subprocess.run(["./shares"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.stdout == "done\n", done.stdout + done.stderr
