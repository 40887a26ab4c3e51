"""The losses in MMDetection's registry: values, gradients and states of the framework's own, called as its heads call them."""
import math

import frameworks
import pytest
import torch
from torch import Tensor

CLASSES = 6
ROWS = 40
REDUCTIONS = ((None, None), (None, 7.0), ("sum", None), ("none", None), ("none", 7.0))


@pytest.fixture(scope="module")
def registry():
    frameworks.mmdetection()
    from mmdet.registry import MODELS

    return MODELS


def labels(generator) -> Tensor:
    return torch.randint(0, CLASSES + 1, (ROWS,), generator=generator)


def uniform(generator, *shape) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def one_hot(targets: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(targets, CLASSES + 1)[:, :CLASSES]


def some_ignored(generator, *shape) -> Tensor:
    """Weights of which a third are 0."""
    weights = uniform(generator, *shape)
    return torch.where(weights < 1 / 3, 0.0, weights)


# Name of the framework's loss, its arguments, columns of the logits, and what a head gives it as targets.
CALLS = {
    "focal_labels": ("FocalLoss", {"gamma": 1.5, "alpha": 0.4, "loss_weight": 2.0}, CLASSES, labels),
    "focal_dense": ("FocalLoss", {}, CLASSES, lambda g: one_hot(labels(g))),
    "focal_probabilities": ("FocalLoss", {"activated": True}, CLASSES, labels),
    "quality_tuple": ("QualityFocalLoss", {"beta": 1.5}, CLASSES, lambda g: (labels(g), uniform(g, ROWS))),
    "quality_ignored_label": ("QualityFocalLoss", {}, CLASSES, lambda g: (labels(g) - 1, uniform(g, ROWS))),
    "quality_dense": ("QualityFocalLoss", {}, CLASSES, lambda g: one_hot(labels(g)) * uniform(g, ROWS, 1)),
    "quality_probabilities": ("QualityFocalLoss", {"activated": True}, CLASSES, lambda g: (labels(g), uniform(g, ROWS))),
    "varifocal": ("VarifocalLoss", {"alpha": 0.6}, CLASSES, lambda g: one_hot(labels(g)) * uniform(g, ROWS, 1)),
    "varifocal_unweighted": ("VarifocalLoss", {"iou_weighted": False}, CLASSES, lambda g: one_hot(labels(g)) * uniform(g, ROWS, 1)),
    "smooth_l1": ("SmoothL1Loss", {"beta": 0.7, "loss_weight": 3.0}, 4, lambda g: 4 * uniform(g, ROWS, 4) - 2),
    "seesaw": ("SeesawLoss", {"num_classes": CLASSES, "p": 0.7, "return_dict": False}, CLASSES + 2, labels),
}


def evaluate(loss, logits: Tensor, *arguments, upstream: Tensor | None = None, **options) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, *arguments, **options)
    value.backward(torch.ones_like(value) if upstream is None else upstream)
    return value.detach(), logits.grad


def assert_equal(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], rtol: float = 1e-9) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=rtol * float(theirs.abs().amax()))


@pytest.mark.parametrize("name", CALLS)
def test_beside_the_framework(registry, generator, name):
    """All reductions, with weights of rows, elements or none."""
    kind, options, columns, make_targets = CALLS[name]
    theirs, ours = registry.build({"type": kind, **options}), registry.build({"type": f"Fused{kind}", **options})
    logits = 3 * torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
    if options.get("activated"):
        logits = logits.sigmoid()
    targets = make_targets(generator)
    weights = {"focal_dense": some_ignored(generator, ROWS, CLASSES), "smooth_l1": some_ignored(generator, ROWS, 4)}
    weight = weights.get(name, some_ignored(generator, ROWS))
    if "varifocal" in name:
        weight = weight[:, None].expand(ROWS, CLASSES)
    # Seesaw's sums of float32 there.
    rtol = 1e-6 if name == "seesaw" else 1e-9
    for reduction, avg_factor in REDUCTIONS:
        for given in (None, weight):
            if name == "seesaw":
                if reduction == "none":  # two losses of different lengths there
                    continue
                counts = torch.randint(0, 50, (CLASSES + 1,), generator=generator)
                for loss in (ours, theirs):
                    loss.cum_samples.copy_(counts)
            call = {"avg_factor": avg_factor, "reduction_override": reduction}
            assert_equal(evaluate(ours, logits, targets, given, **call), evaluate(theirs, logits, targets, given, **call), rtol)
            if name == "seesaw":
                assert torch.equal(ours.cum_samples, theirs.cum_samples.double())
    for loss in (ours, theirs):
        with pytest.raises(ValueError, match="avg_factor"):
            loss(logits, targets, avg_factor=2.0, reduction_override="sum")
        with pytest.raises((AssertionError, ValueError, TypeError)):
            loss(logits, targets, reduction_override="median")


STATEFUL = {
    "ghmc": ("GHMC", {"momentum": 0.75}, CLASSES, lambda g: one_hot(labels(g)).double()),
    "ghmr": ("GHMR", {"momentum": 0.75}, 4, lambda g: 4 * uniform(g, ROWS, 4) - 2),
    "eqlv2": ("EQLV2Loss", {"num_classes": CLASSES}, CLASSES + 1, labels),
}


@pytest.mark.parametrize("name", [*CALLS, *STATEFUL])
def test_compiled(registry, generator, name):
    """In one graph: two steps give what they give without, states included."""
    kind, options, columns, make_targets = (CALLS | STATEFUL)[name]
    eager, traced = (registry.build({"type": f"Fused{kind}", **options}) for _ in range(2))
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        logits = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
        logits = logits.sigmoid() if options.get("activated") else logits
        arguments = [make_targets(generator)]
        if "ghm" in name:
            arguments.append(some_ignored(generator, ROWS, columns))
        assert_equal(evaluate(compiled, logits, *arguments), evaluate(eager, logits, *arguments), 1e-12)
    for before, after in zip(traced.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("kind", ["GHMC", "GHMR"])
def test_ghm_beside_the_framework(registry, generator, kind, momentum):
    """Several steps: the density of one is part of that of the next."""
    options = {"bins": 10, "momentum": momentum, "loss_weight": 2.0} | ({"mu": 0.05} if kind == "GHMR" else {})
    theirs, ours = registry.build({"type": kind, **options}), registry.build({"type": f"Fused{kind}", **options})
    for step in range(4):
        pred = torch.randn(ROWS, CLASSES, generator=generator)
        weight = (torch.rand(ROWS, CLASSES, generator=generator) < 0.8).float()
        target = torch.randn(ROWS, CLASSES, generator=generator)
        if kind == "GHMC":
            target = labels(generator) - 1 if step % 2 else one_hot(labels(generator))
            weight = weight[:, 0] if step % 2 else weight
        calls = [{}, {"avg_factor": 5.0}] if not momentum else [{"avg_factor": 5.0}]
        for call in calls:
            assert_equal(evaluate(ours, pred, target, weight, **call), evaluate(theirs, pred, target, weight, **call), 1e-5)
        if momentum:
            torch.testing.assert_close(ours.acc_sum, theirs.acc_sum.double(), rtol=1e-6, atol=1e-6)
    # `reduction_override` is GHMC's fourth argument.
    arguments = ("none",) if kind == "GHMC" else (None, "none")
    assert_equal(evaluate(ours, pred, target, weight, *arguments), evaluate(theirs, pred, target, weight, *arguments), 1e-5)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_eqlv2_beside_the_framework(registry, generator):
    options = {"num_classes": CLASSES, "gamma": 10, "mu": 0.7, "alpha": 3.0, "loss_weight": 1.5}
    theirs, ours = registry.build({"type": "EQLV2Loss", **options}).double(), registry.build({"type": "FusedEQLV2Loss", **options})
    for _ in range(3):
        logits = torch.randn(ROWS, CLASSES + 1, generator=generator, dtype=torch.float64)
        target = labels(generator)
        assert_equal(evaluate(ours, logits, target), evaluate(theirs, logits, target))
        for name in ("pos_grad", "neg_grad", "pos_neg"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=0)
    assert ours.get_channel_num(CLASSES) == theirs.get_channel_num(CLASSES)
    torch.testing.assert_close(ours.get_activation(logits), theirs.get_activation(logits))
    assert registry.build({"type": "FusedEQLV2Loss", "use_distributed": True}).process_group == "default"


@pytest.mark.parametrize(
    "kind, logits, target, wanted",
    [
        ("FocalLoss", [[100.0, -100.0]], [0], 0.0),
        ("FocalLoss", [[0.0, 0.0]], [2], 0.75 * 0.25 * math.log(2)),
        ("QualityFocalLoss", [[100.0, -100.0]], ([0], [1.0]), 0.0),
        ("QualityFocalLoss", [[0.0]], ([0], [0.5]), 0.0),
        ("QualityFocalLoss", [[0.0, 0.0]], ([2], [0.3]), 2 * 0.25 * math.log(2)),
        ("VarifocalLoss", [[100.0, -100.0]], [[1.0, 0.0]], 0.0),
        ("VarifocalLoss", [[0.0]], [[0.5]], 0.5 * math.log(2)),
        ("SmoothL1Loss", [[1.0, -3.0]], [[1.0, -1.0]], (0 + 1.5) / 2),
    ],
)
def test_documented_values(registry, kind, logits, target, wanted):
    """What MMDetection documents of its losses, of the framework's and of ours."""
    pair = isinstance(target, tuple)
    target = tuple(torch.tensor(part) for part in target) if pair else torch.tensor(target)
    for name in (kind, f"Fused{kind}"):
        loss = registry.build({"type": name})
        assert float(loss(torch.tensor(logits), target)) == pytest.approx(wanted, abs=1e-6)
        weight = torch.zeros(len(logits)) if kind != "SmoothL1Loss" else torch.zeros(1, 2)
        if kind == "VarifocalLoss":
            weight = weight[:, None]
        assert loss(torch.tensor(logits), target, weight) == 0


def test_documented_seesaw(registry):
    """Logits of zero among two classes: log 2 for the objectness, and for the class of a foreground row."""
    for name in ("SeesawLoss", "FusedSeesawLoss"):
        loss = registry.build({"type": name, "p": 0.0, "q": 0.0, "num_classes": 2})
        for label, classes in ((1, math.log(2)), (2, 0.0)):
            got = loss(torch.zeros(1, 4), torch.tensor([label]))
            assert float(got["loss_cls_objectness"]) == pytest.approx(math.log(2))
            assert float(got["loss_cls_classes"]) == pytest.approx(classes, abs=1e-7)
        assert loss.get_cls_channels(2) == 4 and loss.get_activation(torch.zeros(1, 4)).shape == (1, 3)
        with pytest.raises((AssertionError, ValueError)):
            loss(torch.zeros(1, 3), torch.tensor([0]))


def test_empty_batches(registry):
    """No rows: an exact zero that is connected to the graph, as heads add it up."""
    for kind, columns, target in (
        *[(kind, 5, torch.zeros(0, dtype=torch.long)) for kind in ("FocalLoss", "GHMC")],
        ("QualityFocalLoss", 5, (torch.zeros(0, dtype=torch.long), torch.zeros(0))),
        *[(kind, 5, torch.zeros(0, 5)) for kind in ("VarifocalLoss", "GHMR", "SmoothL1Loss")],
    ):
        logits = torch.zeros(0, columns, requires_grad=True)
        weight = torch.zeros(0) if kind in ("FocalLoss", "QualityFocalLoss", "GHMC") else torch.zeros(0, columns)
        loss = registry.build({"type": f"Fused{kind}"})(logits, target, weight, avg_factor=1.0)
        loss.backward()
        assert loss == 0 and logits.grad.shape == logits.shape


def test_ranking_losses_called_as_a_head_calls_them(registry, generator):
    import rsloss_kernels

    logits = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    target, quality, weight = labels(generator), uniform(generator, ROWS), some_ignored(generator, ROWS)
    kept = torch.where(weight > 0, target, -1)
    wanted = {
        "RankSortLoss": lambda x: 2 * sum(rsloss_kernels.rank_sort_loss(x, kept, quality)),
        "APLoss": lambda x: 2 * rsloss_kernels.average_precision_loss(x, kept),
        "ALRPLoss": lambda x: 2 * rsloss_kernels.alrp_loss(x, kept, quality).classification,
    }
    for name, function in wanted.items():
        loss = registry.build({"type": name, "use_sigmoid": True, "loss_weight": 2.0})
        assert_equal(evaluate(loss, logits, (target, quality), weight, avg_factor=3.0), evaluate(function, logits), 0.0)
    with pytest.raises(TypeError, match="tuple .labels, regression_losses., got labels alone"):
        registry.build({"type": "ALRPLoss"})(logits, target)
    with pytest.raises(ValueError, match="iou_threshold must be at least 0 and below 1, got 1"):
        registry.build({"type": "ALRPLoss", "iou_threshold": 1})
    looser = registry.build({"type": "ALRPLoss", "iou_threshold": 0.75})
    wanted = evaluate(registry.build({"type": "ALRPLoss"}), logits, (target, quality))
    assert_equal(evaluate(looser, logits, (target, quality / 2)), wanted, 1e-12)


def test_equalized_losses_take_what_dense_heads_need(registry, generator):
    import rsloss_kernels

    logits, target = torch.randn(ROWS, CLASSES, generator=generator), labels(generator)
    loss = registry.build({"type": "EqualizedFocalLoss", "use_sigmoid": True, "num_classes": CLASSES})
    plain = rsloss_kernels.EqualizedFocalLoss(CLASSES)
    assert_equal(evaluate(loss, logits, target, avg_factor=4.0), evaluate(plain, logits, target, avg_factor=4.0), 0.0)
    quality = registry.build({"type": "EqualizedQualityFocalLoss", "use_sigmoid": True, "num_classes": CLASSES})
    assert quality(logits, (target, torch.rand(ROWS, generator=generator))) > 0
    with pytest.raises(NotImplementedError, match="use_sigmoid must be True"):
        registry.build({"type": "EqualizedFocalLoss", "use_sigmoid": False, "num_classes": CLASSES})
