"""What the processes of distributed_worker.py do with the equalized losses: see there."""
import copy
import dataclasses

import distributed_worker as worker
import harness
import torch
import torch.distributed as dist
from sigmoid_samples import EQUALIZED_LOSSES, SigmoidSample
from torch import Tensor

import rsloss_kernels

STEPS = 3
CLASSES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    loss: str
    backend: str
    split: str = "uneven"
    nan: bool = False
    reduction: str = "mean"

    @property
    def name(self) -> str:
        return " ".join([self.loss, self.backend, self.split, self.reduction, *["nan"] * self.nan])


def _cases():
    for backend in worker.BACKENDS:
        for loss in EQUALIZED_LOSSES:
            for split in worker.SPLITS if loss == "efl" else ("uneven",):
                yield Case(loss, backend, split)
            yield Case(loss, backend, nan=True)
        yield Case("efl", backend, reduction="none")


CASES = {case.name: case for case in _cases()}


def draw(case: Case, seed: int) -> list[tuple[Tensor, ...]]:
    """A batch per step: logits, labels and, for some, quality."""
    generator = harness.generator(seed, f"{case.loss} {case.split}")
    # Negatives that outweigh the positives: the ratio of the two is not the largest there is.
    sample = SigmoidSample("group", worker.ROWS, CLASSES, "ties")
    batches = [EQUALIZED_LOSSES[case.loss].draw(sample, generator).arguments[:-1] for _ in range(STEPS)]
    for number, (logits, labels, *_) in enumerate(batches):
        if case.split == "no_positives":
            labels[: 3 * worker.ROWS // 4] = CLASSES
        if case.nan and number == 1:
            logits[-1, 0], labels[-1] = torch.nan, 1
    return batches


def own_part(case: Case, batch: tuple[Tensor, ...], group) -> tuple[Tensor, ...]:
    lengths = worker.sizes(case.split, dist.get_world_size(group))
    rank = dist.get_rank(group)
    return tuple(value.narrow(0, sum(lengths[:rank]), lengths[rank]) for value in batch)


def module_of(case: Case, group) -> torch.nn.Module:
    options = {} if case.loss == "eqlv2" else {"reduction": case.reduction}
    return EQUALIZED_LOSSES[case.loss].module(CLASSES, process_group=group, **options)


def forward(case: Case, module, leaf: Tensor, labels: Tensor, *quality: Tensor) -> Tensor:
    value = module(leaf, (labels, *quality) if quality else labels)
    # EQL v2 divides by the rows of the process.
    return value * len(leaf) if case.loss == "eqlv2" else value


def evaluate(case: Case, batches: list[tuple[Tensor, ...]], module) -> dict[str, list]:
    """Losses, gradients and state of every step."""
    found: dict[str, list] = {"loss": [], "gradient": [], "state": []}
    with rsloss_kernels.use_backend(case.backend):
        for logits, *others in batches:
            leaf = logits.clone().requires_grad_()
            value = forward(case, module, leaf, *others).sum()
            value.backward()
            found["loss"].append(value.detach())
            found["gradient"].append(leaf.grad)
            found["state"].append(copy.deepcopy(dict(module.named_buffers())))
    return found


def frozen(case: Case, batch: tuple[Tensor, ...], group) -> dict[str, bool]:
    """Whether evaluation and inference leave the state, without waiting for a process that does not come."""
    module = module_of(case, group)
    before = copy.deepcopy(dict(module.named_buffers()))
    if dist.get_rank(group) == 0:
        module.eval()(*batch[:2])
        with torch.no_grad():
            module.train()(*batch[:2])
    return {name: torch.equal(value, before[name]) for name, value in module.named_buffers()}


def all_results(group, seed: int) -> dict:
    results = {}
    for name, case in CASES.items():
        batches = draw(case, seed)
        own = [own_part(case, batch, group) for batch in batches]
        results[name] = evaluate(case, own, module_of(case, group))
        if dist.get_rank(group) == 0:
            results[name, "whole"] = evaluate(case, batches, module_of(case, None))
    first = CASES[next(name for name in CASES if name.startswith("efl"))]
    batches = draw(first, seed)
    results["frozen"] = frozen(first, own_part(first, batches[0], group), group)
    if dist.get_world_size(group) == 2:
        compiled = torch.compile(module_of(first, group), fullgraph=True, backend="aot_eager")
        results["compiled"] = evaluate(first, [own_part(first, batch, group) for batch in batches], compiled)
        results["compiled", "case"] = first.name
    return results
