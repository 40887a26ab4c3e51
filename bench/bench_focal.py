"""Focal loss, EFL and EQL v2 against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_focal.py --quick
    python bench/bench_focal.py --must-show
    python bench/bench_focal.py --loss EFL --sizes 1e5 1e6 --classes 80 1203 --mode forward
"""
import argparse
import functools
import os
import pathlib
import sys
from dataclasses import replace

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import element_targets, focal_problems, harness, loss_bench, measures, targets  # noqa: E402
from bench.focal_problems import EFL, EQLV2, FOCAL_LOSS, MANY_CLASSES, Case, Inputs  # noqa: E402
from bench.peers.equalized import PublishedEQLv2, PublishedEqualizedFocal, modulated_truth  # noqa: E402
from bench.providers import COMPILED_FOCAL, FOCAL, Forward, Provider, focal_providers, peer, workload  # noqa: E402
from rsloss_kernels import (  # noqa: E402
    EQLv2Loss,
    EqualizedFocalLoss,
    eqlv2_loss,
    equalized_focal_loss,
    sigmoid_focal_loss,
)

PUBLISHED_EFL, PUBLISHED_EQLV2 = "published EFL", "published EQL v2"
PUBLISHED = {EFL: PUBLISHED_EFL, EQLV2: PUBLISHED_EQLV2}
LAYOUT = "anchor_major"
DENSE_FOCAL, FOCAL_CASE = (FOCAL_LOSS, 10**6, 80, "dense"), (FOCAL_LOSS, 10**6)
EFL_CASE, EQLV2_CASE = (EFL, 10**6, MANY_CLASSES), (EQLV2, 10**6, MANY_CLASSES)


class FocalBenchmark(loss_bench.OfOperator):
    """The element-wise sigmoid losses as the benchmark sees them."""

    operator = "focal_forward"
    stem, title, num_losses = "focal", "sigmoid_focal_loss, EqualizedFocalLoss and EQLv2Loss", 1
    problems = focal_problems.PROBLEMS

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor]:
        """The loss with a given state."""
        case = inputs.case
        with self.forced(backend, case.device):
            if case.loss == FOCAL_LOSS:
                return (sigmoid_focal_loss(logits, inputs.targets, reduction="sum"),)
            if case.loss == EFL:
                return (equalized_focal_loss(logits, inputs.labels[None], inputs.pos_neg, layout=LAYOUT).loss,)
            return (eqlv2_loss(logits, inputs.labels, inputs.pos_neg).loss,)

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        ratio, device = inputs.pos_neg, inputs.case.device
        if inputs.case.loss == FOCAL_LOSS:
            table = torch.tensor([2.0, 0.25, 0.75], dtype=torch.float64, device=device)
        elif inputs.case.loss == EFL:
            focus = 2 + 8 * (1 - ratio)
            table = torch.stack([focus, 0.25 * focus / 2, 0.75 * focus / 2])[:, :, None, None]
        else:
            negative = torch.cat([(12 * (ratio - 0.8)).sigmoid(), ratio.new_ones(1)])
            rows = len(inputs.logits)
            table = torch.stack([torch.zeros_like(negative), (1 + 4 * (1 - negative)) / rows, negative / rows])
        return modulated_truth(inputs.logits, inputs.dense, *table)

    def providers(self, case: Case) -> list[Provider]:
        ours = [self.ours(backend) for backend in self.backends(case.device)]
        published = [peer(PUBLISHED[case.loss], _published)] if case.loss in PUBLISHED else []
        return [*ours, *published, *focal_providers(lambda inputs: inputs.dense.to(inputs.logits.dtype))]

    def bind(self, inputs: Inputs, backend: str) -> Forward:
        """The equalized losses with their state, as in training."""
        case = inputs.case
        if case.loss == FOCAL_LOSS:
            return lambda logits: self.outputs(logits, inputs, backend)
        if case.loss == EFL:
            module, labels = EqualizedFocalLoss(case.classes, process_group=None, layout=LAYOUT), inputs.labels[None]
        else:
            module, labels = EQLv2Loss(case.classes, process_group=None), inputs.labels
        module.to(case.device)

        def forward(logits: Tensor) -> tuple[Tensor]:
            with self.forced(backend, case.device):
                return (module(logits, labels),)

        return forward


def _published(inputs: Inputs) -> Forward:
    case = inputs.case
    if case.loss == EFL:
        focal = PublishedEqualizedFocal(case.classes, device=case.device)
        return lambda logits: (focal([logits], inputs.labels),)
    loss = PublishedEQLv2(case.classes, device=case.device)
    return lambda logits: (loss(logits, inputs.labels),)


LOSS = FocalBenchmark()


def _narrow_speed(arguments: argparse.Namespace, report: targets.Rows) -> None:
    """bfloat16 and float16 beside float32, in turns."""
    if LOSS.why_not("cpp", "cpu"):
        return
    provider = LOSS.ours("cpp")
    for entry in (FOCAL_CASE, EFL_CASE):
        cases = [replace(LOSS.problems.make_case(arguments, *entry), dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]

        def build(seed: int, cases: list[Case] = cases) -> list[harness.Workload]:
            inputs = [LOSS.problems.make_inputs(replace(case, seed=seed)) for case in cases]
            return [workload(replace(provider, name=each.case.dtype), each, "full") for each in inputs]

        timings = measures.time_draws(arguments, build)
        for case in cases[1:]:
            got = timings[case.dtype].ratio_to(timings["float32"])
            report(f"{provider.name}, {case.title}, {arguments.cache}", 1.0, "x float32", got, targets.medians(timings, case.dtype, "float32"))


EQUALIZED_SPEED = [(EFL_CASE, {PUBLISHED_EFL: 1 / 25}), (EQLV2_CASE, {PUBLISHED_EQLV2: 1 / 8})]
TARGETS = element_targets.Targets(
    warm_speed=[*[(entry, {FOCAL: 0.15, COMPILED_FOCAL: 0.42}) for entry in (DENSE_FOCAL, FOCAL_CASE)], *EQUALIZED_SPEED],
    cold_speed=[*[(entry, {FOCAL: 0.18, COMPILED_FOCAL: 0.45}) for entry in (DENSE_FOCAL, FOCAL_CASE)], *EQUALIZED_SPEED],
    cuda_speed=[((FOCAL_LOSS, 2 * 10**7, 80, "dense"), 1.3), ((FOCAL_LOSS, 2 * 10**7), 1.3)],
    memory=[FOCAL_CASE, EFL_CASE, EQLV2_CASE],
    accuracy=[DENSE_FOCAL, FOCAL_CASE, (FOCAL_LOSS, 10**6, 80, "index", "init"), EFL_CASE, EQLV2_CASE],
    # Of EFL the smallest map.
    least={FOCAL_CASE: (FOCAL_LOSS, 80), EFL_CASE: (EFL, MANY_CLASSES, MANY_CLASSES), EQLV2_CASE: (EQLV2, MANY_CLASSES, MANY_CLASSES)},
    further=_narrow_speed,
)


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(element_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
