"""The peers of the benchmark compute what they claim: a comparison with a wrong competitor would be worth nothing."""
import json
import pathlib
import sys

import numpy as np
import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench.peers import brute_force  # noqa: E402
from bench.peers.bucketed import bucketed_rank_sort  # noqa: E402
from bench.peers.focal import compiled_focal_loss, focal_loss  # noqa: E402
from bench.peers.published_loop import published_rank_sort  # noqa: E402
from bench.peers.vectorised import compiled_rank_sort, vectorised_rank_sort  # noqa: E402

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "ranksort.npz", allow_pickle=False)
CASES = [case for case in json.loads(bytes(GOLDEN["__manifest__"]).decode())["cases"]]
# Without positives the published code raises.
CASES = [case for case in CASES if "nopos" not in case["name"] and "empty" not in case["name"]]
PEERS = {
    "loop": (published_rank_sort, "rs"),
    "vectorised": (vectorised_rank_sort, "rs"),
    "bucketed": (bucketed_rank_sort, "brs"),
}


def golden(case, implementation):
    logits = torch.from_numpy(GOLDEN[f"{case['name']}/in/logits"]).double().requires_grad_()
    targets = torch.from_numpy(GOLDEN[f"{case['name']}/in/targets"]).double()
    names = ("ranking_loss", "sorting_loss", "grad")
    wanted = [torch.from_numpy(GOLDEN[f"{case['name']}/out64/{implementation}/{name}"]) for name in names]
    return logits, targets, wanted


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_peer_equals_golden(case, peer):
    function, implementation = PEERS[peer]
    logits, targets, (ranking, sorting, gradient) = golden(case, implementation)
    got = function(logits, targets, case["hyper"]["delta"])
    torch.testing.assert_close(got[0], ranking.reshape(()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], sorting.reshape(()), rtol=1e-10, atol=1e-12)
    upstream = [torch.tensor(case["hyper"][key]).double() for key in ("gout_rank", "gout_sort")]
    (got_gradient,) = torch.autograd.grad(got, logits, upstream)
    limit = 1e-10 * max(gradient.abs().max().item(), 1e-3)
    torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=limit)


@pytest.mark.parametrize("name", ["rs001_prior_d0.5", "rs010_trained_d0.5", "rs087_large_trained"])
@pytest.mark.parametrize("piece", [40, 1 << 15])
def test_brute_force_equals_golden(name, piece, monkeypatch):
    monkeypatch.setitem(brute_force.PIECE, "cpu", piece)
    case = next(case for case in CASES if case["name"] == name)
    logits, targets, (ranking, sorting, gradient) = golden(case, "rs")
    got = brute_force.brute_force_rank_sort(logits, targets, case["hyper"]["delta"])
    for value, wanted in zip(got, (ranking, sorting, gradient), strict=True):
        torch.testing.assert_close(value, wanted.reshape(value.shape), rtol=1e-10, atol=1e-14)


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
