"""The element-wise sigmoid losses refuse bad input by name and change nothing; their operators cannot be made to leave their memory."""
import re

import pytest
import rsloss_kernels
import torch
from rsloss_kernels import (
    EqualizedFocalLoss,
    EqualizedQualityFocalLoss,
    EQLv2Loss,
    QualityFocalLoss,
    SigmoidFocalLoss,
    VarifocalLoss,
    _library,
    eqlv2_loss,
    equalized_focal_loss,
    equalized_quality_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    use_backend,
    varifocal_loss,
)
from sigmoid_samples import FOCAL, PLAIN_LOSSES, SigmoidSample


def good(form: str = "index") -> dict:
    inputs = FOCAL.draw(SigmoidSample("good", rows=6, form=form, weight="element"), torch.Generator().manual_seed(0))
    return {"logits": inputs.arguments[0], "targets": inputs.arguments[1], "weight": inputs.options["weight"]}


# name -> (argument, from the good value to the bad one, exception, what was wanted, what was got)
FAULTS = {
    "logits_empty_list": ("logits", lambda v: [], TypeError, "a list of one or more", "an empty list"),
    "logits_numbers": ("logits", lambda v: v.tolist(), TypeError, "a Tensor", "list"),
    "logits_int64": ("logits", lambda v: v.long(), TypeError, "float16, bfloat16, float32 or float64", "torch.int64"),
    "logits_0d": ("logits", lambda v: v[0, 0], ValueError, r"shape \[\.\.\., C\]", r"\[\]"),
    "targets_shape": ("targets", lambda v: v[:5], ValueError, r"\[6\] or \[6, 4\]", r"\[5\]"),
    "targets_float_labels": ("targets", lambda v: v.float(), ValueError, r"\[6, 4\]", r"\[6\]"),
    "targets_bool_labels": ("targets", lambda v: v > 0, ValueError, r"\[6, 4\]", r"\[6\]"),
    "targets_complex": ("targets", lambda v: v.to(torch.complex64), TypeError, "class indices or floating", "torch.complex64"),
    "targets_uint64": ("targets", lambda v: v.to(torch.uint64), TypeError, "int64 can hold", "torch.uint64"),
    "targets_float8": ("targets", lambda v: torch.zeros(6, 4).to(torch.float8_e5m2), TypeError, "floating dtype", "float8_e5m2"),
    "targets_meta": ("targets", lambda v: v.to("meta"), ValueError, "device of logits", "meta"),
    "targets_list": ("targets", lambda v: [v, v], ValueError, "one Tensor or 1, one per level", "2"),
    "weight_shape": ("weight", lambda v: v[:5], ValueError, r"\[6\] or \[6, 4\]", r"\[5, 4\]"),
    "weight_columns": ("weight", lambda v: v[0], ValueError, r"\[6\] or \[6, 4\]", r"\[4\]"),
    "class_weight_size": ("class_weight", lambda v: torch.ones(5), ValueError, r"one number per class, \[4\]", r"\[5\]"),
    "class_mask_size": ("class_mask", lambda v: [True] * 3, ValueError, r"one number per class, \[4\]", r"\[3\]"),
    "reduction": ("reduction", lambda v: "max", ValueError, "'none', 'mean', 'sum'", "'max'"),
    "avg_factor_vector": ("avg_factor", lambda v: torch.ones(3), ValueError, "a number or a 0-d Tensor", r"\[3\]"),
    "avg_factor_meta": ("avg_factor", lambda v: torch.ones((), device="meta"), ValueError, "device of logits", "meta"),
    "ignore_index": ("ignore_index", lambda v: 1.0, TypeError, "an int or None", "float"),
    "layout": ("layout", lambda v: "columns", ValueError, "'rows', 'anchor_major', 'class_major'", "'columns'"),
    "num_classes_0": ("num_classes", lambda v: 0, ValueError, "at least 1", "0"),
    "gamma_negative": ("gamma", lambda v: -0.5, ValueError, "at least 0", "-0.5"),
    "gamma_size": ("gamma", lambda v: torch.ones(5), ValueError, r"one number per class, \[4\]", r"\[5\]"),
    "alpha_inf": ("alpha", lambda v: float("inf"), ValueError, "finite", "inf"),
}


def snapshot(arguments: dict) -> list:
    return [(value.clone(), value._version) for value in arguments.values() if torch.is_tensor(value)]


def assert_unchanged(arguments: dict, before: list) -> None:
    for value, (content, version) in zip(filter(torch.is_tensor, arguments.values()), before, strict=True):
        assert value._version == version
        if not value.is_meta and not value.is_sparse and value.dtype != torch.float8_e5m2:
            assert torch.equal(value, content)


@pytest.mark.parametrize(
    "loss, fault",
    [
        pytest.param(loss, fault, id=f"{loss.name}-{fault}")
        for loss in PLAIN_LOSSES.values()
        for fault in FAULTS
        if loss is FOCAL or loss.name == "quality" and fault in ("weight_shape", "targets_meta", "class_mask_size")
    ],
)
def test_bad_argument_is_refused_by_name(backend, loss, fault):
    argument, make, exception, wanted, got = FAULTS[fault]
    arguments = good()
    arguments[argument] = make(arguments.get(argument))
    arguments = {name: v.to(backend.device) if torch.is_tensor(v) and not v.is_meta else v for name, v in arguments.items()}
    before = snapshot(arguments)
    with use_backend(backend.name), pytest.raises(exception) as raised:
        loss.function(**arguments)
    message, function = str(raised.value), "sigmoid_focal_loss" if loss is FOCAL else "quality_focal_loss"
    assert re.search(rf"^{function}: {argument} must .*({wanted}).*, got .*({got})", message), message
    assert_unchanged(arguments, before)


X, Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 3])
MAPS = torch.zeros(2, 6, 2, 2)
R = torch.ones(3)
ALONE = "foreground classes alone"
CALLS = {
    "quality_with_dense": (lambda: quality_focal_loss(X, X, Y.float()), ValueError, "^quality_focal_loss: quality must be None with dense"),
    "quality_shape": (lambda: quality_focal_loss(X, Y, X), ValueError, r"^quality_focal_loss: quality must have shape \[4\] .* got \[4, 3\]"),
    "quality_integral": (lambda: varifocal_loss(X, Y, Y), TypeError, "^varifocal_loss: quality must have a floating dtype"),
    "varifocal_alpha": (lambda: varifocal_loss(X, X, alpha=-1.0), ValueError, "^varifocal_loss: alpha must be finite and at least 0, got -1"),
    "beta": (lambda: quality_focal_loss(X, X, beta=-1.0), ValueError, "^quality_focal_loss: beta must be finite and at least 0, got -1"),
    "levels_dtypes": (lambda: sigmoid_focal_loss([X, X.double()], Y), TypeError, "all levels of logits must have one dtype"),
    "levels_classes": (lambda: sigmoid_focal_loss([X, X[:, :2]], [Y, Y]), ValueError, "^sigmoid_focal_loss: logits must have 3 classes, got 2"),
    "levels_forms": (lambda: sigmoid_focal_loss([X, X], [Y, X]), TypeError, "targets must be .* of one dtype on all levels"),
    "levels_joined": (lambda: sigmoid_focal_loss([X, X], Y), ValueError, r"targets must be a list .* \[8\] or \[8, 3\], got \[4\]"),
    "levels_weights": (lambda: sigmoid_focal_loss([X, X], [Y, Y], weight=[X, X[:, 0]]), ValueError, "weight must have one form on all levels"),
    "classes_of_rows": (lambda: sigmoid_focal_loss(X, Y, num_classes=4), ValueError, f"logits must have 4 classes, got 3 .*{ALONE}"),
    "classes_of_maps": (
        lambda: sigmoid_focal_loss(MAPS, Y, layout="anchor_major", num_classes=4), ValueError, f"logits must have 4 classes, got 6 .*{ALONE}",
    ),
    "rows_of_maps": (
        lambda: sigmoid_focal_loss(MAPS, torch.zeros(2, 9).long(), layout="anchor_major", num_classes=3),
        ValueError, r"targets must have shape \[2, 8\] or \[2, 2, 2, 2\] or \[2, 6, 2, 2\] .* for logits \[2, 6, 2, 2\], got \[2, 9\]",
    ),
    "focal_activated": (lambda: SigmoidFocalLoss(activated=True), NotImplementedError, "^SigmoidFocalLoss: activated must be False: logits"),
    "quality_activated": (lambda: QualityFocalLoss(activated=True), NotImplementedError, "^QualityFocalLoss: activated must be False"),
    "focal_softmax": (lambda: SigmoidFocalLoss(use_sigmoid=False), NotImplementedError, "^SigmoidFocalLoss: use_sigmoid must be True"),
    "varifocal_softmax": (lambda: VarifocalLoss(False), NotImplementedError, "^VarifocalLoss: use_sigmoid must be True"),
    "focal_reduction": (lambda: SigmoidFocalLoss(reduction="max"), ValueError, "^SigmoidFocalLoss: reduction must be one of"),
    "focal_gamma": (lambda: SigmoidFocalLoss(gamma=-1), ValueError, "gamma must be finite and at least 0, got -1"),
    "focal_sum": (lambda: SigmoidFocalLoss(reduction="sum")(X, Y, None, 3.0), ValueError, "avg_factor must be None with"),
    "focal_override": (lambda: SigmoidFocalLoss()(X, Y, None, None, "max"), ValueError, "reduction_override must be one of"),
    "focal_tuple": (lambda: SigmoidFocalLoss()(X, (Y, Y)), ValueError, "targets must be one Tensor or 1"),
    "quality_tuple": (lambda: QualityFocalLoss()(X, (Y,)), ValueError, r"target must be a Tensor or a tuple .*, got 1 entries"),
    "quality_none_of_maps": (
        lambda: QualityFocalLoss(reduction="none", layout="anchor_major", num_classes=3)(MAPS, torch.zeros(2, 8).long()),
        ValueError, "layout must be 'rows' with reduction 'none'",
    ),
    "efl_classes": (lambda: EqualizedFocalLoss(4)(X, Y), ValueError, rf"^EqualizedFocalLoss: logits must have 4 classes, got 3 .*{ALONE}"),
    "efl_maps": (
        lambda: EqualizedFocalLoss(4, layout="anchor_major")(MAPS, torch.zeros(2, 8).long()),
        ValueError, rf"^EqualizedFocalLoss: logits must have 4 classes, got 6 channels. .*{ALONE}",
    ),
    "efl_function_classes": (lambda: equalized_focal_loss(X, Y, torch.ones(4)), ValueError, "logits must have 4 classes, got 3"),
    "efl_num_classes": (lambda: EqualizedFocalLoss(0), ValueError, "^EqualizedFocalLoss: num_classes must be at least 1"),
    "efl_num_classes_type": (lambda: EqualizedFocalLoss(3.0), TypeError, "^EqualizedFocalLoss: num_classes must be an int, got float"),
    "efl_gamma": (lambda: EqualizedFocalLoss(3, gamma=0.0), ValueError, "gamma must be above 0 with the weighting factor"),
    "efl_scale": (lambda: EqualizedFocalLoss(3, scale_factor=-1.0), ValueError, "scale_factor must be finite and at least 0"),
    "efl_group": (lambda: EqualizedFocalLoss(3, process_group="all"), TypeError, "process_group must be None, 'default' or"),
    "efl_sum": (lambda: EqualizedFocalLoss(3, reduction="sum")(X, Y, avg_factor=2.0), ValueError, "avg_factor must be None with"),
    "efl_dense": (lambda: EqualizedFocalLoss(3)(X, X), TypeError, "labels must be class indices, .* got torch.float32"),
    "efl_pos_neg": (lambda: equalized_focal_loss(X, Y, R[None]), ValueError, r"pos_neg must have shape \[C\], .* got \[1, 3\]"),
    "efl_pos_neg_device": (lambda: equalized_focal_loss(X, Y, R.to("meta")), ValueError, "pos_neg must be on the device of logits"),
    "eqfl_target": (lambda: EqualizedQualityFocalLoss(3)(X, Y), TypeError, r"target must be a tuple \(labels, quality\), got Tensor"),
    "efl_labels": (lambda: equalized_focal_loss(X, Y[:3], R), ValueError, r"^equalized_focal_loss: labels must have shape \[4\] for"),
    "eqlv2_one_hot": (lambda: EQLv2Loss(2)(X, X.long()), ValueError, r"^EQLv2Loss: labels must have shape \[4\] for .* got \[4, 3\]"),
    "eqfl_quality": (lambda: equalized_quality_focal_loss(X, Y, None, R), TypeError, "quality must be a Tensor or a list of them, got None"),
    "eqlv2_classes": (lambda: EQLv2Loss(3)(X, Y), ValueError, rf"^EQLv2Loss: logits must have 4 channels, .* got 3. .*{ALONE}"),
    "eqlv2_background": (lambda: EQLv2Loss(4)(X, Y), ValueError, rf"logits must have 5 channels, .* got 3. .*{ALONE}"),
    "eqlv2_function": (lambda: eqlv2_loss(X, Y, R), ValueError, rf"^eqlv2_loss: logits must have 4 channels, .* got 3. .*{ALONE}"),
    "eqlv2_alpha": (lambda: EQLv2Loss(3, alpha=-1.0), ValueError, "^EQLv2Loss: alpha must be finite and at least 0"),
    "eqlv2_softmax": (lambda: EQLv2Loss(3, use_sigmoid=False), NotImplementedError, "^EQLv2Loss: use_sigmoid must be True"),
    "eqlv2_activation": (lambda: EQLv2Loss(3).get_activation(X), ValueError, r"^EQLv2Loss.get_activation: logits must have 4 channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_other_calls_are_refused_by_name(name):
    call, exception, message = CALLS[name]
    with pytest.raises(exception, match=message):
        call()


def test_a_bad_call_leaves_the_state(backend):
    module = EqualizedFocalLoss(3).to(backend.device)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for call in (lambda: module(X[:, :2], Y), lambda: module(X, Y[:3]), lambda: module(X, Y, avg_factor="1")):
        with use_backend(backend.name), pytest.raises((ValueError, TypeError)):
            call()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("fault", ["label", "target"])
def test_debug_checks_refuse_values(backend, monkeypatch, fault):
    logits = X.to(backend.device)
    targets = (torch.tensor([0, 4, 3, -1]) if fault == "label" else torch.full((4, 3), 1.5)).to(backend.device)
    message = "class indices up to 3, got 4" if fault == "label" else "at most 1, got 1.5"
    with use_backend(backend.name):
        assert sigmoid_focal_loss(logits, targets, reduction="sum").isfinite()
        monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
        with pytest.raises(ValueError, match=f"^sigmoid_focal_loss: targets must be {message}"):
            sigmoid_focal_loss(logits, targets)
        for good_targets in (torch.tensor([0, 3, 2, -1]), torch.rand(4, 3)):
            assert sigmoid_focal_loss(logits, good_targets.to(backend.device), reduction="sum").isfinite()


# --- the operators themselves ---

NAMES = {
    "focal_forward": ("scale", "class_sums"),
    "focal_elements": ("scale",),
    "focal_backward": ("scale",),
}
FIRST = ("logits", "targets", "qualities", "weights", "class_table", "normalizer")
OPTIONS = ("modulator", "maps", "background_first", "ignore_index")


def operator_arguments(backend) -> dict:
    """Good arguments of every operator: two levels of 5 and 3 rows."""
    inputs = FOCAL.draw(SigmoidSample("operators", rows=8, weight="element"), torch.Generator().manual_seed(0))
    values = (*inputs.arguments, torch.rand(8), inputs.options["weight"])
    logits, targets, qualities, weights = (list(value.to(backend.device).split([5, 3])) for value in values)
    table = torch.tensor([[2.0], [0.25], [0.75]], dtype=torch.float64, device=backend.device).repeat(1, 4)
    return {
        "logits": logits, "targets": targets, "qualities": qualities, "weights": weights, "class_table": table,
        "normalizer": torch.tensor(3.0, device=backend.device), "grads": [torch.tensor(1.0, device=backend.device)],
        "modulator": 1, "maps": False, "background_first": False, "ignore_index": None, "scale": 1.0, "class_sums": True,
    }  # fmt: skip


def call_operator(backend, operator: str, arguments: dict):
    names = (*FIRST, *["grads"] * (operator == "focal_backward"), *OPTIONS, *NAMES[operator])
    return _library.operator(operator, backend.name)(*[arguments[name] for name in names])


def operator_faults() -> dict[str, tuple[str, str, object]]:
    """name -> (operator, argument, function from the good value to a bad one)"""
    faults = {}

    def add(argument, fault, change, operators=tuple(NAMES)):
        for operator in operators:
            faults[f"{operator}-{argument}-{fault}"] = (operator, argument, change)

    def strided(levels):
        return [torch.stack([level, level], -1)[..., 0] for level in levels]

    add("logits", "none_at_all", lambda levels: [])
    add("logits", "int64", lambda levels: [level.long() for level in levels])
    add("logits", "mixed_dtypes", lambda levels: [levels[0], levels[1].double()])
    add("logits", "other_classes", lambda levels: [level[:, :3].contiguous() for level in levels])
    add("logits", "mixed_devices", lambda levels: [levels[0], levels[1].to("meta")])
    add("logits", "0d", lambda levels: [level[0, 0].clone() for level in levels])
    for argument in ("logits", "targets", "qualities", "weights"):
        add(argument, "strided", strided)
        add(argument, "one_level_less", lambda levels: levels[:1])
        add(argument, "one_level_more", lambda levels: [*levels, levels[0]])
        add(argument, "fewer_rows", lambda levels: [levels[0][:-1], levels[1]])
        add(argument, "more_rows", lambda levels: [torch.cat([levels[0], levels[0]]), levels[1]])
        add(argument, "swapped", lambda levels: levels[::-1])
        add(argument, "complex", lambda levels: [level.to(torch.complex64) for level in levels])
        add(argument, "meta", lambda levels: [level.to("meta") for level in levels])
    add("targets", "int16", lambda levels: [level.to(torch.int16) for level in levels])
    add("targets", "bool", lambda levels: [level > 0 for level in levels])
    add("targets", "labels_of_elements", lambda levels: [level[:, None].repeat(1, 4) for level in levels])
    add("targets", "mixed", lambda levels: [levels[0], levels[1].int().float()])
    add("qualities", "int64", lambda levels: [level.long() for level in levels])
    add("qualities", "of_elements", lambda levels: [level[:, None].repeat(1, 4) for level in levels])
    add("weights", "int64", lambda levels: [level.long() for level in levels])
    add("weights", "of_classes", lambda levels: [level[0].clone() for level in levels])
    add("class_table", "float32", lambda t: t.float())
    add("class_table", "two_rows", lambda t: t[:2])
    add("class_table", "no_classes", lambda t: t[:, :0].contiguous())
    add("class_table", "other_classes", lambda t: t[:, :3].contiguous())
    add("class_table", "vector", lambda t: t[0])
    add("class_table", "transposed", lambda t: t.t().contiguous().t())
    add("class_table", "meta", lambda t: t.to("meta"))
    add("normalizer", "vector", lambda t: t[None])
    add("normalizer", "int64", lambda t: t.long())
    add("normalizer", "meta", lambda t: t.to("meta"))
    for modulator in (-1, 4):
        add("modulator", str(modulator), lambda _, modulator=modulator: modulator)
    backward = ("focal_backward",)
    add("grads", "none_at_all", lambda grads: [], backward)
    add("grads", "two_of_loss", lambda grads: grads * 2, backward)
    add("grads", "vector", lambda grads: [grads[0][None]], backward)
    add("grads", "int64", lambda grads: [grads[0].long()], backward)
    add("grads", "meta", lambda grads: [grads[0].to("meta")], backward)
    add("grads", "of_one_level", lambda grads: [grads[0].new_ones((5, 4))], backward)
    add("grads", "swapped_levels", lambda grads: [grads[0].new_ones((3, 4)), grads[0].new_ones((5, 4))], backward)
    add("grads", "expanded", lambda grads: [grads[0].expand(5, 4), grads[0].expand(3, 4)], backward)
    return faults


OPERATOR_FAULTS = operator_faults()


@pytest.mark.parametrize("fault", OPERATOR_FAULTS)
def test_operator_refuses_bad_argument(backend, fault):
    operator, argument, change = OPERATOR_FAULTS[fault]
    arguments = operator_arguments(backend)
    arguments[argument] = change(arguments[argument])
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)) as raised:
        call_operator(backend, operator, arguments)
    # Where arguments disagree, any of them may be named.
    either = {name: "logits|targets|qualities|weights|class_table" for name in ("logits", "targets", "qualities", "weights", "class_table")}
    named = either.get(argument, argument)
    assert re.search(rf"\b{operator}: ({named}) (must|has the wrong)", str(raised.value)), raised.value


@pytest.mark.parametrize("operator", NAMES)
def test_operator_accepts_good_arguments(backend, operator):
    """Those from which each fault above departs, and every other form of an argument."""
    arguments = operator_arguments(backend)
    dense = [level.abs() for level in arguments["logits"]]
    maps = {name: [level.t().contiguous()[None] for level in arguments[name]] for name in ("logits", "weights")}
    rows = {name: [level[None, None] for level in arguments[name]] for name in ("targets", "qualities")}
    changes = [
        {}, {"qualities": []}, {"weights": []}, {"weights": [level[:, 0].contiguous() for level in arguments["weights"]]},
        {"targets": [level.int() for level in arguments["targets"]]}, {"targets": dense, "qualities": []}, {"normalizer": None},
        {"ignore_index": 2}, {"background_first": True}, {"class_sums": False}, {"scale": 0.0}, {"maps": True, **maps, **rows},
        {"normalizer": torch.tensor(2.0, dtype=torch.float16, device=backend.device)},
        {"grads": [torch.ones_like(level) for level in arguments["logits"]]},
    ]  # fmt: skip
    for change in (*changes, *({"modulator": modulator} for modulator in range(4))):
        call_operator(backend, operator, arguments | change)
    with pytest.raises((RuntimeError, ValueError), match="qualities must be empty with dense targets"):
        call_operator(backend, operator, arguments | {"targets": dense})
    with pytest.raises((RuntimeError, ValueError), match="logits must have shape .*A C"):
        call_operator(backend, operator, arguments | {"maps": True, "logits": [level[:, :3].contiguous() for level in arguments["logits"]]})


@pytest.mark.parametrize("operator", NAMES)
def test_operators_survive_garbage(backend, operator):
    """Anyone can hand in a table and labels; nothing may be read or written out of bounds."""
    arguments = operator_arguments(backend)
    for value in (float("nan"), float("inf"), -1e300, 1e300, -0.5):
        call_operator(backend, operator, arguments | {"class_table": torch.full_like(arguments["class_table"], value)})
    for label in (-(2**63), -1, 4, 5, 2**31 - 1, 2**62):
        for first in (False, True):
            labels = [torch.full_like(level, label) for level in arguments["targets"]]
            call_operator(backend, operator, arguments | {"targets": labels, "background_first": first})


def test_a_forced_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        if rsloss_kernels._backends.why_not("focal_forward", "triton", "cpu") is not None:
            with pytest.raises(RuntimeError, match="backend 'triton' was asked for but cannot run focal_forward on cpu tensors"):
                sigmoid_focal_loss(X, Y, reduction="sum")
