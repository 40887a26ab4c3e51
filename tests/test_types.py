"""What a user's type checker is told about the public names is true; mypy itself runs in `make lint`."""
import ast
import importlib
import inspect
import pathlib
import typing

import pytest
import rsloss_kernels
import typed_calls


@pytest.mark.parametrize("call", typed_calls.CALLS, ids=lambda call: call.__name__)
def test_typed_calls_return_what_their_types_say(call):
    call()


def test_every_public_name_is_called_with_types():
    tree = ast.parse(pathlib.Path(typed_calls.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "rk"}
    assert set(rsloss_kernels.__all__) == used


def test_returned_type_is_seen_as_it_is():
    """So that the calls above cannot pass by asking nothing."""
    with pytest.raises(AssertionError, match="wanted Tensor, got float"):
        typed_calls.returns([1.0], list, typed_calls.Tensor)


def overloads() -> dict[tuple[str, str, str], list[list[str]]]:
    """Of functions whose types share keywords: module, name and keywords -> what each overload names besides."""
    package = pathlib.Path(rsloss_kernels.__file__).parent
    found = {}
    for path in package.rglob("*.py"):
        module = ".".join(["rsloss_kernels", *path.relative_to(package).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text())):
            annotation = isinstance(node, ast.FunctionDef) and node.args.kwarg and node.args.kwarg.annotation
            if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Unpack":
                key = (module, node.name, ast.unparse(annotation.slice))
                found.setdefault(key, []).append([argument.arg for argument in node.args.kwonlyargs])
    return found


@pytest.mark.parametrize("where, named", overloads().items(), ids=lambda value: value[1] if isinstance(value, tuple) else "")
def test_shared_keywords_are_those_of_the_function(where, named):
    """A keyword that a type checker would refuse, or take with another type, is found here."""
    module = importlib.import_module(where[0])
    function = getattr(module, where[1])
    types = typing.get_type_hints(function)
    keywords = {parameter.name for parameter in inspect.signature(function).parameters.values() if parameter.kind == parameter.KEYWORD_ONLY}
    for apart in named:
        assert typing.get_type_hints(getattr(module, where[2])) == {name: types[name] for name in keywords - set(apart)}


def test_functions_with_shared_keywords_are_found():
    assert {"sigmoid_focal_loss", "ghm_regression_loss"} < {name for _, name, _ in overloads()}
