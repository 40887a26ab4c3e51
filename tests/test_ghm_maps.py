"""GHM-C of a head's maps as they come: what the levels give when they are permuted and put together as rows."""
import pytest
import torch
from harness import assert_within, moved
from head_samples import Head
from torch import Tensor

from rsloss_kernels import GHMC, _library, ghm_classification_loss, use_backend

# (B, A, C, sizes of the levels): planes shorter and longer than a block of 512 elements, an empty level, one place, one class.
GEOMETRIES = {
    "two_anchors": (2, 2, 4, ((5, 7), (3, 2), (1, 1))),
    "one_anchor": (3, 1, 5, ((9, 70), (0, 4), (3, 3))),
    "one_class": (2, 3, 1, ((65,), (64,), (1,))),
    "no_spatial": (4, 2, 3, ((), (31,))),
}


def run(backend, logits: list[Tensor] | Tensor, *arguments, loss=ghm_classification_loss, **options) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [level.to(backend.device).detach().requires_grad_() for level in ([logits] if isinstance(logits, Tensor) else logits)]
    with use_backend(backend.name):
        got = loss(leaves[0] if isinstance(logits, Tensor) else leaves, *moved(arguments, backend.device), **options)
        losses = list(got) if isinstance(got, (list, tuple)) else [got]
        gradients = torch.autograd.grad([value for value in losses if value.requires_grad], leaves, [torch.ones_like(v) for v in losses])
    return [value.detach().cpu() for value in losses], [gradient.cpu() for gradient in gradients]


def assert_close(got: Tensor, wanted: Tensor, label: str) -> None:
    """Sums of float64 in another order, rounded to the dtype; gradients are those of the same bins."""
    gate = {torch.float64: 1e-12, torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[got.dtype]
    assert_within(got, wanted.double(), gate * wanted.double().abs() + 1e-30, label)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", ["anchor_major", "class_major"])
def test_maps_are_as_rows(backend, layout, geometry, generator):
    batch, anchors, classes, sizes = GEOMETRIES[geometry]
    for number, dtype in enumerate((torch.float64, torch.float32, torch.float16, torch.bfloat16)):
        head = Head(generator, batch, anchors, classes, sizes, layout, dtype)
        if number % 2:
            head.channels_last()
        shape = head.labels.shape
        weight = torch.randint(-1, 3, shape, generator=generator).to((torch.float32, torch.float64, torch.float16, torch.int64)[number])
        dense = head.dense().clamp(min=0)
        by_element = torch.rand((*shape, classes), generator=generator) - 0.3
        labels = head.labels.int() if number == 1 else head.labels
        cases = {
            "labels": ((labels, weight), (labels, weight)),
            "labels by level": ((head.per_level(labels), head.per_level(weight)), (labels, weight)),
            "labels alone": ((labels,), (labels,)),
            "labels, weights of elements": ((labels, head.as_maps(by_element)), (labels, by_element)),
            "dense maps": ((head.as_maps(dense), head.as_maps(by_element)), (dense, by_element)),
            "dense, weights of rows": ((dense, weight), (dense, weight)),
        }
        for name, (of_maps, of_rows) in list(cases.items())[number % 2 if backend.is_slow else 0 :: 2 if backend.is_slow else 1]:
            options = {"bins": 10 + number, "background": "first" if number == 2 else "last"}
            got = run(backend, head.maps, *of_maps, **head.options, **options)
            wanted = run(backend, head.rows(head.maps), *of_rows, **options)
            assert_close(got[0][0], wanted[0][0], f"{name}, loss")
            assert_close(head.rows(got[1]), wanted[1][0], f"{name}, gradient")
            for gradient, level in zip(got[1], head.maps, strict=True):
                assert gradient.shape == level.shape and (not number % 2 or gradient.movedim(1, -1).is_contiguous())


def test_levels_of_rows(backend, generator):
    levels = [torch.randn((2, rows, 3), generator=generator) for rows in (9, 40)]
    labels = [torch.randint(-1, 4, (2, rows), generator=generator) for rows in (9, 40)]
    weights = [torch.rand((2, rows), generator=generator) - 0.3 for rows in (9, 40)]
    got = run(backend, levels, torch.cat(labels, 1), weights)
    wanted = run(backend, torch.cat(levels, 1), torch.cat(labels, 1), torch.cat(weights, 1))
    assert_close(got[0][0], wanted[0][0], "loss")
    assert_close(torch.cat(got[1], 1), wanted[1][0], "gradient")


def test_module_with_momentum(backend, generator):
    """State, and the losses of the elements in the shapes of the maps."""
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)), "class_major")
    weight = torch.rand(head.labels.shape, generator=generator) - 0.2
    modules = [GHMC(bins=10, momentum=0.7, **options).to(backend.device) for options in (head.options, {})]
    for reduction in ("mean", "none"):
        got, wanted = (
            run(backend, logits, head.labels, weight, loss=module, reduction_override=reduction)
            for module, logits in zip(modules, (head.maps, head.rows(head.maps)), strict=True)
        )
        of_maps = head.rows(got[0]) if reduction == "none" else got[0][0]
        assert_close(of_maps, wanted[0][0], f"{reduction}, loss")
        assert_close(head.rows(got[1]), wanted[1][0], f"{reduction}, gradient")
        assert_close(modules[0].acc_sum.cpu(), modules[1].acc_sum.cpu(), "state")
    assert [level.shape for level in got[0]] == [level.shape for level in head.maps] and modules[0].acc_sum.any()


def test_operators_on_maps(backend, generator):
    head = Head(generator, 2, 2, 3, ((5, 7), (33,)))
    labels, weights = ([level.movedim(-1, 1).contiguous() for level in head.per_level(value)] for value in (head.labels, head.quality - 0.4))
    maps, labels, weights = moved(head.maps, backend.device), moved(labels, backend.device), moved(weights, backend.device)
    forward = _library.operator("ghm_forward", backend.name)
    leaves = [level.detach().requires_grad_() for level in maps]
    tests = {} if backend.name == "cpp" else {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(forward, (leaves, labels, weights, None, None, 10, None, True, 0.0, False), **tests)
    histogram = _library.operator("ghm_histogram", backend.name)
    for bad in (labels[0][:1], labels[0].flatten(2), labels[0].repeat(1, 2, 1, 1), labels[0][..., :-1].contiguous()):
        with pytest.raises((RuntimeError, ValueError), match="ghm_histogram: targets must have the shape of preds"):
            histogram(maps[:1], [bad], [], 10, None, False)
    with pytest.raises((RuntimeError, ValueError), match="ghm_histogram: weights must have the shape of preds"):
        histogram(maps[:1], labels[:1], [weights[0][:, :1].contiguous()], 10, None, False)


BAD = {
    "levels": (lambda a: a | {"target": a["target"][:1]}, ValueError, "target must be one Tensor or 2"),
    "weights": (lambda a: a | {"weight": a["target"][:1]}, ValueError, "weight must be one Tensor or 2"),
    "channels": (lambda a: a | {"num_classes": 5}, ValueError, "logits must have 5 classes, got 6 channels"),
    "layout": (lambda a: a | {"layout": "columns"}, ValueError, "layout must be one of 'rows'"),
    "dtypes": (lambda a: a | {"logits": [a["logits"][0], a["logits"][1].half()]}, TypeError, "all levels of logits must have one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_by_name(fault, generator):
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)))
    good = {"logits": head.maps, "target": head.per_level(head.labels), **head.options}
    assert ghm_classification_loss(**good) > 0
    make, exception, message = BAD[fault]
    with pytest.raises(exception, match=f"ghm_classification_loss: .*{message}"):
        ghm_classification_loss(**make(good))
    if fault == "layout":
        with pytest.raises(exception, match=f"GHMC: {message}"):
            GHMC(layout="columns")


def test_one_place_and_three_spatial_dimensions(backend, generator):
    """Dimensions of length 1 may be anywhere in the order of memory."""
    head = Head(generator, 1, 3, 4, ((1, 1, 1), (1, 1, 1)))
    head.maps[0] = head.maps[0].permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    got = run(backend, head.maps, head.labels, **head.options)
    wanted = run(backend, head.rows(head.maps), head.labels)
    assert_close(got[0][0], wanted[0][0], "loss")
    assert_close(head.rows(got[1]), wanted[1][0], "gradient")


def test_a_list_of_one_weight_beside_one_tensor(backend, generator):
    logits, labels = torch.randn((9, 3), generator=generator), torch.randint(-1, 4, (9,), generator=generator)
    weight = torch.rand(9, generator=generator) - 0.3
    wanted, got = (run(backend, logits, labels, value) for value in (weight, [weight]))
    assert torch.equal(got[0][0], wanted[0][0]) and torch.equal(got[1][0], wanted[1][0])
