"""What must hold for every input of Rank & Sort: invariances, bitwise repeatability, independence of memory layout."""
import contextlib

import harness
import hypothesis.strategies as st
import oracles
import pytest
import torch
from harness import Pipeline, assert_gates, bits, evaluate
from hypothesis import assume, example, given
from samples import DELTAS, RankingSample

# Logits on a grid that float32 adds exactly, dense enough for ties; targets: ignored, negative, positive with ties in quality.
GRID = st.integers(-200, 200).map(lambda n: n / 32)
TARGETS = st.sampled_from([-1.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
ELEMENTS = st.lists(st.tuples(GRID, TARGETS), min_size=1, max_size=40)
DELTA = st.sampled_from(DELTAS)
DTYPE = st.sampled_from([torch.float32, torch.float64])


def tensors(elements, dtype):
    logits, targets = zip(*elements, strict=True)
    return torch.tensor(logits, dtype=dtype), torch.tensor(targets)


def assert_true(backend, got, logits, targets, delta):
    truth = oracles.rank_sort(oracles.read_dense(logits, targets), delta)
    assert_gates(backend, got, truth.losses, truth.gradient())


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE)
@example(elements=[(0.0, 1.0)], delta=0.0, dtype=torch.float32)
@example(elements=[(0.5, 0.5), (0.0, 0.0), (0.0, 1.0)], delta=0.25, dtype=torch.float64)
def test_any_small_input_agrees_with_the_oracle(backend, elements, delta, dtype):
    logits, targets = tensors(elements, dtype)
    assert_true(backend, evaluate(backend, logits, targets, delta=delta), logits, targets, delta)


@given(elements=ELEMENTS, delta=DELTA)
def test_gradients_sum_to_zero(backend, elements, delta):
    """The identity update only moves error between elements."""
    logits, targets = tensors(elements, torch.float64)
    for upstream in ((1.0, None), (None, 1.0), (0.5, 3.0)):
        gradient = evaluate(backend, logits, targets, delta=delta, upstream=upstream).gradient
        assert abs(gradient.sum()) <= backend.gradient_gate(torch.float64) * gradient.abs().sum()


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE, data=st.data())
def test_order_of_elements_does_not_matter(backend, elements, delta, dtype, data):
    """Bitwise, unless two positives are alike in logit and quality (their order then decides the order of additions)."""
    logits, targets = tensors(elements, dtype)
    order = torch.tensor(data.draw(st.permutations(range(len(elements)))))
    positives = [element for element in elements if element[1] > 0]
    before = evaluate(backend, logits, targets, delta=delta)
    after = evaluate(backend, logits[order], targets[order], delta=delta)
    if len(set(positives)) == len(positives):
        assert after.losses == before.losses
        assert torch.equal(bits(after.gradient), bits(before.gradient[order]))
    else:
        assert_true(backend, after, logits[order], targets[order], delta)


def test_order_of_many_elements_does_not_matter(backend, generator):
    inputs = RankingSample("order", 200, 3000).draw(generator)
    order = torch.randperm(inputs.logits.numel(), generator=generator)
    before = evaluate(backend, *inputs.arguments)
    after = evaluate(backend, inputs.logits[order], inputs.targets[order])
    assert after.losses == before.losses
    assert torch.equal(bits(after.gradient), bits(before.gradient[order]))


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE, shift=st.integers(-1000, 1000))
def test_adding_a_constant_to_all_logits_changes_nothing(backend, elements, delta, dtype, shift):
    logits, targets = tensors(elements, dtype)
    shifted = logits + shift
    assert torch.equal(shifted - shift, logits)
    assert_true(backend, evaluate(backend, shifted, targets, delta=delta), logits, targets, delta)


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE)
def test_negatives_below_all_positives_get_exactly_zero(backend, elements, delta, dtype):
    logits, targets = tensors(elements, dtype)
    assume((targets > 0).any())
    # 0.1 is no float32: only elements clearly outside the window are asked about.
    below = (targets == 0) & (logits < logits[targets > 0].min() - delta - 1e-6)
    gradient = evaluate(backend, logits, targets, delta=delta).gradient
    assert not gradient[below].any() and not gradient[targets < 0].any()


@given(elements=ELEMENTS, delta=DELTA, dtype=DTYPE, first=st.integers(-20, 20), second=st.integers(-20, 20))
def test_each_loss_has_its_own_gradient(backend, elements, delta, dtype, first, second):
    """Factors that are powers of two scale exactly; a dropped loss leaves no trace."""
    logits, targets = tensors(elements, dtype)
    truth = oracles.rank_sort(oracles.read_dense(logits, targets), delta)

    def gradient_for(*upstream):
        return evaluate(backend, logits, targets, delta=delta, upstream=upstream).gradient

    ranking, sorting = gradient_for(1.0, None), gradient_for(None, 1.0)
    harness.assert_gradient(backend, ranking, truth.ranking_gradient, "ranking")
    harness.assert_gradient(backend, sorting, truth.sorting_gradient, "sorting")
    assert torch.equal(gradient_for(2.0**first, 0.0), ranking * 2.0**first)
    assert torch.equal(gradient_for(0.0, -(2.0**second)), sorting * -(2.0**second))
    assert not sorting[targets <= 0].any()
    harness.assert_gradient(backend, gradient_for(3.0, -0.5), truth.gradient(3.0, -0.5), "both")


@given(elements=ELEMENTS, delta=DELTA)
def test_upstream_parity_scales_everything_by_the_ranking_loss_factor(backend, elements, delta):
    logits, targets = tensors(elements, torch.float64)
    truth = oracles.rank_sort(oracles.read_dense(logits, targets), delta)
    got = evaluate(backend, logits, targets, delta=delta, upstream=(2.0, 7.0), upstream_parity=True)
    assert_gates(backend, got, truth.losses, truth.gradient(2.0, 2.0))
    only_sorting = evaluate(backend, logits, targets, delta=delta, upstream=(None, 7.0), upstream_parity=True)
    assert not only_sorting.gradient.any()


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
def test_bitwise_the_same_for_any_number_of_threads_and_run(backend, generator, positives, negatives, dtype):
    if not backend.is_deterministic:
        pytest.skip("the reference on a GPU adds atomically; documented as not bitwise repeatable")
    for form in ("dense", "index"):
        inputs = RankingSample("threads", positives, negatives // 4, form=form, dtype=dtype).draw(generator)
        results = []
        for count in (1, 2, 2, 3, 1):
            with threads(count):
                results.append(evaluate(backend, *inputs.arguments, **inputs.options))
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


@pytest.mark.parametrize("form", ["dense", "index"])
def test_layout_in_memory_does_not_matter(backend, generator, form):
    inputs = RankingSample("layout", 12, 72, form=form).draw(generator)
    columns = inputs.logits.shape[-1] if form == "index" else 4
    logits = inputs.logits.view(-1, columns)
    targets = inputs.targets.view(-1, columns) if form == "dense" else inputs.targets[:, None]
    expected = evaluate(backend, logits, targets.view(logits.shape if form == "dense" else -1), inputs.quality)
    for name, laid_out in layouts(logits).items():
        other = layouts(targets)[name].reshape_as(targets) if form == "dense" else layouts(targets)[name][:, 0]
        quality = None if inputs.quality is None else layouts(inputs.quality[:, None])[name][:, 0]
        assert torch.equal(laid_out, logits)
        assert evaluate(backend, laid_out, other, quality) == expected, name


def test_channels_last_maps_and_their_gradient(backend, generator):
    logits = torch.randn((2, 3, 4, 5), generator=generator)
    targets = (torch.rand(logits.shape, generator=generator) - 0.8).clamp(min=0)
    expected = evaluate(backend, logits, targets)
    got = evaluate(backend, logits.to(memory_format=torch.channels_last), targets)
    assert got == expected


def test_expanded_upstream_gradient(backend, generator):
    """`.expand().sum()` hands the operator a stride-0 gradient."""
    inputs = RankingSample("expanded").draw(generator)
    expected = evaluate(backend, *inputs.arguments, upstream=(3.0, 3.0)).gradient
    leaf = inputs.logits.to(backend.device).requires_grad_()
    with harness.rsloss_kernels.use_backend(backend.name):
        losses = harness.rsloss_kernels.rank_sort_loss(leaf, inputs.targets.to(backend.device))
    (sum(losses).expand(3)).sum().backward()
    assert torch.equal(leaf.grad.cpu(), expected)


def test_expanded_targets(backend, generator):
    logits = torch.randn((6, 10), generator=generator)
    row = torch.tensor([0.0, 0.9, 0.0, -1.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert evaluate(backend, logits, row.expand(6, 10)) == evaluate(backend, logits, row.repeat(6, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["dense", "index"])
def test_list_of_feature_maps_equals_their_concatenation(backend, generator, form, dtype):
    """Level sizes that are no multiple of the mask's words, one level empty, one without positives."""
    inputs = RankingSample("levels", 25, 178, 20, form=form, classes=3, dtype=dtype).draw(generator)
    sizes = [1, 64, 0, 65, 30, inputs.targets.shape[0] - 160]

    def split(value):
        return list(value.to(backend.device).contiguous().split(sizes))

    quality = [] if inputs.quality is None else split(inputs.quality)
    got = Pipeline(backend, split(inputs.logits), split(inputs.targets), quality).run()
    expected = evaluate(backend, *inputs.arguments)
    assert got.losses == expected.losses
    assert torch.equal(bits(got.gradient), bits(expected.gradient.flatten()))


@pytest.mark.parametrize("form", ["dense", "index"])
@pytest.mark.parametrize("spare", [0, 1, 700])
def test_spare_capacity_changes_nothing(backend, generator, form, spare):
    inputs = RankingSample("capacity", 30, 300, form=form).draw(generator)
    arguments = [[value.to(backend.device)] for value in inputs.arguments]
    got = Pipeline(backend, *arguments, capacity=30 + spare).run()
    expected = evaluate(backend, *inputs.arguments)
    assert got.losses == expected.losses
    assert torch.equal(bits(got.gradient), bits(expected.gradient.flatten()))
