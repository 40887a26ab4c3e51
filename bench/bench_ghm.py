"""GHM-C and GHM-R against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_ghm.py --quick
    python bench/bench_ghm.py --must-show
    python bench/bench_ghm.py --loss GHM-R --sizes 1e5 1e6 --bins 10 30 --mode forward
"""
import argparse
import contextlib
import functools
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import rsloss_kernels  # noqa: E402
from bench import ghm_problems, loss_bench, targets  # noqa: E402
from bench.ghm_problems import BOXES, CLASSES, MU, Case, Inputs, make_case  # noqa: E402
from bench.peers.ghm import PublishedGHMC, PublishedGHMR, ghm_truth  # noqa: E402
from bench.providers import FOCAL, Forward, Provider, focal_providers, peer  # noqa: E402
from rsloss_kernels import ghm_classification_loss, ghm_regression_loss  # noqa: E402

PUBLISHED, SMOOTH_L1 = "MMDetection's", "smooth L1, eager"
# Of the loss, of the gradient.
LIMITS = 1e-7, 2e-6
ACCURACY = [
    (CLASSES, 10**6, 30, "dense"),
    (CLASSES, 10**6, 10, "index"),
    (CLASSES, 10**6, 10, "index", 0.0, "init"),
    (BOXES, 10**6, 10, "dense"),
]
# (case; largest ratio to MMDetection's, largest ratio to the copy, None: told only)
CPU_SPEED = [
    ((CLASSES, 10**6, 10, "dense"), 1 / 15, 2.5),
    ((CLASSES, 10**6, 30, "dense"), 1 / 20, 4.0),
    ((CLASSES, 10**6, 10, "index"), 1 / 15, None),
    ((CLASSES, 10**6, 30, "index"), 1 / 20, None),
    ((BOXES, 10**6, 10, "dense"), 1 / 15, None),
]
# Captured; (case, largest ratio to the copy).
CUDA_SPEED = [((CLASSES, 2 * 10**7, 10, "index"), 1.5), ((CLASSES, 2 * 10**7, 10, "dense"), 1.5), ((BOXES, 2 * 10**7, 10, "dense"), 1.5)]


class GHMLoss(loss_bench.OfOperator):
    """Both losses as the benchmark sees them."""

    operator = "ghm_finalize"
    stem, title, num_losses = "ghm", "ghm_classification_loss and ghm_regression_loss", 1
    problems = ghm_problems.PROBLEMS

    def name(self, backend: str) -> str:
        return f"ghm [{backend}]"

    def outputs(self, logits: Tensor, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        """The loss, with momentum the new state too."""
        case = inputs.case
        options = {"bins": case.bins}
        if case.momentum:
            options |= {"momentum": case.momentum, "acc_sum": torch.zeros(case.bins, device=case.device)}
        function = ghm_classification_loss if case.loss == CLASSES else functools.partial(ghm_regression_loss, mu=MU)
        is_automatic = self.is_automatic(backend, case.device)
        with contextlib.nullcontext() if is_automatic else rsloss_kernels.use_backend(backend):
            got = function(logits, inputs.targets, inputs.weights, **options)
        return got if isinstance(got, tuple) else (got,)

    def truth(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        weights = inputs.weights
        if weights is not None and weights.dim() == 1:
            weights = weights[:, None].expand(inputs.logits.shape)
        return ghm_truth(inputs.logits, inputs.dense, weights, inputs.case.bins, None if inputs.case.loss == CLASSES else MU)

    def providers(self, case: Case) -> list[Provider]:
        others = focal_providers(lambda inputs: inputs.dense.to(inputs.logits.dtype)) if case.loss == CLASSES else [SMOOTH_L1_PROVIDER]
        return [self._ours(backend) for backend in self.backends(case.device)] + [peer(PUBLISHED, _published), *others]

    def _ours(self, backend: str) -> Provider:
        def bind(inputs: Inputs) -> Forward:
            return lambda logits: self.outputs(logits, inputs, backend)[:1]

        return Provider(self.name(backend), bind, is_ours=True, can_capture=backend != "reference")


def _published(inputs: Inputs) -> Forward:
    case, weights = inputs.case, inputs.weights
    weights = torch.ones_like(inputs.dense) if weights is None else weights
    targets_of_form = inputs.targets if case.form == "index" else inputs.dense
    loss = PublishedGHMC(case.bins, case.momentum) if case.loss == CLASSES else PublishedGHMR(MU, case.bins, case.momentum)
    return lambda logits: (loss(logits, targets_of_form, weights),)


def _smooth_l1(inputs: Inputs) -> Forward:
    def forward(preds: Tensor) -> tuple[Tensor]:
        losses = torch.nn.functional.smooth_l1_loss(preds, inputs.targets.to(preds.dtype), reduction="none", beta=1 / 9)
        return ((losses * inputs.weights).sum(),)

    return forward


SMOOTH_L1_PROVIDER = Provider(SMOOTH_L1, _smooth_l1)
LOSS = GHMLoss()


def check(arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every row. Forward + gradient through autograd; medians of alternating runs, over the seeds."""
    report = targets.Rows()
    if arguments.device == "cuda":
        compiled, sizes = ["cuda", "triton"], [case for case, _ in CUDA_SPEED]
        targets.captured(LOSS, arguments, report, [(make_case(arguments, *entry), limit) for entry, limit in CUDA_SPEED])
    else:
        compiled, sizes = ["cpp"], [case for case, *_ in CPU_SPEED]
        _cpu_speed(arguments, report)
    for backend in compiled:
        for entry in sizes:
            case = make_case(arguments, *entry)
            limit = case.size * getattr(torch, case.dtype).itemsize + targets.MEBIBYTE
            targets.memory(LOSS, backend, case, limit, arguments, report)
    backends = list(dict.fromkeys([*compiled, *LOSS.backends(arguments.device)]))
    for entry in ACCURACY:
        targets.accuracy(LOSS, make_case(arguments, *entry), backends, LIMITS, report)
    return report.close()


def _cpu_speed(arguments: argparse.Namespace, report: targets.Rows) -> None:
    ours, missing = LOSS.name("cpp"), LOSS.why_not("cpp", "cpu")
    for entry, of_published, of_copy in CPU_SPEED:
        case = make_case(arguments, *entry)
        timings, _ = targets.time_case(LOSS, arguments, case, [ours, PUBLISHED, FOCAL])
        for other, limit in ((PUBLISHED, of_published), (loss_bench.COPY, of_copy)):
            got = timings[ours].ratio_to(timings[other]) if ours in timings else None
            report(f"{ours}, {case.title}", limit, f"x {other}", got, missing or targets.medians(timings, ours, other))


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, check, __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
