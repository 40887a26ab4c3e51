"""Every operator under torch.ops x every argument of its schema x what can be wrong with it: refused by name, and nothing is changed.

Good arguments are those that the losses themselves give: recorded from the cases of `rsloss_kernels.selfcheck`, which call every
operator. What looks like a fault and is none stands in ACCEPTED with its reason. Contents that could lead out of a table, and faults in
which several arguments take part, are in the files of the losses.
"""
import functools
import re
from collections.abc import Iterator

import pytest
import torch
from harness import Backend, bits, operator_names
from rsloss_kernels import _library, selfcheck
from test_bad_input import assert_unchanged, faults_of_tensor, process_state, snapshot
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# (operators, arguments, faults): why it is none.
ACCEPTED = {
    (r"\w+", "scale|gradient_scale", "nan|-?inf|-1.0"): "a factor of the result",
    (r"\w+", "ignore_index", r"-?\d+"): "any label",
    ("group_softmax_sample", "others_ratio", "inf"): "keeps all others",
    (r"(rank_sort|average_precision|alrp)_finalize|ranking_(bin|backward)", "logits", "longer|more_dims"): (
        "a mask of whole words fits a few elements more, in any shape"
    ),
    ("ranking_bin", "positives", "narrower"): "any number of slots",
    ("average_precision_forward", "segments", "narrower"): "cuts rows of another size, as long as they are whole",
    ("ghm_backward", "bin_weights", "longer|narrower"): "any number of bins",
    ("group_softmax_scores", "logits", "longer|empty"): "any number of rows",
}
# The steps of which an operator is made may be the ones that refuse.
STEPS = {f"{loss}_forward": f"ranking_collect|ranking_bin|{loss}_finalize" for loss in ("rank_sort", "average_precision")}
STEPS["alrp_forward"] = "ranking_collect|alrp_loss"


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an operator of the library."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == _library.NAMESPACE:
            name = function._schema.name.partition("::")[2]
            self.calls.setdefault(name, []).append(pytree.tree_map_only(Tensor, lambda value: value.detach().clone(), args))
        return function(*args, **(kwargs or {}))


@functools.cache
def recorded(backend) -> dict[str, list[tuple]]:
    with Recorder() as recorder:
        for case in selfcheck.cases(0):
            if backend.name in _library.implemented_by(case.operator):
                selfcheck.evaluate(case, backend.name, backend.device, torch.float32)
    return recorder.calls


def is_given(value: object) -> bool:
    return value is not None and value != [] and value != ()


def faults(kind: str, good: object) -> Iterator[tuple[str, object]]:
    """What can be wrong with an argument of this type of the schema."""
    if "Tensor" in kind and not is_given(good):
        return
    is_optional, kind = kind.startswith("Optional"), re.sub(r"^Optional\[(.*)\]$", r"\1", kind)
    if kind == "List[Tensor]":
        yield from (("no_list", 3), ("text", "text"), ("one_more", [*good, good[0]]))
        yield from ((name, [fault, *good[1:]]) for name, fault in (*faults_of_tensor(good[0]), ("none", None), ("number", 1.0)))
        yield from ((name, [fault, *good[1:]]) for name, fault in faults_of_table(good[0]))
        return
    yield "text", "text"
    if kind == "Tensor":
        yield "number", 1.0
        yield from faults_of_tensor(good)
        yield from faults_of_table(good)
    elif kind in ("int", "SymInt"):
        yield from ((str(number), number) for number in (-1, 2**31, 2**62, 1.5))
    elif kind == "float":
        yield from ((str(number), number) for number in (float("nan"), float("inf"), -float("inf"), -1.0))
    elif kind == "List[int]":
        yield from (("empty", []), ("longer", [*good, good[-1]]), ("shorter", good[:-1]), ("float", [0.5, *good[1:]]))
        yield from (("negative", [-7, *good[1:]]), ("huge", [*good[:-1], 2**62]))
    elif kind != "bool":  # of which the dispatcher takes what is true or false
        raise AssertionError(f"there is no table of faults for the type {kind}")
    if not is_optional and kind != "bool":
        yield "none", None


def faults_of_table(good: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "int8", good.to(torch.int8)
    if good.dim() and good.numel() > 1:
        yield "strided", torch.stack([good, good], -1)[..., 0]
        yield "empty", good[:0]


def results(function: torch._ops.OpOverload, calls: list[tuple]) -> list[Tensor]:
    return [bits(value) for call in calls for value in pytree.tree_leaves(function(*call))]


def is_accepted(operator: str, argument: str, fault: str) -> bool:
    return any(all(map(re.fullmatch, row, (operator, argument, fault))) for row in ACCEPTED)


def is_refused_by_name(operator: str, argument: object, names: str, fault: str, message: str) -> bool:
    """By the operator's own check; or by the dispatcher, which knows types and kinds of tensors."""
    own = rf"({operator}|{STEPS.get(operator, operator)}): ({names}) must .*, got "
    if re.search(own, message):
        return True
    # A layout that has no kernel.
    if fault == "sparse":
        return f"Could not run '{_library.NAMESPACE}::{operator}." in message
    return f"{operator}() Expected a value of type '{argument.type}' for argument '{argument.name}' but instead found" in message


def test_losses_call_every_operator(backend):
    assert recorded(backend).keys() == {name for name in operator_names() if backend.name in _library.implemented_by(name)}


@pytest.mark.parametrize("operator", sorted(set(_library.defined)))
def test_operator_refuses_bad_arguments(backend, operator):
    if backend.name not in _library.implemented_by(operator):
        good = recorded(Backend(_library.implemented_by(operator)[0], "cpu"))[operator][0]
        with pytest.raises(NotImplementedError, match=f"{operator}.{backend.name}"):
            _library.operator(operator, backend.name)(*good)
        return
    function, calls = _library.operator(operator, backend.name), recorded(backend)[operator]
    arguments = function._schema.arguments
    inputs, process, before = snapshot(calls), process_state(), results(function, calls)
    wrong = []
    for place, argument in enumerate(arguments):
        # One that has this argument.
        good = next((call for call in calls if is_given(call[place])), calls[0])
        kind = str(argument.type)
        names = "|".join(other.name for other in arguments if str(other.type) in kind or "Tensor" in str(other.type) and "Tensor" in kind)
        for fault, value in faults(kind, good[place]):
            label = f"{operator}, {argument.name}, {fault}"
            try:
                function(*good[:place], value, *good[place + 1 :])
            except (TypeError, ValueError, RuntimeError) as error:
                first_line = str(error).partition("\n")[0]
                if is_accepted(operator, argument.name, fault):
                    wrong.append(f"{label}: refused, though ACCEPTED: {first_line}")
                elif not is_refused_by_name(operator, argument, names, fault, str(error)):
                    wrong.append(f"{label}: {type(error).__name__}: {first_line}")
            else:
                if not is_accepted(operator, argument.name, fault):
                    wrong.append(f"{label}: accepted")
    assert not wrong, "\n".join(wrong)
    assert_unchanged(inputs)
    assert process_state() == process
    after = results(function, calls)
    assert len(before) == len(after) and all(map(torch.equal, before, after))
