"""Every public module with state, and a training step of each: one list for what must be true of all of them."""
import dataclasses
from collections.abc import Callable

import rsloss_kernels as r
import torch
from torch import Tensor, nn

ROWS, CLASSES = 24, 4


@dataclasses.dataclass
class Batch:
    """What a step of any of them takes."""

    logits: Tensor  # [ROWS, CLASSES + 2]: as many columns as each loss wants are taken
    labels: Tensor  # [ROWS]
    quality: Tensor  # [ROWS], above 0

    @staticmethod
    def draw(generator: torch.Generator, rows: int = ROWS) -> "Batch":
        logits = torch.randn(rows, CLASSES + 2, generator=generator, dtype=torch.float64) * 2
        labels = torch.randint(0, CLASSES + 1, (rows,), generator=generator)
        # A positive of every class, as far as there are rows.
        labels[:CLASSES] = torch.arange(CLASSES)[:rows]
        return Batch(logits, labels, torch.rand(rows, generator=generator) * 0.9 + 0.05)

    def part(self, rows: slice) -> "Batch":
        return Batch(self.logits[rows], self.labels[rows], self.quality[rows])

    def with_logits(self, logits: Tensor) -> "Batch":
        return dataclasses.replace(self, logits=logits)


@dataclasses.dataclass(frozen=True)
class Stateful:
    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]  # of the batch's logits, 0-d; may change the state
    update: Callable[[nn.Module, Batch], None] | None = None  # what changes the state, where the forward does not
    takes_group: bool = True

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """The loss of a step that also takes the update."""
        loss = self.loss(module, batch)
        if self.update is not None:
            self.update(module, batch)
        return loss

    def step(self, module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of the logits."""
        leaf = batch.logits.clone().requires_grad_()
        loss = self(module, batch.with_logits(leaf))
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient


def _balanced(module: nn.Module, batch: Batch) -> Tensor:
    # Sums, which are finite of no rows too.
    return module(0.01 * batch.logits.detach().abs().sum() + 0.1, 0.01 * batch.logits.square().sum())


def _classes(batch: Batch) -> Tensor:
    return batch.logits[:, :CLASSES]


def _zeros(batch: Batch) -> Tensor:
    return torch.zeros(len(batch.logits), CLASSES, dtype=torch.float64)


def _threshold(module: nn.Module, batch: Batch) -> Tensor:
    """A loss that the threshold decides about."""
    return (batch.logits[:, 0] * r.assign_by_iou(batch.quality, module.iou_threshold)).sum()


def _follow_boxes(module: nn.Module, batch: Batch) -> None:
    module.update(batch.logits[:, :CLASSES].detach() * 0.1)


def _groups() -> nn.Module:
    groups = r.ClassGroups([[0], [1, 3], [2]])
    return r.GroupSoftmaxLoss(groups, 1.0, background="last", generator=torch.Generator().manual_seed(5))


def _of_groups(module: nn.Module, batch: Batch) -> Tensor:
    return module(torch.cat([batch.logits, batch.logits], 1)[:, : module.groups.num_logits], batch.labels)


STATEFUL = {
    one.name: one
    for one in (
        Stateful(
            "ghm_c",
            lambda **group: r.GHMC(bins=12, momentum=0.75, bias_correction=True, **group),
            lambda module, batch: module(_classes(batch), batch.labels),
        ),
        Stateful(
            "ghm_r",
            lambda **group: r.GHMR(mu=0.5, bins=7, momentum=0.5, **group),
            lambda module, batch: module(_classes(batch), _zeros(batch)),
        ),
        Stateful(
            "equalized_focal",
            lambda **group: r.EqualizedFocalLoss(CLASSES, **group),
            lambda module, batch: module(_classes(batch), batch.labels),
        ),
        Stateful(
            "equalized_quality_focal",
            lambda **group: r.EqualizedQualityFocalLoss(CLASSES, **group),
            lambda module, batch: module(_classes(batch), (batch.labels, batch.quality)),
        ),
        Stateful(
            "eqlv2",
            lambda **group: r.EQLv2Loss(CLASSES, **group),
            lambda module, batch: module(batch.logits[:, : CLASSES + 1], batch.labels),
        ),
        Stateful(
            "seesaw",
            lambda **group: r.SeesawLoss(CLASSES, return_dict=False, **group),
            lambda module, batch: module(batch.logits, batch.labels),
        ),
        Stateful("balancing", lambda **group: r.SelfBalancing(**group), _balanced),
        Stateful("balancing, running", lambda **group: r.SelfBalancing("running", period=3, initial=2.0, **group), _balanced),
        *(
            Stateful(
                f"label_assignment, {variant}",
                lambda variant=variant, **group: r.DynamicLabelAssignment(2, 2, 0.1, variant, schedule_length=3, **group),
                _threshold,
                lambda module, batch: module.update([batch.quality[:9], batch.quality[9:]]),
            )
            for variant in ("mmdet", "original")
        ),
        *(
            Stateful(
                f"smooth_l1, {variant}",
                lambda variant=variant, **group: r.DynamicSmoothL1Loss(3, 2, 0.5, variant, schedule_length=3, **group),
                lambda module, batch: module(_classes(batch) * 0.1, _zeros(batch)),
                _follow_boxes,
            )
            for variant in ("mmdet", "original")
        ),
        # No buffer that changes, but random numbers.
        Stateful("group_softmax", lambda: _groups(), _of_groups, takes_group=False),
    )
}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        one.dtype == second[name].dtype and torch.equal(one, second[name]) for name, one in first.items()
    )
