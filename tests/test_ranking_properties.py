"""What must hold for every input of a ranking loss: invariances, bitwise repeatability, independence of memory layout."""
import contextlib

import harness
import hypothesis.strategies as st
import pytest
import rsloss_kernels
import torch
from harness import assert_gates, bits
from hypothesis import assume, example, given
from samples import DELTAS, RankingSample

# Logits on a grid that float32 adds exactly, dense enough for ties; targets: ignored, negative, positive with ties in quality.
GRID = st.integers(-200, 200).map(lambda n: n / 32)
TARGETS = st.sampled_from([-1.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
ELEMENTS = st.lists(st.tuples(GRID, TARGETS), min_size=1, max_size=40)
DELTA = st.sampled_from(DELTAS)
DTYPE = st.sampled_from([torch.float32, torch.float64])


def arguments_from(loss, elements, dtype) -> tuple[torch.Tensor, ...]:
    logits, targets = zip(*elements, strict=True)
    return loss.arguments(torch.tensor(logits, dtype=dtype), torch.tensor(targets))


def assert_true(backend, loss, got, arguments, delta):
    truth = loss.truth(*arguments, delta=delta)
    assert_gates(backend, got, truth.losses, truth.gradient())


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE)
@example(elements=[(0.0, 1.0)], delta=0.0, dtype=torch.float32)
@example(elements=[(0.5, 0.5), (0.0, 0.0), (0.0, 1.0)], delta=0.25, dtype=torch.float64)
def test_any_small_input_agrees_with_the_oracle(backend, loss, elements, delta, dtype):
    arguments = arguments_from(loss, elements, dtype)
    assert_true(backend, loss, loss.evaluate(backend, *arguments, delta=delta), arguments, delta)


@given(elements=ELEMENTS, delta=DELTA)
def test_gradients_sum_to_zero(backend, loss, elements, delta):
    """The identity update only moves error between elements."""
    arguments = arguments_from(loss, elements, torch.float64)
    for upstream in ((1.0, None), (None, 1.0), (0.5, 3.0)) if loss.num_losses == 2 else ((1.0,), (-0.5,)):
        gradient = loss.evaluate(backend, *arguments, delta=delta, upstream=upstream).gradient
        assert abs(gradient.sum()) <= backend.gradient_gate(torch.float64) * gradient.abs().sum()


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE, data=st.data())
def test_order_of_elements_does_not_matter(backend, loss, elements, delta, dtype, data):
    """Bitwise, unless two positives are alike in logit and quality (their order then decides the order of additions)."""
    order = data.draw(st.permutations(range(len(elements))))
    positives = [element for element in elements if element[1] > 0]
    before = loss.evaluate(backend, *arguments_from(loss, elements, dtype), delta=delta)
    moved = arguments_from(loss, [elements[index] for index in order], dtype)
    after = loss.evaluate(backend, *moved, delta=delta)
    if len(set(positives)) == len(positives):
        assert after.losses == before.losses
        assert torch.equal(bits(after.gradient), bits(before.gradient[torch.tensor(order)]))
    else:
        assert_true(backend, loss, after, moved, delta)


def test_order_of_many_elements_does_not_matter(backend, loss, generator):
    logits, targets, _ = RankingSample("order", 200, 3000).draw(generator)
    order = torch.randperm(logits.numel(), generator=generator)
    before = loss.evaluate(backend, *loss.arguments(logits, targets))
    after = loss.evaluate(backend, *loss.arguments(logits[order], targets[order]))
    assert after.losses == before.losses
    assert torch.equal(bits(after.gradient), bits(before.gradient[order]))


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE, shift=st.integers(-1000, 1000))
def test_adding_a_constant_to_all_logits_changes_nothing(backend, loss, elements, delta, dtype, shift):
    logits, *others = arguments_from(loss, elements, dtype)
    shifted = logits + shift
    assert torch.equal(shifted - shift, logits)
    assert_true(backend, loss, loss.evaluate(backend, shifted, *others, delta=delta), (logits, *others), delta)


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE)
def test_negatives_below_all_positives_get_exactly_zero(backend, loss, elements, delta, dtype):
    logits, targets, *third = arguments_from(loss, elements, dtype)
    assume((targets > 0).any())
    # 0.1 is no float32: only elements clearly outside the window are asked about.
    below = (targets == 0) & (logits < logits[targets > 0].min() - delta - 1e-6)
    gradient = loss.evaluate(backend, logits, targets, *third, delta=delta).gradient
    assert not gradient[below].any() and not gradient[targets < 0].any()


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE, exponents=st.tuples(st.integers(-20, 20), st.integers(-20, 20)))
def test_each_loss_has_its_own_gradient(backend, loss, elements, delta, dtype, exponents):
    """Factors that are powers of two scale exactly; a dropped loss leaves no trace."""
    arguments = arguments_from(loss, elements, dtype)
    truth = loss.truth(*arguments, delta=delta)

    def gradient_for(*upstream):
        return loss.evaluate(backend, *arguments, delta=delta, upstream=upstream).gradient

    def only(number, factor, others):
        return [factor if i == number else others for i in range(loss.num_losses)]

    for number, wanted in enumerate(truth.gradients):
        alone = gradient_for(*only(number, 1.0, None))
        harness.assert_gradient(backend, alone, wanted, f"loss {number}")
        factor = (-1.0) ** number * 2.0 ** exponents[number]
        assert torch.equal(gradient_for(*only(number, factor, 0.0)), alone * factor)
        assert number == 0 or not alone[arguments[1] <= 0].any()
    upstream = (3.0, -0.5)[: loss.num_losses]
    harness.assert_gradient(backend, gradient_for(*upstream), truth.gradient(*upstream), "all")


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("positives, negatives", [(40, 1000), (700, 150_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.slow_interpreter
def test_bitwise_the_same_for_any_number_of_threads_and_run(backend, loss, generator, positives, negatives, dtype):
    if not backend.is_deterministic:
        pytest.skip("the reference on a GPU adds atomically; documented as not bitwise repeatable")
    for form in ("dense", "index"):
        inputs = loss.draw(RankingSample("threads", positives, negatives // 4, form=form, dtype=dtype), generator)
        results = []
        # GPU kernels on the CPU have the number of the grid's processors in place of threads.
        for count in (1, 2) if backend.is_slow else (1, 2, 2, 3, 4, 1):
            with threads(count):
                results.append(loss.evaluate(backend, *inputs.arguments, **inputs.options))
        assert all(result == results[0] for result in results)


def layouts(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in memory laid out differently."""
    rows, columns = value.shape
    offset = torch.zeros(value.numel() + 3, dtype=value.dtype)
    strided = torch.zeros((rows, 2 * columns), dtype=value.dtype)
    results = {
        "transposed": value.t().contiguous().t(),
        "offset": offset[3:].view(rows, columns),
        "every_second_column": strided[:, ::2],
    }
    for name in ("offset", "every_second_column"):
        results[name].copy_(value)
    return results


@pytest.mark.shared_code
@pytest.mark.parametrize("form", ["dense", "index"])
def test_layout_in_memory_does_not_matter(backend, loss, generator, form):
    logits, targets, *third = loss.draw(RankingSample("layout", 12, 72, form=form), generator).arguments
    columns = logits.shape[-1] if form == "index" else 4
    logits = logits.view(-1, columns)
    targets = targets.view(-1, columns) if form == "dense" else targets[:, None]
    shape = logits.shape if form == "dense" else (-1,)
    expected = loss.evaluate(backend, logits, targets.view(shape), *third)
    for name, laid_out in layouts(logits).items():
        other = layouts(targets)[name] if form == "dense" else layouts(targets)[name][:, 0]
        strided = [layouts(value[:, None])[name][:, 0] for value in third]
        assert torch.equal(laid_out, logits)
        assert loss.evaluate(backend, laid_out, other, *strided) == expected, name


@pytest.mark.shared_code
def test_channels_last_maps_and_their_gradient(backend, loss, generator):
    logits = torch.randn((2, 3, 4, 5), generator=generator)
    arguments = loss.arguments(logits, (torch.rand(logits.shape, generator=generator) - 0.8).clamp(min=0))
    expected = loss.evaluate(backend, *arguments)
    got = loss.evaluate(backend, logits.to(memory_format=torch.channels_last), *arguments[1:])
    assert got == expected


def test_expanded_upstream_gradient(backend, loss, generator):
    """`.expand().sum()` hands the operator a stride-0 gradient."""
    arguments = loss.draw(RankingSample("expanded"), generator).arguments
    expected = loss.evaluate(backend, *arguments, upstream=[3.0] * loss.num_losses).gradient
    leaf, *others = (value.to(backend.device) for value in arguments)
    with rsloss_kernels.use_backend(backend.name):
        losses = harness.losses_in(loss.function(leaf.requires_grad_(), *others))
    (sum(losses).expand(3)).sum().backward()
    assert torch.equal(leaf.grad.cpu(), expected)


@pytest.mark.shared_code
def test_expanded_targets(backend, loss, generator):
    logits = torch.randn((6, 10), generator=generator)
    row = torch.tensor([0.0, 0.9, 0.0, -1.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0])
    logits, targets, *third = loss.arguments(logits, row.repeat(6, 1))
    assert loss.evaluate(backend, logits, row.expand(6, 10), *third) == loss.evaluate(backend, logits, targets, *third)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_list_of_feature_maps_equals_their_concatenation(backend, loss, generator, dtype):
    """Level sizes that are no multiple of the mask's words, one level empty, one without positives."""
    for form in ("dense", "index"):
        # The operators take regression losses where Rank & Sort has its quality.
        whole = RankingSample("levels", 25, 178, 20, form=form, classes=3, dtype=dtype).draw(generator)
        values = [value.to(backend.device) for value in whole if value is not None]
        sizes = [1, 64, 0, 65, 30, values[1].shape[0] - 160]
        expected = loss.pipeline(backend, *([value] for value in values)).run()
        got = loss.pipeline(backend, *(list(value.contiguous().split(sizes)) for value in values)).run()
        assert got.losses == expected.losses
        assert torch.equal(bits(got.gradient), bits(expected.gradient))
        if loss.third == "quality":
            assert loss.evaluate(backend, *values, delta=0.5).losses == expected.losses


@pytest.mark.parametrize("form", ["dense", "index"])
@pytest.mark.parametrize("spare", [1, 700])
def test_spare_capacity_changes_nothing(backend, loss, generator, form, spare):
    values = RankingSample("capacity", 30, 300, form=form).draw(generator)
    arguments = [[value.to(backend.device)] for value in values if value is not None]
    got = loss.pipeline(backend, *arguments, capacity=30 + spare).run()
    expected = loss.pipeline(backend, *arguments, capacity=30).run()
    assert got.losses == expected.losses
    assert torch.equal(bits(got.gradient), bits(expected.gradient))
