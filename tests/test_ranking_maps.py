"""Ranking losses of a head's maps as they come: bit for bit those of the levels permuted and put together as rows.

The values of that call are tested against float64 truth where the losses are; one test here compares maps with that truth too.
"""
import harness
import pytest
import torch
from harness import assert_gates, moved
from head_samples import Head
from samples import LOSSES
from torch import Tensor

import rsloss_kernels
from rsloss_kernels import _library, alrp_loss, alrp_regression_loss, average_precision_loss, rank_sort_loss, use_backend

LAYOUTS = ("anchor_major", "class_major")
FORMS = ("labels", "labels_per_level", "dense", "dense_maps")


def run(backend, loss, logits, *arguments, **options) -> tuple[list[Tensor], list[Tensor]]:
    """What the loss returns, and the gradients of the logits."""
    leaves = [level.to(backend.device).detach().requires_grad_() for level in ([logits] if isinstance(logits, Tensor) else logits)]
    with use_backend(backend.name):
        got = loss(leaves[0] if isinstance(logits, Tensor) else leaves, *moved(arguments, backend.device), **options)
        returned = [got] if isinstance(got, Tensor) else list(got)
        losses = [value for value in returned if value.requires_grad]
        upstream = [torch.full_like(value, 0.5 + number) for number, value in enumerate(losses)]
        gradients = torch.autograd.grad(losses, leaves, upstream)
    return [value.detach().cpu() for value in returned], [gradient.cpu() for gradient in gradients]


def assert_same(one: list[Tensor], other: list[Tensor], label: str = "") -> None:
    for number, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert mine.dtype == theirs.dtype and torch.equal(mine.nan_to_num(-3e30), theirs.nan_to_num(-3e30)), f"{label} {number}"


def assert_as_rows(backend, head: Head, loss, form: str = "labels", **options) -> tuple[list[Tensor], list[Tensor]]:
    """Of the maps as they are, against the same call with the levels put together."""
    function, label = loss.function, f"{loss.name} {form} {head.layout}"
    got = run(backend, function, head.maps, head.targets(form), *head.third(loss, form), **head.options, **options)
    flat_form = "dense" if form.startswith("dense") else "labels"
    wanted = run(backend, function, head.rows(head.maps), head.targets(flat_form), *head.third(loss, flat_form), **options)
    assert_same(got[0], wanted[0], label)
    assert_same([head.rows(got[1])], wanted[1], f"{label}, gradient of level")
    for gradient, level in zip(got[1], head.maps, strict=True):
        assert gradient.shape == level.shape and gradient.dtype == level.dtype
    return got


# (B, A, C, sizes of the levels), with an empty level, one place, three spatial dimensions, planes longer than many words of the mask.
GEOMETRIES = {
    "two_anchors": (2, 2, 4, ((5, 7), (3, 2), (1, 1))),
    "one_anchor": (3, 1, 5, ((9, 8), (0, 4), (3, 3))),
    "one_class": (2, 3, 1, ((65,), (64,), (1,))),
    "one_of_all": (1, 1, 1, ((2, 3, 11),)),
    "no_spatial": (4, 2, 3, ((), (31,))),
    "large": (2, 1, 6, ((37, 41), (19, 21))),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_have_the_bits_of_rows(backend, loss, layout, geometry, generator):
    batch, anchors, classes, sizes = GEOMETRIES[geometry]
    if backend.is_slow and (geometry == "large" or layout == "class_major") and loss.name != "rank_sort":
        return  # the operators are the same
    for number, form in enumerate(FORMS):
        dtype = (torch.float32, torch.float16, torch.float64, torch.bfloat16)[number]
        head = Head(generator, batch, anchors, classes, sizes, layout, dtype)
        if number % 2:
            head.channels_last()
        got = assert_as_rows(backend, head, loss, form)
        if number % 2:
            assert all(gradient.movedim(1, -1).is_contiguous() for gradient in got[1]), "the gradient takes the logits' memory layout"
        if number == 1:
            head.labels = head.labels + 1
            head.labels[head.labels > classes] = 0
            assert_as_rows(backend, head, loss, form, background="first", delta=0.0)


def test_a_chunk_of_images_is_a_segment_over_all_levels(backend, generator):
    for batch, segments in ((4, 4), (4, 2)):
        head = Head(generator, batch, 1, 3, ((4, 5), (7,)))
        head.labels[:, 0] = 0  # every image has a positive, or it would not be in the mean
        for loss in (LOSSES["rank_sort"], LOSSES["ap"]):
            for form in ("labels", "dense_maps"):
                assert_as_rows(backend, head, loss, form, segments=segments)
    (losses, _) = run(backend, rank_sort_loss, head.maps, head.labels, head.quality, segments=4, **head.options)
    alone = [
        run(backend, rank_sort_loss, [level[image] for level in head.maps], head.labels[image], head.quality[image], **head.options)[0][0]
        for image in (slice(number, number + 1) for number in range(4))
    ]
    assert float(losses[0]) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-6)


def test_maps_against_the_truth(backend, loss, generator):
    head = Head(generator, 2, 2, 4, ((6, 5), (3, 3)), "anchor_major", torch.float64)
    third = head.third(loss, "labels")
    losses, gradients = run(backend, loss.function, head.maps, head.labels, *third, **head.options)
    truth = loss.truth(head.rows(head.maps), head.labels, *third)
    factors = [0.5 + number for number in range(len(truth.losses))]
    got = harness.Evaluation(tuple(losses[: len(truth.losses)]), head.rows(gradients).flatten())
    assert_gates(backend, got, truth.losses, truth.gradient(*factors))


def test_a_list_of_one_quality_beside_one_tensor(backend, generator):
    logits, labels = torch.randn((9, 3), generator=generator), torch.randint(-1, 4, (9,), generator=generator)
    quality = torch.rand(9, generator=generator)
    wanted, got = (run(backend, rank_sort_loss, logits, labels, value) for value in (quality, [quality]))
    assert_same(got[0], wanted[0])
    assert_same(got[1], wanted[1], "gradient")


@pytest.mark.parametrize("shape", [((2, 9), (2, 4)), ((7,), (3,)), ((11,),)], ids=str)
def test_levels_of_rows(backend, loss, shape, generator):
    """A list of levels [..., C]."""
    classes, dim = 3, len(shape[0]) - 1
    levels = [torch.randn((*rows, classes), generator=generator) for rows in shape]
    labels = [torch.where(torch.rand(rows, generator=generator) < 0.4, 0, classes) for rows in shape]
    labels[0].view(-1)[0], labels[0].view(-1)[1] = 1, -1
    quality = [torch.rand(rows, generator=generator).mul(8).ceil() / 8 for rows in shape]
    together, rows, all_quality = torch.cat(labels, dim), torch.cat(levels, dim), torch.cat(quality, dim)
    third = {"quality": (quality,), "regression_losses": (all_quality,)}.get(loss.third, ())
    got = run(backend, loss.function, levels, labels, *third)
    wanted = run(backend, loss.function, rows, together, *((all_quality,) if loss.third else ()))
    assert_same(got[0], wanted[0])
    assert_same([torch.cat(got[1], dim)], wanted[1], "gradient")
    if loss.third == "regression_losses":
        return
    # One tensor for all levels; segments by row and by class.
    third = (all_quality,) if loss.third else ()
    ids = torch.randint(-1, 3, together.shape, generator=generator)
    for segments in ({}, {"segments": ids.split([rows[-1] for rows in shape], dim), "num_segments": 3}, {"segments": "class"}):
        on_device = {name: moved(value, backend.device) for name, value in segments.items()}
        flat = on_device | ({"segments": ids.to(backend.device)} if "num_segments" in segments else {})
        got = run(backend, loss.function, levels, together, *third, **on_device)
        wanted = run(backend, loss.function, rows, together, *third, **flat)
        assert_same(got[0], wanted[0], str(list(segments)))
        assert_same([torch.cat(got[1], dim)], wanted[1], f"gradient {list(segments)}")


def test_not_finite_and_overflow(backend, loss, generator):
    head = Head(generator, 2, 1, 3, ((6, 7), (5,)))
    head.maps[0][0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    head.maps[1][1, 2, 3] = torch.nan
    assert_as_rows(backend, head, loss)
    assert_as_rows(backend, head, loss, "dense_maps")
    if backend.device != "cpu":
        losses, gradients = run(backend, loss.function, head.maps, head.labels, *head.third(loss, "labels"), max_positives=2, **head.options)
        assert losses[0].isnan() and all(gradient.isnan().all() for gradient in gradients)


def test_nothing_positive_nothing_at_all(backend, loss, generator):
    for label in (3, -1):
        head = Head(generator, 2, 1, 3, ((4, 3), (5,)))
        head.labels.fill_(label)
        losses, gradients = assert_as_rows(backend, head, loss)
        assert not losses[0] and not any(gradient.any() for gradient in gradients)
    head = Head(generator, 2, 1, 3, ((0, 3), (0,)))
    losses, gradients = assert_as_rows(backend, head, loss)
    assert not losses[0] and [gradient.shape for gradient in gradients] == [level.shape for level in head.maps]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alrp_regression_part_of_maps(backend, layout, generator):
    """With ties in logit and regression loss, whose order decides their gradient: that of the rows."""
    head = Head(generator, 2, 2, 3, ((5, 4), (3, 1)), layout)
    head.maps = [level.round() for level in head.maps]
    is_positive = (head.labels >= 0) & (head.labels < 3)
    for losses in (head.quality, head.quality[is_positive]):
        ranks = []
        for logits, options in ((head.maps, head.options), (head.rows(head.maps), {})):
            _, rank, order = run(backend, alrp_loss, logits, head.labels, losses, **options)[0]
            leaf = losses.clone().requires_grad_()
            total = alrp_regression_loss(leaf, rank, order)
            ranks.append([rank, order, total.detach(), *torch.autograd.grad(total, leaf)])
        assert ranks[0][0].shape == losses.shape and ranks[0][3].count_nonzero() == is_positive.sum()
        assert_same(*ranks)


@pytest.mark.parametrize("loss", [LOSSES["rank_sort"], LOSSES["alrp"]], ids=["rank_sort", "alrp"])
def test_compiled_graphs(backend, loss, generator):
    """In one graph, with tables that have room to spare, as on a GPU; of Rank & Sort for other sizes too."""
    if loss.name == "alrp" and backend.name != "cpp":
        return  # a graph takes long to make, and the operators have tests of their own
    torch._dynamo.reset()
    is_dynamic = loss.name == "rank_sort" and backend.name == "cpp"
    compiled = torch.compile(loss.function, backend="aot_eager", fullgraph=True, dynamic=is_dynamic)
    for sizes in (((35,), (6,)), ((36,), (10,)))[: 1 + is_dynamic]:
        head = Head(generator, 2, 2, 3, sizes)
        # Regression losses of the positives alone.
        third = head.third(loss, "dense" if loss.third == "regression_losses" else "labels")
        got = run(backend, compiled, head.maps, head.labels, *third, **head.options)
        wanted = run(backend, loss.function, head.rows(head.maps), head.labels, *third)
        assert_same(got[0], wanted[0])
        assert_same([head.rows(got[1])], wanted[1], "gradient")


def operator_arguments(head: Head, device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    labels = [level.movedim(-1, 1).contiguous() for level in head.per_level(head.labels)]
    quality = [level.movedim(-1, 1).contiguous() for level in head.per_level(head.quality)]
    return moved(head.maps, device), moved(labels, device), moved(quality, device)


def test_operators_on_maps(backend, generator):
    """opcheck; and collect finds on maps what it finds on rows."""
    head = Head(generator, 2, 2, 3, ((5, 7), (33,)))
    logits, labels, quality = operator_arguments(head, backend.device)
    collect = _library.operator("ranking_collect", backend.name)
    count = int(((head.labels >= 0) & (head.labels < 3)).sum())
    arguments = (logits, labels, quality, None, 1, count, True, False)
    positives, _, counts = collect(*arguments)
    rows = [[value.to(backend.device)] for value in (head.rows(logits), head.labels, head.quality)]
    of_rows, _, counts_of_rows = collect(*rows, None, 1, count, False, False)
    flat, found = torch.cat([level.flatten() for level in logits]).double(), positives
    assert torch.equal(counts, counts_of_rows) and bool((found[3, 1:] > found[3, :-1]).all())
    assert torch.equal(flat[found[3].long()], found[0])
    assert sorted(found[:2].t().tolist()) == sorted(of_rows[:2].t().tolist())
    quick = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(collect, arguments, **quick)
    forward = _library.operator("rank_sort_forward", backend.name)
    leaves = [level.detach().requires_grad_() for level in logits]
    tests = {} if backend.name == "cpp" else quick
    torch.library.opcheck(forward, (leaves, labels, quality, None, 2, count, True, False, 0.5, 1.0, False), **tests)


@pytest.mark.parametrize("background_first", [False, True])
def test_every_label_is_read_as_the_reference_reads_it(backend, background_first, generator):
    """Whole words of 64 labels and a rest, of both widths, extremes among them; planes that begin anywhere in a word."""
    for places, dtype in ((64 * 70 + 9, torch.int64), (77, torch.int64), (64 * 9, torch.int32), (3, torch.int32)):
        classes, low, high = 5, torch.iinfo(dtype).min, torch.iinfo(dtype).max
        labels = torch.randint(-3, classes + 4, (2, 1, places), generator=generator).to(dtype)
        extremes = torch.tensor([low, high, low + 1, high - 1, -1, 0, 1, classes, classes + 1], dtype=dtype)
        at = torch.randint(0, labels.numel(), (40,), generator=generator)
        labels.view(-1)[at] = extremes[torch.randint(0, len(extremes), (40,), generator=generator)]
        logits = torch.randn((2, classes, places), generator=generator)
        results = []
        for name in ("reference", backend.name):
            device = backend.device if name == backend.name else "cpu"
            tables = _library.operator("ranking_collect", name)(
                [logits.to(device)], [labels.to(device)], [], None, 1, 3 * places, True, background_first
            )
            results.append([table.cpu() for table in tables])
        assert results[0][2][0] > 0 or places < 64
        assert_same(*results, f"{places} places, table")


def test_operators_refuse_labels_that_do_not_fit_maps(backend, generator):
    head = Head(generator, 2, 2, 3, ((5, 7),))
    logits, labels, quality = operator_arguments(head, backend.device)
    collect = _library.operator("ranking_collect", backend.name)
    twice = labels[0].expand(2, 2, 5, 7).repeat(1, 2, 1, 1)
    for bad in (labels[0][:1], labels[0][:, :0].contiguous(), labels[0].flatten(2), twice, labels[0][..., :-1].contiguous()):
        with pytest.raises((RuntimeError, ValueError), match="ranking_collect: targets must have"):
            collect(logits, [bad], [], None, 1, 10, True, False)
    with pytest.raises((RuntimeError, ValueError), match="ranking_collect: targets must have"):
        collect([logits[0].flatten()], [labels[0].flatten()], [], None, 1, 10, True, False)


BAD = {
    "levels_of_targets": (lambda a: a | {"targets": a["targets"][:1]}, ValueError, "targets must be one Tensor or 2"),
    "levels_of_quality": (lambda a: a | {"quality": [*a["quality"], a["quality"][0]]}, ValueError, "quality must be one Tensor or 2"),
    "channels": (lambda a: a | {"num_classes": 4}, ValueError, "logits must have 4 classes, got 6 channels"),
    "num_classes": (lambda a: a | {"num_classes": 0}, ValueError, r"num_classes must be at least 1 and below 2\^31, got 0"),
    "num_classes_kind": (lambda a: a | {"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
    "layout": (lambda a: a | {"layout": "columns"}, ValueError, "layout must be one of 'rows'"),
    "dtypes": (lambda a: a | {"logits": [a["logits"][0], a["logits"][1].double()]}, TypeError, "logits must have one dtype"),
    "device": (lambda a: a | {"targets": [level.to("meta") for level in a["targets"]]}, ValueError, "targets must be on the device"),
    "no_levels": (lambda a: a | {"logits": []}, TypeError, "logits must be a Tensor or a list of one or more, got an empty list"),
    "shape": (lambda a: a | {"targets": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "targets must be a list with one per level"),
    "forms": (lambda a: a | {"targets": [a["targets"][0], a["logits"][1].detach()]}, TypeError, "targets must be class indices or floating"),
    "dense_quality": (lambda a: a | {"targets": [torch.zeros_like(x) for x in a["logits"]]}, ValueError, "quality must be None with dense"),
    "class": (lambda a: a | {"segments": "class"}, ValueError, "segments of maps must be None or a number of equal chunks"),
    "ids": (lambda a: a | {"segments": a["targets"], "num_segments": 3}, ValueError, "segments of maps must be None or a number"),
    "chunks": (lambda a: a | {"segments": 3}, ValueError, "segments must divide the first dimension of logits, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_by_name(fault, generator):
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)))
    good = {"logits": head.maps, "targets": head.per_level(head.labels), "quality": head.per_level(head.quality), **head.options}
    assert rank_sort_loss(**good).ranking > 0
    make, exception, message = BAD[fault]
    with pytest.raises(exception, match=f"rank_sort_loss: .*{message}"):
        rank_sort_loss(**make(good))


def test_bad_regression_losses_are_refused(generator):
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)))
    with pytest.raises(TypeError, match="alrp_loss: regression_losses must be a Tensor"):
        alrp_loss(head.maps, head.labels, head.per_level(head.quality), **head.options)
    with pytest.raises(ValueError, match="alrp_loss: regression_losses must be a list with one per level of logits, or have shape"):
        alrp_loss(head.maps, head.labels, head.quality[:, :-1], **head.options)
    with pytest.raises(RuntimeError, match="regression_losses must have one value per positive"):
        alrp_loss(head.maps, head.labels, torch.ones(3), **head.options)
    ragged = [torch.zeros(2, 3, 4), torch.zeros(5, 3, 4)]
    with pytest.raises(ValueError, match="levels of logits must have one shape but for their last two dimensions"):
        alrp_loss(ragged, [level[..., 0].long() for level in ragged], torch.ones(21))


def test_debug_checks_see_all_levels(generator, monkeypatch):
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)))
    good = run(harness.Backend("reference", "cpu"), rank_sort_loss, head.maps, head.labels, head.quality, **head.options)
    assert good[0][0] > 0
    positives = int(((head.labels >= 0) & (head.labels < 3)).sum())
    with pytest.raises(RuntimeError, match=f"max_positives must be at least the number of positives, {positives}, got 1"):
        rank_sort_loss(head.maps, head.labels, head.quality, max_positives=1, **head.options)
    head.labels[1, -1] = 4
    with pytest.raises(ValueError, match="targets must be class indices up to 3, got 4"):
        rank_sort_loss(head.maps, head.labels, head.quality, **head.options)
    head.labels[1, -1], head.quality[1, -1] = 0, 1.5
    with pytest.raises(ValueError, match="quality must be within"):
        average = rank_sort_loss(head.maps, head.per_level(head.labels), head.quality, **head.options)
        assert average


@pytest.mark.parametrize("module", ["RankSortLoss", "APLoss", "ALRPLoss"])
def test_modules_take_maps(module, generator):
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)), "class_major")
    loss = next(loss for loss in LOSSES.values() if loss.function in (getattr(rsloss_kernels, name) for name in (
        {"RankSortLoss": "rank_sort_loss", "APLoss": "average_precision_loss", "ALRPLoss": "alrp_loss"}[module],)))
    third = head.third(loss, "labels")
    of_module = getattr(rsloss_kernels, module)(layout="class_major", num_classes=3, loss_weight=2.0)
    assert "layout='class_major', num_classes=3" in repr(of_module)
    got, wanted = of_module(head.maps, head.labels, *third), loss.function(head.maps, head.labels, *third, **head.options)
    first = (got, wanted) if isinstance(got, Tensor) else (got[0], wanted[0])
    assert first[0] == 2 * first[1]
    with pytest.raises(ValueError, match=f"{module}: layout must be one of"):
        getattr(rsloss_kernels, module)(layout="columns")
    with pytest.raises(TypeError, match=f"{module}: num_classes must be an int"):
        getattr(rsloss_kernels, module)(num_classes="3")


def test_contiguous_maps_are_not_copied(generator):
    """Neither the logits nor dense targets in their shape."""
    head = Head(generator, 2, 2, 3, ((5, 7), (3, 2)))
    seen, original = [], _library.differentiable

    def record(name, backend, logits, targets, *rest):
        seen.extend((*logits, *targets))
        return original(name, backend, logits, targets, *rest)

    dense = head.as_maps(head.dense())
    given = {level.data_ptr() for level in dense}
    for maps in (head.maps, [level.movedim(1, -1).contiguous().movedim(-1, 1) for level in head.maps]):
        given |= {level.data_ptr() for level in maps}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_library, "differentiable", record)
            average_precision_loss(maps, dense if maps is head.maps else head.labels, **head.options)
    assert len(seen) == 8 and {level.data_ptr() for level in seen[:6]} <= given
