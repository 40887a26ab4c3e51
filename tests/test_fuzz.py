"""Random cases of every loss (tests/fuzz), the same in every run; and few elements of any floats, which shrink.

A failure prints the command that repeats it. `python -m tests.fuzz` runs others, as many as one likes.
"""
import dataclasses
import itertools

import hypothesis.strategies as st
import pytest
import torch
from fuzz import cases, runner
from harness import Backend, assert_gates
from hypothesis import example, given
from samples import LOSSES

SEED = 20261121
# Of one loss: one to three seconds on a CPU.
CASES = {"cpp": 600, "reference": 160, "cuda": 40, "triton": 10}
pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("loss", cases.DRAWS)
def test_random_cases(backend, loss):
    """The same cases every time, so that a change is judged by what it changes; `python -m tests.fuzz` goes on with others."""
    # What is beyond the oracles is compared with another backend.
    backends = [Backend("reference", "cpu"), backend] if backend.device == "cpu" and backend.name == "cpp" else [backend]
    ran = 0
    numbers = (number for number in itertools.count() if cases.loss_of(f"{SEED}:{number}") == loss)
    for number in itertools.islice(numbers, CASES[backend.name]):
        name = f"{SEED}:{number}"
        is_paired = len(backends) > 1 and ran % 8 == 0
        chosen, wrong = runner.run_case(name, backends if is_paired else [backend])
        if wrong is not None:
            names = ",".join(one.name for one in backends)
            pytest.fail(f"{wrong}\nrepeat: python -m tests.fuzz --case {name} --backends {names}", pytrace=False)
        ran += bool(chosen)
    assert ran or backend.name != "cpp" or loss in ("asl1", "score_weights", "assign_by_iou")


def test_a_case_is_a_function_of_its_name():
    for number in range(40):
        one, two = (cases.draw(f"{SEED}:{number}") for _ in range(2))
        assert one.describe() == two.describe() and len(one.given) == len(two.given)
        for a, b in zip(one.given, two.given, strict=True):
            assert a.stride() == b.stride() and torch.equal(a.double().nan_to_num(7.5), b.double().nan_to_num(7.5))


def test_what_is_wrong_is_found(monkeypatch):
    """Of losses that are a little off, change their input, depend on the run, or have another dtype, each is told."""
    calls = itertools.count()

    def spoiled(kind):
        def wrapped(logits, *others, **options):
            if kind == "input":
                with torch.no_grad():
                    logits.add_(1)
            losses = LOSSES["ap"].function(logits, *others, **options)
            if kind == "value":
                return losses * (1 + 1e-5)
            if kind == "gradient":
                return losses + (logits.detach() - logits).nan_to_num(0, 0, 0).sum().to(losses.dtype)
            if kind == "run":
                return losses * (1 + (next(calls) % 2) * torch.finfo(losses.dtype).eps)
            return losses.half() if kind == "dtype" else losses

        return wrapped

    numbers = (number for number in itertools.count() if cases.loss_of(f"{SEED}:{number}") == "ap")
    names = [f"{SEED}:{number}" for number in itertools.islice(numbers, 60)]
    reference = [Backend("reference", "cpu")]
    assert not any(runner.run_case(name, reference)[1] for name in names[:10])
    draw = cases.draw
    for kind in ("value", "gradient", "run", "dtype", "input"):
        monkeypatch.setattr(cases, "draw", lambda name, kind=kind: dataclasses.replace(draw(name), function=spoiled(kind)))
        assert any(runner.run_case(name, reference)[1] for name in names), kind


FLOATS = st.one_of(
    st.floats(width=32), st.floats(-8, 8, width=32), st.sampled_from([0.0, -0.0, 1e-45, 3.4028234663852886e38, -1e38, 0.5, -0.5])
)
TARGETS = st.sampled_from([-1.0, 0.0, 0.0, 0.25, 1.0])
DELTAS = st.one_of(st.sampled_from([0.0, 0.5, 1e-30, 1e30]), st.floats(1e-30, 1e30))


@given(elements=st.lists(st.tuples(FLOATS, TARGETS), min_size=1, max_size=6), delta=DELTAS, copies=st.sampled_from([1, 64, 65]))
@example(elements=[(-3.4028234663852886e38, 1.0), (3.4028234663852886e38, 0.0)], delta=0.0, copies=64)
@pytest.mark.parametrize("name", ["rank_sort", "ap"])
def test_few_elements_of_any_floats(backend, name, elements, delta, copies):
    """`copies` of the negatives, which take the paths of whole vectors."""
    loss = LOSSES[name]
    spread = [element for element in elements for _ in range(copies if element[1] == 0 else 1)]
    logits, targets = (torch.tensor(values, dtype=torch.float32) for values in zip(*spread, strict=True))
    truth = loss.truth(logits, targets, delta=delta)
    got = loss.evaluate(backend, logits, targets, delta=delta)
    assert_gates(backend, got, truth.losses, truth.gradient(), f"{elements}")
