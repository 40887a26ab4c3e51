"""Self-balancing and score weights: the authors' outputs, state, guards, compilation, bad input."""

import copy
import warnings

import golden_vectors
import numpy as np
import pytest
import torch

from rsloss_kernels import SelfBalancing, rank_sort_loss, score_weights

TOLERANCE = 1e-10


def golden_cases(kind):
    return [
        pytest.param(case, id=case.name)
        for case in golden_vectors.cases("rank_head")
        if case.outputs(kind) or kind in case.tags
    ]


def scalar(value, **keywords):
    return torch.tensor(value, **keywords)


def of_mode(mode, period, **options):
    return SelfBalancing(mode, **({"period": period} if mode == "running" else {}), **options)


def giou_losses(pred, target):
    """IoU and GIoU loss as the published heads compute them, down to the gradient where a clamp acts."""
    eps = pred.new_tensor(1e-6)
    overlap = (torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (pred, target)]
    enclosing = (torch.max(pred[:, 2:], target[:, 2:]) - torch.min(pred[:, :2], target[:, :2])).clamp(min=0).prod(1)
    union = torch.max(areas[0] + areas[1] - overlap, eps)
    enclosing = torch.max(enclosing, eps)
    iou = overlap / union
    return iou, 1 - (iou - (enclosing - union) / enclosing)


@pytest.mark.parametrize("case", golden_cases("rs_atss") + golden_cases("posweight0"))
def test_golden_atss_head(case):
    inputs, golden, aux = case.inputs(), case.outputs("rs_atss"), case.outputs("aux")
    labels = inputs["labels"]
    is_positive = labels < case.hyper["num_classes"]
    logits = inputs["cls_scores"].double().requires_grad_()
    boxes = inputs["box_pred"].double().requires_grad_()

    weights = score_weights(logits, labels)
    iou, giou = giou_losses(boxes[is_positive], inputs["box_target"][is_positive].double())
    box = (weights[is_positive] * giou).sum() / weights.sum().clamp(min=1e-12)
    dense = torch.zeros_like(logits, requires_grad=False)
    dense[inputs["label_weights"] == 0] = -1
    dense[is_positive, labels[is_positive]] = iou.detach()
    ranking, sorting = rank_sort_loss(logits, dense, delta=case.hyper["delta"])
    balancing = SelfBalancing()
    scaled = balancing(ranking + sorting, box)
    (ranking + sorting + scaled).backward()

    if "rs_atss" in case.crashed:  # the published head raises where a positive has label weight 0
        assert torch.isfinite(scaled) and torch.isfinite(boxes.grad).all()
        return
    assert torch.allclose(weights[is_positive], aux.get("score_weights", weights[is_positive]), rtol=0, atol=TOLERANCE)
    assert torch.allclose(logits.grad, golden["grad_scores"], rtol=0, atol=TOLERANCE)
    if not golden["loss_bbox"].isfinite():
        assert box == 0 and scaled == 0 and (boxes.grad == 0).all() and balancing.SB_weight == 50
        return
    assert abs(scaled - golden["loss_bbox"]) <= TOLERANCE
    assert torch.allclose(boxes.grad, golden["grad_box"], rtol=0, atol=TOLERANCE)
    if "SB_weight" in golden:
        assert balancing.SB_weight.item() == pytest.approx(golden["SB_weight"].item(), rel=TOLERANCE)


@pytest.mark.parametrize("case", golden_cases("alrp_retina"))
def test_golden_alrp_running_sequence(case):
    golden = case.outputs("alrp_retina")
    balancing = SelfBalancing("running", period=case.hyper["period"], initial=case.hyper["initial_SB"])
    for step in range(case.hyper["steps"]):
        expected = {
            name: golden[f"s{step}_{name}"].item() for name in ("loss_cls", "loss_bbox", "SB_weight_after", "counter_after")
        }
        # The head stores its box loss scaled: before that it was the stored one over the stored factor.
        loss = scalar(expected["loss_bbox"] / expected["SB_weight_after"], dtype=torch.float64, requires_grad=True)
        scaled = balancing(scalar(expected["loss_cls"], dtype=torch.float64), loss)
        scaled.backward()
        assert scaled.item() == pytest.approx(expected["loss_bbox"], rel=TOLERANCE)
        assert loss.grad.item() == pytest.approx(expected["SB_weight_after"], rel=TOLERANCE)
        assert balancing.SB_weight.item() == pytest.approx(expected["SB_weight_after"], rel=TOLERANCE)
        assert balancing.counter.item() == expected["counter_after"]


def test_step_scales_to_the_reference_with_a_constant_factor():
    reference, loss = scalar(3.0, requires_grad=True), scalar(0.5, requires_grad=True)
    balancing = SelfBalancing()
    scaled = balancing(reference, loss)
    scaled.backward()
    assert scaled.item() == 3.0 and loss.grad.item() == 6.0 and reference.grad is None
    assert balancing.SB_weight.item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reference, loss", [(1.0, 0.0), (0.0, 0.0)])
def test_zero_loss_is_an_exact_connected_zero(dtype, reference, loss):
    loss = scalar(loss, dtype=dtype, requires_grad=True)
    balancing = SelfBalancing()
    scaled = balancing(scalar(reference, dtype=dtype), loss)
    scaled.backward()
    assert scaled.item() == 0 and loss.grad.item() == 0 and balancing.SB_weight.item() == 50
    assert scaled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_factor_beyond_float32_counts_as_a_zero_loss():
    loss = scalar(1e-44, requires_grad=True)
    balancing = SelfBalancing()
    scaled = balancing(scalar(1.0), loss)
    assert scaled.item() == 0 and balancing.SB_weight.item() == 50


@pytest.mark.parametrize("mode", ["step", "running"])
@pytest.mark.parametrize(
    "reference, loss", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_non_finite_statistics_leave_the_state(mode, reference, loss):
    balancing = of_mode(mode, period=2, initial=7.0)
    balancing(scalar(1.0), scalar(2.0))
    before = copy.deepcopy(balancing.state_dict())
    scaled = balancing(scalar(reference), scalar(loss))
    assert all(torch.equal(value, before[name]) for name, value in balancing.state_dict().items())
    assert not torch.isfinite(scaled) or (mode == "running" and np.isfinite(loss))


def test_running_period_of_zero_losses_waits_for_a_finite_factor():
    balancing = SelfBalancing("running", period=2, initial=7.0)
    for _ in range(3):
        assert balancing(scalar(1.0), scalar(0.0)).item() == 0
    assert balancing.SB_weight.item() == 7 and balancing.counter.item() == 1
    assert balancing(scalar(1.0), scalar(4.0)).item() == pytest.approx(4 * (4 + 2) / 4)
    assert balancing.counter.item() == 0 and balancing.loss_sum.item() == 0


@pytest.mark.parametrize("mode", ["step", "running"])
def test_state_changes_only_in_training_with_gradients(mode):
    balancing = of_mode(mode, period=1, initial=7.0)
    before = copy.deepcopy(balancing.state_dict())
    with torch.no_grad():
        balancing(scalar(1.0), scalar(2.0))
    balancing.eval()
    scaled = balancing(scalar(1.0), scalar(2.0))
    assert scaled.item() == (1.0 if mode == "step" else 14.0)
    assert all(torch.equal(value, before[name]) for name, value in balancing.state_dict().items())
    balancing.train()(scalar(1.0), scalar(2.0))
    assert not torch.equal(balancing.SB_weight, before["SB_weight"])


def test_two_forwards_before_one_backward():
    balancing = SelfBalancing("running", period=1)
    losses = [scalar(value, requires_grad=True) for value in (1.0, 4.0)]
    sum(balancing(scalar(2.0), loss) for loss in losses).backward()
    assert [loss.grad.item() for loss in losses] == [3.0, 1.5]


@pytest.mark.parametrize("mode", ["step", "running"])
def test_state_survives_save_resume_and_copies(mode):
    def run(balancing, steps):
        return [balancing(scalar(0.3 * step + 1), scalar(0.7 + step % 3)).item() for step in steps]

    whole = of_mode(mode, period=4)
    expected = run(whole, range(10))
    first = of_mode(mode, period=4)
    values = run(first, range(5))
    resumed = of_mode(mode, period=4)
    resumed.load_state_dict(first.state_dict())
    assert values + run(resumed, range(5, 10)) == expected
    copied = copy.deepcopy(whole)
    assert run(copied, range(3)) == run(whole, range(3))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_state_stays_wide_under_casts(cast):
    balancing = SelfBalancing("running", period=2, initial=1 / 3)
    getattr(torch.nn.Sequential(balancing, torch.nn.Linear(2, 2)), cast)()
    assert balancing.SB_weight.dtype == torch.float64 and balancing.SB_weight.item() == 1 / 3
    assert balancing.counter.dtype == torch.int64
    assert balancing.to("meta").SB_weight.device.type == "meta"


def test_checkpoint_of_another_loss_loads_with_one_warning():
    balancing = SelfBalancing("running")
    with pytest.warns(UserWarning, match="^SelfBalancing: .* another loss.* has no SB_weight, .* its acc_sum is left out$") as caught:
        balancing.load_state_dict({"acc_sum": torch.ones(3)}, strict=True)
    assert len(caught) == 1 and balancing.SB_weight.item() == 50


def test_checkpoint_without_the_balancing_says_what_it_lacks():
    """A model that was trained without it."""
    model = torch.nn.ModuleDict({"balance": SelfBalancing("running", initial=7.0)})
    wanted = r"it has no balance\.SB_weight, balance\.counter, .* which keep the values that they have now$"
    with pytest.warns(UserWarning, match=wanted) as caught:
        model.load_state_dict({}, strict=True)
    assert len(caught) == 1 and model["balance"].SB_weight.item() == 7


def test_period_without_effect_is_told():
    with pytest.warns(UserWarning, match="^SelfBalancing: period=100 has no effect with mode='step'"):
        SelfBalancing(period=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SelfBalancing(), SelfBalancing("running", period=100), SelfBalancing("step", 3665)


@pytest.mark.parametrize("mode", ["step", "running"])
def test_compiles_once_as_one_graph(mode):
    torch._dynamo.reset()
    eager, module = of_mode(mode, period=3), of_mode(mode, period=3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(8):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = scalar(0.0 if step == 4 else 1.0 + step, requires_grad=True)
            scaled = compiled(scalar(2.0), loss)
        scaled.backward()
        expected = eager(scalar(2.0), loss)
        assert scaled.item() == expected.item() and torch.equal(module.SB_weight, eager.SB_weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_score_weights_of_every_form(dtype):
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = torch.arange(40) % 9 - 2  # ignored, foreground, background 5, above
    is_positive = (labels >= 0) & (labels < 5)
    dense = torch.zeros(40, 5)
    dense[labels < 0] = -1
    dense[is_positive, labels[is_positive]] = 0.25
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.where(is_positive, logits.detach().to(wide).sigmoid().amax(1), 0)
    shifted = torch.where(is_positive, labels + 1, torch.where(labels < 0, labels, 0))
    for got in (
        score_weights(logits, labels),
        score_weights(logits, labels.to(torch.int32)),
        score_weights(logits, dense),
        score_weights(logits, shifted, background="first"),
        score_weights(logits.view(4, 10, 5), labels.view(4, 10)).flatten(),
    ):
        assert got.dtype == wide and not got.requires_grad
        assert torch.allclose(got, expected, rtol=1e-7, atol=0) and (got[~is_positive] == 0).all()


def test_score_weights_of_ignored_rows_and_nothing():
    logits = torch.full((3, 2), float("nan"))
    assert (score_weights(logits, torch.tensor([2, -1, 2])) == 0).all()
    assert score_weights(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    compiled = torch.compile(score_weights, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.zeros(2, 3), torch.tensor([1, 3])), torch.tensor([0.5, 0.0]))


LOGITS = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SelfBalancing("mean"), ValueError, "SelfBalancing: mode must be one of 'step', 'running', got 'mean'"),
        (lambda: SelfBalancing("running", period=0), ValueError, "SelfBalancing: period must be at least 1 and below 2.31, got 0"),
        (lambda: SelfBalancing("running", initial=float("nan")), ValueError, "SelfBalancing: initial .* got nan"),
        (lambda: SelfBalancing()(1.0, scalar(1.0)), TypeError, "SelfBalancing: reference_loss must be a Tensor, got float"),
        (
            lambda: SelfBalancing()(scalar(1.0), scalar(1)),
            TypeError,
            "SelfBalancing: loss must have a floating dtype, got torch.int64",
        ),
        (
            lambda: SelfBalancing()(scalar(1.0), scalar([1.0])),
            ValueError,
            r"SelfBalancing: loss must have no dimensions, \[\], got \[1\]",
        ),
        (lambda: score_weights(LOGITS.long(), LOGITS), TypeError, "score_weights: logits must be float16"),
        (lambda: score_weights(LOGITS, torch.zeros(3)), ValueError, r"score_weights: targets .* \[4, 3\], got \[3\]"),
        (lambda: score_weights(LOGITS, LOGITS, background="none"), ValueError, "score_weights: background .* got 'none'"),
        (lambda: score_weights(scalar(1.0), scalar(1.0)), ValueError, r"score_weights: logits must have .* got \[\]"),
        (
            lambda: score_weights(LOGITS, LOGITS.to("meta")),
            ValueError,
            "score_weights: targets must be on the device of logits, cpu, got meta",
        ),
    ],
)
def test_bad_input_names_function_argument_wanted_and_got(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_score_weights_of_more_classes_than_the_label_type_can_count(dtype):
    logits, labels = torch.randn(4, 300), torch.tensor([0, 5, 100, -1 if dtype.is_signed else 7]).to(dtype)
    assert torch.equal(score_weights(logits, labels) > 0, labels >= 0)
