"""Cases of group softmax, its sampling and scores, and of Seesaw loss."""
import functools

import group_softmax_samples
import harness
import rsloss_kernels
import seesaw_samples
import torch
from group_softmax_samples import GroupSample
from rsloss_kernels import use_backend
from torch import Tensor

from .case import Case, Wanted
from .levels import ABOVE
from .source import FLOATS, INF, INTEGERS, Source

SIZES = ((5, 4, 0, 3), (7,), (), (0, 3, 0), (1, 2) * 4, (15, 17), (100,), (2, 2))


def draw_rows(source: Source, most: int = 60) -> int:
    """The oracles go row by row in Python."""
    return source.pick((0, 1, 2, 5, 11), 16, 33, most)


def draw_groups(source: Source, name: str) -> Case:
    sample = GroupSample(
        name, draw_rows(source), source.pick(SIZES), source.pick(("trained", "ties", "wide", "surest", "surer")),
        source.pick(("softmax", "sigmoid")), source.pick(("first", "last")), source.pick(("first", "last")), source.dtype(),
        source.pick((torch.int64, torch.int32), torch.int16), source.pick(("sampled", "random", "ones"), "zeros"), source.pick(FLOATS),
        source.chance(0.7), source.pick((0.5, 0.1, 1.1, 0.0)),
    )  # fmt: skip
    inputs = sample.draw(source.generator)
    source.notes.append(f"{sample}")
    if source.chance(0.5):
        inputs.logits = source.values(inputs.logits.shape, sample.dtype)
    if source.chance(0.15):
        inputs.weights = (inputs.weights * source.pick((-1.0, 1e-3, 100.0), 1e20, 1e-20)).nan_to_num().clamp(-6e4, 6e4)
        inputs.weights = inputs.weights.to(sample.weight_dtype)
    if source.chance(0.1):
        above = min(sum(sample.sizes) + source.pick(ABOVE), torch.iinfo(sample.label_dtype).max)
        inputs.labels = torch.where(source.mask(inputs.labels.shape, 0.2), above, inputs.labels)
    inputs.logits = source.lay(source.broken(inputs.logits), may_expand=True)
    inputs.labels, inputs.weights = source.lay(inputs.labels), source.lay(inputs.weights, may_expand=True)
    options = {"background": sample.background, "sample_weights": inputs.weights}
    count = len(inputs.layout)
    upstream = torch.ones(count, dtype=torch.float64)
    if source.chance(0.3):
        upstream = source.normal((count,)) * source.pick((1.0, 65536.0))
    upstream = upstream.to(torch.float64 if sample.dtype == torch.float64 else torch.float32)

    @functools.cache
    def truth() -> Wanted:
        found = group_softmax_samples.truth(inputs)
        return Wanted((torch.from_numpy(found.losses),), found.gradient(upstream.tolist()).flatten())

    keys = source.uniform((count, sample.rows)).float()
    ratio = source.pick((0.0, 0.3, 1.0, 2.5, 8.0), 1e6, INF)

    def also(backend: harness.Backend) -> None:
        if sample.label_dtype in (torch.int64, torch.int32):
            contiguous = group_softmax_samples.Inputs(
                inputs.logits, inputs.labels.contiguous(), inputs.groups, inputs.weights, inputs.layout, inputs.background
            )
            got = group_softmax_samples.sample(backend, contiguous, keys, ratio)
            assert torch.equal(got, group_softmax_samples.sampling_truth(inputs, keys, ratio)), f"sampling, ratio {ratio}"
        if bool((inputs.logits.isnan() | (inputs.logits == INF)).any()):
            return
        with use_backend(backend.name):
            got = rsloss_kernels.group_softmax_scores(inputs.logits, inputs.groups, background=sample.background)
        wanted = group_softmax_samples.scores_truth(inputs)
        gate = backend.loss_gate(torch.float64) if sample.dtype == torch.float64 else 2e-6
        relative, smallest = harness.ROUNDING.get(sample.dtype, (0.0, 0.0))
        harness.assert_within(got, wanted, (gate + relative) * wanted + smallest + 1e-30, "scores")

    return Case(
        name, "group_softmax", rsloss_kernels.group_softmax_loss, [inputs.logits], False, (inputs.labels, inputs.groups), options,
        (upstream,), truth, source.given, source.notes, narrow=group_softmax_samples.GRADIENT_GATE,
        also=also if source.chance(0.3) else None,
    )  # fmt: skip


def draw_seesaw(source: Source, name: str) -> Case:
    dtype, rows, classes = source.dtype(), draw_rows(source), source.pick((1, 2, 3, 7), 40)
    drawn = seesaw_samples.draw(
        source.generator, rows, classes, source.pick((2.0, 0.1, 30.0), 300.0), source.pick((0.0, 5.0), 18.0, -30.0), dtype
    )
    logits = drawn.logits if source.chance(0.5) else source.values(drawn.logits.shape, dtype)
    logits = source.lay(source.broken(logits), may_expand=True)
    label_type = source.pick((torch.int64, torch.int32), torch.int16, torch.int8)
    labels = drawn.labels
    if source.chance(0.1):
        labels = torch.where(source.mask((rows,), 0.2), min(classes + source.pick(ABOVE), torch.iinfo(label_type).max), labels)
    labels = source.lay(labels.to(label_type))
    counts = drawn.counts * source.pick((1.0, 0.0), 1e12)
    counts = source.lay(counts.to(source.pick((torch.float32, torch.float64), torch.int64)))
    weight = None
    if source.chance(0.6):
        kind = source.pick(FLOATS, torch.bool, torch.int64)
        scaled = drawn.weight if kind not in FLOATS else drawn.weight * source.pick((1.0,), -1.0, 1e4, 1e-3)
        weight = source.lay((scaled > 0.5 if kind in (torch.bool, *INTEGERS) else scaled).to(kind))
    powers = {"p": source.pick((0.8, 0.0, 1.5), 1e-3, 1e3), "q": source.pick((2.0, 0.0, 0.7), 1e-3, 1e3)}
    powers["eps"] = source.pick((1e-2, 0.0, 0.3), 1e-30, 1.0, 5.0)
    if source.chance(0.3):
        powers = {}
    reduction = source.pick(("mean", "mean", "sum", "none"))
    options = {**powers, "reduction": reduction}
    factor = None
    if reduction == "mean" and source.chance(0.3):
        factor = source.pick((7.0, 0.5, 1e4))
        options["avg_factor"] = torch.tensor(factor) if source.chance(0.5) else factor
    pulls = tuple(source.pick((1.0,), 0.7, -2.0, 0.0, 1024.0) for _ in range(2))
    upstream = tuple(source.lay(source.normal((rows,)).to(dtype)) for _ in range(2)) if reduction == "none" else pulls
    inputs = seesaw_samples.Inputs(logits, labels.long(), counts, weight, powers)
    is_kept = labels >= 0
    is_foreground = is_kept & (labels < classes)
    divisors = (int(is_kept.sum()), int(is_foreground.sum())) if reduction == "mean" else (1, 1)
    divisors = (factor, factor) if factor else tuple(max(divisor, 1) for divisor in divisors)

    @functools.cache
    def truth() -> Wanted:
        parts = [seesaw_samples.truth(inputs, pair) for pair in ((1.0, 0.0), (0.0, 1.0))]
        losses, gradient = parts[0][0], torch.zeros_like(parts[0][1])
        for part, columns in enumerate((slice(classes, None), slice(0, classes))):
            scale = upstream[part] if not isinstance(upstream[part], Tensor) else upstream[part].double()[:, None]
            gradient[:, columns] = parts[part][1][:, columns] * scale / divisors[part]
        # What is NaN is so whatever the factor, and what is dropped 0.
        wanted = [torch.from_numpy(losses[part]) for part in range(2)]
        if reduction != "none":
            wanted = [value.sum() / divisor for value, divisor in zip(wanted, divisors, strict=True)]
        return Wanted(tuple(wanted), gradient.flatten())

    return Case(
        name, "seesaw", rsloss_kernels.seesaw_loss, [logits], False, (labels, counts, weight), options, upstream, truth,
        source.given, source.notes, narrow=seesaw_samples.GRADIENT_GATE,
    )  # fmt: skip
