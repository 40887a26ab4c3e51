"""Balanced group softmax as the tests see it: inputs, one way to evaluate it, and its truth, written from the paper in numpy.

The truth knows no table of columns: it lists what each logit of a row stands for, and goes pair by pair in extended precision.
"""
import dataclasses
import math

import harness
import numpy as np
import rsloss_kernels
import torch
from rsloss_kernels import ClassGroups, _library
from torch import Tensor

OPERATORS = ("group_softmax_sample", "group_softmax_forward", "group_softmax_backward", "group_softmax_scores")
GRADIENT_GATE = 2e-6
BACKGROUND, OTHERS = "background", "others"

# name -> logits from standard normal numbers [N, K] and where the column of a target is.
DISTRIBUTIONS = {
    "init": lambda n, is_target: 0.02 * n,
    "trained": lambda n, is_target: 2 * n + 4.0 * is_target,
    "ties": lambda n, is_target: (n * 2).round() / 2,
    "all_equal": lambda n, is_target: torch.full_like(n, 0.3),
    "sure_and_right": lambda n, is_target: 0.1 * n + 18.0 * is_target,
    "surer": lambda n, is_target: n + 70.0 * is_target,
    "surest": lambda n, is_target: 0.1 * n + 95.0 * is_target,
    "wide": lambda n, is_target: 300 * n,
}


@dataclasses.dataclass(frozen=True)
class GroupSample:
    """Describes inputs of the loss; `draw` makes them."""

    name: str
    rows: int = 40
    sizes: tuple[int, ...] = (5, 4, 0, 3)  # classes of each group of classes
    distribution: str = "trained"
    form: str = "softmax"
    place: str = "first"  # of the background group
    background: str = "first"
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.int64
    weights: str = "sampled"  # or "random", "ones", "zeros"
    weight_dtype: torch.dtype = torch.float32
    ignored: bool = True
    foreground: float = 0.5

    def draw(self, generator: torch.Generator) -> "Inputs":
        classes = sum(self.sizes)
        numbers = torch.randperm(classes, generator=generator).tolist()
        lists = [sorted(numbers[sum(self.sizes[:i]) : sum(self.sizes[: i + 1])]) for i in range(len(self.sizes))]
        groups = ClassGroups(lists, background_form=self.form, background_group=self.place)
        chosen = torch.randint(0, max(classes, 1), (self.rows,), generator=generator)
        is_background = torch.rand(self.rows, generator=generator) >= self.foreground
        number = torch.where(is_background, classes, chosen) if classes else torch.full_like(chosen, classes)
        is_ignored = (torch.rand(self.rows, generator=generator) < 0.1) & self.ignored
        inputs = Inputs(
            torch.empty(0), as_labels(number, classes, self.background, is_ignored).to(self.label_dtype), groups, torch.empty(0),
            layout_of(lists, self.form, self.place), self.background,
        )  # fmt: skip
        normal = torch.randn((self.rows, groups.num_logits), generator=generator, dtype=torch.float64)
        is_target = torch.zeros_like(normal)
        for row, targets in enumerate(inputs.targets()):
            for column in targets:
                if column is not None:
                    is_target[row, column] = 1.0
        inputs.logits = DISTRIBUTIONS[self.distribution](normal, is_target).to(self.dtype)
        inputs.weights = self._weights(inputs, generator).to(self.weight_dtype)
        return inputs

    def _weights(self, inputs: "Inputs", generator: torch.Generator) -> Tensor:
        shape = (len(inputs.layout), self.rows)
        if self.weights == "random":
            drawn = torch.rand(shape, generator=generator) * 3
            return torch.where(torch.rand(shape, generator=generator) < 0.3, 0.0, drawn)
        if self.weights in ("ones", "zeros"):
            return torch.full(shape, float(self.weights == "ones"))
        keys = torch.rand(shape, generator=generator)
        return sampling_truth(inputs, keys, 1.5)


@dataclasses.dataclass
class Inputs:
    logits: Tensor
    labels: Tensor
    groups: ClassGroups
    weights: Tensor
    layout: list[list]  # what each logit of each group stands for: a class number, BACKGROUND or OTHERS
    background: str

    def numbers(self) -> list[int | str | None]:
        """What each row is: a class number, BACKGROUND, or None where it is ignored."""
        classes = sum(isinstance(entry, int) for group in self.layout for entry in group)
        result = []
        for label in self.labels.tolist():
            number = label - 1 if self.background == "first" else label
            is_class = 0 <= number < classes and label >= 0
            result.append(None if label < 0 else number if is_class else BACKGROUND)
        return result

    def targets(self) -> list[list[int | None]]:
        """Of each row in each group the column of its target, None where it is others without a logit."""
        starts = np.cumsum([0] + [len(group) for group in self.layout]).tolist()
        places = [{entry: start + i for i, entry in enumerate(group)} for group, start in zip(self.layout, starts, strict=False)]
        return [[place.get(number, place.get(OTHERS)) for place in places] for number in self.numbers()]


def layout_of(lists: list[list[int]], form: str, place: str) -> list[list]:
    of_classes = [[OTHERS, *numbers] for numbers in lists]
    if form == "sigmoid":
        alone = [BACKGROUND]
    else:
        alone = [BACKGROUND, OTHERS] if place == "first" else [OTHERS, BACKGROUND]
    return [alone, *of_classes] if place == "first" else [*of_classes, alone]


def as_labels(number: Tensor, classes: int, background: str, is_ignored: Tensor) -> Tensor:
    """Labels from class numbers, `classes` for the background."""
    labels = torch.where(number == classes, 0, number + 1) if background == "first" else number
    return torch.where(is_ignored, -1, labels)


@dataclasses.dataclass
class Truth:
    losses: np.ndarray  # [G]
    slopes: np.ndarray  # [N, K], the gradient for upstream gradients of 1
    group_of_column: np.ndarray

    def gradient(self, upstream: list[float] | None = None) -> Tensor:
        factors = np.ones(len(self.losses)) if upstream is None else np.array(upstream, dtype=np.float64)
        return torch.from_numpy(self.slopes * factors[self.group_of_column])


def truth(inputs: Inputs, weights: Tensor | None = None) -> Truth:
    """Losses and gradients in extended precision, one pair after the other."""
    logits = inputs.logits.detach().double().cpu().numpy().astype(np.longdouble)
    weights = (inputs.weights if weights is None else weights).double().cpu().numpy()
    targets, numbers = inputs.targets(), inputs.numbers()
    sizes = [len(group) for group in inputs.layout]
    starts = np.cumsum([0, *sizes])
    losses, slopes = np.zeros(len(sizes)), np.zeros(logits.shape)
    for g, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        used = [row for row in range(len(numbers)) if numbers[row] is not None and weights[g, row] != 0]
        total = math.fsum(weights[g, row] for row in used)
        average = total if not total <= 1 else 1.0
        terms = []
        for row in used:
            z, target = list(logits[row, start : start + size]), targets[row][g]
            if OTHERS not in inputs.layout[g]:
                z.append(np.longdouble(0))
            t = len(z) - 1 if target is None else target - start
            if any(math.isnan(value) or value == math.inf for value in z) or z[t] == -math.inf:
                terms.append(math.nan)
                slopes[row, start : start + size] = math.nan
                continue
            largest = max(z)
            exponentials = [np.exp(value - largest) for value in z]
            first = z.index(largest)
            rest = sum(value for i, value in enumerate(exponentials) if i != first)
            terms.append(weights[g, row] * ((largest - z[t]) + np.log1p(rest)))
            below = sum(value for i, value in enumerate(exponentials) if i != t)
            slope = [value / (1 + rest) for value in exponentials]
            slope[t] = -below / (1 + rest)
            slopes[row, start : start + size] = [float(value * weights[g, row] / average) for value in slope[:size]]
        losses[g] = float(sum(terms, start=np.longdouble(0)) / average)
    return Truth(losses, slopes, np.repeat(np.arange(len(sizes)), sizes))


def sampling_truth(inputs: Inputs, keys: Tensor, ratio: float) -> Tensor:
    """Weights [G, N] from the keys."""
    numbers = inputs.numbers()
    weights = torch.zeros((len(inputs.layout), len(numbers)))
    for g, group in enumerate(inputs.layout):
        if BACKGROUND in group:
            kept = [row for row, number in enumerate(numbers) if number is not None]
        else:
            foreground = [row for row, number in enumerate(numbers) if number in group]
            others = [row for row, number in enumerate(numbers) if number is not None and number not in group]
            others.sort(key=lambda row: (float(keys[g, row]), row))
            wanted = len(foreground) * ratio if foreground else 0
            kept = foreground + (others if wanted >= len(others) else others[: int(wanted)])
        weights[g, kept] = 1.0
    return weights


def scores_truth(inputs: Inputs) -> Tensor:
    logits = inputs.logits.detach().double().cpu().numpy().astype(np.longdouble)
    classes = inputs.groups.num_classes
    result = np.zeros((len(logits), classes + 1))
    starts = np.cumsum([0] + [len(group) for group in inputs.layout])
    for row, values in enumerate(logits):
        shares = []
        for start, group in zip(starts, inputs.layout, strict=False):
            z = {entry: values[start + i] for i, entry in enumerate(group)}
            z.setdefault(OTHERS, np.longdouble(0))
            largest = max(z.values())
            total = sum(np.exp(value - largest) for value in z.values())
            shares.append({entry: np.exp(value - largest) / total for entry, value in z.items()})
        (of_background,) = (share for share in shares if BACKGROUND in share)
        by_number = {entry: value for share in shares for entry, value in share.items() if isinstance(entry, int)}
        ordered = [by_number[number] * of_background[OTHERS] for number in range(classes)]
        whole = [of_background[BACKGROUND], *ordered] if inputs.background == "first" else [*ordered, of_background[BACKGROUND]]
        result[row] = [float(value) for value in whole]
    return torch.from_numpy(result)


def on_device(inputs: Inputs, backend: harness.Backend) -> Inputs:
    tensors = {name: getattr(inputs, name).to(backend.device) for name in ("logits", "labels", "weights")}
    return dataclasses.replace(inputs, **tensors, groups=inputs.groups.to(backend.device))


def call(backend: harness.Backend, inputs: Inputs, logits: Tensor | None = None, **options) -> Tensor:
    """The losses, with the weights of the inputs unless `others_ratio` asks for the sampling."""
    if "others_ratio" not in options:
        options = {"sample_weights": inputs.weights} | options
    with rsloss_kernels.use_backend(backend.name):
        return rsloss_kernels.group_softmax_loss(
            inputs.logits if logits is None else logits, inputs.labels, inputs.groups, background=inputs.background, **options
        )


def evaluate(
    backend: harness.Backend, inputs: Inputs, upstream: list[float] | None = None, **options
) -> harness.Evaluation:
    inputs = on_device(inputs, backend)
    leaf = inputs.logits.detach().requires_grad_()
    losses = call(backend, inputs, leaf, **options)
    factors = torch.ones_like(losses) if upstream is None else torch.tensor(upstream, dtype=losses.dtype, device=losses.device)
    (gradient,) = torch.autograd.grad(losses, leaf, factors)
    return harness.Evaluation(tuple(losses.detach().cpu().unbind()), gradient.cpu())


def assert_agrees(
    backend: harness.Backend, inputs: Inputs, label: str = "", upstream: list[float] | None = None, **options
) -> harness.Evaluation:
    got, wanted = evaluate(backend, inputs, upstream, **options), truth(inputs)
    noise = harness.smallest_of(inputs.logits.dtype)
    harness.assert_gates(backend, got, wanted.losses.tolist(), wanted.gradient(upstream), label, noise, GRADIENT_GATE)
    return got


def sample(backend: harness.Backend, inputs: Inputs, keys: Tensor | None, ratio: float) -> Tensor:
    """Weights from the operator, on the CPU."""
    inputs = on_device(inputs, backend)
    groups = inputs.groups
    weights = _library.operator("group_softmax_sample", backend.name)(
        inputs.labels,
        groups.class_columns,
        keys if keys is None else keys.to(backend.device),
        groups.starts,
        groups.others,
        groups.background_group,
        inputs.background == "first",
        ratio,
    )
    return weights.cpu()


SAMPLES = [
    GroupSample("float32"),
    GroupSample("float64", dtype=torch.float64, weights="random", weight_dtype=torch.float64),
    GroupSample("float16", dtype=torch.float16, background="last"),
    GroupSample("bfloat16", dtype=torch.bfloat16, weights="random", weight_dtype=torch.float16),
    GroupSample("sigmoid", form="sigmoid", weights="random"),
    GroupSample("sigmoid_last_float64", form="sigmoid", place="last", dtype=torch.float64, background="last"),
    GroupSample("background_group_last", place="last", background="last", label_dtype=torch.int32),
    GroupSample("one_group", sizes=(7,), weights="ones"),
    GroupSample("only_the_background", sizes=(), weights="random"),
    GroupSample("groups_without_classes", sizes=(0, 3, 0), weights="ones"),
    GroupSample("many_groups", sizes=(1, 2) * 12, rows=20, weights="random", weight_dtype=torch.bfloat16),
    GroupSample("wide_groups", sizes=(15, 16, 17, 100), rows=12, weights="ones"),
    GroupSample("all_background", foreground=0.0),
    GroupSample("all_foreground", foreground=1.1, ignored=False),
    GroupSample("no_weights", weights="zeros"),
    GroupSample("empty", rows=0),
]
