"""The element-wise sigmoid losses of maps, of levels and of rows of any shape, beside rows put together."""
import harness
import pytest
import torch
from harness import moved
from rsloss_kernels import equalized_focal_loss, quality_focal_loss, sigmoid_focal_loss, use_backend
from sigmoid_samples import EFL, FOCAL, QUALITY

GRADIENT_GATE = 2e-6


def natural_order(levels, layout: str, anchors: int, classes: int) -> torch.Tensor:
    """[B, K, C] of maps, over levels, then h, w, anchor: as the published losses reshape them."""
    parts = []
    for level in levels:
        batch, _, *spatial = level.shape
        if layout == "anchor_major":
            named = level.reshape(batch, anchors, classes, -1).permute(0, 3, 1, 2)
        else:
            named = level.reshape(batch, classes, anchors, -1).permute(0, 3, 2, 1)
        parts.append(named.reshape(batch, -1, classes))
    return torch.cat(parts, 1)


MEMORY = {
    "contiguous": lambda level, number: level,
    "channels_last": lambda level, number: level.contiguous(memory_format=torch.channels_last),
    "mixed": lambda level, number: level.contiguous(memory_format=torch.channels_last) if number == 0 else level,
    "sliced": lambda level, number: torch.cat([level, level], 3)[..., : level.shape[3]],
}


@pytest.mark.parametrize(
    "memory",
    # What is laid out by Python alone is the same for all backends.
    [pytest.param(name, marks=[pytest.mark.slow_interpreter] * (name in ("mixed", "sliced"))) for name in MEMORY],
)
@pytest.mark.parametrize("anchors", [1, 3])
@pytest.mark.parametrize("layout", ["anchor_major", "class_major"])
def test_maps(backend, generator, layout, anchors, memory):
    """Against rows in the order in which detectors flatten, for every form of what comes with the logits."""
    batch, classes, sizes = 2, 5, [(4, 6), (2, 3), (1, 1)]
    levels = [torch.randn((batch, anchors * classes, *size), generator=generator) for size in sizes]
    levels = [MEMORY[memory](level, number) for number, level in enumerate(levels)]
    rows = [height * width * anchors for height, width in sizes]
    labels = torch.randint(-1, classes + 2, (batch, sum(rows)), generator=generator)
    quality = torch.rand((batch, sum(rows)), generator=generator)
    weight = torch.rand((batch, sum(rows), classes), generator=generator)
    soft = torch.rand((batch, sum(rows), classes), generator=generator)
    flat = natural_order(levels, layout, anchors, classes)
    expected = {
        "labels": QUALITY.truth(flat, labels, quality, weight=weight[..., 0]),
        "dense": QUALITY.truth(flat, soft, weight=weight),
    }

    def per_level(value):
        return list(value.split(rows, 1))

    def per_place(value):
        return [part.reshape(batch, *size, anchors, *part.shape[2:]) for part, size in zip(per_level(value), sizes, strict=True)]

    def as_maps(value):
        """As the head would put them out."""
        order = (0, 3, 4, 1, 2) if layout == "anchor_major" else (0, 4, 3, 1, 2)
        return [part.permute(order).reshape(level.shape) for part, level in zip(per_place(value), levels, strict=True)]

    forms = [("labels", form, labels, quality, weight[..., 0].contiguous()) for form in (lambda value: value, per_level, per_place)]
    forms += [("dense", form, soft, None, weight) for form in (lambda value: value, per_level, per_place, as_maps)]
    for name, form, targets, *others in forms:
        leaves = [level.detach().to(backend.device).requires_grad_() for level in levels]
        options = {"layout": layout, "num_classes": classes, "reduction": "sum"}
        targets, qualities, weights = (value if value is None else moved(form(value), backend.device) for value in (targets, *others))
        with use_backend(backend.name):
            loss = quality_focal_loss(leaves, targets, qualities, weight=weights, **options)
        gradients = [gradient.cpu() for gradient in torch.autograd.grad(loss, leaves)]
        assert all(gradient.shape == level.shape for gradient, level in zip(gradients, levels, strict=True))
        got = harness.Evaluation((loss.detach().cpu(),), natural_order(gradients, layout, anchors, classes))
        harness.assert_gates(backend, got, expected[name].losses, expected[name].gradient(), name, narrow=GRADIENT_GATE)


def test_a_shape_of_rows_or_of_elements_follows_the_other_levels(backend, generator):
    """Of one class and one anchor [B, S, 1] is either, on maps with one spatial dimension; on the next it is of elements alone."""
    levels = [torch.randn((2, 1, *size), generator=generator) for size in ((12,), (3, 4))]
    labels, weight = torch.randint(-1, 2, (2, 24), generator=generator), torch.rand((2, 24, 1), generator=generator)
    leaves, targets, weights = moved(levels, backend.device), moved(labels, backend.device), moved(weight, backend.device)
    options = {"layout": "anchor_major", "reduction": "sum"}
    with use_backend(backend.name):
        wanted = sigmoid_focal_loss(leaves, targets, weight=weights[..., 0], **options)
        for given in (weights, list(weights.split(12, 1))):
            assert torch.equal(sigmoid_focal_loss(leaves, targets, weight=given, **options), wanted)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["anchor_major", "class_major"])
def test_elements_of_maps(backend, generator, layout, memory):
    levels = [torch.randn((2, 6, *size), generator=generator) for size in ((3, 4), (2, 2))]
    levels = [MEMORY[memory](level, 0).to(backend.device) for level in levels]
    labels = torch.randint(-1, 4, (2, 32), generator=generator).to(backend.device)
    with use_backend(backend.name):
        got = sigmoid_focal_loss(levels, labels, layout=layout, num_classes=3)
        wanted = sigmoid_focal_loss(natural_order(levels, layout, 2, 3), labels)
        single = sigmoid_focal_loss(levels[0], labels[:, :24], layout=layout, num_classes=3)
    assert [losses.shape for losses in got] == [level.shape for level in levels] and torch.equal(single, got[0])
    assert all(losses.stride() == level.stride() for losses, level in zip(got, levels, strict=True))
    torch.testing.assert_close(natural_order(got, layout, 2, 3), wanted, rtol=1e-7, atol=0)


@pytest.mark.parametrize("anchors, layout", [(1, "anchor_major"), (1, "class_major"), (3, "anchor_major"), (3, "class_major")])
def test_maps_in_channels_last_memory_are_not_copied(backend, generator, layout, anchors):
    levels = [torch.randn((2, anchors * 4, 6, 5), generator=generator).contiguous(memory_format=torch.channels_last)]
    levels = [level.to(backend.device).requires_grad_() for level in levels]
    labels = torch.randint(0, 5, (2, 30 * anchors), generator=generator).to(backend.device)
    addresses = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: addresses.add(value.data_ptr()), lambda value: value):
        with use_backend(backend.name):
            sigmoid_focal_loss(levels, labels, layout=layout, num_classes=4, reduction="sum")
    # Rows are counted in the order of the labels then, too.
    assert {levels[0].data_ptr(), labels.data_ptr()} <= addresses


# In pieces of some of the classes, of several parts of an image's rows, and of rows alone: 200,000 elements and more.
MANY = {"images": (3, 40, [(50, 40)]), "levels": (1, 90, [(4, 8), (30, 40), (40, 30)]), "classes": (1, 1203, [(13, 20)])}


@pytest.mark.slow_interpreter
@pytest.mark.parametrize("layout", ["rows", "anchor_major"])
@pytest.mark.parametrize("form", MANY)
def test_class_sums_of_many_elements(backend, generator, form, layout):
    batch, classes, sizes = MANY[form]
    if backend.is_slow:
        sizes = [(3, 5) for _ in sizes]
    levels = [torch.randn((batch, classes, *size), generator=generator) for size in sizes]
    labels = torch.randint(-1, classes + 1, (batch, sum(height * width for height, width in sizes)), generator=generator)
    pos_neg = torch.rand(classes, generator=generator, dtype=torch.float64)
    flat = natural_order(levels, "anchor_major", 1, classes)
    truth = EFL.truth(flat.flatten(0, 1), labels.flatten(), pos_neg)
    if layout == "rows":
        levels = flat
    with use_backend(backend.name):
        got = equalized_focal_loss(moved(levels, backend.device), labels.to(backend.device), pos_neg.to(backend.device), layout=layout)
    harness.assert_within(got.loss.cpu(), truth.losses[0], 1e-7 * truth.losses[0], "loss")
    for name, sums, wanted in zip(("positives", "negatives"), got[1:], truth.class_sums, strict=True):
        harness.assert_within(sums.cpu(), wanted, 1e-6 * wanted, name)


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (2, 3, 4, 3), (0, 3), (2, 0, 3)])
def test_rows_of_any_shape(backend, generator, shape):
    logits = torch.randn(shape, generator=generator)
    labels = torch.randint(-1, 5, shape[:-1], generator=generator)
    FOCAL.assert_agrees(backend, logits, labels, weight=torch.rand(shape[:-1], generator=generator), label=str(shape))
    FOCAL.assert_agrees(backend, logits, torch.rand(shape, generator=generator), weight=torch.rand(shape, generator=generator))
    transposed = torch.randn(shape[::-1], generator=generator).permute(*range(len(shape))[::-1])
    FOCAL.assert_agrees(backend, transposed, labels)


def test_levels_of_rows(backend, generator):
    levels = [torch.randn((2, rows, 4), generator=generator) for rows in (5, 0, 9)]
    labels = torch.randint(-1, 6, (2, 14), generator=generator)
    joined = torch.cat(levels, 1)
    truth = FOCAL.truth(joined, labels)
    for targets in (labels, list(labels.split([5, 0, 9], 1))):
        leaves = [level.to(backend.device).requires_grad_() for level in levels]
        with use_backend(backend.name):
            loss = FOCAL.function(leaves, moved(targets, backend.device))
        gradient = torch.cat([part.cpu() for part in torch.autograd.grad(loss, leaves)], 1)
        got = harness.Evaluation((loss.detach().cpu(),), gradient)
        harness.assert_gates(backend, got, truth.losses, truth.gradient(), narrow=GRADIENT_GATE)


def test_many_small_levels_are_one(backend, generator):
    """Equal elements, whatever they are cut into: chunks must not lose or repeat any."""
    logits, labels = torch.randn((210, 3), generator=generator), torch.randint(0, 4, (210,), generator=generator)
    expected = FOCAL.assert_agrees(backend, logits, labels)
    parts = [1, 2, 3, 4, 50, 60, 70, 20]
    leaves = [part.to(backend.device).requires_grad_() for part in logits.split(parts)]
    with use_backend(backend.name):
        loss = FOCAL.function(leaves, labels.to(backend.device))
    torch.testing.assert_close(loss.detach().cpu(), expected.losses[0], rtol=2e-7, atol=0)
    assert torch.equal(torch.cat(torch.autograd.grad(loss, leaves)).cpu(), expected.gradient)
