"""Balanced group softmax against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_group_softmax.py --quick
    python bench/bench_group_softmax.py --must-show
    python bench/bench_group_softmax.py --rows 512 4096 --classes instances --ratio 1 --mode forward
"""
import functools
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from bench import element_targets, group_softmax_problems, harness, loss_bench  # noqa: E402
from bench.group_softmax_problems import Case, Inputs  # noqa: E402
from bench.peers.group_softmax import PublishedGroupSoftmax, group_softmax_truth  # noqa: E402
from bench.providers import Forward, Provider, peer  # noqa: E402
from rsloss_kernels import group_softmax_loss  # noqa: E402

PUBLISHED, PLAIN = "published groups", "plain softmax, eager"
SIZES = [(512,), (2048,)]
TARGETS = element_targets.Targets(
    # Sampling included.
    warm_speed=[
        (entry, {PUBLISHED: 1 / 16, harness.COPY: 2.0, PLAIN: None}) for entry in (*SIZES, (512, "instances"), (2048, "instances"))
    ],
    cuda_speed=[((8192,), 1.5)],
    memory=SIZES,
    accuracy=[(2048,), (512, "instances")],
    least={(512,): (8,), (2048,): (8,), (512, "instances"): (8, "instances"), (2048, "instances"): (8, "instances")},
)


class GroupSoftmaxBenchmark(loss_bench.OfOperator):
    operator = "group_softmax_forward"
    stem, title, num_losses = "group_softmax", "group_softmax_loss", 1
    problems = group_softmax_problems.PROBLEMS

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor]:
        """For the accuracy all others are kept: a sample would differ from that of the truth."""
        return self._total(logits, inputs, backend, sample_weights=torch.ones_like(torch.stack(inputs.mapped), dtype=torch.float32))

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        mapped = inputs.mapped
        return group_softmax_truth(inputs.logits, mapped, inputs.slices, torch.ones_like(torch.stack(mapped), dtype=torch.float64))

    def providers(self, case: Case) -> list[Provider]:
        ours = [self.ours(backend) for backend in self.backends(case.device)]
        return [*ours, peer(PUBLISHED, _published), Provider(PLAIN, _plain_softmax)]

    def bind(self, inputs: Inputs, backend: str) -> Forward:
        return lambda logits: self._total(logits, inputs, backend, others_ratio=inputs.case.others_ratio)

    def _total(self, logits: Tensor, inputs: Inputs, backend: str, **options) -> tuple[Tensor]:
        with self.forced(backend, inputs.case.device):
            return (group_softmax_loss(logits, inputs.labels, inputs.groups, **options).sum(),)


def _published(inputs: Inputs) -> Forward:
    ratio = min(inputs.case.others_ratio, 1e9)
    loss = PublishedGroupSoftmax(inputs.maps, inputs.slices, ratio)
    return lambda logits: (sum(loss(logits, inputs.labels)),)


def _plain_softmax(inputs: Inputs) -> Forward:
    """One softmax over all columns: what a detector pays anyway."""
    return lambda logits: (cross_entropy(logits, inputs.labels),)


LOSS = GroupSoftmaxBenchmark()


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(element_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
