"""aLRP loss: the authors' recorded outputs, its ranks, order and regression part. Random inputs: test_ranking_values.py."""
import golden_vectors
import harness
import oracles
import pytest
import torch
from harness import NOISE, Backend, assert_gates, assert_within
from rsloss_kernels.losses.alrp import api
from rsloss_kernels import ALRPLoss, ALRPLosses, alrp_loss, alrp_regression_loss, use_backend
from samples import DELTAS, LOSSES, RankingSample

GOLDEN = golden_vectors.params("alrp")
DTYPES = [torch.float64, torch.float32]
ALRP = LOSSES["alrp"]
POS_LOGITS_TIED = {case.name for case in golden_vectors.cases("alrp") if case.manifest["pos_logits_tied"]}


def as_published(targets: torch.Tensor) -> torch.Tensor:
    """The authors' positives are exactly 1; they ignore what lies between 0 and 1."""
    return torch.where((targets > 0) & (targets < 1), -1.0, targets)


def published(case) -> dict[str, torch.Tensor]:
    """The authors' float64 run; where it crashed for want of a positive, exact zeros."""
    out = case.outputs("alrp")
    if out:
        assert all(value.isfinite().all() for value in out.values())
        return out
    assert "alrp" in case.crashed and case.name == "alrp038_nopos"
    zero, nothing = torch.zeros((), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    gradient = torch.zeros(case.inputs()["logits"].numel(), dtype=torch.float64)
    return {
        "cls_loss": zero, "grad": gradient, "rank": nothing, "order": nothing.long(), "reg_loss": zero, "reg_grad": nothing,
    }  # fmt: skip


def regression_part(backend: Backend, losses: torch.Tensor, rank: torch.Tensor, order: torch.Tensor):
    """Value and gradient of `alrp_regression_loss`, on the CPU."""
    leaf = losses.detach().to(backend.device).requires_grad_()
    with use_backend(backend.name):
        value = alrp_regression_loss(leaf, rank.to(backend.device), order.to(backend.device))
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach().cpu(), gradient.cpu()


def assert_relative(got: torch.Tensor, wanted: torch.Tensor, gate: float, label: str) -> None:
    """Every entry to its own size."""
    assert_within(got, wanted, gate * wanted.abs() + NOISE, label)


def test_all_golden_vectors_are_there():
    assert len(GOLDEN) == 39 and len(POS_LOGITS_TIED) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(backend, case, dtype):
    inputs, wanted = case.inputs(), published(case)
    regression = inputs["regression_losses"].to(dtype)
    got = ALRP.evaluate(
        backend,
        inputs["logits"].to(dtype),
        as_published(inputs["targets"]),
        regression,
        delta=case.hyper["delta"],
        upstream=(case.hyper["gout"],),
    )
    assert_gates(backend, got, [float(wanted["cls_loss"])], wanted["grad"], case.name, NOISE)
    rank, order = got.statistics
    assert rank.shape == order.shape == regression.shape and order.dtype == torch.int64
    assert rank.dtype == torch.float64
    assert_relative(rank, wanted["rank"], backend.loss_gate(dtype), "rank")
    if case.name not in POS_LOGITS_TIED:
        assert torch.equal(order, wanted["order"])
    assert torch.equal(order.sort().values, torch.arange(order.numel()))
    value, gradient = regression_part(backend, regression, rank, order)
    if case.name in POS_LOGITS_TIED:  # the originals' sort leaves open which of them comes first
        wanted["reg_loss"], wanted["reg_grad"] = oracles.alrp_regression(regression, wanted["rank"], order)
    assert value.dtype == dtype and gradient.dtype == dtype
    assert_relative(value, torch.as_tensor(wanted["reg_loss"], dtype=torch.float64), 2 * backend.loss_gate(dtype), "regression loss")
    assert_within(gradient, wanted["reg_grad"], backend.gradient_gate(dtype) * wanted["reg_grad"].abs() + NOISE, "regression gradient")


@pytest.mark.parametrize("case", GOLDEN)
def test_oracle_agrees_with_golden_vectors(case):
    """The oracle of the other tests is right, and independently of the library."""
    inputs, wanted = case.inputs(), published(case)
    elements = oracles.read_dense(inputs["logits"], as_published(inputs["targets"]))
    elements = oracles.with_regression_losses(elements, inputs["regression_losses"])
    truth = oracles.alrp(elements, case.hyper["delta"], case.hyper["eps"])
    value, gradient = oracles.alrp_regression(inputs["regression_losses"], truth.rank, wanted["order"])
    assert_relative(torch.tensor(truth.losses, dtype=torch.float64), wanted["cls_loss"][None], 1e-12, "classification")
    assert_relative(truth.rank, wanted["rank"], 1e-12, "rank")
    value, wanted_value = (torch.as_tensor(one, dtype=torch.float64) for one in (value, wanted["reg_loss"]))
    assert_relative(value, wanted_value, 1e-12, "regression loss")
    for got, expected in ((truth.gradient(case.hyper["gout"]), wanted["grad"]), (gradient, wanted["reg_grad"])):
        assert_within(got, expected, 1e-12 * float(expected.abs().amax() if expected.numel() else 0), case.name)


@pytest.mark.parametrize("form", ["dense", "index"])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_order_and_regression_part(backend, generator, dtype, delta, form):
    for distribution, positives in (("trained", 30), ("init", 1), ("ties", 25), ("wide", 130)):
        sample = RankingSample(distribution, positives, 200, 20, distribution, delta, form, dtype=dtype)
        inputs = ALRP.draw(sample, generator)
        elements = ALRP.read(*inputs.arguments)
        truth = oracles.alrp(elements, delta)
        logits, targets, regression = inputs.arguments
        is_row = torch.ones(positives, dtype=torch.bool) if form == "dense" else (targets >= 0) & (targets < sample.classes)
        got = ALRP.evaluate(backend, *inputs.arguments, **inputs.options)
        rank, order = got.statistics
        assert rank.shape == order.shape == regression.shape
        assert_relative(rank[is_row], truth.rank, backend.loss_gate(dtype), "rank")
        # Positives in flat order, however the regression losses were handed in.
        of_positives = regression[is_row]
        ascending = elements.logits[elements.is_positive].argsort(stable=True)
        if form == "dense":
            assert torch.equal(elements.logits[elements.is_positive][order], elements.logits[elements.is_positive][ascending])
            ascending = order
        elif len(elements.logits[elements.is_positive].unique()) < positives:
            continue  # which of equal positives comes first, drawn so or by chance, is asked for where the order names positives
        value, gradient = oracles.alrp_regression(of_positives, truth.rank, ascending)
        got_value, got_gradient = regression_part(backend, regression, rank, order)
        gate = backend.gradient_gate(regression.dtype)
        assert_within(got_value, value, 2 * backend.loss_gate(regression.dtype) * abs(value) + NOISE, "regression loss")
        assert_within(got_gradient[is_row], gradient, gate * gradient.abs() + NOISE, "regression gradient")
        assert not got_gradient[~is_row].any() if form == "index" else True


def test_regression_losses_per_row_or_per_positive(backend, generator):
    """Both forms are one loss."""
    logits, labels, rows = ALRP.draw(RankingSample("forms", 20, 100, 9, form="index"), generator).arguments
    is_row = (labels >= 0) & (labels < 4)
    per_row = ALRP.evaluate(backend, logits, labels, rows)
    per_positive = ALRP.evaluate(backend, logits, labels, rows[is_row])
    assert per_row.losses == per_positive.losses and torch.equal(per_row.gradient, per_positive.gradient)
    assert torch.equal(per_row.statistics[0][is_row], per_positive.statistics[0])
    garbage = ALRP.evaluate(backend, logits, labels, rows.where(is_row, torch.nan))
    assert garbage.losses == per_row.losses and torch.equal(garbage.gradient, per_row.gradient)
    values = [regression_part(backend, losses, *got.statistics) for losses, got in ((rows, per_row), (rows[is_row], per_positive))]
    assert values[0][0] == values[1][0] and torch.equal(values[0][1][is_row], values[1][1])
    value, gradient = regression_part(backend, rows.where(is_row, torch.nan), *per_row.statistics)
    assert value == values[0][0] and torch.equal(gradient, values[0][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["dense", "index"])
def test_regression_loss_that_is_not_finite(backend, generator, form, value):
    """Its positive is left out of everything else; the losses and its own gradient are NaN."""
    logits, targets, regression = ALRP.draw(RankingSample("broken", 12, 80, form=form), generator).arguments
    elements = ALRP.read(logits, targets, regression)
    index = elements.is_positive.nonzero().squeeze(1)[5]
    regression[5 if form == "dense" else index // 4] = value
    got = ALRP.evaluate(backend, logits, targets, regression)
    truth = ALRP.truth(logits, targets, regression)
    assert_gates(backend, got, truth.losses, truth.gradient())
    assert got.losses[0].isnan() and harness.where(got.gradient.isnan()) == [int(index)]
    of_positives = got.statistics[0] if form == "dense" else got.statistics[0][targets < 4]
    assert_relative(of_positives, truth.rank, 1e-7, "rank")
    assert harness.where(of_positives.isnan()) == [5]
    value, _ = regression_part(backend, regression, *got.statistics)
    assert value.isnan()


def test_wrong_number_of_regression_losses(backend, generator, monkeypatch):
    """An error where their number is on the host; else NaN, and an error under the debug switch."""
    torch._dynamo.reset()  # graphs of other backends count towards its limit
    logits, targets, regression = (value.to(backend.device) for value in ALRP.draw(RankingSample("count"), generator).arguments)
    compiled = torch.compile(alrp_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for wrong in (regression[:-1], torch.cat([regression, regression[:1]]), regression[:0]):
        for function in (compiled,) if backend.device == "cpu" else (compiled, alrp_loss):
            got = harness.evaluate(backend, logits, targets, wrong, loss=function)
            assert got.losses[0].isnan() and got.gradient.isnan().all() and got.statistics[0].isnan().all()
        for switch in ("0", "1") if backend.device == "cpu" else ("1",):
            monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", switch)
            with pytest.raises(RuntimeError, match="^alrp_loss: regression_losses must have one value per positive, 9, got "):
                ALRP.evaluate(backend, logits, targets, wrong)
        monkeypatch.delenv("RSLOSS_DEBUG_CHECKS")


def test_gate_leaves_small_sums_without_gradient(backend):
    """At most 1e-5 of false positives: no gradient for the positive, even with a large localisation error above it."""
    logits = torch.tensor([0.0, 5.0, 2.0**-16 - 1], dtype=torch.float64)  # 2^-17 of a false positive
    targets, regression = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.5, 2.0])
    got = ALRP.evaluate(backend, logits, targets, regression)
    assert 0 < got.losses[0] < 1e-5 and not got.gradient.any()
    logits[2] = 2.0**-15 - 1
    got = ALRP.evaluate(backend, logits, targets, regression)
    truth = ALRP.truth(logits, targets, regression)
    assert_gates(backend, got, truth.losses, truth.gradient())
    assert got.gradient[2] > 0.3, "the gradient is not proportional to the error: that is the gate's reason"


@pytest.mark.parametrize("where", ["all", "lowest", "one"])
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_large_regression_losses_take_no_digits_from_small_ones(backend, generator, delta, where):
    """Those below a positive are no part of its error: every entry of the gradient to its own size.

    Where a window holds a large one in part, its own included, sums have its rounding (README.md of the loss): those are left out.
    """
    sample = RankingSample("large", 250, 1500, delta=delta, dtype=torch.float64)
    logits, targets, regression = ALRP.draw(sample, generator).arguments
    regression = torch.rand(regression.shape, generator=generator, dtype=torch.float64)
    if where == "all":
        regression *= 1e9
    elif where == "lowest":
        regression[logits[targets > 0].argmin()] = 1e8
    else:
        regression[0] = 1e6
    got = ALRP.evaluate(backend, logits, targets, regression, delta=delta)
    truth = ALRP.truth(logits, targets, regression, delta=delta)
    assert_gates(backend, got, truth.losses, truth.gradient())
    chosen = targets > 0
    if where == "one":
        distance = logits - logits[chosen][0]
        chosen &= distance.abs() >= delta
    assert chosen.sum() > 100
    assert_relative(got.gradient[chosen], truth.gradient()[chosen], backend.gradient_gate(torch.float64), "positives")


def test_rank_and_order_have_no_gradient(backend, generator):
    logits, targets, regression = (value.to(backend.device) for value in ALRP.draw(RankingSample("graph"), generator).arguments)
    logits.requires_grad_(), regression.requires_grad_()
    with use_backend(backend.name):
        losses = alrp_loss(logits, targets, regression)
        total = alrp_regression_loss(regression, losses.rank, losses.order)
    assert type(losses) is ALRPLosses and losses._fields == ("classification", "rank", "order")
    assert losses.classification.requires_grad and not losses.rank.requires_grad and not losses.order.requires_grad
    losses.classification.backward()
    assert regression.grad is None and logits.grad.any()
    before = logits.grad.clone()
    total.backward()
    assert regression.grad.gt(0).all() and torch.equal(logits.grad, before)


def test_regression_part_is_linear_in_the_losses(backend, generator):
    logits, targets, regression = ALRP.draw(RankingSample("linear", 20, 100, dtype=torch.float64), generator).arguments
    rank, order = ALRP.evaluate(backend, logits, targets, regression).statistics
    value, gradient = regression_part(backend, regression, rank, order)
    doubled, same = regression_part(backend, 2 * regression, rank, order)
    assert doubled == 2 * value and torch.equal(same, gradient)
    assert float((gradient * regression).sum()) == pytest.approx(float(value), rel=1e-12)


def test_regression_part_without_positives(backend):
    logits, targets, regression = torch.linspace(-1, 1, 8), torch.zeros(8), torch.zeros(0)
    got = ALRP.evaluate(backend, logits, targets, regression)
    assert got.losses == (0.0,) and [value.shape for value in got.statistics] == [(0,), (0,)]
    value, gradient = regression_part(backend, regression, *got.statistics)
    assert value == 0 and gradient.shape == (0,)
    labels, rows = torch.full((2,), 4), torch.tensor([0.5, torch.nan])
    got = ALRP.evaluate(backend, logits.view(2, 4), labels, rows)
    value, gradient = regression_part(backend, rows, *got.statistics)
    assert value == 0 and not gradient.any() and not gradient.isnan().any()


REGRESSION_FAULTS = {
    "list": (lambda a: a | {"regression_losses": [0.5]}, TypeError, "regression_losses"),
    "int": (lambda a: a | {"regression_losses": torch.ones(3, dtype=torch.int64)}, TypeError, "regression_losses"),
    "rank_shape": (lambda a: a | {"rank": torch.ones(2)}, ValueError, "rank"),
    "rank_int": (lambda a: a | {"rank": torch.ones(3, dtype=torch.int64)}, TypeError, "rank"),
    "order_shape": (lambda a: a | {"order": torch.arange(4)}, ValueError, "order"),
    "order_float": (lambda a: a | {"order": torch.arange(3.0)}, TypeError, "order"),
    "order_meta": (lambda a: a | {"order": torch.arange(3, device="meta")}, ValueError, "order"),
}


@pytest.mark.parametrize("fault", REGRESSION_FAULTS)
def test_regression_part_refuses_bad_arguments_by_name(fault):
    change, exception, named = REGRESSION_FAULTS[fault]
    good = {"regression_losses": torch.ones(3), "rank": torch.tensor([1.0, 2.0, 3.0]), "order": torch.tensor([2, 1, 0])}
    assert alrp_regression_loss(**good) == pytest.approx((1 + 2 / 2 + 3 / 3) / 3)
    with pytest.raises(exception, match=f"^alrp_regression_loss: {named} must .*, got "):
        alrp_regression_loss(**change(good))


def test_module_passes_every_keyword_on(backend, generator):
    arguments = [value.to(backend.device) for value in ALRP.draw(RankingSample("module", form="index"), generator).arguments]
    with use_backend(backend.name):
        for options in ({"delta": 0.25}, {"background": "first"}):
            expected = alrp_loss(*arguments, **options)
            got = ALRPLoss(**options)(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            assert expected.classification != alrp_loss(*arguments).classification
        with pytest.raises(ValueError, match="max_positives must be"):
            ALRPLoss(max_positives=0)(*arguments)


def test_published_example():
    """One positive, one negative far above: rank 2. A better located positive above both: by hand."""
    truth = oracles.alrp(ALRP.read(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.7])), 1.0)
    assert truth.losses == (0.5,) and truth.rank.tolist() == [2.0] and truth.gradient().tolist() == [-0.5, 0.5]
    elements = ALRP.read(torch.tensor([0.0, 9.0, 20.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 0.25]))
    truth = oracles.alrp(elements, 1.0)
    assert truth.rank.tolist() == [3.0, 1.0] and truth.losses == (pytest.approx(1 / 6),)
    assert truth.gradient().tolist() == pytest.approx([-1.25 / 3 / 2, 1.25 / 3 / 2, 0.0])
    value, gradient = oracles.alrp_regression(torch.tensor([0.5, 0.25]), truth.rank, torch.tensor([0, 1]))
    assert value == pytest.approx((0.25 / 1 + 0.75 / 3) / 2) and gradient.tolist() == pytest.approx([1 / 6, (1 + 1 / 3) / 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_falls_where_the_logit_rises(backend, dtype):
    """However close the logits are: processes order their positives by it."""
    positives = torch.tensor([3e-17, 1e-17, 2e-17, 0.5, 2e-17, torch.nan, -30.0], dtype=dtype)
    logits = torch.cat([positives, torch.tensor([-1.0, -0.2, 0.1], dtype=dtype)])
    targets = (torch.arange(10) < 7).to(dtype)
    with use_backend(backend.name):
        _, rank, order = alrp_loss(*(v.to(backend.device) for v in (logits, targets, torch.ones(7, dtype=dtype))))
    ascending = [6, 1, 2, 4, 0, 3, 5]
    assert [index for index in order.tolist() if index != 5] == ascending[:-1]
    ranked = positives[ascending].double()
    falling = api._strictly_falling(rank.cpu()[ascending], ranked)
    steps = falling[:-1].diff()
    assert falling[-1].isnan() and steps[2] == 0 and (steps[[0, 1, 3, 4]] < 0).all(), falling
    assert ((falling - rank.cpu()[ascending])[:-1].abs() <= 1e-14).all()
