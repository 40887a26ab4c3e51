"""The levels of a head as they come against the same levels put together: time or memory, or the rows that must hold (`--must-show`).

    python bench/bench_maps.py --quick
    python bench/bench_maps.py --must-show
    python bench/bench_maps.py --loss rank_sort --pixels 256 512 --anchors 1 9

A head leaves maps [B, A * C, H, W]; losses of rows want [B, K, C], so detectors permute and concatenate, and backward does it again.
"""
import argparse
import pathlib
import sys
from dataclasses import replace

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from torch import Tensor  # noqa: E402

from bench import element_targets, loss_bench, map_problems, targets  # noqa: E402
from bench.logits import NUM_CLASSES  # noqa: E402
from bench.map_problems import RANK_SORT, Case, Inputs, rows_of  # noqa: E402
from bench.providers import Forward, Provider, focal_providers  # noqa: E402
from rsloss_kernels import rank_sort_loss, sigmoid_focal_loss  # noqa: E402

TOGETHER = "cat + permute"
LIMITS = {"cpu": [(loss, 2, 512) for loss in (map_problems.FOCAL_LOSS, RANK_SORT)]}
LIMITS["cuda"] = [(entry[0], 4, 800) for entry in LIMITS["cpu"]]
# Of the rows that are ranked: the tables of a positive.
TABLE_BYTES = 600


class MapsBenchmark(loss_bench.OfOperator):
    operator = "rank_sort_finalize"
    stem, title = "maps", "losses of maps"
    problems = map_problems.PROBLEMS

    def call(self, logits: Tensor | list[Tensor], inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        """Of maps, or of rows [B, K, C]."""
        options = {} if isinstance(logits, Tensor) else {"layout": "anchor_major", "num_classes": NUM_CLASSES}
        with self.forced(backend, inputs.case.device):
            if inputs.case.loss == RANK_SORT:
                return rank_sort_loss(logits, inputs.labels, inputs.quality, **options)
            return (sigmoid_focal_loss(logits, inputs.labels, reduction="sum", **options),)

    def providers(self, case: Case) -> list[Provider]:
        backends = self.backends(case.device)
        together = [of_rows(replace(self.ours(backend), name=f"[{backend}]", is_ours=False)) for backend in backends]
        eager, *_ = focal_providers(lambda inputs: inputs.dense.to(inputs.logits[0].dtype))
        return [*(self.ours(backend) for backend in backends), *together, of_rows(eager)]

    def bind(self, inputs: Inputs, backend: str) -> Forward:
        return lambda maps: self.call(maps, inputs, backend)


def of_rows(provider: Provider) -> Provider:
    """The same on the levels put together, in forward and, by autograd, in backward."""

    def bind(inputs: Inputs) -> Forward:
        forward = provider.bind(inputs)
        return lambda maps: forward(rows_of(maps))

    return replace(provider, name=f"{TOGETHER} {provider.name}", bind=bind)


LOSS = MapsBenchmark()


def check(arguments: argparse.Namespace) -> list[dict]:
    """Maps cost no more time than the rows alone would with their copies, and no more memory than the rows without them."""
    report = targets.Rows()
    for backend in ["cpp"] if arguments.device == "cpu" else ["cuda", "triton"]:
        for entry in LIMITS[arguments.device]:
            case = LOSS.problems.make_case(arguments, *entry)
            other = f"{TOGETHER} [{backend}]"
            element_targets.compare(LOSS, backend, case, {other: 1.0}, targets.changed(arguments, cache="cold"), report)
            inputs = LOSS.problems.make_inputs(case)
            tables = inputs.elements / 8 + TABLE_BYTES * case.images * map_problems.OBJECTS if case.loss == RANK_SORT else 0
            targets.memory(LOSS, backend, case, inputs.gradient_bytes + tables + targets.MEBIBYTE, arguments, report)
    return report.close()


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, check, __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
