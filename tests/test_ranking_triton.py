"""Ways of the Triton kernels of the ranking losses that must give the same bits: by search and by value, in blocks of any size."""
import importlib

import pytest
import torch
from harness import ROUNDING, Backend, Pipeline, assert_gates, backends_under_test

from rsloss_kernels import ghm_classification_loss, sigmoid_focal_loss, smooth_l1_loss, use_backend

REFERENCE = Backend("reference", "cpu")
BACKENDS = [backend for backend in backends_under_test() if backend.name == "triton"]
on_triton = pytest.mark.parametrize("kernels", BACKENDS, ids=lambda backend: backend.id)


def stages(backend: Backend, logits, targets, delta: float, capacity: int) -> tuple[torch.Tensor, ...]:
    """Bins, losses and gradient, on the CPU."""
    logits, targets = ([part.to(backend.device) for part in parts] for parts in (logits, targets))
    pipeline = Pipeline(backend, logits, targets, delta=delta, capacity=capacity)
    positives, negatives, counts = pipeline.collect()
    _, bins = pipeline.bin(negatives, positives, counts)
    result = pipeline.run((0.5, 2.0))
    return bins.cpu(), torch.stack(list(result.losses)), result.gradient


def assert_same_bits(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@on_triton
@pytest.mark.parametrize("delta", [0.25, 0.0])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_by_value_as_by_search(kernels, dtype, delta, generator, monkeypatch):
    """Zeros of both signs at the first breakpoint, infinities, NaN, several tensors, more positives than slots, none."""
    values = importlib.import_module("rsloss_kernels.losses.ranking.triton_values")
    sizes, positives = (3001, 0, 7), 40
    logits = [(torch.randn(size, generator=generator) * 3).to(dtype) for size in sizes]
    logits[0][-5:] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 7.0])
    targets = [torch.zeros(size) for size in sizes]
    targets[0][:positives] = torch.rand(positives, generator=generator) + 0.1
    logits[0][:positives] = logits[0][:positives].abs() + delta
    logits[0][3] = delta
    targets[0][positives : positives + 100] = -1
    broken = [level.clone() for level in logits]
    broken[0][1000], broken[2][3] = torch.nan, -torch.nan
    ignored = [target.clamp(max=0) for target in targets]
    for levels, of_levels, capacity in ((logits, targets, 64), (broken, targets, 64), (logits, targets, 39), (logits, ignored, 8)):
        arguments = (levels, of_levels, delta, capacity)
        monkeypatch.setattr(values, "FEWEST_BY_VALUE", 1)
        by_value = stages(kernels, *arguments)
        monkeypatch.setattr(values, "FEWEST_BY_VALUE", 1 << 40)
        assert_same_bits(by_value, stages(kernels, *arguments))
        assert torch.equal(by_value[0], stages(REFERENCE, *arguments)[0])


@on_triton
def test_many_16_bit_logits_take_the_way_by_value(kernels, generator, monkeypatch):
    """From 2^20 of them on, of one segment; the losses and the gradient within their gates."""
    values = importlib.import_module("rsloss_kernels.losses.ranking.triton_values")
    logits = [torch.randn(1 << 20, generator=generator).bfloat16()]
    targets = [torch.zeros(1 << 20)]
    targets[0][:50] = torch.rand(50, generator=generator)
    assert values.is_by_value(logits, None, 1) and not values.is_by_value(logits, None, 2)
    assert not values.is_by_value([logits[0][1:]], None, 1) and not values.is_by_value([logits[0].float()], None, 1)
    assert not values.is_by_value([logits[0].expand(4096, -1)], None, 1), "counters have 32 bits"
    called = []
    for name in ("bin_by_value", "look_up"):
        for stage in ("bin", "backward"):
            module = importlib.import_module(f"rsloss_kernels.losses.ranking.triton_{stage}")
            if hasattr(module, name):
                real = getattr(module, name)
                monkeypatch.setattr(module, name, lambda *given, real=real: called.append(real.__name__) or real(*given))
    on_device = [[part.to(kernels.device) for part in parts] for parts in (logits, targets)]
    got = Pipeline(kernels, *on_device, delta=0.25, capacity=64).run()
    assert called == ["bin_by_value", "look_up"]
    truth = Pipeline(REFERENCE, [logits[0].double()], targets, delta=0.25, capacity=64).run()
    assert_gates(kernels, got, [float(loss) for loss in truth.losses], truth.gradient)


# Passes that add floats in an order that hangs on their configuration.
ORDERED = (
    *("ranking pairs", "ranking losses", "focal sums", "focal class sums", "focal total", "ghm histogram"),
    *("group softmax", "group softmax losses", "seesaw", "smooth l1 sums"),
)


@on_triton
def test_configurations_give_the_same_bits(kernels, generator, monkeypatch):
    """Of every pass that does not add floats, with sizes that no block divides, and room for copies of the bins."""
    common = importlib.import_module("rsloss_kernels.losses.triton_common")
    values = importlib.import_module("rsloss_kernels.losses.ranking.triton_values")
    logits = [torch.randn(size, generator=generator) * 2 for size in (3000, 1, 1801)]
    targets = [torch.where(torch.rand(len(level), generator=generator) < 0.03, 0.5, 0.0) for level in logits]
    rows = torch.randn(97, 21, generator=generator).to(kernels.device)
    labels = torch.randint(-1, 22, (97,), generator=generator).to(kernels.device)
    losses = (
        lambda leaf: sigmoid_focal_loss(leaf, labels, reduction="none").sum(),
        lambda leaf: ghm_classification_loss(leaf, (leaf.detach() > 1).float()),
        lambda leaf: smooth_l1_loss(leaf, leaf.detach().flip(0), 0.5, reduction="none").sum(),
    )

    def everything() -> list[torch.Tensor]:
        results = [*stages(kernels, logits, targets, 0.25, 1000)]
        with monkeypatch.context() as patch:
            patch.setattr(values, "FEWEST_BY_VALUE", 1)
            results += stages(kernels, [level.half() for level in logits], targets, 0.25, 1000)
        with use_backend("triton"):
            for loss in losses:
                leaf = rows.clone().requires_grad_()
                results += torch.autograd.grad(loss(leaf), leaf)
        return results

    wanted = everything()
    table = common.CONFIGURATIONS if kernels.device == "cuda" else common.INTERPRETED
    for name in table.keys() - set(ORDERED):
        small = common.Configuration(1024, programs=2)
        monkeypatch.setitem(table, name, (common.Entry(small),) if kernels.device == "cuda" else small)
    assert_same_bits(everything(), wanted)


@on_triton
def test_configurations_hang_on_the_device_and_on_sizes(kernels):
    """Float sums of a tensor keep their order whatever its size and the GPU; everything else has an entry for any of both."""
    common = importlib.import_module("rsloss_kernels.losses.triton_common")
    assert common.CONFIGURATIONS.keys() == common.INTERPRETED.keys()
    for name, entries in common.CONFIGURATIONS.items():
        assert entries[-1].capability == 0 and entries[-1].most is None, name
        assert name not in ORDERED or len(entries) == 1, name
        assert common.choose(name, 1 << 40, 75) == entries[-1].configuration
    assert common.choose("ranking search", common.SMALL, 90).block < common.choose("ranking search", common.SMALL + 1, 90).block
    assert common.choose("ranking values", 1 << 20, 120) != common.choose("ranking values", 1 << 20, 100)
