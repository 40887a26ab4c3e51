"""GHM-C and GHM-R as the tests see them, and the sample inputs of both; see samples.py for the ranking losses."""
import dataclasses
from collections.abc import Callable

import harness
import oracles
import rsloss_kernels
import torch
from rsloss_kernels import _library
from samples import Inputs
from torch import Tensor

GRADIENT_GATE = 2e-6

# name -> numbers from standard normal ones: logits of elements with a target of 0 and above 0, and the distance of box offsets.
DISTRIBUTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "init": lambda n, p: (0.02 * n - 4.6, 0.02 * p - 4.6, 0.02 * n),
    "trained": lambda n, p: (1.5 * n - 4, 2 * p, 0.3 * n * p),
    "ties": lambda n, p: ((2 * n).round() / 2 - 1, (2 * p).round() / 2, (4 * n).round() / 64),
    "all_equal": lambda n, p: (torch.full_like(n, -4.59512), torch.full_like(p, -4.59512), torch.full_like(n, 0.0125)),
    "wide": lambda n, p: (1000 * n, 1000 * p + 300, 1000 * n),
    "tiny": lambda n, p: (1e-6 * n, 1e-6 * p, 1e-6 * n),
    "separated": lambda n, p: (n - 60, p + 60, 1e4 + n),
}


@dataclasses.dataclass(frozen=True)
class GHMSample:
    """Describes inputs of a GHM loss; `draw` makes them."""

    name: str
    rows: int = 60
    classes: int = 4
    distribution: str = "trained"
    form: str = "dense"  # one-hot, or "soft", "index"
    weight: str | None = None  # or "element", "row"
    background: str = "last"
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype = torch.float32
    bins: int = 10
    momentum: float = 0.0
    is_corrected: bool = False
    empty_bins: str = "skip"
    state_dtype: torch.dtype = torch.float64
    mu: float = 0.02

    def resized(self, positives: int, negatives: int) -> "GHMSample":
        return dataclasses.replace(self, rows=positives + negatives)

    def draw(self, generator: torch.Generator, is_regression: bool) -> Inputs:
        shape = (self.rows, self.classes)
        labels = torch.randint(-1, 2 * self.classes, (self.rows,), generator=generator).clamp(max=self.classes)
        columns = torch.arange(self.classes) + (self.background == "first")
        is_positive = labels[:, None] == columns
        normal = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        negatives, positives, distance = DISTRIBUTIONS[self.distribution](*normal)
        if is_regression:
            target = torch.randn(shape, generator=generator).round(decimals=1).to(self.target_dtype or self.dtype)
            # The distance survives the rounding of `pred` where it is large.
            pred = target.double() + distance
        else:
            pred = torch.where(is_positive, positives, negatives)
            soft = torch.rand(shape, generator=generator)
            dense = torch.where(soft < 0.5, is_positive, soft) if self.form == "soft" else is_positive
            target = dense.to(self.target_dtype or self.dtype)
            if self.form == "index":
                target = labels.to(self.target_dtype or torch.int64)
        arguments = (pred.to(self.dtype), target)
        if self.weight is not None:
            drawn = torch.rand(shape if self.weight == "element" else shape[:1], generator=generator) - 0.3
            arguments += ((drawn > 0 if self.weight_dtype == torch.bool else drawn.clamp(min=0)).to(self.weight_dtype),)
        return Inputs(arguments, self._options(generator, is_regression))

    def _options(self, generator: torch.Generator, is_regression: bool) -> dict:
        options = {"bins": self.bins, "empty_bins": self.empty_bins, "momentum": self.momentum}
        options |= {"mu": self.mu} if is_regression else {"background": self.background}
        if self.momentum > 0:
            options["acc_sum"] = (torch.rand(self.bins, generator=generator) * 20).to(self.state_dtype)
            if self.is_corrected:
                options["num_updates"] = torch.randint(0, 9, (self.bins,), generator=generator)
        return options


GHM_SAMPLES = [
    GHMSample("float32"),
    GHMSample("float64", dtype=torch.float64),
    GHMSample("float16", dtype=torch.float16, distribution="ties"),
    GHMSample("bfloat16_targets_float32", dtype=torch.bfloat16, target_dtype=torch.float32, weight="element"),
    GHMSample("float32_targets_float16", target_dtype=torch.float16, weight="element", weight_dtype=torch.float64),
    GHMSample("float64_targets_bfloat16", dtype=torch.float64, target_dtype=torch.bfloat16, weight="element", bins=30),
    GHMSample("soft", form="soft", weight="element", weight_dtype=torch.bfloat16),
    GHMSample("soft_float64_targets", form="soft", target_dtype=torch.float64, bins=30),
    GHMSample("row_weights", weight="row", weight_dtype=torch.float16),
    GHMSample("bool_weights", weight="element", weight_dtype=torch.bool),
    GHMSample("index", form="index"),
    GHMSample("index_int32_row_weights", form="index", target_dtype=torch.int32, weight="row"),
    GHMSample("index_background_first", form="index", background="first", weight="element", bins=30),
    GHMSample("index_float16", form="index", dtype=torch.float16, weight="row", weight_dtype=torch.float64),
    GHMSample("index_one_class", form="index", classes=1),
    GHMSample("index_80_classes", form="index", classes=80, rows=30, bins=256),
    GHMSample("one_bin", bins=1, weight="element"),
    GHMSample("two_bins", bins=2),
    GHMSample("256_bins", bins=256, distribution="ties"),
    GHMSample("count_empty_bins", empty_bins="count", distribution="init", bins=30),
    GHMSample("momentum", momentum=0.75, weight="element"),
    GHMSample("momentum_float32_state", momentum=0.5, state_dtype=torch.float32, bins=30),
    GHMSample("momentum_corrected", momentum=0.9, is_corrected=True, distribution="init"),
    GHMSample("momentum_corrected_count_empty", momentum=0.9, is_corrected=True, empty_bins="count", dtype=torch.float64),
    GHMSample("wide", distribution="wide"),
    GHMSample("all_equal", distribution="all_equal"),
    GHMSample("other_mu", mu=0.5, momentum=0.3),
    GHMSample("empty", rows=0, momentum=0.75),
    GHMSample("empty_index", rows=0, form="index"),
]


OPERATOR_SAMPLES = (
    "float32", "float64_targets_bfloat16", "bfloat16_targets_float32", "soft", "row_weights", "index_int32_row_weights",
    "index_background_first", "momentum_float32_state", "momentum_corrected", "empty",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GHM:
    """A GHM loss with its functions, its oracle and its samples."""

    name: str
    function: Callable
    module: type[torch.nn.Module]
    is_regression: bool
    num_losses: int = 1
    operators: tuple[str, ...] = ("ghm_histogram", "ghm_finalize", "ghm_forward", "ghm_backward")
    narrow: float = GRADIENT_GATE  # the gate of float32 gradients
    compiled_samples: tuple[str, ...] = ("float32", "bfloat16_targets_float32", "index", "momentum_corrected")

    @property
    def samples(self) -> list[GHMSample]:
        fits = [s for s in GHM_SAMPLES if s.form == "dense" and s.weight != "row" and s.background == "last"]
        return fits if self.is_regression else GHM_SAMPLES

    @property
    def operator_samples(self) -> list[GHMSample]:
        """For checks that take long: every form of every argument of the operators."""
        return [sample for sample in self.samples if sample.name in OPERATOR_SAMPLES]

    def run_other_operators(self, backend: harness.Backend, inputs: Inputs) -> None:
        """Those that the public function calls with a process group only."""
        pred, target, *weights = inputs.arguments
        self.run_operators(backend, [pred], [target], weights, **inputs.options)

    def arguments(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        return (logits, labels) if weight is None else (logits, labels, weight)

    def draw(self, sample: GHMSample, generator: torch.Generator) -> Inputs:
        return sample.draw(generator, self.is_regression)

    def evaluate(self, backend: harness.Backend, *arguments: Tensor | None, **options) -> harness.Evaluation:
        return harness.evaluate(backend, *arguments, loss=self.function, **options)

    def truth(self, *arguments: Tensor | None, **options) -> oracles.HarmonizedTruth:
        if self.is_regression:
            options = {"mu": 0.02} | options
        return oracles.ghm(*arguments, **options)

    def assert_agrees(
        self, backend: harness.Backend, *arguments: Tensor | None, label: str = "", upstream: float = 1.0, **options
    ) -> harness.Evaluation:
        """Loss, gradient and state against the oracle."""
        got = self.evaluate(backend, *arguments, upstream=[upstream], **options)
        truth = self.truth(*arguments, **options)
        noise = harness.smallest_of(got.gradient.dtype)
        harness.assert_gates(backend, got, truth.losses, truth.gradient(upstream), label, noise, self.narrow)
        if options.get("acc_sum") is not None:
            assert_state(got.statistics, truth, options, label)
        return got

    def run_operators(
        self, backend: harness.Backend, preds: list[Tensor], targets: list[Tensor], weights: list[Tensor], **options
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """The operators one by one, on a list of levels: histogram, loss, acc_sum, the weights of the bins, gradients."""
        bins, mu = options.get("bins", 10), options.get("mu", 0.02) if self.is_regression else None
        first = options.get("background", "last") == "first"
        levels = [[value.contiguous().to(backend.device) for value in values] for values in (preds, targets, weights)]

        def call(name: str, *arguments):
            return _library.operator(name, backend.name)(*levels, *arguments)

        histogram = call("ghm_histogram", bins, mu, first)
        state = [value if value is None else value.to(backend.device) for value in map(options.get, ("acc_sum", "num_updates"))]
        count_empty = options.get("empty_bins") == "count"
        finalized = call("ghm_finalize", histogram, *state, bins, mu, first, options.get("momentum", 0.0), count_empty, 1.0)
        loss, acc_sum, _, weights_of_bins = finalized
        return histogram, loss, acc_sum, weights_of_bins, call("ghm_backward", weights_of_bins, torch.ones_like(loss), mu, first)


def assert_state(got: tuple[Tensor, ...], truth: oracles.HarmonizedTruth, options: dict, label: str = "") -> None:
    acc_sum, *num_updates = got
    assert acc_sum.dtype == options["acc_sum"].dtype
    eps = torch.finfo(acc_sum.dtype).eps
    harness.assert_within(acc_sum, truth.acc_sum, eps * truth.acc_sum.abs(), f"{label} acc_sum")
    assert len(num_updates) == (options.get("num_updates") is not None)
    for value in num_updates:
        assert value.dtype == torch.int64 and torch.equal(value, truth.num_updates), label


GHM_LOSSES = {
    loss.name: loss
    for loss in (
        GHM("ghm_classification", rsloss_kernels.ghm_classification_loss, rsloss_kernels.GHMC, is_regression=False),
        GHM("ghm_regression", rsloss_kernels.ghm_regression_loss, rsloss_kernels.GHMR, is_regression=True),
    )
}
CLASSIFICATION, REGRESSION = GHM_LOSSES.values()
