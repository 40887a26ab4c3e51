"""The peers of the benchmark compute what they claim: a comparison with a wrong competitor would be worth nothing."""
import pathlib
import sys

import golden_vectors
import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench.peers import brute_force  # noqa: E402
from bench.peers.bucketed import bucketed_average_precision_loss, bucketed_rank_sort_loss  # noqa: E402
from bench.peers.equalized import PublishedEqualizedFocal, PublishedEQLv2, modulated_truth  # noqa: E402
from bench.peers.focal import compiled_focal_loss, focal_loss  # noqa: E402
from bench.peers.ghm import PublishedGHMC, PublishedGHMR, ghm_truth, one_hot_targets  # noqa: E402
from bench.peers.published_loop import (  # noqa: E402
    published_alrp,
    published_alrp_regression,
    published_average_precision,
    published_rank_sort,
)
from bench.peers.vectorised import compiled_rank_sort, vectorised_rank_sort  # noqa: E402

# Name: (peer, family of golden vectors, implementation)
PEERS = {
    "rank_sort loop": (published_rank_sort, "ranksort", "rs"),
    "rank_sort vectorised": (vectorised_rank_sort, "ranksort", "rs"),
    "rank_sort bucketed": (bucketed_rank_sort_loss, "ranksort", "brs"),
    "ap loop": (published_average_precision, "aploss", "ap"),
    "ap bucketed": (bucketed_average_precision_loss, "aploss", "bap"),
}
LOSSES = {"ranksort": {"ranking_loss": "gout_rank", "sorting_loss": "gout_sort"}, "aploss": {"loss": "gout"}}
PEER_CASES = [
    pytest.param(peer, case, id=f"{peer}-{case.name}") for peer in PEERS for case in golden_vectors.cases(PEERS[peer][1])
]


def inputs_of(case, dtype=torch.float64):
    inputs = case.inputs()
    return inputs["logits"].to(dtype).requires_grad_(), inputs["targets"].to(dtype)


def only_ones(targets):
    """What lies between 0 and 1 ignored, as the authors' AP and aLRP do."""
    return torch.where((targets > 0) & (targets != 1), -1.0, targets)


def assert_gradient(got, wanted, tolerance=1e-10):
    largest = max([1e-3, *wanted.abs().flatten().tolist()])
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * largest)


def is_finite(outputs):
    return bool(outputs) and all(bool(value.isfinite().all()) for value in outputs.values())


@pytest.mark.parametrize("peer, case", PEER_CASES)
def test_peer_equals_golden_or_is_defined(peer, case):
    function, family, implementation = PEERS[peer]
    logits, targets = inputs_of(case)
    got = function(logits, targets, case.hyper["delta"])
    got = got if isinstance(got, tuple) else (got,)
    upstream = [torch.tensor(case.hyper[key], dtype=torch.float64) for key in LOSSES[family].values()]
    (gradient,) = torch.autograd.grad(got, logits, upstream)
    wanted = case.outputs(implementation)
    if is_finite(wanted):
        for loss, name in zip(got, LOSSES[family], strict=True):
            torch.testing.assert_close(loss, wanted[name].reshape(()), rtol=1e-10, atol=1e-12)
        assert_gradient(gradient, wanted["grad"])
    elif implementation == "ap" and bool((targets == 0).any()) and bool((targets == 1).any()):
        # Ties at delta = 0 are NaN as published; here the step counts them, as in Rank & Sort.
        truth = brute_force.brute_force_average_precision(logits, only_ones(targets), case.hyper["delta"])
        torch.testing.assert_close(got[0].detach(), truth[0], rtol=1e-10, atol=0)
        assert_gradient(gradient, truth[1])
    else:
        # The original raises: nothing positive, or no negative that reaches a positive. Nothing is wrong then.
        assert got[0] == 0 and bool((gradient == 0).all())


@pytest.mark.parametrize("case", golden_vectors.params("alrp"))
def test_alrp_loop_equals_golden_or_is_defined(case):
    logits, targets = inputs_of(case)
    regression = case.inputs()["regression_losses"].double().requires_grad_()
    loss, rank, order = published_alrp(logits, targets, regression, case.hyper["delta"])
    assert not rank.requires_grad and not order.requires_grad
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(case.hyper["gout"], dtype=torch.float64))
    of_boxes = published_alrp_regression(regression, rank, order)
    (box_gradient,) = torch.autograd.grad(of_boxes, regression)
    wanted = case.outputs("alrp")
    if not wanted:  # no positives: the original raises
        assert loss == 0 and of_boxes == 0 and rank.numel() == 0 and bool((gradient == 0).all())
        return
    torch.testing.assert_close(loss, wanted["cls_loss"].reshape(()), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(rank, wanted["rank"], rtol=1e-12, atol=0)
    assert_gradient(gradient, wanted["grad"])
    if torch.unique(logits.detach()[targets == 1]).numel() == rank.numel():
        assert torch.equal(order, wanted["order"])
        torch.testing.assert_close(of_boxes, wanted["reg_loss"].reshape(()), rtol=1e-10, atol=0)
        assert_gradient(box_gradient, wanted["reg_grad"])


@pytest.mark.parametrize("implementation", ["brs", "bap"])
def test_bucketed_negative_tied_with_a_positive_falls_below_it(implementation):
    family, loss = {"brs": ("ranksort", "ranking_loss"), "bap": ("aploss", "loss")}[implementation]
    sensitive = [case for case in golden_vectors.cases(family) if case.outputs(f"{implementation}_unstable")]
    assert len(sensitive) >= 2
    differ = 0
    for case in sensitive:
        # The recorded outputs of the two tie orders differ, so agreement with one of them (above) pins the order down.
        stable, unstable = (case.outputs(name) for name in (implementation, f"{implementation}_unstable"))
        differ += not torch.equal(stable["grad"], unstable["grad"]) or not torch.equal(stable[loss], unstable[loss])
    assert differ == len(sensitive)
    logits = torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    targets = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    # delta = 0: a bucket of its own at 1.0 below both positives and one at 3.0; had the tied one joined that, its mean were 2.
    function = {"brs": bucketed_rank_sort_loss, "bap": bucketed_average_precision_loss}[implementation]
    for permutation in ([0, 1, 2, 3], [3, 1, 2, 0], [1, 0, 3, 2]):
        leaf = logits[permutation].requires_grad_()
        got = function(leaf, targets[permutation], 0.25)
        got = got[0] if isinstance(got, tuple) else got
        torch.testing.assert_close(got.detach(), torch.tensor(1.5 / 2.5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_bucketed_float32_where_the_original_crashes():
    crashed = [case for case in golden_vectors.cases("ranksort") if "brs" in case.crashed and case.outputs("brs")]
    assert [case.name for case in crashed] == ["rs031_allequal_d0.0"]
    logits, targets = inputs_of(crashed[0], torch.float32)
    losses = bucketed_rank_sort_loss(logits, targets, 0.0)
    (gradient,) = torch.autograd.grad(losses, logits)
    wanted = crashed[0].outputs("brs")
    torch.testing.assert_close(losses[0].double(), wanted["ranking_loss"].reshape(()), rtol=1e-6, atol=0)
    assert_gradient(gradient.double(), wanted["grad"], 1e-6)


@pytest.mark.parametrize("piece", [40, 1 << 15])
@pytest.mark.parametrize("family", ["ranksort", "aploss", "alrp"])
def test_brute_force_equals_golden(family, piece, monkeypatch):
    monkeypatch.setitem(brute_force.PIECE, "cpu", piece)
    checked = 0
    for case in golden_vectors.cases(family):
        wanted = case.outputs({"ranksort": "rs", "aploss": "ap", "alrp": "alrp"}[family])
        logits, targets = inputs_of(case)
        if not is_finite(wanted) or case.hyper.get("gout_rank", 1.0) != 1 or case.hyper.get("gout", 1.0) != 1:
            continue
        delta = case.hyper["delta"]
        if family == "ranksort":
            got = brute_force.brute_force_rank_sort(logits, targets, delta)
            names = ("ranking_loss", "sorting_loss")
        elif family == "aploss":
            got = brute_force.brute_force_average_precision(logits, only_ones(targets), delta)
            names = ("loss",)
        else:
            regression = case.inputs()["regression_losses"]
            got = brute_force.brute_force_alrp(logits, only_ones(targets), regression, delta)
            names = ("cls_loss", "rank")
        for value, name in zip(got, names, strict=False):
            torch.testing.assert_close(value, wanted[name].reshape(value.shape), rtol=1e-10, atol=1e-14)
        assert_gradient(got[-1], wanted["grad"])
        checked += 1
    assert checked >= {"ranksort": 80, "aploss": 40, "alrp": 36}[family]


def test_compiled_vectorised_equals_eager():
    generator = torch.Generator().manual_seed(3)
    for positives, negatives in ((5, 300), (17, 2000)):
        logits = torch.randn(positives + negatives, generator=generator, dtype=torch.float64).requires_grad_()
        targets = torch.cat([torch.rand(positives, generator=generator) * 0.9 + 0.1, torch.zeros(negatives)]).double()
        outputs = [function(logits, targets, 0.5) for function in (compiled_rank_sort, vectorised_rank_sort)]
        gradients = [torch.autograd.grad(output, logits)[0] for output in outputs]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", [focal_loss, compiled_focal_loss])
def test_focal_loss_and_gradient_equal_the_closed_form(function):
    logits = torch.linspace(-12, 12, 2001, dtype=torch.float64).requires_grad_()
    targets = (torch.arange(2001) % 3 == 0).double()
    loss = function(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    # z = logit where t = 1, -logit where t = 0; p = sigma(z); l = -a (1 - p)^2 log p,
    # dl/dz = a (1 - p)^2 (2 p log p - (1 - p)).
    sign = 2 * targets - 1
    z = (sign * logits).detach()
    alpha, p, log_p = 0.75 - 0.5 * targets, z.sigmoid(), torch.nn.functional.logsigmoid(z)
    torch.testing.assert_close(loss.detach(), (-alpha * (1 - p) ** 2 * log_p).sum(), rtol=1e-12, atol=0)
    wanted = sign * alpha * (1 - p) ** 2 * (2 * p * log_p - (1 - p))
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-15)


def published_ghm(case):
    bins, momentum = case.hyper["bins"], case.hyper["momentum"]
    if "mu" in case.hyper:
        return PublishedGHMR(case.hyper["mu"], bins, momentum)
    return PublishedGHMC(bins, momentum, background_first=case.hyper["label_convention"] == "bg0")


@pytest.mark.parametrize("case", golden_vectors.params("ghm"))
def test_published_ghm_equals_golden_step_by_step(case):
    # Releases differ in the convention of the labels; of the first one no gradients were recorded.
    wanted = case.outputs("mmdet2") or case.outputs("mmdet1")
    loss, inputs = published_ghm(case), case.inputs()
    # The state is float32.
    tolerance = 1e-6 if case.hyper["momentum"] > 0 else 1e-10
    compared = 0
    for step in range(case.hyper["steps"]):
        pred = inputs[f"s{step}_pred"].double().requires_grad_()
        got = case.hyper["loss_weight"] * loss(pred, inputs[f"s{step}_target"], inputs[f"s{step}_label_weight"].double())
        (gradient,) = torch.autograd.grad(got, pred, torch.tensor(case.hyper["gout"], dtype=torch.float64))
        torch.testing.assert_close(got.detach(), wanted[f"s{step}_loss"].reshape(()), rtol=tolerance, atol=1e-12)
        if f"s{step}_grad" in wanted:
            assert_gradient(gradient, wanted[f"s{step}_grad"], tolerance)
            compared += 1
        if case.hyper["momentum"] > 0:
            torch.testing.assert_close(loss.acc_sum.double(), wanted[f"s{step}_acc_sum"].double(), rtol=1e-6, atol=0)
    assert compared == case.hyper["steps"] or not case.outputs("mmdet2")


HARD_GHM = [case for case in golden_vectors.cases("ghm") if case.hyper["momentum"] == 0 and "soft" not in case.tags]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in HARD_GHM])
def test_truth_of_ghm_equals_golden(case):
    wanted = case.outputs("mmdet2") or case.outputs("mmdet1")
    pred, target, weight = (case.inputs()[f"s0_{name}"] for name in ("pred", "target", "label_weight"))
    if target.dim() != pred.dim():
        target = one_hot_targets(target, pred.shape[-1], case.hyper["label_convention"] == "bg0")
        weight = weight[:, None].expand(pred.shape)
    loss, gradient = ghm_truth(pred, target, weight, case.hyper["bins"], case.hyper.get("mu"))
    scale = case.hyper["loss_weight"]
    torch.testing.assert_close(scale * loss, wanted["s0_loss"].reshape(()), rtol=1e-10, atol=1e-14)
    if "s0_grad" in wanted:
        assert_gradient(scale * case.hyper["gout"] * gradient, wanted["s0_grad"])


def of_kind(family, kind):
    return [pytest.param(case, id=case.name) for case in golden_vectors.cases(family) if case.manifest["kind"] == kind]


@pytest.mark.parametrize("case", of_kind("efl", "efl_seq"))
def test_published_efl_equals_golden(case):
    inputs, hyper, wanted = case.inputs(), case.hyper, case.outputs("efl")
    loss = PublishedEqualizedFocal(hyper["num_classes"] - 1, hyper["focal_gamma"], hyper["focal_alpha"], hyper["scale_factor"])
    for step in range(hyper["steps"]):
        levels = [inputs[f"s{step}_level{level}"].double().requires_grad_() for level in range(hyper["fpn_levels"])]
        given, labels = float(inputs[f"s{step}_normalizer"]), inputs[f"s{step}_target"].flatten()
        is_divided = given == given and hyper["reduction"] == "mean"
        # The classes come first here, the background last.
        labels = torch.where(labels > 0, labels - 1, torch.where(labels == 0, hyper["num_classes"] - 1, -1))
        value = hyper["loss_weight"] * loss(levels, labels, given if is_divided else 1.0)
        gradients = torch.autograd.grad(value, levels)
        torch.testing.assert_close(value.detach(), wanted[f"s{step}_loss"].reshape(()), rtol=1e-5, atol=0)
        recorded = {level: wanted[f"s{step}_grad_level{level}"] for level in range(len(levels)) if f"s{step}_grad_level{level}" in wanted}
        for level, gradient in recorded.items():
            assert_gradient(gradients[level], gradient, 1e-5)
        for name in ("pos_grad", "neg_grad", "pos_neg"):
            torch.testing.assert_close(getattr(loss, name).double(), wanted[f"s{step}_after_{name}"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("case", of_kind("eqlv2", "eqlv2_seq"))
def test_published_eqlv2_equals_golden(case):
    inputs, hyper, wanted = case.inputs(), case.hyper, case.outputs("eqlv2")
    loss = PublishedEQLv2(hyper["num_classes"], hyper["gamma"], hyper["mu"], hyper["alpha"])
    for step in range(hyper["steps"]):
        logits = inputs[f"s{step}_pred"].double()
        value = hyper["loss_weight"] * loss(logits, inputs[f"s{step}_target"])
        torch.testing.assert_close(value, wanted[f"s{step}_loss"].reshape(()), rtol=1e-5, atol=0)
        for name in ("pos_grad", "neg_grad", "pos_neg"):
            torch.testing.assert_close(getattr(loss, name).double(), wanted[f"s{step}_after_{name}"], rtol=1e-5, atol=1e-9)


def test_modulated_truth_equals_focal_loss_and_its_derivative():
    logits = torch.linspace(-12, 12, 2001, dtype=torch.float64).requires_grad_()
    targets = (torch.arange(2001) % 3 == 0).double()
    loss = focal_loss(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    table = torch.tensor([2.0, 0.25, 0.75], dtype=torch.float64)
    torch.testing.assert_close(modulated_truth(logits, targets, *table), (loss.detach(), gradient), rtol=1e-9, atol=1e-15)
