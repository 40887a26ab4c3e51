"""Every loss under the transforms of torch.func, forward mode and second derivatives: right where it is plain PyTorch, else refused with
what to do instead; and nothing is left changed."""
import pytest
import rsloss_kernels as r
import torch
from stateful_modules import STATEFUL, Batch, same_bits, state_of
from torch.autograd import forward_ad

ROWS, CLASSES = 6, 5
GROUPS = r.ClassGroups([[0, 3], [], [1, 2, 4]])
LABELS = torch.tensor([0, 5, 2, 4, 1, 5])
QUALITY = torch.tensor([0.3, 0.9, 0.2, 0.8, 0.5, 0.6])
STATE = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.5])

# name -> (columns of the logits, loss of them).
KERNELS = {
    "rank_sort": (CLASSES, lambda x: sum(r.rank_sort_loss(x, LABELS, QUALITY))),
    "average_precision": (CLASSES, lambda x: r.average_precision_loss(x, LABELS)),
    "alrp": (CLASSES, lambda x: r.alrp_loss(x, LABELS, QUALITY).classification),
    "ghm_classification": (CLASSES, lambda x: r.ghm_classification_loss(x, LABELS)),
    "ghm_regression": (CLASSES, lambda x: r.ghm_regression_loss(x, torch.zeros(ROWS, CLASSES))),
    "gradient_density": (CLASSES, lambda x: r.gradient_density(x, LABELS)[0].sum()),
    "focal": (CLASSES, lambda x: r.sigmoid_focal_loss(x, LABELS, reduction="sum")),
    "focal, elements": (CLASSES, lambda x: r.sigmoid_focal_loss(x, LABELS).mean()),
    "quality_focal": (CLASSES, lambda x: r.quality_focal_loss(x, LABELS, QUALITY, reduction="sum")),
    "varifocal": (CLASSES, lambda x: r.varifocal_loss(x, LABELS, QUALITY, reduction="sum")),
    "equalized_focal": (CLASSES, lambda x: r.equalized_focal_loss(x, LABELS, STATE).loss),
    "equalized_quality_focal": (CLASSES, lambda x: r.equalized_quality_focal_loss(x, LABELS, QUALITY, STATE).loss),
    "eqlv2": (CLASSES + 1, lambda x: r.eqlv2_loss(x, LABELS, STATE).loss),
    "group_softmax": (GROUPS.num_logits, lambda x: r.group_softmax_loss(x, LABELS, GROUPS, others_ratio=None).sum()),
    "group_softmax_scores": (GROUPS.num_logits, lambda x: r.group_softmax_scores(x, GROUPS).sum()),
    "seesaw": (CLASSES + 2, lambda x: sum(r.seesaw_loss(x, LABELS, torch.ones(CLASSES + 1)))),
    "smooth_l1": (CLASSES, lambda x: r.smooth_l1_loss(x, torch.zeros(ROWS, CLASSES), 0.5)),
    "smooth_l1, elements": (CLASSES, lambda x: r.smooth_l1_loss(x, torch.zeros(ROWS, CLASSES), 0.5, reduction="none").sum()),
}
WITHOUT_GRADIENT = ("gradient_density", "group_softmax_scores")
PLAIN = {
    "asl1": lambda x: r.authentic_smooth_l1_loss(x, torch.zeros(ROWS, CLASSES)),
    "alrp_regression": lambda x: r.alrp_regression_loss(x[:, 0], QUALITY.double() + 1, LABELS.argsort()),
    "weighted_mean": lambda x: r.score_weighted_mean(x[:, 0], QUALITY),
    "score_weights": lambda x: (r.score_weights(x, LABELS) * x[:, 0]).sum(),
    "assign_by_iou": lambda x: (r.assign_by_iou(x.detach().sigmoid(), 0.5, 0.3) * x).sum(),
}
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, -x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, -x])),
}


def logits(columns: int, generator) -> torch.Tensor:
    return torch.randn(ROWS, columns, generator=generator)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", KERNELS)
def test_transforms_of_kernels_are_refused_with_what_to_do(name, generator):
    columns, loss = KERNELS[name]
    values = logits(columns, generator)
    expected = loss(values)
    message = r"rsloss_kernels: \w+ cannot run under a transform.*outside of the transform.*each part"
    for transform_name, transform in TRANSFORMS.items():
        if transform_name == "functionalize" and name in WITHOUT_GRADIENT:
            # It needs no rule.
            assert torch.equal(transform(loss, values), expected)
            continue
        with pytest.raises(RuntimeError, match=message):
            transform(loss, values)
        # The next call is as if nothing had been.
        assert torch.equal(loss(values), expected)


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in WITHOUT_GRADIENT])
def test_forward_mode_and_second_derivatives_are_refused_with_what_to_do(name, generator):
    columns, loss = KERNELS[name]
    values = logits(columns, generator)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"no forward-mode derivative.*torch\.autograd\.grad"):
        loss(forward_ad.make_dual(values, values))
    with pytest.raises(RuntimeError, match=r"no second derivative.*without create_graph=True"):
        torch.autograd.functional.hessian(loss, values)
    (gradient,) = torch.autograd.grad(loss(leaf := values.clone().requires_grad_()), leaf)
    assert gradient.any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", PLAIN)
def test_plain_functions_are_right_under_transforms(name, generator):
    loss, values = PLAIN[name], logits(CLASSES, generator)

    def gradient(x):
        return torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0]

    expected = torch.stack([gradient(values), gradient(-values)])
    torch.testing.assert_close(TRANSFORMS["vmap of grad"](loss, values), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(TRANSFORMS["vmap"](loss, values), torch.stack([loss(values), loss(-values)]), rtol=1e-6, atol=0)
    value, tangent = TRANSFORMS["jvp"](loss, values)
    assert value == loss(values)
    torch.testing.assert_close(tangent, (expected[0] * values).sum().to(tangent.dtype), rtol=1e-5, atol=1e-6)
    assert expected.any()


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_constants_may_be_evaluated_within_a_transform(name, generator):
    columns, evaluate = KERNELS[name]
    constant, values = logits(columns, generator), logits(CLASSES, generator)
    expected = evaluate(constant)
    assert torch.equal(torch.func.grad(lambda x: (x * evaluate(constant)).sum())(values), torch.full_like(values, float(expected)))
    assert torch.equal(torch.func.vmap(lambda x: x * evaluate(constant))(values), values * expected)


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in WITHOUT_GRADIENT])
def test_gradients_in_batches_are_refused_with_what_to_do(name, generator):
    columns, loss = KERNELS[name]
    value = loss(leaf := logits(columns, generator).requires_grad_())
    message = r"_backward cannot run under a transform.*in place of is_grads_batched or vectorize, for each part"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(value, leaf, torch.ones(2, dtype=value.dtype), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(lambda grad: torch.autograd.grad(value, leaf, grad, retain_graph=True))(torch.ones(2, dtype=value.dtype))
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.any()


OF_KERNELS = [one for one in STATEFUL.values() if one.update is None and "balancing" not in one.name]


@pytest.mark.parametrize("one", OF_KERNELS, ids=lambda one: one.name)
def test_modules_that_refuse_keep_their_state(one, generator):
    module, batch = one.make(), Batch.draw(generator)
    one.step(module, batch)
    before = state_of(module)
    for transform in ("grad", "vmap", "jvp"):
        with pytest.raises(RuntimeError, match="cannot run under a transform"):
            TRANSFORMS[transform](lambda x: one(module, batch.with_logits(x)), batch.logits)
    assert same_bits(state_of(module), before)
