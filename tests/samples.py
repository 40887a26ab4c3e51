"""Sample inputs of every loss: one list that feeds the tests of values, gradients, opcheck, torch.compile and export.

A loss adds itself to `LOSSES` with its public function, its module, its oracle and its samples.
"""
import dataclasses
from collections.abc import Callable

import harness
import oracles
import rsloss_kernels
import torch
from torch import Tensor

DELTAS = (0.0, 0.1, 0.25, 0.5, 1.0, 5.0)

# name -> (logits of negatives, logits of positives), from standard normal numbers.
DISTRIBUTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "init": lambda n, p: (0.02 * n - 4.6, 0.02 * p - 4.6),
    "trained": lambda n, p: (1.5 * n - 4, 2 * p),
    "ties": lambda n, p: ((2 * n).round() / 2 - 1, (2 * p).round() / 2),
    "all_equal": lambda n, p: (torch.full_like(n, -4.59512), torch.full_like(p, -4.59512)),
    "wide": lambda n, p: (1000 * n, 1000 * p + 300),
    "tiny": lambda n, p: (1e-6 * n, 1e-6 * p),
    "separated": lambda n, p: (n - 60, p + 60),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arguments of a ranking loss: logits, targets, and where the loss has one a third."""

    arguments: tuple[Tensor, ...]
    options: dict

    @property
    def logits(self) -> Tensor:
        return self.arguments[0]

    @property
    def targets(self) -> Tensor:
        return self.arguments[1]


@dataclasses.dataclass(frozen=True)
class RankingSample:
    """Describes inputs of a ranking loss; `draw` makes them. Class indices: `positives + negatives` rows of `classes` logits."""

    name: str
    positives: int = 9
    negatives: int = 120
    ignored: int = 0
    distribution: str = "trained"
    delta: float = 0.5
    form: str = "dense"  # or "index"
    classes: int = 4
    background: str = "last"
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    quality_dtype: torch.dtype | None = torch.float32
    quality_levels: int | None = None  # None: distinct qualities; 1: all 1

    @property
    def options(self) -> dict:
        return {"delta": self.delta} | ({} if self.form == "dense" else {"background": self.background})

    def resized(self, positives: int, negatives: int) -> "RankingSample":
        return dataclasses.replace(self, positives=positives, negatives=negatives)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits, targets and quality, from which every ranking loss makes its arguments."""
        return (self._draw_dense if self.form == "dense" else self._draw_labels)(generator)

    def _draw_dense(self, generator: torch.Generator) -> tuple[Tensor, Tensor, None]:
        counts = (self.positives, self.negatives, self.ignored)
        kind = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        kind = kind[torch.randperm(sum(counts), generator=generator)]
        targets = torch.zeros(kind.shape, dtype=self.target_dtype or self.dtype)
        targets[kind == 0] = self._quality(self.positives, generator).to(targets.dtype)
        targets[kind == 2] = -1
        return self._logits(kind == 0, generator), targets, None

    def _draw_labels(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        counts = (self.positives, self.negatives, self.ignored)
        kind = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
        kind = kind[torch.randperm(sum(counts), generator=generator)]
        first = 1 if self.background == "first" else 0
        labels = torch.randint(0, self.classes, kind.shape, generator=generator) + first
        is_positive = torch.nn.functional.one_hot(labels - first, self.classes).bool() & (kind == 0)[:, None]
        labels[kind == 1] = 0 if first else self.classes
        labels[kind == 2] = -1
        quality = None
        if self.quality_dtype is not None:
            quality = self._quality(kind.numel(), generator).to(self.quality_dtype)
        return self._logits(is_positive, generator), labels.to(self.target_dtype or torch.int64), quality

    def _logits(self, is_positive: Tensor, generator: torch.Generator) -> Tensor:
        normal = torch.randn((2, *is_positive.shape), generator=generator, dtype=torch.float64)
        negatives, positives = DISTRIBUTIONS[self.distribution](*normal)
        return torch.where(is_positive, positives, negatives).to(self.dtype)

    def _quality(self, count: int, generator: torch.Generator) -> Tensor:
        quality = torch.rand(count, generator=generator) * 0.95 + 0.05
        return quality if self.quality_levels is None else (quality * self.quality_levels).ceil() / self.quality_levels


RANKING_SAMPLES = [
    RankingSample("dense_float32"),
    RankingSample("dense_float64", dtype=torch.float64),
    RankingSample("dense_float16", dtype=torch.float16, distribution="ties"),
    RankingSample("dense_bfloat16_targets_float32", dtype=torch.bfloat16, target_dtype=torch.float32),
    RankingSample("dense_float32_targets_float16", target_dtype=torch.float16, ignored=30),
    RankingSample("dense_float32_targets_float64", target_dtype=torch.float64, quality_levels=3),
    RankingSample("dense_float64_targets_bfloat16", dtype=torch.float64, target_dtype=torch.bfloat16, delta=0.0),
    RankingSample("dense_delta_0_ties", delta=0.0, distribution="ties", quality_levels=4),
    RankingSample("dense_many_positives", positives=300, negatives=700),
    RankingSample("dense_one_positive", positives=1),
    RankingSample("dense_no_negatives", negatives=0),
    RankingSample("dense_no_positives", positives=0),
    RankingSample("dense_all_ignored", positives=0, negatives=0, ignored=20),
    RankingSample("dense_empty", positives=0, negatives=0),
    RankingSample("index_float32", form="index", ignored=11),
    RankingSample("index_int32_no_quality", form="index", target_dtype=torch.int32, quality_dtype=None),
    RankingSample("index_background_first", form="index", background="first", ignored=7),
    RankingSample("index_float64_quality_float16", form="index", dtype=torch.float64, quality_dtype=torch.float16),
    RankingSample("index_float16_quality_float64", form="index", dtype=torch.float16, quality_dtype=torch.float64, delta=1.0),
    RankingSample("index_bfloat16_quality_bfloat16", form="index", dtype=torch.bfloat16, quality_dtype=torch.bfloat16, delta=0.0),
    RankingSample("index_80_classes", form="index", classes=80, positives=20, negatives=60, delta=1.0),
    RankingSample("index_one_class", form="index", classes=1, delta=0.25),
    RankingSample("index_no_positives", form="index", positives=0),
    RankingSample("index_empty", form="index", positives=0, negatives=0),
]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A ranking loss as the tests see it. `third` names its third argument; `finalize` its own operator, the last of the forward."""

    name: str
    function: Callable
    module: type[torch.nn.Module]
    oracle: Callable[..., oracles.Truth]
    delta: float
    finalize: str
    third: str | None = None
    finalize_options: tuple = ()
    num_losses: int = 1
    takes_segments: bool = True
    narrow: float = 1e-6  # the gate of float32 gradients
    compiled_samples: tuple[str, ...] = ("dense_float32", "dense_bfloat16_targets_float32", "index_float32")

    @property
    def operator_samples(self) -> list[RankingSample]:
        return RANKING_SAMPLES

    @property
    def operators(self) -> tuple[str, ...]:
        return "ranking_collect", "ranking_bin", self.finalize, "ranking_backward", self.forward

    @property
    def forward(self) -> str:
        """The operator that does all steps of the forward in one call; that of aLRP not every backend has."""
        return self.finalize.replace("_finalize", "_forward")

    def arguments(self, logits: Tensor, targets: Tensor, quality: Tensor | None = None) -> tuple[Tensor, ...]:
        """Those of the function. Regression losses follow from the quality: between 0 and 2, one per positive or per row."""
        if self.third == "quality":
            return (logits, targets) if quality is None else (logits, targets, quality)
        if self.third is None:
            return logits, targets
        if not targets.is_floating_point():
            rows = torch.ones(targets.shape, dtype=torch.float32, device=targets.device) if quality is None else quality
            return logits, targets, 2 - 2 * rows
        flat = targets.flatten()
        return logits, targets, 2 - 2 * flat[~(flat <= 0)].clamp(max=1).nan_to_num(1.0)

    def draw(self, sample: RankingSample, generator: torch.Generator) -> Inputs:
        return Inputs(self.arguments(*sample.draw(generator)), sample.options)

    def evaluate(self, backend: harness.Backend, *arguments: Tensor, **options) -> harness.Evaluation:
        """`arguments` are those of the function."""
        return harness.evaluate(backend, *arguments, loss=self.function, **options)

    def read(self, logits: Tensor, targets: Tensor, third: Tensor | None = None, *, background: str = "last") -> oracles.Elements:
        if self.third == "regression_losses" and targets.is_floating_point():
            return oracles.with_regression_losses(oracles.read(logits, targets), third)
        return oracles.read(logits, targets, third, background)

    def truth(self, *arguments: Tensor, delta: float | None = None, background: str = "last") -> oracles.Truth:
        return self.oracle(self.read(*arguments, background=background), self.delta if delta is None else delta)

    def run_other_operators(self, backend: harness.Backend, inputs: Inputs) -> None:
        """Those that the public function calls with a process group only. Dense targets serve as the regression losses of aLRP."""
        is_dense = inputs.arguments[1].is_floating_point()
        arguments = ([value.to(backend.device)] for value in inputs.arguments[: 2 if is_dense else None])
        options = {"delta": inputs.options["delta"], "background_first": inputs.options.get("background") == "first"}
        self.pipeline(backend, *arguments, **options).run()

    def pipeline(self, backend: harness.Backend, *arguments: list[Tensor], **options) -> harness.Pipeline:
        """The operators one by one; `arguments` are lists of logits, targets and qualities (here of regression losses too)."""
        return harness.Pipeline(backend, *arguments, finalize=self.finalize, finalize_options=self.finalize_options, **options)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            "rank_sort",
            rsloss_kernels.rank_sort_loss,
            rsloss_kernels.RankSortLoss,
            oracles.rank_sort,
            delta=0.5,
            finalize="rank_sort_finalize",
            third="quality",
            finalize_options=(False,),
            num_losses=2,
        ),
        Loss(
            "ap",
            rsloss_kernels.average_precision_loss,
            rsloss_kernels.APLoss,
            oracles.average_precision,
            delta=1.0,
            finalize="average_precision_finalize",
            finalize_options=(True,),
        ),
        Loss(
            "alrp",
            rsloss_kernels.alrp_loss,
            rsloss_kernels.ALRPLoss,
            oracles.alrp,
            delta=1.0,
            finalize="alrp_finalize",
            third="regression_losses",
            takes_segments=False,
        ),
    )
}
