"""Losses, gradients, weights and scores of balanced group softmax: the authors' outputs, and the truth on fresh random inputs."""
import dataclasses
import math

import golden_vectors
import harness
import pytest
import rsloss_kernels
import torch
from group_softmax_samples import (
    DISTRIBUTIONS,
    GRADIENT_GATE,
    SAMPLES,
    GroupSample,
    Inputs,
    assert_agrees,
    call,
    evaluate,
    layout_of,
    on_device,
    sample,
    sampling_truth,
    scores_truth,
)
from rsloss_kernels import ClassGroups, group_softmax_scores, use_backend

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BOUNDARIES = {3: (100,), 5: (10, 100, 1000), 9: (5, 10, 50, 100, 500, 1000, 5000)}


def golden_inputs(case: golden_vectors.Case, dtype: torch.dtype) -> tuple[Inputs, dict]:
    arrays = case.inputs()
    is_bags = case.manifest["kind"] != "groupsoftmax2"
    boundaries = BOUNDARIES[case.hyper["num_groups"]] if is_bags else case.hyper["bin_split"]
    place = "first" if is_bags else "last"
    groups = ClassGroups.from_counts(arrays["class_counts"], boundaries, background_group=place)
    layout = layout_of(groups.groups, "softmax", place)
    return Inputs(arrays["cls_score"].to(dtype), arrays["labels"], groups, arrays["group_weights"], layout, place), arrays


@pytest.mark.parametrize("case", golden_vectors.params("bags"))
def test_golden(backend, case):
    """The authors' code, and that of the EQL v2 repository, in float64 with their recorded samples."""
    outputs = case.outputs("gs2" if case.manifest["kind"] == "groupsoftmax2" else "bags")
    for dtype in (torch.float64, torch.float32):
        inputs, _ = golden_inputs(case, dtype)
        got = evaluate(backend, inputs)
        gate = backend.loss_gate(dtype)
        # One of the losses is log1p(6e-4); the authors' float64 softmax keeps 1e-16 of 1.
        if "loss_bins" in outputs:
            for value, wanted in zip(got.losses, outputs["loss_bins"].tolist(), strict=True):
                harness.assert_within(value, wanted, gate * abs(wanted) + harness.NOISE, case.name)
        total = outputs["loss_total"]
        harness.assert_within(sum(value.double() for value in got.losses), total, gate * total + harness.NOISE, case.name)
        harness.assert_gradient(backend, got.gradient, outputs["grad"], case.name, harness.NOISE, GRADIENT_GATE)
        if "merged_scores" in outputs:
            moved = on_device(inputs, backend)
            with use_backend(backend.name):
                scores = group_softmax_scores(moved.logits, moved.groups, background=inputs.background)
            bound = (1e-9 if dtype == torch.float64 else 2e-6) * outputs["merged_scores"] + harness.NOISE
            harness.assert_within(scores.cpu(), outputs["merged_scores"], bound, case.name)


@pytest.mark.parametrize("case", golden_vectors.params("bags"))
def test_groups_are_those_of_the_authors(case):
    inputs, arrays = golden_inputs(case, torch.float32)
    groups, layout = inputs.groups, inputs.layout
    maps = arrays["label2binlabel"] if "label2binlabel" in arrays else arrays["group_label_maps"]
    assert inputs.logits.shape[1] == groups.num_logits and maps.shape == (groups.num_groups, groups.num_classes + 1)
    if "pred_slice" in arrays:
        starts = arrays["pred_slice"][:, 0].tolist()
        assert starts == list(groups.starts[:-1])
        # Their classes are 1..C.
        wanted = [arrays[f"fg_split_{g}"].tolist() for g in range(1, groups.num_groups)]
        assert [[number + 1 for number in group] for group in groups.groups] == wanted
    for g, entries in enumerate(layout):
        for number in range(groups.num_classes + 1):
            label = number if inputs.background == "last" else (number + 1) % (groups.num_classes + 1)
            place = int(maps[g, label])
            entry = "background" if number == groups.num_classes else number
            assert entries[place] == (entry if entry in entries else "others")
            if entry in entries:
                assert groups.column_of(number) == groups.starts[g] + place


def test_golden_class_reweighted(backend):
    """The factors of the classes on top of the bare sample give the authors' weights."""
    (case,) = [case for case in golden_vectors.cases("bags") if case.manifest["kind"] == "bags_reweight"]
    inputs, arrays = golden_inputs(case, torch.float64)
    factors = torch.ones(inputs.groups.num_classes, dtype=torch.float64)
    for g, numbers in enumerate(inputs.groups.groups, start=1):
        factors[numbers] = arrays[f"bin_cls_weight_{g}"][1:]
    moved = on_device(inputs, backend)
    bare = (moved.weights != 0).float()
    got = call(backend, moved, sample_weights=bare, class_weights=factors.to(backend.device))
    harness.assert_within(got.cpu(), case.outputs("bags")["loss_bins"], 1e-9, case.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_random_inputs(backend, generator, distribution, dtype):
    variants = (
        {"rows": 30},
        {"rows": 9, "sizes": (30, 3), "weights": "random", "place": "last", "background": "last"},
        {"rows": 20, "sizes": (6,), "form": "sigmoid", "weights": "random"},
    )
    for variant in variants[: 1 if backend.is_interpreted else None]:
        inputs = GroupSample(distribution, distribution=distribution, dtype=dtype, **variant).draw(generator)
        assert_agrees(backend, inputs, f"{distribution} {variant}")


@pytest.mark.parametrize("description", SAMPLES, ids=lambda description: description.name)
def test_samples(backend, generator, description):
    inputs = description.draw(generator)
    upstream = [0.75 - 0.5 * g for g in range(len(inputs.layout))]
    assert_agrees(backend, inputs, description.name, upstream)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_equal_rows_have_no_errors_that_average_out(backend, dtype):
    """From logits that are all equal to targets that stand out so far that r is below the range of float32."""
    gaps = (0.0, 1e-6, 0.3, 0.9, 2.7, 5.1, 11.0, 15.7, 17.1, 23.0, 41.0, 57.3, 60.1, 75.0, 86.5, 88.5, 95.0, 102.0, 300.0)
    for gap in gaps[::4] if backend.is_interpreted else gaps:
        for sizes in ((1,), (2,), (37,), (14, 15)):
            inputs = GroupSample("equal", rows=3, sizes=sizes, dtype=dtype, weights="ones", ignored=False).draw(torch.Generator())
            for sign in (1.0, -1.0):
                inputs.logits = torch.zeros_like(inputs.logits)
                for row, targets in enumerate(inputs.targets()):
                    inputs.logits[row, targets] = sign * gap
                assert_agrees(backend, inputs, f"{sign * gap} {sizes}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(backend, generator, dtype):
    largest = 100.0 if dtype in (torch.float16, torch.bfloat16) else 1e30
    for scale in (largest, 60000.0):
        inputs = GroupSample("extreme", dtype=dtype, weights="ones").draw(generator)
        inputs.logits = (inputs.logits.sign() * scale).to(dtype)
        assert evaluate(backend, inputs).gradient.isfinite().all()
        assert_agrees(backend, inputs, f"{scale}")


def test_sizes(backend, generator):
    """Around the widths of vectors and the rows of a block."""
    for rows, sizes in ((1, (1,)), (31, (6, 7, 8)), (33, (14, 15, 16)), (65, (62, 63, 64)), (300, (3,))):
        if backend.is_interpreted and rows > 40:
            continue
        inputs = GroupSample("sizes", rows=rows, sizes=sizes, weights="random").draw(generator)
        assert_agrees(backend, inputs, f"{rows} {sizes}")


@pytest.mark.slow_interpreter
def test_lvis(backend, generator):
    """The published setting: 1230 classes, four groups by their counts."""
    counts = (1e5 / torch.arange(1, 1231) ** 1.3).long()
    groups = ClassGroups.from_counts(counts)
    rows = 16
    labels = torch.where(torch.rand(rows, generator=generator) < 0.5, torch.randint(1, 1231, (rows,), generator=generator), 0)
    logits = torch.randn((rows, groups.num_logits), generator=generator) * 2
    inputs = Inputs(logits, labels, groups, torch.empty(0), layout_of(groups.groups, "softmax", "first"), "first")
    inputs.weights = sampling_truth(inputs, torch.rand((5, rows), generator=generator), 8.0)
    assert groups.num_groups == 5 and groups.num_logits == 1230 + 1 + 5
    assert_agrees(backend, inputs)


# --- labels ---


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16], ids=str)
def test_labels_of_any_integral_dtype(backend, generator, label_dtype):
    inputs = GroupSample("labels", ignored=False, weights="ones").draw(generator)
    expected = assert_agrees(backend, inputs)
    assert evaluate(backend, dataclasses.replace(inputs, labels=inputs.labels.to(label_dtype))) == expected


@pytest.mark.parametrize("background", ["first", "last"])
def test_labels_above_the_classes_are_background(backend, generator, background):
    inputs = GroupSample("labels", background=background, weights="ones", ignored=False, rows=12).draw(generator)
    classes = inputs.groups.num_classes
    none = 0 if background == "first" else classes
    inputs.labels[:4] = none
    expected = assert_agrees(backend, inputs)
    for label in (classes + 1, 1000, 2**31 - 1, 2**62):
        inputs.labels[:4] = label
        assert evaluate(backend, inputs) == expected


def test_ignored_rows_do_not_count(backend, generator):
    """Neither in the losses nor among the others that may be drawn; their logits and weights may be anything."""
    whole = GroupSample("ignored", ignored=False, weights="random", rows=24).draw(generator)
    kept = torch.arange(24) % 3 != 1
    part = dataclasses.replace(whole, logits=whole.logits[kept], labels=whole.labels[kept], weights=whole.weights[:, kept].contiguous())
    expected = assert_agrees(backend, part)
    whole.labels[~kept] = torch.tensor([-1, -100, -(2**62)]).repeat(3)[: int((~kept).sum())]
    whole.logits[~kept] = torch.nan
    whole.weights[:, ~kept] = torch.nan
    got = assert_agrees(backend, whole)
    assert torch.equal(got.gradient[kept], expected.gradient) and not got.gradient[~kept].any()
    keys = torch.rand((len(whole.layout), 24), generator=generator)
    weights = sample(backend, whole, keys, 1.0)
    assert torch.equal(weights[:, kept], sample(backend, part, keys[:, kept].contiguous(), 1.0)) and not weights[:, ~kept].any()


# --- sampling ---


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 2.5, 8.0, 1e6, math.inf])
def test_sampled_weights(backend, generator, ratio):
    for description in SAMPLES[::3] if backend.is_interpreted else SAMPLES:
        inputs = dataclasses.replace(description, foreground=0.2).draw(generator)
        keys = torch.rand((len(inputs.layout), len(inputs.labels)), generator=generator)
        keys = (keys * 8).round() / 8  # ties
        assert torch.equal(sample(backend, inputs, keys, ratio), sampling_truth(inputs, keys, ratio)), description.name
        if ratio in (0.0, math.inf):
            assert torch.equal(sample(backend, inputs, None, ratio), sampling_truth(inputs, keys, ratio))


def test_keys_that_are_no_uniform_numbers(backend):
    inputs = GroupSample("keys", rows=9, sizes=(1,), ignored=False).draw(torch.Generator())
    inputs.labels = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0, 0])
    keys = torch.tensor([0.0, 0.0, 3.0, math.nan, -5.0, math.inf, -0.0, 0.0, -math.inf]).repeat(2, 1)
    order = [8, 4, 6, 7, 2, 5, 3]
    for kept in range(1, 8):
        weights = sample(backend, inputs, keys, kept / 2)
        assert weights[1].nonzero().flatten().tolist() == sorted([0, 1, *order[:kept]])
        assert weights[0].all()


def test_the_number_of_others_is_that_of_float64(backend):
    """Products that float32 would round up to the next whole number, or down from one."""
    for foreground, ratio in ((3, 0.1 + 0.2), (10, 0.3), (7, 1 / 7), (29, 0.1), (100, 0.29), (49, 1 / 49)):
        rows = foreground + 60
        inputs = GroupSample("count", rows=rows, sizes=(1,), ignored=False).draw(torch.Generator())
        inputs.labels = (torch.arange(rows) < foreground).long()
        weights = sample(backend, inputs, torch.rand(2, rows), ratio)
        assert int(weights[1].sum()) == foreground + int(foreground * ratio)


@pytest.mark.slow_interpreter
def test_sampling_of_many_rows(backend, generator):
    rows = 3000
    inputs = GroupSample("many", rows=rows, sizes=(3, 4), foreground=0.05).draw(generator)
    for keys in (torch.rand((3, rows), generator=generator), torch.zeros((3, rows)), torch.randn((3, rows), generator=generator)):
        assert torch.equal(sample(backend, inputs, keys, 8.0), sampling_truth(inputs, keys, 8.0))


# --- scores ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(backend, generator, dtype):
    for description in SAMPLES[::4] if backend.is_interpreted else SAMPLES:
        for distribution in ("trained", "wide"):
            inputs = dataclasses.replace(description, dtype=dtype, distribution=distribution).draw(generator)
            moved, wanted = on_device(inputs, backend), scores_truth(inputs)
            with use_backend(backend.name):
                got = group_softmax_scores(moved.logits, moved.groups, background=inputs.background)
            assert got.dtype == dtype and got.shape == wanted.shape and not got.requires_grad
            gate = backend.loss_gate(torch.float64) if dtype == torch.float64 else 2e-6
            relative, smallest = harness.ROUNDING.get(dtype, (0.0, 0.0))
            # Probabilities below 1e-30 may be 0.
            harness.assert_within(got.cpu(), wanted, (gate + relative) * wanted + smallest + 1e-30, description.name)


def test_scores_of_low_logits_down_to_1e_30(backend, generator):
    """A group's largest logit is -19 or less, so that of a probability of 1e-30 is below -86."""
    inputs = dataclasses.replace(SAMPLES[0], rows=64).draw(generator)
    falls = torch.where(torch.rand(inputs.logits.shape, generator=generator) < 0.5, 0.0, 64.0)
    inputs.logits = -19 - falls - 4 * torch.rand(inputs.logits.shape, generator=generator)
    moved, wanted = on_device(inputs, backend), scores_truth(inputs)
    assert ((wanted > 1.5e-30) & (wanted < 8e-30)).any()
    with use_backend(backend.name):
        got = group_softmax_scores(moved.logits, moved.groups, background=inputs.background)
    harness.assert_within(got.cpu(), wanted, 2e-6 * wanted + 1e-30, "scores")


def test_scores_follow_the_foreground(backend):
    """Where the row is background no class has a score; where it is not, the scores of a group are its own softmax."""
    groups = ClassGroups([[0, 1], [2]]).to(backend.device)
    logits = torch.zeros((2, groups.num_logits), device=backend.device)
    logits[0, groups.column_of(3)], logits[1, groups.column_of(3)] = 60.0, -60.0
    with use_backend(backend.name):
        scores = rsloss_kernels.group_softmax_scores(logits, groups).cpu()
    harness.assert_within(scores[0], torch.tensor([1.0, 0, 0, 0]), 1e-20, "background")
    harness.assert_within(scores[1], torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 2]), 1e-7, "foreground")
