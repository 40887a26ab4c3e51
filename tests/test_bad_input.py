"""Every public function and module x every argument x what can be wrong with it: refused by name, and nothing is changed.

The faults follow from the annotations of a name, so that a new one needs a row of good arguments alone, and fails the first test until
it has one. What looks like a fault and is none stands in ACCEPTED with its reason. Faults that only one loss knows (a form of targets,
values that RSLOSS_DEBUG_CHECKS=1 finds) are in that loss's own file; the operators in test_bad_input_operators.py.
"""
import copy
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pytest
import rsloss_kernels as rk
import torch
from harness import bits
from rsloss_kernels import _backends
from torch import Tensor
from torch.utils import _pytree as pytree

WITHOUT_ARGUMENTS = {"backend_report", "__version__"}
RESULTS = {
    *("ALRPLosses", "EqualizedLoss", "GHMCorrectedLoss", "GHMLoss", "GradientDensity", "RankSortLosses", "SeesawLosses"),
}  # named tuples, made by the functions
LOGITS, LABELS, QUALITY = torch.linspace(-2, 2, 24).view(6, 4), torch.tensor([0, 4, 2, 4, -1, 3]), torch.linspace(0, 1, 6)
BOXES, OFFSETS, ONES = LOGITS * 0.1, LOGITS.flip(0), torch.ones(6, 4)
GROUPS = [[0, 2, 4], [1], [3, 5]]  # 11 logits
GROUP_LOGITS = torch.linspace(-1, 1, 66).view(6, 11)
IDS = {"segments": torch.zeros(6, dtype=torch.int64), "num_segments": 1}
STATE = {"momentum": 0.5, "acc_sum": torch.ones(10), "num_updates": torch.ones(10, dtype=torch.int64)}
ROWS = {"logits": LOGITS, "targets": LABELS}
SIGMOID = {
    **ROWS, "weight": QUALITY, "class_weight": torch.ones(4), "class_mask": torch.ones(4), "avg_factor": 2.0, "ignore_index": 7,
    "num_classes": 4,
}  # fmt: skip
FOCUS = {"logits": LOGITS, "labels": LABELS, "pos_neg": torch.ones(4), "weight": QUALITY, "avg_factor": 2.0, "ignore_index": 7}


def groups() -> rk.ClassGroups:
    return rk.ClassGroups(GROUPS)


def enter_backend(name: str) -> None:
    with rk.use_backend(name):
        pass


FUNCTIONS: dict[str, dict[str, object]] = {
    "rank_sort_loss": {**ROWS, "quality": QUALITY, **IDS, "max_positives": 5},
    "average_precision_loss": {**ROWS, **IDS, "max_positives": 5},
    "alrp_loss": {**ROWS, "regression_losses": QUALITY, "max_positives": 5},
    "alrp_regression_loss": {"regression_losses": QUALITY, "rank": QUALITY * 3, "order": torch.arange(6)},
    "score_weights": ROWS,
    "score_weighted_mean": {"losses": QUALITY, "weights": QUALITY},
    "sigmoid_focal_loss": SIGMOID,
    "quality_focal_loss": {**SIGMOID, "quality": QUALITY},
    "varifocal_loss": {**SIGMOID, "quality": QUALITY},
    "equalized_focal_loss": FOCUS,
    "equalized_quality_focal_loss": {**FOCUS, "quality": QUALITY},
    "eqlv2_loss": {"logits": LOGITS, "labels": LABELS, "pos_neg": torch.ones(3)},
    "ghm_classification_loss": {"logits": LOGITS, "target": LABELS, "weight": QUALITY, **STATE},
    "ghm_regression_loss": {"pred": BOXES, "target": OFFSETS, "weight": ONES, **STATE},
    "gradient_density": {"pred": LOGITS, "target": LABELS, "weight": QUALITY},
    "authentic_smooth_l1_loss": {"pred": BOXES, "target": OFFSETS, "weight": ONES, "avg_factor": 2.0},
    "smooth_l1_loss": {"pred": BOXES, "target": OFFSETS, "beta": 0.5, "weight": ONES, "avg_factor": 2.0},
    "seesaw_loss": {"logits": LOGITS, "labels": LABELS, "cum_samples": torch.ones(3), "weight": QUALITY, "avg_factor": 2.0},
    "group_softmax_loss": {"logits": GROUP_LOGITS, "labels": LABELS, "groups": groups(), "class_weights": torch.ones(6)},
    "group_softmax_scores": {"logits": GROUP_LOGITS, "groups": groups()},
    "convert_classifier": {"weight": torch.ones(7, 2), "bias": torch.ones(7), "groups": groups()},
    "assign_by_iou": {"max_overlaps": QUALITY, "pos_thr": 0.5, "neg_thr": 0.4},
    "use_backend": {"name": "reference"},
}
PRED = {"pred": LOGITS, "target": LABELS, "weight": QUALITY}
# Of the constructor and of a call.
MODULES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "RankSortLoss": ({}, {**ROWS, "quality": QUALITY, **IDS}),
    "APLoss": ({}, {**ROWS, **IDS}),
    "ALRPLoss": ({}, {**ROWS, "regression_losses": QUALITY}),
    "SelfBalancing": ({"mode": "running"}, {"reference_loss": torch.tensor(2.0), "loss": torch.tensor(0.5)}),
    "SigmoidFocalLoss": ({"num_classes": 4}, PRED),
    "QualityFocalLoss": ({"num_classes": 4}, PRED),
    "VarifocalLoss": ({"num_classes": 4}, PRED),
    "EqualizedFocalLoss": ({"num_classes": 4}, PRED),
    "EqualizedQualityFocalLoss": ({"num_classes": 4}, {**PRED, "target": (LABELS, QUALITY)}),
    "EQLv2Loss": ({"num_classes": 3}, {"cls_score": LOGITS, "label": LABELS}),
    "GHMC": ({"momentum": 0.5, "bias_correction": True}, {"pred": LOGITS, "target": LABELS, "label_weight": QUALITY}),
    "GHMR": ({"momentum": 0.5}, {"pred": BOXES, "target": OFFSETS, "label_weight": ONES}),
    "SeesawLoss": ({"num_classes": 2}, {"cls_score": LOGITS, "labels": LABELS, "label_weights": QUALITY}),
    "GroupSoftmaxLoss": (
        {"groups": groups(), "class_weights": torch.ones(6)}, {"cls_score": GROUP_LOGITS, "label": LABELS, "weight": QUALITY},
    ),
    "DynamicLabelAssignment": ({"update_iter_interval": 2}, {"ious_per_image": QUALITY}),
    "DynamicSmoothL1Loss": ({"update_iter_interval": 2}, {"pred": BOXES, "target": OFFSETS, "weight": ONES}),
    "ClassGroups": ({"groups": GROUPS}, {}),
}  # fmt: skip

# A call of a module may name the function that it calls, and that function's name of an argument.
FUNCTION_OF = {
    "RankSortLoss": "rank_sort_loss", "APLoss": "average_precision_loss", "ALRPLoss": "alrp_loss", "GroupSoftmaxLoss": "group_softmax_loss",
}  # fmt: skip
NAMES = {
    "pred": "logits", "cls_score": "logits", "target": "(targets|labels)", "label": "labels", "label_weight": "weight",
    "label_weights": "weight", "name": "backend",
}  # fmt: skip
# Two arguments that do not fit: either may be named.
RELATIONS = ("meta", "more_dims", "longer", "narrower")

# (names, arguments, faults): why it is none.
ACCEPTED = {
    (r"\w+", "avg_factor", "nan|inf|negative"): "divides as in floating point",
    (r"\w+", "loss_weight", "negative"): "a weight is any finite number",
    (r"\w+", "ignore_index", "negative_int"): "any label",
    ("sigmoid_focal_loss|equalized_focal_loss|SigmoidFocalLoss|EqualizedFocalLoss", "alpha", "negative"): "both terms weigh 1",
    ("eqlv2_loss|EQLv2Loss", "gamma|mu", "negative"): "a curve may fall, and lie anywhere",
    ("EQLv2Loss", "weight|avg_factor|reduction_override", r"\w+"): "has no effect, as published",
    ("group_softmax_loss|GroupSoftmaxLoss", "others_ratio", "inf"): "keeps all others",
    ("GroupSoftmaxLoss", "class_weights", "meta"): "a module may be made there and moved",
    ("group_softmax_scores", "logits", "longer"): "any number of rows",
    ("rank_sort_loss|average_precision_loss|alrp_loss|score_weights|(RankSort|AP|ALRP)Loss", "logits", "narrower"): "any number of classes",
    ("ghm_classification_loss|gradient_density|GHMC", "logits|pred", "narrower"): "any number of classes",
    ("convert_classifier", "weight", "narrower"): "any number of features",
    ("assign_by_iou", "max_overlaps", "meta|more_dims|longer|narrower"): "any shape and device",
    ("assign_by_iou", "pos_thr|neg_thr", "inf|negative"): "any number may be compared with",
    ("DynamicLabelAssignment", "ious_per_image", "more_dims|longer|narrower|empty"): "one image or several, each of any length, or none",
}
# As documented: what only the device knows.
RUNTIME_ERRORS = {("alrp_loss", "regression_losses"), ("ALRPLoss", "regression_losses")}


def faults(annotation: object, good: object) -> Iterator[tuple[str, object]]:
    """What can be wrong with an argument that is annotated so."""
    kinds = typing.get_args(annotation) if isinstance(annotation, type(int | str)) else (annotation,)
    if object in kinds:  # a process group
        yield from (("text", "all"), ("number", 3))
        return
    is_sequence = any(typing.get_origin(kind) is Sequence for kind in kinds)
    yield "object", object()
    if str in kinds:
        yield "unknown", "nonsense"
    else:
        yield "text", "text"
    if type(None) not in kinds:
        yield "none", None
    if bool in kinds:
        yield "number", 2
    elif {str, float, int} & set(kinds):
        yield "bool", True
    if float in kinds:
        yield from (("nan", float("nan")), ("inf", float("inf")), ("negative", -1.0))
    if int in kinds:
        yield from (("fraction", 1.5), ("negative_int", -1), ("huge", 2**70))
    if Tensor in kinds:
        if not {float, int} & set(kinds):
            yield "number", 1.5
        if is_sequence:
            yield from (("empty", []), ("mixed", [good, "text"]))
        if isinstance(good, Tensor):
            yield from faults_of_tensor(good)


def faults_of_tensor(good: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "complex", good.to(torch.complex64)
    yield "sparse", good.to_sparse()
    yield "meta", good.to("meta")
    yield "more_dims", good[None]
    if good.dim():
        yield "longer", torch.cat([good, good[:1]])
        yield "narrower", good[..., :-1].contiguous()


def on_device(values: dict[str, object], device: str) -> dict[str, object]:
    def moved(value: object) -> object:
        return copy.deepcopy(value).to(device) if isinstance(value, rk.ClassGroups) else value.to(device) if torch.is_tensor(value) else value

    return {name: pytree.tree_map(moved, value) for name, value in values.items()}


def outcome(call: Callable[[], object]) -> list[Tensor]:
    """What a call returns, whatever random numbers it draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [bits(value) for value in pytree.tree_leaves(call()) if torch.is_tensor(value)]


def process_state() -> list[object]:
    return [torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), _backends._forced]


def snapshot(values: object) -> list[tuple[Tensor, Tensor, int]]:
    return [(value, bits(value).clone(), value._version) for value in pytree.tree_leaves(values) if torch.is_tensor(value)]


def assert_unchanged(before: list[tuple[Tensor, Tensor, int]]) -> None:
    for value, content, version in before:
        assert value._version == version and torch.equal(bits(value), content)


def is_accepted(name: str, argument: str, fault: str) -> bool:
    return any(all(map(re.fullmatch, row, (name, argument, fault))) for row in ACCEPTED)


def check_faults(
    name: str, function: Callable, good: dict[str, object], call: Callable[..., object], harmless: Callable[..., object] | None = None
) -> int:
    """Calls with one fault at a time; returns how many. `harmless`: called with what is accepted, which may change a state."""
    inputs, process, wrong, count = snapshot(good), process_state(), [], 0
    for parameter in inspect.signature(function).parameters.values():
        argument = parameter.name
        if argument == "self":
            continue
        named = f"({argument}|{NAMES.get(argument, argument)})"
        for fault, value in faults(parameter.annotation, good.get(argument)):
            count += 1
            label = f"{name}, {argument}, {fault}"
            try:
                if is_accepted(name, argument, fault):
                    with torch.random.fork_rng():
                        (harmless or call)(**{**good, argument: value})
                else:
                    call(**{**good, argument: value})
            except (TypeError, ValueError, RuntimeError) as error:
                message, is_documented = str(error), isinstance(error, (TypeError, ValueError)) or (name, argument) in RUNTIME_ERRORS
                wanted = rf"({name}|{FUNCTION_OF.get(name, name)}): {r'.+' if fault in RELATIONS else named} must .*, got "
                if is_accepted(name, argument, fault):
                    wrong.append(f"{label}: refused, though ACCEPTED: {message}")
                elif not is_documented or not re.match(wanted, message, re.DOTALL):
                    wrong.append(f"{label}: {type(error).__name__}: {message}")
            else:
                if not is_accepted(name, argument, fault):
                    wrong.append(f"{label}: accepted")
    assert not wrong, "\n".join(wrong)
    assert_unchanged(inputs)
    assert process_state() == process
    return count


def test_every_public_name_has_a_row():
    assert set(rk.__all__) == WITHOUT_ARGUMENTS | RESULTS | FUNCTIONS.keys() | MODULES.keys()


def named(names: Iterable[str]) -> pytest.MarkDecorator:
    """Seesaw has no CUDA kernels."""
    marks = {"seesaw_loss": pytest.mark.implemented("seesaw_forward"), "SeesawLoss": pytest.mark.implemented("seesaw_forward")}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks.get(name, ())) for name in names])


@named(FUNCTIONS)
def test_function_refuses_bad_arguments(backend, name):
    function, good = getattr(rk, name), on_device(FUNCTIONS[name], backend.device)
    call = enter_backend if name == "use_backend" else function
    with rk.use_backend(backend.name if "logits" in good or "pred" in good else "reference"):
        before = outcome(lambda: call(**good))
        assert check_faults(name, function, good, call) > 0
        after = outcome(lambda: call(**good))
    assert len(before) == len(after) and all(map(torch.equal, before, after))


def test_integers_may_come_from_numpy():
    names = set()
    for name, good in {**FUNCTIONS, **{name: options for name, (options, _) in MODULES.items()}}.items():
        function = getattr(rk, name)
        for parameter in inspect.signature(function).parameters.values():
            value = good.get(parameter.name, parameter.default)
            if type(value) is int and float not in (parameter.annotation, *typing.get_args(parameter.annotation)):
                given = function(**{**good, parameter.name: np.int64(value)})
                assert repr(given) == repr(function(**good)), (name, parameter.name)
                assert not isinstance(given, torch.nn.Module) or type(getattr(given, parameter.name, value)) is int
                names.add(parameter.name)
    assert names >= {"bins", "num_classes", "ignore_index", "period", "iou_topk", "beta_topk", "max_positives", "num_segments"}


def test_flags_may_be_numbers_and_come_from_numpy_and_tensors():
    count = 0
    for name, good in {**FUNCTIONS, **{name: options for name, (options, _) in MODULES.items()}}.items():
        function = getattr(rk, name)
        for flag in inspect.signature(function).parameters.values():
            if flag.annotation is bool:
                expected = function(**good)
                for form in (int, np.bool_, torch.tensor):
                    given = function(**{**good, flag.name: form(good.get(flag.name, flag.default))})
                    assert repr(given) == repr(expected), (name, flag.name)
                    assert not isinstance(given, torch.nn.Module) or type(getattr(given, flag.name)) is bool
                count += 1
    assert count > 20


@pytest.mark.parametrize("name", MODULES)
def test_constructor_refuses_bad_arguments(name):
    module, good = getattr(rk, name), MODULES[name][0]
    assert check_faults(name, module, good, module) > 0
    assert repr(module(**good)) == repr(module(**good))


@named(name for name in MODULES if name != "ClassGroups")
def test_module_refuses_bad_arguments_and_keeps_its_state(backend, name):
    kind, (options, arguments) = getattr(rk, name), MODULES[name]
    module, good = kind(**on_device(options, "cpu")).to(backend.device), on_device(arguments, backend.device)
    method = "update" if name == "DynamicLabelAssignment" else "forward"
    twin, throwaway = copy.deepcopy(module), copy.deepcopy(module)
    state = snapshot(module.state_dict())
    with rk.use_backend(backend.name):
        call = getattr(module, method)
        assert check_faults(name, call, good, call, getattr(throwaway, method)) > 0
        assert_unchanged(state)
        results = [outcome(lambda one=one: getattr(one, method)(**good)) for one in (module, twin)]
    assert all(map(torch.equal, *results)) and str(module.state_dict()) == str(twin.state_dict())
