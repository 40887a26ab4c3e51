"""One ranking over several processes: what it costs against one process on the same elements, and that the numbers are the same.

    python bench/world.py --loss rank_sort --processes 2 --backend gloo
    python bench/world.py --loss rank_sort --processes 2 --backend nccl     one GPU for each process

Losses, and gradients with `average_gradients=False`, must equal those of one process on all elements bit by bit; else it raises.
"""
import argparse
import datetime
import importlib
import json
import pathlib
import sys
import tempfile
import time

import torch
import torch.distributed
import torch.multiprocessing

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench.logits import Case, make_inputs  # noqa: E402

# Medians over the rounds of the slowest process, seconds of forward + gradient.
MEANING = {
    "whole": "one process, all threads",
    "together": "one ranking over all processes",
    "apart": "every process its own ranking",
}
TIMEOUT = datetime.timedelta(seconds=60)
WARM_UPS, MOST_ROUNDS = 3, 100


def measure(stem: str, case: Case, processes: int, backend: str, threads: int, budget: float) -> dict[str, float]:
    """Seconds by the keys of MEANING; `threads` are shared out among the processes, `budget` seconds go to each kind of call."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (stem, case.as_dict(), processes, backend, threads, budget, folder)
        torch.multiprocessing.start_processes(_process, arguments, processes, start_method="spawn")
        return json.loads((pathlib.Path(folder) / "times.json").read_text())


def _process(rank: int, stem: str, case: dict, processes: int, backend: str, threads: int, budget: float, folder: str) -> None:
    loss = importlib.import_module(f"bench.bench_{stem}").LOSS
    case = Case(**case)
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    device = torch.device(case.device, rank) if case.device == "cuda" else torch.device("cpu")
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=TIMEOUT
    )
    inputs = make_inputs(case)
    share = inputs.share(rank, processes)
    group = torch.distributed.group.WORLD

    def step(part, **options):
        leaf = part.logits.detach().clone().requires_grad_()
        torch.distributed.barrier()
        start = time.perf_counter()
        losses = loss.outputs(leaf, part, **options)[: loss.num_losses]
        (gradient,) = torch.autograd.grad(losses, leaf)
        if case.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, [value.detach() for value in losses], gradient

    def sample() -> list[float]:
        """One call of every kind. Only the first process computes the whole batch, with all threads, the others wait."""
        torch.set_num_threads(threads)
        whole = step(inputs)[0] if rank == 0 else torch.distributed.barrier() or 0.0
        torch.set_num_threads(max(threads // processes, 1))
        return [whole, step(share, process_group=group)[0], step(share)[0]]

    _, losses, gradient = step(inputs)
    _, shared_losses, shared_gradient = step(share, process_group=group, average_gradients=False)
    size = share.logits.shape[0]
    start = rank * -(-inputs.logits.shape[0] // processes)
    same = all(torch.equal(one, other) for one, other in zip(losses, shared_losses, strict=True))
    if not same or not torch.equal(gradient[start : start + size], shared_gradient):
        raise AssertionError(f"{loss.function}: process {rank} of {processes} differs from one process on all elements")

    # As many rounds on every process.
    warm_up = [sample() for _ in range(WARM_UPS)]
    rounds = torch.tensor([min(MOST_ROUNDS, 1 + int(budget / max(warm_up[-1])))], device=device)
    torch.distributed.all_reduce(rounds, torch.distributed.ReduceOp.MIN)
    samples = torch.tensor([sample() for _ in range(int(rounds))], device=device)
    torch.distributed.all_reduce(samples, torch.distributed.ReduceOp.MAX)
    if rank == 0:
        median = samples.median(0).values.tolist()
        (pathlib.Path(folder) / "times.json").write_text(json.dumps(dict(zip(MEANING, median, strict=True))))
    torch.distributed.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", default="rank_sort", help="stem of a bench_<stem>.py of a ranking loss")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--threads", type=int, default=2, help="of one process; shared out among several")
    parser.add_argument("--positives", type=lambda text: int(float(text)), default=1000)
    parser.add_argument("--negatives", type=lambda text: int(float(text)), default=10**6)
    parser.add_argument("--form", choices=("dense", "index"), default="dense")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds")
    arguments = parser.parse_args(argv)
    device = "cuda" if arguments.backend == "nccl" else "cpu"
    if device == "cuda" and torch.cuda.device_count() < arguments.processes:
        parser.error(f"--backend nccl --processes {arguments.processes}: there are {torch.cuda.device_count()} GPUs")
    capacity = 1 << (2 * arguments.positives - 1).bit_length()
    case = Case("trained", arguments.positives, arguments.negatives, arguments.form, device=device, max_positives=capacity)
    times = measure(arguments.loss, case, arguments.processes, arguments.backend, arguments.threads, arguments.budget)
    print(f"{arguments.loss}, {case.title}, {arguments.processes} processes ({arguments.backend}): same bits as one process")
    for key, words in MEANING.items():
        print(f"  {words:<32} {times[key] * 1e3:8.4g} ms")
    print(f"  one ranking over all processes costs {times['together'] / times['whole']:.3g} x one process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
