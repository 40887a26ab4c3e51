"""The counts of SeesawLoss, and arguments that it refuses."""
import copy
import warnings

import distributed_seesaw
import distributed_worker as worker
import pytest
import torch
from distributed_seesaw import LABELS, LOGITS
from rsloss_kernels import SeesawLoss, seesaw_loss

COUNTED = [2.0, 0.0, 1.0, 2.0]


def test_counts_in_training_with_gradients_only():
    module = SeesawLoss(3)
    assert module.cum_samples.tolist() == [0.0] * 4
    module(LOGITS, LABELS, torch.zeros(6))
    assert module.cum_samples.tolist() == COUNTED
    module.eval()(LOGITS, LABELS)
    with torch.no_grad():
        module.train()(LOGITS, LABELS)
    assert module.cum_samples.tolist() == COUNTED
    with pytest.raises(TypeError):
        module(LOGITS, LABELS, "weights")
    assert module.cum_samples.tolist() == COUNTED
    module(LOGITS, LABELS)
    assert module.cum_samples.tolist() == [2 * count for count in COUNTED]


def test_the_batch_counts_before_its_loss():
    module = SeesawLoss(3)
    got = module(LOGITS, LABELS)["loss_cls_classes"]
    assert got == seesaw_loss(LOGITS, LABELS, torch.tensor(COUNTED)).classes
    assert got != seesaw_loss(LOGITS, LABELS, torch.zeros(4)).classes
    assert SeesawLoss(3, return_dict=False)(LOGITS, LABELS) == sum(SeesawLoss(3)(LOGITS, LABELS).values())


def test_state_survives():
    module = SeesawLoss(3)
    module(LOGITS, LABELS)
    assert module.half().cum_samples.dtype == torch.float64 and module.cum_samples.tolist() == COUNTED
    fresh = SeesawLoss(3)
    fresh.load_state_dict(copy.deepcopy(module).state_dict())
    assert fresh.cum_samples.tolist() == COUNTED
    with pytest.raises(RuntimeError, match=r"cum_samples of the checkpoint must have shape \[5\].*got \[4\]"):
        SeesawLoss(4).load_state_dict(module.state_dict())
    with pytest.warns(UserWarning, match="has no cum_samples"):
        SeesawLoss(3).load_state_dict({})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SeesawLoss(3).load_state_dict(module.state_dict())


@pytest.mark.parametrize("world", worker.WORLDS)
def test_processes_count_together(process_results, world):
    """Those of test_distributed.py."""
    for rank, of_process in enumerate(process_results[:world]):
        found = of_process[world]["seesaw"]
        assert found["together"]["counts"].tolist() == [distributed_seesaw.STEPS * count for count in COUNTED]
        assert (found["alone"]["counts"].tolist() == found["together"]["counts"].tolist()) == (world == 1)
        for name in ("loss_cls_objectness", "loss_cls_classes"):
            assert torch.equal(found["together"][name], found["whole"][name][rank::world])


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, r"logits must have 5 columns, got shape \[6, 4\]: the classes without the background", {"logits": LOGITS[:, :4]}),
        (ValueError, r"logits must have shape \[N, C \+ 2\]", {"logits": LOGITS[None]}),
        (TypeError, "logits must have a floating dtype", {"logits": LOGITS.long()}),
        (ValueError, r"labels must have one label per row of logits, \[6\], got \[5\]", {"labels": LABELS[:5]}),
        (TypeError, "labels must be class indices", {"labels": LABELS.float()}),
        (TypeError, "cum_samples must be a Tensor, got list", {"cum_samples": [1, 2, 3, 4]}),
        (ValueError, "weight must have one weight per row", {"weight": torch.ones(6, 1)}),
        (ValueError, "p must be finite and at least 0, got -1", {"p": -1}),
        (ValueError, "q must be finite and at least 0, got inf", {"q": float("inf")}),
        (TypeError, "eps must be a number, got str", {"eps": "0"}),
        (ValueError, "reduction must be one of", {"reduction": "max"}),
        (ValueError, "avg_factor must be None with reduction 'sum'", {"reduction": "sum", "avg_factor": 3.0}),
        (TypeError, "avg_factor must be a number", {"avg_factor": "3"}),
    ],
)
def test_bad_input(error, message, changes):
    arguments = {"logits": LOGITS, "labels": LABELS, "cum_samples": torch.zeros(4), **changes}
    with pytest.raises(error, match=f"seesaw_loss: {message}"):
        seesaw_loss(**arguments)


def test_average_factor_of_the_module():
    """As MMDetection: 0 does not divide by 0, and single losses are not divided."""
    module = SeesawLoss(3)
    without_rows = module(LOGITS, LABELS, torch.zeros(len(LABELS)), avg_factor=torch.tensor(0))
    assert [loss.item() for loss in without_rows.values()] == [0, 0]
    module.eval()
    divided = module(LOGITS, LABELS, avg_factor=2.0, reduction_override="none")
    whole = module(LOGITS, LABELS, reduction_override="none")
    assert all(torch.equal(divided[name], whole[name]) for name in whole)


def test_bad_input_of_the_module():
    with pytest.raises(ValueError, match=r"SeesawLoss: cls_score must have 6 columns, got shape \[6, 5\]"):
        SeesawLoss(4)(LOGITS, LABELS)
    with pytest.raises(ValueError, match="num_classes must be 3, as the module was made, got 4"):
        SeesawLoss(3).get_cls_channels(4)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        SeesawLoss(0)
    with pytest.raises(NotImplementedError, match="use_sigmoid"):
        SeesawLoss(3, use_sigmoid=True)


def test_debug_checks(monkeypatch):
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    with pytest.raises(ValueError, match="labels must be at most 3, the number of classes"):
        seesaw_loss(LOGITS, LABELS, torch.zeros(4))
