"""Balanced group softmax refuses bad input by name and changes nothing; its operators cannot be made to leave their memory."""
import re

import pytest
import rsloss_kernels
import torch
from group_softmax_samples import GroupSample
from rsloss_kernels import ClassGroups, GroupSoftmaxLoss, _library, convert_classifier, group_softmax_scores

GROUPS = ClassGroups([[0, 2, 4], [1], [3, 5]])  # 6 classes, 11 logits


def good() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn((5, 11), generator=generator),
        "labels": torch.tensor([0, 3, 6, -1, 1]),
        "groups": GROUPS,
        "sample_weights": torch.ones(4, 5),
        "class_weights": torch.ones(6),
    }


# name -> (argument, from the good value to the bad one, exception, what was wanted, what was got)
FAULTS = {
    "logits_list": ("logits", lambda v: v.tolist(), TypeError, "a Tensor", "list"),
    "logits_int64": ("logits", lambda v: v.long(), TypeError, "floating dtype", "torch.int64"),
    "logits_of_the_classes": ("logits", lambda v: v[:, :6], ValueError, r"\[N, 11\].*", r"\[5, 6\].*not C, not C \+ 1"),
    "logits_of_the_classes_and_background": ("logits", lambda v: v[:, :7], ValueError, r"\[N, 11\]", r"\[5, 7\].*num_logits"),
    "logits_flat": ("logits", lambda v: v.flatten(), ValueError, r"\[N, 11\]", r"\[55\]"),
    "labels_float": ("labels", lambda v: v.float(), TypeError, "class indices, integers", "torch.float32"),
    "labels_bool": ("labels", lambda v: v > 0, TypeError, "class indices, integers", "torch.bool"),
    "labels_uint64": ("labels", lambda v: v.to(torch.uint64), TypeError, "int64 can hold", "torch.uint64"),
    "labels_shape": ("labels", lambda v: v[:4], ValueError, r"per row of logits, \[5\]", r"\[4\]"),
    "labels_one_hot": ("labels", lambda v: v[:, None].expand(5, 11), ValueError, r"\[5\]", r"\[5, 11\]"),
    "groups_list": ("groups", lambda v: v.groups, TypeError, "ClassGroups", "list"),
    "groups_meta": ("groups", lambda v: ClassGroups(v.groups).to("meta"), ValueError, r"device.*groups\.to", "meta"),
    "weights_list": ("sample_weights", lambda v: v.tolist(), TypeError, "a Tensor", "list"),
    "weights_rows": ("sample_weights", lambda v: v[0], ValueError, r"per group and row, \[4, 5\]", r"\[5\]"),
    "weights_transposed": ("sample_weights", lambda v: v.t(), ValueError, r"\[4, 5\]", r"\[5, 4\]"),
    "weights_complex": ("sample_weights", lambda v: v.to(torch.complex64), TypeError, "floating", "torch.complex64"),
    "weights_meta": ("sample_weights", lambda v: v.to("meta"), ValueError, "device", "meta"),
    "class_weights_with_background": ("class_weights", lambda v: torch.ones(7), ValueError, r"without the background, \[6\]", r"\[7\]"),
    "class_weights_int64": ("class_weights", lambda v: v.long(), TypeError, "floating dtype", "torch.int64"),
    "ratio_negative": ("others_ratio", lambda v: -0.5, ValueError, "at least 0", "-0.5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_argument_is_refused_by_name(backend, fault):
    argument, make, exception, wanted, got = FAULTS[fault]
    arguments = good()
    if argument == "others_ratio":
        del arguments["sample_weights"]
    arguments[argument] = make(arguments.get(argument))
    moved = {name: v.to(backend.device) if torch.is_tensor(v) and not v.is_meta else v for name, v in arguments.items()}
    if fault != "groups_meta" and isinstance(moved["groups"], ClassGroups):
        moved["groups"] = ClassGroups(GROUPS.groups).to(backend.device)
    before = [(v.clone(), v._version) for v in moved.values() if torch.is_tensor(v) and not v.is_sparse]
    with rsloss_kernels.use_backend(backend.name), pytest.raises(exception) as raised:
        rsloss_kernels.group_softmax_loss(**moved)
    message = str(raised.value)
    assert re.search(rf"^group_softmax_loss: {argument} must .*({wanted}).*, got .*({got})", message), message
    for value, (content, version) in zip((v for v in moved.values() if torch.is_tensor(v) and not v.is_sparse), before, strict=True):
        assert value._version == version and (value.is_meta or torch.equal(value, content))


def test_good_arguments_are_accepted(backend):
    arguments = {name: v.to(backend.device) if torch.is_tensor(v) else v for name, v in good().items()}
    arguments["groups"] = ClassGroups(GROUPS.groups).to(backend.device)
    with rsloss_kernels.use_backend(backend.name):
        assert rsloss_kernels.group_softmax_loss(**arguments).isfinite().all()


def module(**options) -> GroupSoftmaxLoss:
    return GroupSoftmaxLoss(GROUPS, **options)


X, LABELS = torch.zeros(5, 11), torch.zeros(5, dtype=torch.int64)
CALLS = {
    "repeated": (lambda: ClassGroups([[0, 1], [1]]), ValueError, "groups must hold each class once, got class 1 twice"),
    "missing": (lambda: ClassGroups([[0, 1], [3]]), ValueError, r"must hold 0\.\.2 \(without the background\), got \[3\], missing \[2\]"),
    "from_one": (lambda: ClassGroups([[1, 2, 3]]), ValueError, r"must hold 0\.\.2 .*, got \[3\], missing \[0\]"),
    "negative": (lambda: ClassGroups([[-1, 0]]), ValueError, r"must hold 0\.\.1 .*, got \[-1\]"),
    "float_class": (lambda: ClassGroups([[0.0]]), TypeError, "integer"),
    "too_many": (lambda: ClassGroups([[]] * 64), ValueError, "groups must be at most 63, got 64"),
    "form": (lambda: ClassGroups([[0]], background_form="tanh"), ValueError, "background_form must be one of .* got 'tanh'"),
    "place": (lambda: ClassGroups([[0]], background_group="middle"), ValueError, "background_group must be one of .* got 'middle'"),
    "boundaries": (lambda: ClassGroups.from_counts([1, 2], (10, 10)), ValueError, r"boundaries must ascend, got \[10, 10\]"),
    "boundary_nan": (lambda: ClassGroups.from_counts([1], (float("nan"),)), ValueError, "boundaries must ascend"),
    "counts": (lambda: ClassGroups.from_counts([1, -2]), ValueError, "counts must be at least 0, got -2 for class 1"),
    "counts_shape": (lambda: ClassGroups.from_counts(torch.ones(2, 2)), ValueError, r"counts must have shape \[C\], got \[2, 2\]"),
    "column": (lambda: GROUPS.column_of(7), ValueError, r"number must be a class 0\.\.5 or 6 for the background, got 7"),
    "module_groups": (lambda: GroupSoftmaxLoss([[0]]), TypeError, "^GroupSoftmaxLoss: groups must be ClassGroups, got list"),
    "module_ratio": (lambda: module(others_ratio=-1), ValueError, "^GroupSoftmaxLoss: others_ratio must be at least 0, got -1"),
    "module_background": (lambda: module(background="x"), ValueError, "^GroupSoftmaxLoss: background must be one of"),
    "module_class_weights": (lambda: module(class_weights=torch.ones(7)), ValueError, r"class_weights must have .* \[6\], got \[7\]"),
    "module_weight": (lambda: module()(X, LABELS, torch.ones(4)), ValueError, r"^GroupSoftmaxLoss: weight must have .* got \[4\]"),
    "module_avg_factors": (lambda: module()(X, LABELS, None, torch.ones(2)), TypeError, r"avg_factor must be .* got shape \[2\]"),
    "module_loss_weight": (lambda: GroupSoftmaxLoss(GROUPS, loss_weight="1"), TypeError, "^GroupSoftmaxLoss: loss_weight must be a number"),
    "module_avg_factor": (lambda: module()(X, LABELS, None, "mean"), TypeError, "^GroupSoftmaxLoss: avg_factor must be .* got str"),
    "module_reduction": (lambda: module()(X, LABELS, None, None, "max"), ValueError, "reduction_override must be one of .* got 'max'"),
    "module_channels": (lambda: module().get_cls_channels(7), ValueError, "num_classes must be 6, .* without the background, got 7"),
    "scores_columns": (lambda: group_softmax_scores(X[:, :7], GROUPS), ValueError, r"^group_softmax_scores: logits .* got \[5, 7\]"),
    "scores_groups": (lambda: group_softmax_scores(X, None), TypeError, "^group_softmax_scores: groups must be ClassGroups"),
    "convert_rows": (lambda: convert_classifier(torch.ones(6, 2), None, GROUPS), ValueError, r"\[7, ...\].*background.*got \[6, 2\]"),
    "convert_bias": (lambda: convert_classifier(torch.ones(7, 2), torch.ones(6), GROUPS), ValueError, r"bias .* \[7\], got \[6\]"),
    "convert_dtype": (lambda: convert_classifier(torch.ones(7, 2).long(), None, GROUPS), TypeError, "weight must have a floating"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_modules_and_other_functions_refuse_bad_arguments_by_name(name):
    call, exception, message = CALLS[name]
    with pytest.raises(exception, match=message):
        call()


def test_debug_checks(backend, monkeypatch):
    """Labels above C, the sign of the other convention, are an error under debug checks; else background."""
    arguments = {name: v.to(backend.device) if torch.is_tensor(v) else v for name, v in good().items()}
    arguments["groups"] = ClassGroups(GROUPS.groups).to(backend.device)
    with rsloss_kernels.use_backend(backend.name):
        expected = rsloss_kernels.group_softmax_loss(**arguments)
        monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
        assert torch.equal(rsloss_kernels.group_softmax_loss(**arguments), expected)
        arguments["labels"][1] = 7
        with pytest.raises(ValueError, match=r"^group_softmax_loss: labels must be at most 6, .*0 is the background.*, got 7"):
            rsloss_kernels.group_softmax_loss(**arguments)
        monkeypatch.delenv("RSLOSS_DEBUG_CHECKS")
        assert rsloss_kernels.group_softmax_loss(**arguments).isfinite().all()


# --- the operators themselves ---

OPERATOR_ARGUMENTS = {
    "group_softmax_sample": [
        "labels", "class_columns", "keys", "starts", "others", "background_group", "background_first", "others_ratio",
    ],
    "group_softmax_forward": ["logits", "labels", "class_columns", "weights", "starts", "others", "background_first"],
    "group_softmax_backward": [
        "logits", "labels", "class_columns", "weights", "averages", "row_tables", "grad_losses", "starts", "others",
        "background_first",
    ],
    "group_softmax_scores": ["logits", "class_columns", "starts", "others", "background_group", "background_first"],
}  # fmt: skip
ALL = tuple(OPERATOR_ARGUMENTS)
SAMPLE, FORWARD, BACKWARD, SCORES = ALL


def operator_arguments(backend) -> dict:
    """Good arguments of every operator: 4 rows, groups of 2, 4, 2 and 3 columns."""
    inputs = GroupSample("operators", rows=4, sizes=(3, 1, 2), weights="ones").draw(torch.Generator().manual_seed(0))
    groups = inputs.groups
    arguments = {
        "logits": inputs.logits, "labels": inputs.labels, "class_columns": groups.class_columns, "weights": inputs.weights,
        "keys": torch.rand(4, 4), "averages": torch.ones(4, dtype=torch.float64), "row_tables": torch.rand(3, 4, 4),
        "grad_losses": torch.ones(4), "starts": list(groups.starts), "others": list(groups.others),
        "background_group": groups.background_group, "background_first": True, "others_ratio": 8.0,
    }  # fmt: skip
    return {name: value.to(backend.device) if torch.is_tensor(value) else value for name, value in arguments.items()}


def call_operator(backend, operator: str, arguments: dict):
    return _library.operator(operator, backend.name)(*[arguments[name] for name in OPERATOR_ARGUMENTS[operator]])


def operator_faults() -> dict[str, tuple[str, str, object]]:
    """name -> (operator, argument, function from the good value to a bad one)"""
    faults = {}

    def add(argument, fault, change, operators=ALL):
        for operator in operators:
            if argument in OPERATOR_ARGUMENTS[operator]:
                faults[f"{operator}-{argument}-{fault}"] = (operator, argument, change)

    add("logits", "int64", lambda t: t.long())
    add("logits", "one_column_less", lambda t: t[:, :-1].contiguous())
    add("logits", "more_dimensions", lambda t: t[None])
    add("logits", "strided", lambda t: torch.cat([t, t], 1)[:, ::2])
    for argument in ("labels", "weights", "keys", "averages", "row_tables", "grad_losses", "class_columns"):
        add(argument, "more_dimensions", lambda t: t[None])
        add(argument, "int16", lambda t: t.to(torch.int16))
        if argument != "labels":
            add(argument, "fewer", lambda t: t[:-1].contiguous())
            add(argument, "more", lambda t: torch.cat([t, t[:1]]))
        add(argument, "strided", lambda t: torch.stack([t, t], -1)[..., 0])
        add(argument, "meta", lambda t: t.to("meta"))
    add("labels", "fewer", lambda t: t[:-1].contiguous(), (FORWARD, BACKWARD))
    add("class_columns", "int64", lambda t: t.long())
    add("keys", "float64", lambda t: t.double())
    add("keys", "none", lambda t: None)
    add("averages", "float32", lambda t: t.float())
    add("row_tables", "float64", lambda t: t.double())
    for starts in ([], [0], [1, 2, 6, 8, 11], [0, 6, 2, 8, 11], [0, 2, 2, 8, 11], [0, 2, 6, 8], [0, 2, 6, 8, 10], [0, 2, 6, 8, 11, 12]):
        add("starts", f"{starts}", lambda _, starts=starts: starts)
    for others in ([], [0, 2, 6], [2, 2, 6, 8], [1, 2, 6, 11], [-2, 2, 6, 8], [1, 2, 6, 8, 8], [1, -1, 6, 8]):
        add("others", f"{others}", lambda _, others=others: others)
    for group in (-1, 4, 2**31):
        add("background_group", f"{group}", lambda _, group=group: group)
    for ratio in (-1.0, float("nan")):
        add("others_ratio", f"{ratio}", lambda _, ratio=ratio: ratio)
    return faults


OPERATOR_FAULTS = operator_faults()
# Where two arguments disagree, either may be named.
EITHER = {
    "starts": ["starts", "others", "logits", "class_columns"],
    "others": ["starts", "others", "class_columns"],
    "labels": ["labels", "keys", "weights", "class_columns"],
    "keys": ["keys", "labels"],
}


@pytest.mark.parametrize("operator", ALL)
def test_operator_refuses_bad_arguments(backend, operator):
    failures = []
    for fault, (of_operator, argument, change) in OPERATOR_FAULTS.items():
        if of_operator != operator:
            continue
        arguments = operator_arguments(backend)
        arguments[argument] = change(arguments[argument])
        either = "|".join(EITHER.get(argument, [argument]))
        try:
            call_operator(backend, operator, arguments)
            failures.append(f"{fault}: accepted")
        except (RuntimeError, ValueError, TypeError) as error:
            if not re.search(rf"\b{operator}: ({either}) (must|has the wrong)", str(error)):
                failures.append(f"{fault}: {error}")
    assert len(failures) == 0, failures


def test_operators_survive_garbage(backend):
    """Anyone can hand in labels, columns and tables; nothing may be read or written out of bounds."""
    arguments = operator_arguments(backend)
    for operator in ALL:
        call_operator(backend, operator, arguments)
    for value in (-(2**31), -1, 0, 5, 11, 2**31 - 1):
        changed = arguments | {"class_columns": torch.full_like(arguments["class_columns"], value)}
        for operator in ALL:
            call_operator(backend, operator, changed)
    for label in (-(2**63), -1, 7, 2**31, 2**63 - 1):
        for first in (True, False):
            changed = arguments | {"labels": torch.full_like(arguments["labels"], label), "background_first": first}
            for operator in (SAMPLE, FORWARD, BACKWARD):
                call_operator(backend, operator, changed)
    for value in (float("nan"), float("inf"), -1e30, 0.0):
        changed = {name: torch.full_like(arguments[name], value) for name in ("averages", "row_tables", "grad_losses", "keys")}
        for operator in (SAMPLE, BACKWARD):
            call_operator(backend, operator, arguments | changed)
    scores = call_operator(backend, SCORES, arguments | {"class_columns": torch.full_like(arguments["class_columns"], 99)})
    assert not scores.any()
