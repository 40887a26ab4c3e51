"""What a user's type checker is told about the public names is true; mypy itself runs in `make lint`."""
import ast
import pathlib

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
