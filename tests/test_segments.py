"""Segments of Rank & Sort and AP: one call equals a loop over segments, in every form, and refuses bad input by name."""
import oracles
import pytest
import rsloss_kernels
import torch
from harness import assert_gates, evaluate, losses_in
from samples import LOSSES, RankingSample

WITH_SEGMENTS = [pytest.param(loss, id=loss.name) for loss in LOSSES.values() if loss.takes_segments]
of_losses = pytest.mark.parametrize("loss", WITH_SEGMENTS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
FORMS = ["ids", "ids_int32", "chunks", "class"]
COLUMNS = 4


def drawn(loss, generator, form="index", rows=120, positives=40, dtype=torch.float32, distribution="trained"):
    """Arguments of a loss with logits [rows, 4]."""
    if form == "index":
        sample = RankingSample("rows", positives, rows - positives - 6, 6, distribution, form="index", dtype=dtype)
        return loss.draw(sample, generator).arguments
    sample = RankingSample("dense", positives, COLUMNS * rows - positives - 6, 6, distribution, dtype=dtype)
    logits, targets = loss.draw(sample, generator).arguments
    return logits.view(rows, COLUMNS), targets.view(rows, COLUMNS)


def segments_of(form: str, rows: int, number: int, generator) -> tuple[dict, torch.Tensor, int]:
    """Keywords of the function, the id of every element, and the number of segments. Ids are shuffled, some are outside."""
    if form == "class":
        return {"segments": "class"}, torch.arange(COLUMNS).repeat(rows), COLUMNS
    if form == "chunks":
        return {"segments": number}, torch.arange(number).repeat_interleave(rows * COLUMNS // number), number
    ids = torch.randint(-1, number + 2, (rows,), generator=generator)
    ids[ids == 1] = number - 1  # a segment without elements
    keywords = {"segments": ids.int() if form == "ids_int32" else ids, "num_segments": number}
    return keywords, ids.repeat_interleave(COLUMNS), number


def assert_agrees(backend, loss, arguments, keywords, ids, number, delta):
    got = evaluate(backend, *arguments, loss=loss.function, delta=delta, **keywords)
    truth = oracles.segmented(loss.oracle, loss.read(*arguments), ids, number, delta)
    assert_gates(backend, got, truth.losses, truth.gradient(), f"{number} segments, delta {delta}")
    return got


@of_losses
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_equal_to_a_loop_over_segments(backend, loss, generator, form, dtype):
    for targets in ("index", "dense"):
        for distribution, delta in (("trained", 0.5), ("ties", 0.0), ("init", 1.0)):
            arguments = drawn(loss, generator, targets, dtype=dtype, distribution=distribution)
            keywords, ids, number = segments_of(form, 120, 5, generator)
            assert_agrees(backend, loss, arguments, keywords, ids, number, delta)


@of_losses
def test_equal_to_calls_of_the_unsegmented_loss(backend, loss, generator):
    """The same numbers from the library's own loop: to the rounding of one float32 mean, the gradient to its gate."""
    arguments = drawn(loss, generator, dtype=torch.float64)
    whole = evaluate(backend, *arguments, loss=loss.function, segments=4)
    parts = [evaluate(backend, *part, loss=loss.function) for part in zip(*(value.chunk(4) for value in arguments), strict=True)]
    losses = [float(sum(values)) / 4 for values in zip(*(part.losses for part in parts), strict=True)]
    assert_gates(backend, whole, losses, torch.cat([part.gradient for part in parts]) / 4)


@of_losses
@pytest.mark.parametrize("form", ["index", "dense"])
def test_one_segment_is_the_unsegmented_call(backend, loss, generator, form):
    arguments = drawn(loss, generator, form)
    expected = loss.evaluate(backend, *arguments)
    assert loss.evaluate(backend, *arguments, segments=1) == expected
    ids = torch.zeros(120, dtype=torch.int64)
    assert loss.evaluate(backend, *arguments, segments=ids, num_segments=1) == expected
    spare = loss.evaluate(backend, *arguments, segments=ids + 7, num_segments=9)
    assert spare.losses == expected.losses and torch.equal(spare.gradient, expected.gradient)


@of_losses
def test_one_dimensional_logits_have_an_id_per_element(backend, loss, generator):
    logits, targets = drawn(loss, generator, "dense")
    ids = torch.randint(-1, 6, logits.shape, generator=generator).flatten()
    assert_agrees(backend, loss, (logits.flatten(), targets.flatten()), {"segments": ids, "num_segments": 6}, ids, 6, 0.5)


@of_losses
@pytest.mark.slow_interpreter
def test_ten_thousand_segments(backend, loss, generator):
    """One or no positive in most of them."""
    rows, number = 20_000, 10_000
    logits, targets = torch.randn((rows, 2), generator=generator), torch.zeros(rows, 2)
    targets[::25, 0] = torch.rand(rows // 25, generator=generator) * 0.9 + 0.1
    ids = torch.randint(0, number, (rows,), generator=generator)
    got = evaluate(backend, logits, targets, loss=loss.function, delta=0.5, segments=ids, num_segments=number)
    # Only segments with a positive count: the loop goes over those.
    used = ids[::25].unique()
    renumbered = torch.full((number,), -1)
    renumbered[used] = torch.arange(used.numel())
    elements = loss.read(logits, targets)
    truth = oracles.segmented(loss.oracle, elements, renumbered[ids].repeat_interleave(2), used.numel(), 0.5)
    assert_gates(backend, got, truth.losses, truth.gradient())


@of_losses
def test_segments_without_positives_count_for_nothing(backend, loss, generator):
    arguments = drawn(loss, generator)
    ids = torch.arange(120) % 3
    expected = loss.evaluate(backend, *arguments, segments=ids.where(ids < 2, -1), num_segments=2)
    labels = arguments[1].where((ids < 2) | (arguments[1] < 0), COLUMNS)
    got = loss.evaluate(backend, arguments[0], labels, *arguments[2:], segments=ids, num_segments=3)
    assert got.losses == expected.losses and torch.equal(got.gradient, expected.gradient)
    nothing = loss.evaluate(backend, *arguments, segments=torch.full((120,), -5), num_segments=3)
    assert [float(value) for value in nothing.losses] == [0.0] * loss.num_losses and not nothing.gradient.any()


@of_losses
@pytest.mark.parametrize("form", ["index", "dense"])
def test_positives_of_no_segment_take_no_room(backend, loss, generator, monkeypatch, form):
    """Not in the tables, and not for the debug checks either, which know of ids from `num_segments` on as errors."""
    arguments = drawn(loss, generator, form)
    ids = torch.arange(120) % 3 - 1
    keywords = {"segments": ids, "num_segments": 2}
    targets = arguments[1]
    is_positive = targets > 0 if form == "dense" else (targets >= 0) & (targets < COLUMNS)
    room = int(is_positive[ids >= 0].sum())
    expected = loss.evaluate(backend, *arguments, **keywords)
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    assert 0 < room < is_positive.sum()
    assert loss.evaluate(backend, *arguments, max_positives=room, **keywords) == expected
    with pytest.raises(RuntimeError, match=f"max_positives must be .* number of positives, {room}, got {room - 1}"):
        loss.evaluate(backend, *arguments, max_positives=room - 1, **keywords)


@of_losses
@pytest.mark.slow_interpreter
@pytest.mark.parametrize("positives", [3, 70, 300, 900])
def test_positives_on_both_sides_of_changes_of_method(backend, loss, generator, positives):
    """All in one segment of several, and spread over them."""
    arguments = drawn(loss, generator, rows=1200, positives=positives)
    for ids in (torch.arange(1200) // 400, torch.where(torch.arange(1200) < 1100, 1, 0)):
        keywords = {"segments": ids, "num_segments": 3}
        assert_agrees(backend, loss, arguments, keywords, ids.repeat_interleave(COLUMNS), 3, 0.5)


@of_losses
def test_values_that_are_not_finite_spoil_the_loss_and_themselves_only(backend, loss, generator):
    logits, labels, *third = drawn(loss, generator)
    ids = torch.arange(120) % 4
    for row in ((labels == COLUMNS).nonzero()[3], ((labels >= 0) & (labels < COLUMNS)).nonzero()[2]):
        broken = logits.clone()
        broken[row, labels[row] % COLUMNS] = torch.nan
        keywords = {"segments": ids, "num_segments": 4}
        got = assert_agrees(backend, loss, (broken, labels, *third), keywords, ids.repeat_interleave(COLUMNS), 4, 0.5)
        assert all(value.isnan() for value in got.losses) and got.gradient.isnan().sum() == 1


@of_losses
@pytest.mark.slow_interpreter
def test_bitwise_the_same_for_shuffled_rows(backend, loss, generator):
    logits, labels, *third = drawn(loss, generator, rows=2000, positives=300)
    ids, order = torch.arange(2000) % 7, torch.randperm(2000, generator=generator)
    before = loss.evaluate(backend, logits, labels, *third, segments=ids, num_segments=7)
    moved = (value[order] for value in (logits, labels, *third))
    after = loss.evaluate(backend, *moved, segments=ids[order], num_segments=7)
    assert after.losses == before.losses and torch.equal(after.gradient, before.gradient[order])


IDS = torch.zeros(6, dtype=torch.int64)
FAULTS = {
    "float_ids": ({"segments": IDS.float(), "num_segments": 2}, TypeError, "segments"),
    "int16_ids": ({"segments": IDS.short(), "num_segments": 2}, TypeError, "segments"),
    "too_few_ids": ({"segments": IDS[:5], "num_segments": 2}, ValueError, "segments"),
    "ids_per_element": ({"segments": IDS[:, None].expand(6, 4), "num_segments": 2}, ValueError, "segments"),
    "other_device": ({"segments": IDS.to("meta"), "num_segments": 2}, ValueError, "segments"),
    "no_number": ({"segments": IDS}, ValueError, "num_segments"),
    "number_zero": ({"segments": IDS, "num_segments": 0}, ValueError, "num_segments"),
    "number_negative": ({"segments": IDS, "num_segments": -1}, ValueError, "num_segments"),
    "number_float": ({"segments": IDS, "num_segments": 2.0}, ValueError, "num_segments"),
    "number_alone": ({"num_segments": 2}, ValueError, "num_segments"),
    "chunks_that_do_not_divide": ({"segments": 4}, ValueError, "segments"),
    "zero_chunks": ({"segments": 0}, ValueError, "segments"),
    "bool_chunks": ({"segments": True}, TypeError, "segments"),
    "chunks_and_another_number": ({"segments": 3, "num_segments": 2}, ValueError, "num_segments"),
    "other_word": ({"segments": "image"}, ValueError, "segments"),
    "list": ({"segments": [0] * 6, "num_segments": 1}, TypeError, "segments"),
}
# What a module can refuse before it sees a batch.
MODULE_FAULTS = ("number_float", "number_negative", "number_zero", "zero_chunks", "bool_chunks", "other_word", "list", "float_ids")


@of_losses
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_segments_are_refused_by_name(backend, loss, fault):
    keywords, exception, named = FAULTS[fault]
    keywords = {k: v.to(backend.device) if torch.is_tensor(v) and not v.is_meta else v for k, v in keywords.items()}
    logits, targets = (torch.zeros(shape, device=backend.device) for shape in ((6, 4), (6, 4)))
    with rsloss_kernels.use_backend(backend.name):
        losses_in(loss.function(logits, targets))
        with pytest.raises(exception, match=f"^{loss.function.__name__}: {named} must .*, got "):
            loss.function(logits, targets, **keywords)


@of_losses
@pytest.mark.parametrize("shape", [(), (6,)])
def test_class_segments_need_rows_and_classes(backend, loss, shape):
    zeros = torch.zeros(shape, device=backend.device)
    with rsloss_kernels.use_backend(backend.name), pytest.raises(ValueError, match="logits must have rows and .* classes .*, got"):
        loss.function(zeros, zeros, segments="class")


@of_losses
@pytest.mark.parametrize("fault", MODULE_FAULTS)
def test_module_refuses_bad_segments_by_name(loss, fault):
    keywords, exception, named = FAULTS[fault]
    if fault != "float_ids":
        keywords = {name: value for name, value in keywords.items() if not torch.is_tensor(value)}
    with pytest.raises(exception, match=f"^{loss.module.__name__}: {named} must .*"):
        loss.module(**keywords)


@of_losses
def test_module_takes_ids_and_their_number_from_the_batch(backend, loss, generator):
    arguments = [value.to(backend.device) for value in drawn(loss, generator)]
    ids = (torch.arange(120) % 3).to(backend.device)
    with rsloss_kernels.use_backend(backend.name):
        expected = losses_in(loss.function(*arguments, segments=ids, num_segments=3))
        assert expected != losses_in(loss.function(*arguments))
        for module, of_batch in (
            (loss.module(), {"segments": ids, "num_segments": 3}),
            (loss.module(num_segments=3), {"segments": ids}),
            (loss.module(num_segments=5), {"segments": ids, "num_segments": 3}),
            (loss.module(segments=6), {"segments": ids, "num_segments": 3}),
        ):
            assert losses_in(module(*arguments, **of_batch)) == expected
        for module, of_batch in ((loss.module(), {"num_segments": 3}), (loss.module(num_segments=3), {})):
            with pytest.raises(ValueError, match="num_segments must be None without segments, got 3"):
                module(*arguments, **of_batch)
        with pytest.raises(ValueError, match="num_segments must be None or 6 .*, got 3"):
            loss.module(segments=6)(*arguments, num_segments=3)
        with pytest.raises(ValueError, match="num_segments must be given"):
            loss.module(segments=6)(*arguments, segments=ids)


def test_alrp_takes_no_segments():
    with pytest.raises(TypeError, match="segments"):
        rsloss_kernels.alrp_loss(torch.zeros(2), torch.zeros(2), torch.zeros(0), segments=1)
