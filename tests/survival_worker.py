"""The processes of a training that is killed, for test_survival_distributed.py.

    torchrun ... survival_worker.py FOLDER --die-step N [--steps N]     one of them
    survival_worker.py FOLDER --die-step N --processes N                all of them, and how each ended, into FOLDER/ends.json

Trains a layer with every stateful loss and Rank & Sort, each over all processes, and saves FOLDER/checkpoint.pt after every step. In the
first attempt the second process kills itself at the step: while the others wait in a collective, or under torchrun after forward. What
comes to the end trains once more from the start, undisturbed, into FOLDER/undisturbed.pt.
"""
import argparse
import datetime
import json
import os
import pathlib
import signal
import sys
import time

import harness
import torch
import torch.distributed as dist
from stateful_modules import CLASSES, ROWS, STATEFUL, Batch
from torch import Tensor, nn

import rsloss_kernels

SEED = 20
LOSSES = [one for one in STATEFUL.values() if one.takes_group]


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.linear = nn.Linear(CLASSES + 2, CLASSES + 2, dtype=torch.float64)
        self.ranking = rsloss_kernels.RankSortLoss(process_group="default", max_positives=4 * ROWS)
        self.losses = nn.ModuleList(one.make(process_group="default") for one in LOSSES)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch.with_logits(self.linear(batch.logits))
        total = sum(self.ranking(batch.logits[:, :CLASSES], batch.labels, batch.quality))
        return total + sum(one(loss, batch) for one, loss in zip(LOSSES, self.losses, strict=True))


def own_batch(step: int) -> Batch:
    """Parts of unequal size. In one step the last process has no positives, in the next one no rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = Batch.draw(harness.generator(SEED, f"step {step}"), ROWS * world)
    bounds = [ROWS * world * place**2 // world**2 for place in range(world + 1)]
    part = whole.part(slice(bounds[rank], bounds[rank + 1] if rank < world - 1 or step != 2 else bounds[rank]))
    if rank == world - 1 and step == 1:
        part.labels.fill_(CLASSES)
    return part


class Training:
    """Gradient descent with momentum. By hand: torch.optim and `DistributedDataParallel` take seconds to import."""

    def __init__(self):
        self.model = Detector()
        self.momentum = {name: torch.zeros_like(value) for name, value in self.model.named_parameters()}
        self.step = 0

    def load(self, path: pathlib.Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"], strict=True)
        self.momentum, self.step = state["momentum"], state["step"]

    def save(self, path: pathlib.Path) -> None:
        if dist.get_rank() == 0:
            state = {"model": self.model.state_dict(), "momentum": self.momentum, "step": self.step}
            torch.save(state, path.with_suffix(".unfinished"))
            path.with_suffix(".unfinished").replace(path)
        dist.barrier()

    @torch.no_grad()
    def descend(self) -> None:
        for name, parameter in self.model.named_parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
            self.momentum[name].mul_(0.9).add_(parameter.grad)
            parameter -= 1e-3 * self.momentum[name]
            parameter.grad = None

    def train(self, steps: int, path: pathlib.Path, die_step: int | None, in_collective: bool) -> None:
        while self.step < steps:
            dies = self.step == die_step and dist.get_rank() == 1
            if dies and in_collective:
                os.kill(os.getpid(), signal.SIGKILL)
            loss = self.model(own_batch(self.step))
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
            self.descend()
            self.step += 1
            self.save(path)


def train(options: argparse.Namespace) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # A store for each attempt: in one that outlives it a process may find the address of one that is dead.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.folder}/meet-{attempt}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=240),
    )
    training, checkpoint = Training(), options.folder / "checkpoint.pt"
    is_first = attempt == "0"
    if dist.get_rank() == 0 and is_first:
        torch.save(training.model.state_dict(), options.folder / "start.pt")
    if checkpoint.exists() and not is_first:
        training.load(checkpoint)
        (options.folder / "resumed_at").write_text(str(training.step))
    training.train(options.steps, checkpoint, options.die_step if is_first else None, options.processes > 0)
    del training
    Training().train(options.steps, options.folder / "undisturbed.pt", None, False)
    dist.destroy_process_group()


def fork(options: argparse.Namespace) -> None:
    """All processes out of this one, which has imported what they need."""
    ranks, ends = {}, {}
    for rank in range(options.processes):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.processes))
            os.dup2(os.open(options.folder / f"{rank}.errors", os.O_WRONLY | os.O_CREAT, 0o600), sys.stderr.fileno())
            status = 1
            try:
                train(options)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(status)
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        ends[ranks.pop(child)] = {"status": os.waitstatus_to_exitcode(status), "at": time.monotonic()}
    (options.folder / "ends.json").write_text(json.dumps([ends[rank] for rank in range(options.processes)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--die-step", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--processes", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fork(options) if options.processes else train(options)


if __name__ == "__main__":
    main()
