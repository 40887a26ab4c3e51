"""What the processes of distributed_worker.py do with GHM-C and GHM-R: see there."""

import copy
import dataclasses

import distributed_worker as worker
import harness
import torch
import torch.distributed as dist
from ghm_samples import GHM_LOSSES, GHMSample
from torch import Tensor

import rsloss_kernels

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    loss: str
    backend: str
    sample: GHMSample
    split: str = "uneven"
    average: bool = False
    nan: bool = False
    reduction: str = "mean"

    @property
    def name(self) -> str:
        words = [self.loss, self.backend, self.sample.name, self.split, self.reduction]
        return " ".join([*words, *["average"] * self.average, *["nan"] * self.nan])


def _cases():
    dense = GHMSample("dense", worker.ROWS, 5, weight="element", bins=30, momentum=0.75, is_corrected=True)
    index = GHMSample("index", worker.ROWS, 5, form="index", weight="row", momentum=0.5, empty_bins="count")
    wide = dataclasses.replace(dense, name="float64", dtype=torch.float64, is_corrected=False)
    narrow = GHMSample("bfloat16", worker.ROWS, 5, dtype=torch.bfloat16, bins=256)
    for backend in worker.BACKENDS:
        for loss in GHM_LOSSES:
            for split in worker.SPLITS:
                yield Case(loss, backend, dense, split)
            yield Case(loss, backend, wide)
            yield Case(loss, backend, narrow, "empty", average=True)
            yield Case(loss, backend, dense, average=True)
            yield Case(loss, backend, dense, nan=True)
            yield Case(loss, backend, dense, reduction="none")
        yield Case("ghm_classification", backend, index)
        yield Case("ghm_classification", backend, index, "empty", average=True)


CASES = {case.name: case for case in _cases()}


def draw(case: Case, seed: int) -> list[tuple[Tensor, ...]]:
    """A batch per step: logits, target and, for some, weights."""
    generator = harness.generator(seed, f"{case.loss} {case.sample.name} {case.split}")
    batches = [GHM_LOSSES[case.loss].draw(case.sample, generator).arguments for _ in range(STEPS)]
    for pred, _, *weight in batches:
        if case.split == "no_positives" and weight:
            weight[0][: 3 * worker.ROWS // 4] = 0
        if case.nan:
            pred[-1, -1] = torch.nan
            weight[0][-1, -1] = 1
    return batches


def own_part(case: Case, batch: tuple[Tensor, ...], group) -> tuple[Tensor, ...]:
    lengths = worker.sizes(case.split, dist.get_world_size(group))
    rank = dist.get_rank(group)
    return tuple(value.narrow(0, sum(lengths[:rank]), lengths[rank]) for value in batch)


def module_of(case: Case, group) -> torch.nn.Module:
    return GHM_LOSSES[case.loss].module(
        bins=case.sample.bins,
        momentum=case.sample.momentum,
        reduction=case.reduction,
        empty_bins=case.sample.empty_bins,
        bias_correction=case.sample.is_corrected,
        process_group=group,
        average_gradients=case.average,
    )


def evaluate(case: Case, batches: list[tuple[Tensor, ...]], group: object | None = None) -> dict[str, list]:
    """Losses, gradients and state of every step, and the density of the first."""
    module = module_of(case, group)
    found: dict[str, list] = {"loss": [], "gradient": [], "state": []}
    options = {"mu": 0.02} if case.loss == "ghm_regression" else {}
    with rsloss_kernels.use_backend(case.backend):
        density = rsloss_kernels.gradient_density(*batches[0], bins=30, process_group=group, **options)
        for pred, *others in batches:
            leaf = pred.clone().requires_grad_()
            value = module(leaf, *others)
            value.sum().backward()
            found["loss"].append(value.detach())
            found["gradient"].append(leaf.grad)
            found["state"].append(copy.deepcopy(dict(module.named_buffers())))
    return found | {"density": density}


def mismatches(group) -> dict[str, str]:
    """Calls that differ from process to process, which must fail on all; after each the group is as good as before."""
    rank = dist.get_rank(group)
    x, t, zeros = torch.randn(6, 3), torch.zeros(6, 3), torch.zeros(10)

    def classification(**options):
        return rsloss_kernels.ghm_classification_loss(x, t, process_group=group, **options)

    def regression(**options):
        return rsloss_kernels.ghm_regression_loss(x, t, process_group=group, **options)

    return {
        "bins": worker.caught(lambda: classification(bins=10 + rank)),
        "mu": worker.caught(lambda: regression(mu=0.5 + rank)),
        "momentum": worker.caught(lambda: classification(momentum=0.25 + 0.125 * rank, acc_sum=zeros)),
        "empty_bins": worker.caught(lambda: regression(empty_bins=("skip", "count")[rank % 2])),
        "loss": worker.caught(classification if rank == 0 else regression),
        "average": worker.caught(lambda: classification(average_gradients=rank == 0)),
        "correction": worker.caught(lambda: classification(acc_sum=zeros, num_updates=[None, zeros.long()][min(rank, 1)])),
        "density": worker.caught(lambda: rsloss_kernels.gradient_density(x, t, bins=5 + rank, process_group=group)),
        "afterwards": worker.caught(classification),
    }


def compiled(group, seed: int) -> dict[str, object]:
    """Steps in a graph; and one in which the processes do not agree, where nothing can be read on the host."""
    case = next(case for case in CASES.values() if case.loss == "ghm_classification" and case.split == "uneven")
    batches = [own_part(case, batch, group) for batch in draw(case, seed)]
    module = module_of(case, group)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    found: dict[str, list] = {"loss": [], "gradient": []}
    with rsloss_kernels.use_backend(case.backend):
        for pred, *others in batches:
            leaf = pred.clone().requires_grad_()
            value = step(leaf, *others)
            value.backward()
            found["loss"].append(value.detach())
            found["gradient"].append(leaf.grad)
        state = copy.deepcopy(dict(module.named_buffers()))
        other = copy.deepcopy(module)
        other.momentum = 0.25 + 0.5 * dist.get_rank(group)
        leaf = pred.clone().requires_grad_()
        value = torch.compile(other, fullgraph=True, backend="aot_eager")(leaf, *others)
        value.backward()
    disagreeing = {"loss": value.detach(), "gradient": leaf.grad, "weight": others[-1], "state": dict(other.named_buffers())}
    return found | {"case": case.name, "state": state, "disagreeing": disagreeing}


def all_results(group, seed: int) -> dict:
    results = {}
    for name, case in CASES.items():
        batches = draw(case, seed)
        results[name] = evaluate(case, [own_part(case, batch, group) for batch in batches], group)
        if dist.get_rank(group) == 0:
            results[name, "whole"] = evaluate(case, batches)
    results["mismatches"] = mismatches(group)
    if dist.get_world_size(group) == 2:
        results["compiled"] = compiled(group, seed)
    return results
