"""How far Bucketed Rank & Sort is from the exact loss: loss and gradient of both in float64, on the same logits.

    python bench/bench_bucketed.py                       prints the table
    python bench/bench_bucketed.py --must-show           delta = 0: equal to rounding; exit status 1 if not

Nothing is timed here; the bucketed loss takes part in the benchmark of the exact one. Options of other benchmarks are passed over.
"""
import argparse
import datetime
import pathlib
import sys

import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import harness, results  # noqa: E402
from bench.logits import Case, make_inputs  # noqa: E402
from bench.peers.brute_force import brute_force_rank_sort  # noqa: E402
from bench.peers.bucketed import bucketed_rank_sort_loss  # noqa: E402

LOSS = "bucketed"
NEGATIVES = 10**5
PROBLEMS = [(delta, kind, positives) for delta in (0.5, 0.0) for kind in ("init", "trained") for positives in (50, 1000)]
# Without ties the two are the same loss at delta = 0; what is left are the roundings of sums over the negatives.
LARGEST_AT_ZERO = 1e-10


def distance(delta: float, distribution: str, positives: int, negatives: int, seeds: list[int]) -> dict:
    """The worst over the draws. `gradient_largest`: the largest difference over the largest entry."""
    draws = []
    for seed in seeds:
        # float32 numbers, held in float64.
        inputs = make_inputs(Case(distribution, positives, negatives, dtype="float64", seed=seed))
        logits = untied(inputs.logits, inputs.dense > 0).requires_grad_()
        losses = bucketed_rank_sort_loss(logits, inputs.dense, delta)
        (got,) = torch.autograd.grad(losses, logits)
        ranking, _, wanted = brute_force_rank_sort(logits, inputs.dense, delta)
        draws.append(
            {
                "ranking_loss": (losses[0] - ranking).abs().item(),
                "gradient_l2": ((got - wanted).norm() / wanted.norm()).item(),
                "gradient_largest": ((got - wanted).abs().max() / wanted.abs().max()).item(),
                "gradient_cosine": min(torch.cosine_similarity(got, wanted, dim=0).item(), 1.0),
            }
        )
    problem = {"distribution": distribution, "positives": positives, "negatives": negatives, "delta": delta}
    worst = {name: max(draw[name] for draw in draws) for name in draws[0]}
    return problem | worst | {"gradient_cosine": min(draw["gradient_cosine"] for draw in draws)}


def untied(logits: torch.Tensor, is_positive: torch.Tensor) -> torch.Tensor:
    """Positives moved by less than a float32 can tell, so that none has the logit of a negative: tie orders differ by design."""
    return torch.where(is_positive, logits + 2.0**-40, logits)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--must-show", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few negatives, one draw; not for a results file")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path)
    arguments, _ = parser.parse_known_args(argv)
    torch.set_num_threads(arguments.threads)
    negatives, seeds = (NEGATIVES // 10, arguments.seeds[:1]) if arguments.quick else (NEGATIVES, arguments.seeds)
    records = []
    for delta, distribution, positives in PROBLEMS:
        record = distance(delta, distribution, positives, negatives, seeds)
        records.append(record)
        figures = ", ".join(f"{name} {value:.3g}" for name, value in record.items() if isinstance(value, float) and name != "delta")
        print(f"delta {delta:g}, {distribution} P={positives} N={negatives}: {figures}", flush=True)
    if arguments.out and not arguments.quick:
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        shared = {"date": date, "threads": arguments.threads, "seeds": seeds, "budget_s": 0, "foreign_load": None, "cache": "-"}
        section = {"distance": {"settings": shared, "records": records}}
        print(f"wrote {results.update(arguments.out, LOSS, harness.machine('cpu'), section)}")
    exact = [record for record in records if record["delta"] == 0]
    return int(arguments.must_show and any(record["gradient_largest"] > LARGEST_AT_ZERO for record in exact))


if __name__ == "__main__":
    sys.exit(main())
