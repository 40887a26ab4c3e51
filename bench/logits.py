"""The inputs of the ranking benchmarks: three kinds of detector logits with their targets, dense or as class indices."""
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

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
class Case:
    """One problem: `positives` among about `negatives` negatives (class indices round up to whole rows of 80 classes)."""

    distribution: str
    positives: int
    negatives: int
    form: str = "dense"
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    max_positives: int | None = None

    @property
    def title(self) -> str:
        return f"{self.distribution} P={self.positives} N={self.negatives:.3g} {self.form} {self.dtype}".replace("e+0", "e")

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Inputs:
    """`targets` and `quality` as the loss takes them; `dense` holds the same targets element by element for the peers."""

    case: Case
    logits: Tensor  # [P + N], index form [A, C]
    targets: Tensor
    quality: Tensor | None
    dense: Tensor

    def minimal_bytes(self) -> int:
        """What forward and backward must move: the logits twice, the targets once, a bit mask both ways, the gradient."""
        elements, width = self.logits.numel(), self.logits.element_size()
        read_once = self.targets.numel() * self.targets.element_size()
        if self.quality is not None:
            read_once += self.quality.numel() * self.quality.element_size()
        return 3 * elements * width + read_once + 2 * (elements // 8)


def _scatter(count: int, places: int, generator: torch.Generator) -> Tensor:
    """`count` distinct places, ascending: one drawn in each of `count` equal stretches."""
    stretch = places // max(count, 1)
    return torch.arange(count) * stretch + torch.randint(max(stretch, 1), (count,), generator=generator)


def make_inputs(case: Case) -> Inputs:
    """The same numbers for the same case on every device; drawn on the CPU in float32, then rounded to the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)
    if case.form == "index":
        rows = -(-(case.positives + case.negatives) // NUM_CLASSES)
        if rows < case.positives:
            raise ValueError(f"{case.title}: more positives than rows of {NUM_CLASSES} classes")
        row = _scatter(case.positives, rows, generator)
        label = torch.randint(NUM_CLASSES, (case.positives,), generator=generator)
        index, elements = row * NUM_CLASSES + label, rows * NUM_CLASSES
    else:
        elements = case.positives + case.negatives
        index = _scatter(case.positives, elements, generator)
    draw = DISTRIBUTIONS[case.distribution]
    logits = draw(elements, False, generator)
    logits[index] = draw(case.positives, True, generator)
    quality_of_positives = 1 - torch.rand(case.positives, generator=generator)  # (0, 1]
    dense = torch.zeros(elements).index_put_((index,), quality_of_positives)
    targets, quality = dense, None
    if case.form == "index":
        targets, quality = torch.full((rows,), NUM_CLASSES), torch.ones(rows)
        targets[row], quality[row] = label, quality_of_positives
        logits, dense = logits.view(rows, NUM_CLASSES), dense.view(rows, NUM_CLASSES)
    soft = torch.float64 if dtype == torch.float64 else torch.float32
    targets = targets.to(case.device) if case.form == "index" else targets.to(case.device, soft)
    quality = None if quality is None else quality.to(case.device, soft)
    return Inputs(case, logits.to(case.device, dtype), targets, quality, dense.to(case.device, soft))
