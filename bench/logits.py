"""The inputs of the ranking benchmarks: three kinds of detector logits with their targets, dense or as class indices."""
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import problems

NUM_CLASSES = 80


def _init(count: int, is_positive: bool, generator: torch.Generator) -> Tensor:
    """A fresh head with prior 0.01: positives and negatives alike, nearly every negative matters."""
    return torch.randn(count, generator=generator) - 4.6


def _trained(count: int, is_positive: bool, generator: torch.Generator) -> Tensor:
    """Halfway through training: positives around 0, negatives around -5 of which 1 % spread evenly up to +1."""
    if is_positive:
        return torch.randn(count, generator=generator) * 1.5
    logits = torch.randn(count, generator=generator) * 1.5 - 5
    is_tail = torch.rand(count, generator=generator) < 0.01
    return torch.where(is_tail, torch.rand(count, generator=generator) * 6 - 5, logits)


def _separated(count: int, is_positive: bool, generator: torch.Generator) -> Tensor:
    """A good detector: few negatives reach any positive."""
    noise = torch.randn(count, generator=generator)
    return noise * 1.2 if is_positive else noise * 1.5 - 7


DISTRIBUTIONS = {"init": _init, "trained": _trained, "separated": _separated}
FORMS = ("dense", "index")


@dataclass(frozen=True)
class Case(problems.Case):
    """One problem: `positives` among about `negatives` negatives.

    Class indices, and segments of any form, have rows of 80 classes; segments are equal numbers of whole rows.
    """

    distribution: str
    positives: int
    negatives: int
    form: str = "dense"
    segments: int = 1
    max_positives: int | None = None

    @property
    def title(self) -> str:
        size = f"P={self.positives} N={self.negatives:.3g}".replace("e+0", "e")
        parts = f" S={self.segments}" if self.segments > 1 else ""
        return f"{self.distribution} {size}{parts} {self.form} {self.dtype}"

    @property
    def has_rows(self) -> bool:
        return self.form == "index" or self.segments > 1


@dataclass
class Inputs(problems.Inputs):
    """`targets` and `quality` as the loss takes them; `dense` holds the same targets element by element for the peers.

    The regression loss of a positive is one minus its quality.
    """

    case: Case
    logits: Tensor  # [P + N]; with rows [A, C]
    targets: Tensor
    quality: Tensor | None  # index form: [A], 1 where there is no object
    dense: Tensor
    regression: Tensor  # [P] in flat order; index form [A]

    @property
    def segment_ids(self) -> Tensor:
        """[A], equal numbers of rows."""
        rows = self.logits.shape[0]
        return torch.arange(rows, dtype=torch.int32, device=self.logits.device) // (rows // self.case.segments)

    @property
    def regression_of_positives(self) -> Tensor:
        if self.case.form == "index":
            return self.regression[(self.dense > 0).any(-1)]
        return self.regression

    def relevant(self, delta: float) -> float:
        """The fraction of the negatives that can reach a positive. It hangs on one number, the lowest positive."""
        is_positive, flat = (self.dense > 0).flatten(), self.logits.flatten().double()
        if not bool(is_positive.any()):
            return 0.0
        reach = (flat >= flat[is_positive].min() - delta) & ~is_positive
        return int(reach.sum()) / max(int((~is_positive).sum()), 1)

    def share(self, rank: int, world: int) -> "Inputs":
        """What one of `world` processes holds of the same batch: neighbouring elements or rows, the last may have fewer."""
        size = -(-self.logits.shape[0] // world)
        mine = slice(rank * size, (rank + 1) * size)
        is_index = self.case.form == "index"
        before = int((self.dense[: rank * size] > 0).sum())
        count = int((self.dense[mine] > 0).sum())
        return Inputs(
            self.case,
            self.logits[mine].contiguous(),
            self.targets[mine],
            None if self.quality is None else self.quality[mine],
            self.dense[mine],
            self.regression[mine] if is_index else self.regression[before : before + count],
        )

    def minimal_bytes(self) -> int:
        """What forward and backward must move: the logits twice, the targets once, a bit mask both ways, the gradient."""
        elements, width = self.logits.numel(), self.logits.element_size()
        read_once = self.targets.numel() * self.targets.element_size()
        if self.quality is not None:
            read_once += self.quality.numel() * self.quality.element_size()
        return 3 * elements * width + read_once + 2 * (elements // 8)

    def working_set(self) -> int | None:
        """Bytes of the copy that the times are compared to: each of the minimal ones once."""
        return None


def _scatter(count: int, places: int, generator: torch.Generator) -> Tensor:
    """`count` distinct places, ascending: one drawn in each of `count` equal stretches."""
    stretch = places // max(count, 1)
    return torch.arange(count) * stretch + torch.randint(max(stretch, 1), (count,), generator=generator)


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    rows = -(-(case.positives + case.negatives) // NUM_CLASSES)
    rows = -(-rows // case.segments) * case.segments
    if case.has_rows and rows < case.positives:
        raise ValueError(f"{case.title}: more positives than rows of {NUM_CLASSES} classes")
    elements = rows * NUM_CLASSES if case.has_rows else case.positives + case.negatives
    if case.has_rows:
        row = _scatter(case.positives, rows, generator)
        label = torch.randint(NUM_CLASSES, (case.positives,), generator=generator)
        index = row * NUM_CLASSES + label
    else:
        index = _scatter(case.positives, elements, generator)
    draw = DISTRIBUTIONS[case.distribution]
    logits = draw(elements, False, generator)
    logits[index] = draw(case.positives, True, generator)
    quality_of_positives = 1 - torch.rand(case.positives, generator=generator)  # (0, 1]
    dense = torch.zeros(elements).index_put_((index,), quality_of_positives)
    if case.has_rows:
        logits, dense = logits.view(rows, NUM_CLASSES), dense.view(rows, NUM_CLASSES)
    targets, quality, regression = dense, None, 1 - quality_of_positives
    if case.form == "index":
        targets, quality = torch.full((rows,), NUM_CLASSES), torch.ones(rows)
        targets[row], quality[row] = label, quality_of_positives
        regression = 1 - quality
    soft = torch.float64 if dtype == torch.float64 else torch.float32
    to = {"device": case.device, "dtype": soft}
    targets = targets.to(case.device) if case.form == "index" else targets.to(**to)
    quality = None if quality is None else quality.to(**to)
    return Inputs(case, logits.to(case.device, dtype), targets, quality, dense.to(**to), regression.to(**to))
