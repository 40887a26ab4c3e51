"""The element-wise sigmoid losses as the tests see them, and sample inputs of all; see samples.py for the ranking losses."""
import dataclasses
import math
from collections.abc import Callable

import harness
import rsloss_kernels
import sigmoid_oracle
import torch
from ghm_samples import DISTRIBUTIONS
from samples import Inputs
from torch import Tensor

GRADIENT_GATE = 2e-6
SUMS_GATE = 1e-6


@dataclasses.dataclass(frozen=True)
class SigmoidSample:
    """Describes inputs of an element-wise loss; `draw` makes them."""

    name: str
    rows: int = 60
    classes: int = 4
    distribution: str = "trained"
    form: str = "index"  # or "dense" (one-hot), "soft"
    has_quality: bool = False  # of class indices, where the loss takes one
    weight: str | None = None  # or "element", "row"
    background: str = "last"
    ignore_index: int | None = None
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype = torch.float32
    gamma: float | str = 2.0  # or "classes"
    alpha: float = 0.25
    class_weight: bool = False
    class_mask: bool = False
    avg_factor: str | None = None  # or "number", "tensor"

    def resized(self, positives: int, negatives: int) -> "SigmoidSample":
        return dataclasses.replace(self, rows=positives + negatives)


SIGMOID_SAMPLES = [
    SigmoidSample("float32"),
    SigmoidSample("soft_element_weights", form="soft", weight="element", avg_factor="tensor"),
    SigmoidSample("float64", dtype=torch.float64, form="soft", weight="row"),
    SigmoidSample("float64_index", dtype=torch.float64, has_quality=True, gamma=1.5, avg_factor="number"),
    SigmoidSample("float16", dtype=torch.float16, distribution="ties", has_quality=True, weight="row", weight_dtype=torch.float64),
    SigmoidSample("bfloat16_targets_float32", dtype=torch.bfloat16, form="soft", target_dtype=torch.float32, gamma=1.0),
    SigmoidSample("bfloat16_index", dtype=torch.bfloat16, weight="element", weight_dtype=torch.bfloat16, avg_factor="tensor"),
    SigmoidSample("float32_targets_float16", form="soft", target_dtype=torch.float16, weight="element", gamma=0.5),
    SigmoidSample("float64_targets_bfloat16", dtype=torch.float64, form="dense", target_dtype=torch.bfloat16, gamma="classes"),
    SigmoidSample("dense_integral", form="dense", target_dtype=torch.int64, alpha=-1.0, weight="row", weight_dtype=torch.bool),
    SigmoidSample("index_int32_background_first", background="first", target_dtype=torch.int32, has_quality=True, weight="row"),
    SigmoidSample("ignore_index", ignore_index=4, weight="element", gamma="classes"),
    SigmoidSample("ignore_foreground", ignore_index=1, background="first", class_weight=True),
    SigmoidSample("classes", gamma="classes", class_weight=True, class_mask=True, form="soft", avg_factor="number"),
    SigmoidSample("classes_float64", gamma="classes", class_mask=True, dtype=torch.float64, has_quality=True),
    SigmoidSample("cross_entropy", gamma=0.0, alpha=-1.0, class_weight=True, form="soft"),
    SigmoidSample("cross_entropy_index", gamma=0.0, alpha=-1.0, weight="element"),
    SigmoidSample("large_gamma", gamma=16.0, alpha=0.5, form="soft"),
    SigmoidSample("large_gamma_index", gamma=10.0, distribution="init"),
    SigmoidSample("alpha_1", alpha=1.0, form="soft"),
    SigmoidSample("alpha_0", alpha=0.0, has_quality=True),
    SigmoidSample("one_class", classes=1, has_quality=True),
    SigmoidSample("1203_classes", classes=1203, rows=7, gamma="classes", avg_factor="tensor"),
    SigmoidSample("80_classes", classes=80, rows=33, weight="row"),
    SigmoidSample("init", distribution="init", form="dense"),
    SigmoidSample("all_equal", distribution="all_equal", rows=500),
    SigmoidSample("all_equal_gamma_1.5", distribution="all_equal", rows=500, gamma=1.5),
    SigmoidSample("tiny", distribution="tiny", form="soft"),
    SigmoidSample("wide", distribution="wide", form="soft", gamma=1.5),
    SigmoidSample("separated", distribution="separated", form="dense", dtype=torch.float64, gamma=3.0),
    SigmoidSample("empty", rows=0),
    SigmoidSample("empty_dense", rows=0, form="dense", avg_factor="tensor"),
]
OPERATOR_SAMPLES = ("float32", "soft_element_weights", "float64_index", "bfloat16_index", "index_int32_background_first", "empty")


@dataclasses.dataclass(frozen=True)
class SigmoidLoss:
    """An element-wise loss: its function summed over all elements, its module, and how a sample's options become its own."""

    name: str
    function: Callable
    module: type[torch.nn.Module]
    modulator: str
    takes_quality: bool = False
    is_equalized: bool = False
    num_losses: int = 1
    operators: tuple[str, ...] = ("focal_forward", "focal_elements", "focal_backward")
    narrow: float = GRADIENT_GATE  # the gate of float32 gradients
    compiled_samples: tuple[str, ...] = ("float32", "soft_element_weights", "bfloat16_index")
    exported_samples: tuple[str, ...] = ("float32", "float64_index")

    @property
    def samples(self) -> list[SigmoidSample]:
        if not self.is_equalized:
            return SIGMOID_SAMPLES
        fits = [s for s in SIGMOID_SAMPLES if s.form == "index" and not s.class_weight and not s.class_mask and s.gamma != 0]
        if self.name == "eqlv2":
            fits = [s for s in fits if s.weight is None and s.background == "last" and s.ignore_index is None]
        return [sample for sample in fits if isinstance(sample.gamma, float)]

    @property
    def operator_samples(self) -> list[SigmoidSample]:
        return [sample for sample in self.samples if sample.name in OPERATOR_SAMPLES]

    def run_other_operators(self, backend: harness.Backend, inputs: Inputs) -> None:
        """The losses of the elements."""
        logits, targets = (value.to(backend.device) for value in inputs.arguments[:2])
        with rsloss_kernels.use_backend(backend.name):
            rsloss_kernels.sigmoid_focal_loss(logits.requires_grad_(), targets).sum().backward()

    def arguments(self, logits: Tensor, labels: Tensor, third: Tensor | None = None) -> tuple[Tensor, ...]:
        """Of class indices; `third` has a number in [0, 1] for each row."""
        return (logits, labels, third) if self.takes_quality and third is not None else (logits, labels)

    def draw(self, sample: SigmoidSample, generator: torch.Generator) -> Inputs:
        channels = sample.classes + (self.name == "eqlv2")
        shape, first = (sample.rows, channels), int(sample.background == "first")
        labels = torch.randint(-1, 2 * sample.classes, shape[:1], generator=generator).clamp(max=sample.classes)
        columns = torch.arange(channels) + first
        is_positive = labels[:, None] == columns
        normal = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        negatives, positives, _ = DISTRIBUTIONS[sample.distribution](*normal)
        logits = torch.where(is_positive, positives, negatives).to(sample.dtype)
        soft = torch.rand(shape, generator=generator)
        if sample.form == "index":
            targets = labels.to(sample.target_dtype or torch.int64)
        else:
            # A third each: one-hot, between, and some below 0.
            mixed = torch.where(soft < 0.4, is_positive, torch.where(soft < 0.8, soft, -1.0))
            chosen = mixed if sample.form == "soft" else is_positive
            targets = chosen.to(sample.target_dtype or sample.dtype)
        arguments = (logits, targets)
        if self.takes_quality and sample.form == "index" and (sample.has_quality or self.is_equalized):
            arguments += ((torch.rand(shape[:1], generator=generator) - 0.1).clamp(min=0),)
        if self.is_equalized:
            arguments += (torch.rand(sample.classes, generator=generator).double() * (1.2 if self.name == "eqlv2" else 1.0),)
        return Inputs(arguments, self._options(sample, shape, generator))

    def _options(self, sample: SigmoidSample, shape: tuple[int, int], generator: torch.Generator) -> dict:
        options: dict = {}
        if self.name == "eqlv2":
            return {"focal_gamma": sample.gamma if sample.name != "float32" else 0.0}
        if sample.weight is not None:
            drawn = (torch.rand(shape if sample.weight == "element" else shape[:1], generator=generator) - 0.3).clamp(min=0)
            options["weight"] = (drawn > 0 if sample.weight_dtype == torch.bool else drawn).to(sample.weight_dtype)
        if sample.background != "last":
            options["background"] = sample.background
        if sample.ignore_index is not None:
            options["ignore_index"] = sample.ignore_index
        if sample.avg_factor is not None:
            options["avg_factor"] = torch.tensor(7.3) if sample.avg_factor == "tensor" else 7.3
        gamma = torch.rand(shape[1], generator=generator) * 5 if sample.gamma == "classes" else sample.gamma
        options["beta" if self.modulator == "quality" and not self.is_equalized else "gamma"] = gamma
        if self.modulator == "focal" or (not self.is_equalized and self.modulator == "varifocal" and sample.alpha >= 0):
            options["alpha"] = sample.alpha
        if sample.class_weight:
            options["class_weight"] = torch.rand(shape[1], generator=generator) * 3
        if sample.class_mask:
            options["class_mask"] = torch.arange(shape[1]) % 3 != 1
        return options

    def evaluate(self, backend: harness.Backend, *arguments: Tensor | None, **options) -> harness.Evaluation:
        return harness.evaluate(backend, *arguments, loss=self.function, **options)

    def truth(self, logits: Tensor, targets: Tensor, *others: Tensor, **options) -> sigmoid_oracle.SigmoidTruth:
        """Of the function's arguments, layout "rows"."""
        options = {name: value for name, value in options.items() if value is not None}
        divisor = float(options.pop("avg_factor", 1.0))
        common = {name: options.pop(name) for name in ("weight", "background", "ignore_index", "class_weight", "class_mask") if name in options}
        table = self._table(others[-1] if self.is_equalized else None, options)
        quality = others[0] if self.takes_quality and len(others) > int(self.is_equalized) else None
        sums_factor = 1.0
        if self.name == "eqlv2":
            divisor = sums_factor = max(targets.numel(), 1)
        return sigmoid_oracle.sigmoid_loss(
            logits, targets, quality, modulator=table.pop("modulator", self.modulator), divisor=divisor, sums_factor=sums_factor,
            **table, **common,
        )  # fmt: skip

    def _table(self, pos_neg: Tensor | None, options: dict) -> dict:
        if self.name == "eqlv2":
            steepness, mu, alpha = (options.get(name, default) for name, default in (("gamma", 12.0), ("mu", 0.8), ("alpha", 4.0)))
            negative = torch.tensor([1 / (1 + math.exp(-steepness * (r - mu))) for r in pos_neg.tolist()] + [1.0], dtype=torch.float64)
            return {"gamma": options.get("focal_gamma", 0.0), "a": 1 + alpha * (1 - negative), "b": negative}
        alpha = options.get("alpha", 0.75 if self.modulator == "varifocal" else 0.25 if self.modulator == "focal" else -1.0)
        gamma = options.get("beta", options.get("gamma", 2.0))
        a, b = (1.0, 1.0) if alpha < 0 else (alpha, 1 - alpha)
        if self.modulator == "varifocal":
            modulator = "varifocal" if options.get("iou_weighted", True) else "varifocal_unweighted"
            return {"gamma": gamma, "a": 1.0, "b": alpha, "modulator": modulator}
        if pos_neg is None:
            return {"gamma": gamma, "a": a, "b": b}
        focus = gamma + options.get("scale_factor", 8.0) * (1 - pos_neg.double())
        factor = focus / gamma if options.get("weighting_factor", True) else torch.ones_like(focus)
        return {"gamma": focus, "a": a * factor, "b": b * factor}

    def assert_agrees(
        self, backend: harness.Backend, *arguments: Tensor | None, label: str = "", upstream: float = 1.0, **options
    ) -> harness.Evaluation:
        """Loss, gradient and class sums against the oracle."""
        got = self.evaluate(backend, *arguments, upstream=[upstream], **options)
        self.assert_true(backend, got, self.truth(*arguments, **options), label, upstream)
        return got

    def assert_true(
        self, backend: harness.Backend, got: harness.Evaluation, truth: sigmoid_oracle.SigmoidTruth, label: str = "", upstream: float = 1.0
    ) -> None:
        dtype = got.gradient.dtype
        noise = harness.smallest_of(dtype)
        harness.assert_gates(backend, got, truth.losses, truth.gradient(upstream), label, noise, self.narrow)
        if self.is_equalized:
            gate = backend.loss_gate(dtype) if dtype == torch.float64 else SUMS_GATE
            for name, value, wanted in zip(("positives", "negatives"), got.statistics, truth.class_sums, strict=True):
                wanted = wanted[: len(value)]
                assert value.dtype == torch.float64
                harness.assert_within(value, wanted, gate * wanted.abs() + noise, f"{label} sums of {name}")


def assert_is_focal_loss(backend: harness.Backend, got: harness.Evaluation, focal: harness.Evaluation) -> None:
    """Bit by bit; but GPU kernels add up in another order with sums of classes, which a float64 loss shows."""
    assert torch.equal(harness.bits(got.gradient), harness.bits(focal.gradient))
    is_exact = backend.name not in ("cuda", "triton") or got.losses[0].dtype == torch.float32
    harness.assert_within(got.losses[0], focal.losses[0], 0.0 if is_exact else 1e-14 * focal.losses[0], "loss")


def focal(*arguments, **options):
    return rsloss_kernels.sigmoid_focal_loss(*arguments, **{"reduction": "sum"} | options)


def quality(*arguments, **options):
    return rsloss_kernels.quality_focal_loss(*arguments, **{"reduction": "sum"} | options)


def varifocal(*arguments, **options):
    return rsloss_kernels.varifocal_loss(*arguments, **{"reduction": "sum"} | options)


SIGMOID_LOSSES = {
    loss.name: loss
    for loss in (
        SigmoidLoss("focal", focal, rsloss_kernels.SigmoidFocalLoss, "focal"),
        SigmoidLoss("quality", quality, rsloss_kernels.QualityFocalLoss, "quality", takes_quality=True),
        SigmoidLoss("varifocal", varifocal, rsloss_kernels.VarifocalLoss, "varifocal", takes_quality=True),
        SigmoidLoss(
            "efl", rsloss_kernels.equalized_focal_loss, rsloss_kernels.EqualizedFocalLoss, "focal",
            is_equalized=True, compiled_samples=(), exported_samples=(),
        ),
        SigmoidLoss(
            "eqfl", rsloss_kernels.equalized_quality_focal_loss, rsloss_kernels.EqualizedQualityFocalLoss, "quality",
            takes_quality=True, is_equalized=True,
        ),
        SigmoidLoss("eqlv2", rsloss_kernels.eqlv2_loss, rsloss_kernels.EQLv2Loss, "focal", is_equalized=True),
    )
}  # fmt: skip
PLAIN_LOSSES = {name: loss for name, loss in SIGMOID_LOSSES.items() if not loss.is_equalized}
EQUALIZED_LOSSES = {name: loss for name, loss in SIGMOID_LOSSES.items() if loss.is_equalized}
FOCAL, QUALITY, VARIFOCAL, EFL, EQFL, EQLV2 = SIGMOID_LOSSES.values()
