"""Rank & Sort loss against the field: time or memory over a grid of problems, or the rows that must hold (`--must-show`).

    python bench/bench_rank_sort.py --quick
    python bench/bench_rank_sort.py --must-show
    python bench/bench_rank_sort.py --mode forward --positives 1000 --negatives 1e5 1e6 --dtype bfloat16
"""
import functools
import os
import pathlib
import sys

# Compiling in this process keeps it apart from the load that others put on the machine.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import loss_bench, ranking_scale, ranking_targets  # noqa: E402
from bench import ranking_providers as field  # noqa: E402
from bench.peers.brute_force import brute_force_rank_sort  # noqa: E402
from bench.peers.bucketed import bucketed_rank_sort_loss  # noqa: E402
from bench.peers.published_loop import published_rank_sort  # noqa: E402
from bench.peers.vectorised import compiled_rank_sort, vectorised_rank_sort  # noqa: E402
from bench.providers import COMPILED_FOCAL, FOCAL, peer  # noqa: E402
from bench.targets import Aim  # noqa: E402
from rsloss_kernels import rank_sort_loss  # noqa: E402

DELTA = 0.5
OWN_FOCAL = f"{field.OWN_FOCAL} [cpp]"


def _call(logits, inputs, **options):
    return rank_sort_loss(logits, inputs.targets, inputs.quality, delta=DELTA, **options)


def _dense(function):
    return lambda inputs: lambda logits: function(logits, inputs.dense, DELTA)


LOSS = field.RankingLoss(
    stem="rank_sort",
    function="rank_sort_loss",
    operator="rank_sort_finalize",
    delta=DELTA,
    num_losses=2,
    call=_call,
    peers=(
        peer(field.LOOP, _dense(published_rank_sort), field.limit("P*N", field.LOOP_PAIRS)),
        peer("bucketed", _dense(bucketed_rank_sort_loss), field.limit("P*P", field.SQUARE)),
        peer("vectorised", _dense(vectorised_rank_sort), field.both_limits(field.BROADCAST_PAIRS)),
        peer(
            "vectorised, torch.compile", _dense(compiled_rank_sort), field.both_limits(field.FUSED_PAIRS), is_compiled=True
        ),
    ),
    truth=lambda inputs: brute_force_rank_sort(inputs.logits, inputs.dense, DELTA),
)
TARGETS = ranking_targets.Targets(
    warm_speed=(
        ("trained", 1000, 10**6, {FOCAL: 0.14, COMPILED_FOCAL: 0.40, OWN_FOCAL: Aim(1.0), field.LOOP: 1 / 250}),
        ("init", 1000, 10**6, {FOCAL: 0.22, COMPILED_FOCAL: 0.60, OWN_FOCAL: Aim(1.4)}),
        ("trained", 200, 10**5, {FOCAL: 0.50}),
        ("trained", 20000, 10**6, {FOCAL: 1.5}),
    ),
    cold_speed=(
        ("trained", 1000, 10**6, {FOCAL: 0.20, field.LOOP: 1 / 250}),
        ("init", 1000, 10**6, {FOCAL: 0.30}),
        ("trained", 200, 10**5, {FOCAL: 0.50}),
        ("trained", 20000, 10**6, {FOCAL: 1.5}),
    ),
    cuda_speed=(("trained", 1000, 2 * 10**6, None, 40.0), ("trained", 3000, 2 * 10**7, COMPILED_FOCAL, 2.0)),
    reference_to_loop=0.25,
    scale=(
        ranking_scale.narrow_type,
        ranking_scale.kept_outputs,
        ranking_scale.tiny_call,
        ranking_scale.import_of_the_package,
        ranking_scale.equal_segments,
        ranking_scale.many_positives,
        ranking_scale.two_processes,
    ),
)


def main(argv: list[str] | None = None) -> int:
    return loss_bench.main(LOSS, functools.partial(ranking_targets.check, LOSS, TARGETS), __file__, argv)


if __name__ == "__main__":
    sys.exit(main())
