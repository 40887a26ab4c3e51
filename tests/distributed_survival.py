"""What the processes of distributed_worker.py do with stateful losses inside of DistributedDataParallel: broadcast buffers, several batches
before a step, torch.compile."""
import copy
import warnings

import harness
import torch
import torch.distributed as dist
from stateful_modules import CLASSES, ROWS, STATEFUL, Batch, Stateful, state_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 3


class Head(nn.Module):
    """A layer and the loss behind it, as a detector's head holds it."""

    def __init__(self, one: Stateful, **options):
        super().__init__()
        self.one = one
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, CLASSES + 2, dtype=torch.float64))
        self.loss = one.make(**options)

    def forward(self, batch: Batch) -> Tensor:
        return self.one(self.loss, batch.with_logits(batch.logits * self.scale))


def batches(seed: int, rank: int) -> list[Batch]:
    """Of one process: in its second step the second process has nothing."""
    generator = harness.generator(seed, f"survival {rank}")
    return [Batch.draw(generator, 0 if (rank, step) == (1, 1) else ROWS) for step in range(STEPS)]


def replicated(head: Head, group, **options) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 has another name for `broadcast_buffers`.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(head, process_group=group, **options)


def steps(one: Stateful, group, seed: int, own_group: object | None, broadcast_buffers: bool) -> list[dict]:
    """Of each step the state before and after it, the loss, and the gradient."""
    head = Head(one, process_group=own_group) if one.takes_group else Head(one)
    network, result = replicated(head, group, broadcast_buffers=broadcast_buffers), []
    for batch in batches(seed, dist.get_rank(group)):
        before = state_of(head.loss)
        head.scale.grad = None
        loss = network(batch)
        loss.backward()
        found = {"before": before, "after": state_of(head.loss), "loss": loss.detach(), "gradient": head.scale.grad.clone()}
        result.append(found)
    return result


def accumulate(one: Stateful, group, seed: int) -> dict:
    """Two batches, of which the second synchronises; and both gradients, each synchronised by itself."""
    results = {}
    for name in ("together", "apart"):
        head = Head(one, process_group=group)
        network, gradients = replicated(head, group), []
        for number, batch in enumerate(batches(seed, dist.get_rank(group))[::2]):
            if name == "together" and number == 0:
                with network.no_sync():
                    network(batch).backward()
            else:
                network(batch).backward()
            if name == "apart":
                gradients.append(head.scale.grad.clone())
                head.scale.grad = None
        results[name] = (head.scale.grad.clone() if name == "together" else sum(gradients), state_of(head.loss))
    return results


def break_one(one: Stateful, group, seed: int) -> list[dict]:
    """The state after a step, after one in which the second process alone has NaN, and after another one."""
    head, states = Head(one, process_group=group), []
    first, _, last = batches(seed, dist.get_rank(group))
    for step, batch in enumerate((first, first, last)):
        if step == 1 and dist.get_rank(group) == 1:
            batch.logits[0] = batch.quality[0] = torch.nan
        head(batch).backward()
        states.append(state_of(head.loss))
    return states


def compiled(group, seed: int) -> dict:
    """A step of DistributedDataParallel with and without torch.compile, and the state."""
    results = {}
    for name in ("eager", "compiled"):
        head = Head(STATEFUL["ghm_c"], process_group=group)
        network = replicated(head, group)
        if name == "compiled":
            network = torch.compile(network, backend="aot_eager")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in batches(seed, dist.get_rank(group))[::2]:
                network(batch).backward()
        results[name] = (head.scale.grad.clone(), state_of(head.loss))
    return results


def all_results(group, seed: int) -> dict:
    results = {}
    for name, one in STATEFUL.items():
        for own in (None, group) if one.takes_group else (None,):
            for broadcast in (True, False):
                results[name, own is not None, broadcast] = steps(one, group, seed, own, broadcast)
        if one.takes_group:
            results[name, "accumulate"] = accumulate(one, group, seed)
            results[name, "broken"] = break_one(one, group, seed)
    results["compiled"] = compiled(group, seed)
    results["copy"] = copy.deepcopy(Head(STATEFUL["seesaw"], process_group=group)).loss.process_group is group
    return results
