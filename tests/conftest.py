"""Backends and random numbers for the tests; see harness.py.

Every run draws a new seed and prints it. `RSLOSS_TEST_SEED=<seed>` repeats a run.
"""
import ctypes
import gc
import importlib
import os
import pathlib
import random

# Before torch is imported: OpenMP threads that spin while they wait take the cores from the other tests, half of the whole time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import harness
import hypothesis
import pytest
import torch
import torch.multiprocessing
from rsloss_kernels import _library
from samples import LOSSES, Loss

if harness.Backend("triton", "cpu") in harness.backends_under_test():
    importlib.import_module("quick_interpreter").quicken()

SEED = int(os.environ.get("RSLOSS_TEST_SEED") or random.SystemRandom().randrange(2**31))
os.environ["RSLOSS_TEST_SEED"] = str(SEED)  # for the workers of pytest-xdist, which must collect the same tests
_reasons: dict[str, str | None] = {}
# Files whose tests take long, in this order before all others: no worker is left with one of them at the end.
LONGEST_FIRST = (
    *("test_triton_compile.py", "test_distributed.py", "test_ghm_distributed.py", "test_survival_distributed.py"),
    *("test_cpu_variants.py", "test_cuda_compile.py", "test_packaging.py", "test_cuda_on_cpu.py", "test_train_detector.py"),
    *("test_ops.py", "test_ranking_large.py", "test_guard_pages.py"),
    *("test_bench_harness.py", "test_bench_peers.py", "test_mmdet_dense_heads.py"),
)
# On a machine that cannot have MMDetection, torchvision and Ultralytics.
if harness.WITHOUT_FRAMEWORKS:
    collect_ignore_glob = [
        *("test_mmdet_*.py", "test_torchvision_*.py", "test_ultralytics.py", "test_swaps.py", "test_two_stage.py"),
        "test_readme_examples.py",
    ]
# Parameters of mallopt.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3

# Triton's interpreter takes some 30 ms for a loss.
EXAMPLES = os.environ.get("RSLOSS_TEST_EXAMPLES") or ("10" if os.environ.get("TRITON_INTERPRET") == "1" else "40")
hypothesis.settings.register_profile("rsloss", deadline=None, database=None, print_blob=True, max_examples=int(EXAMPLES))
hypothesis.settings.load_profile("rsloss")


def keep_freed_memory() -> None:
    """glibc gives large temporaries back to the system, which takes longer to map them again than a test needs to fill them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, size in ((TRIM_THRESHOLD, 1 << 30), (MMAP_THRESHOLD, 1 << 30), (TOP_PAD, 64 << 20)):
            mallopt(parameter, size)


def pytest_configure(config):
    keep_freed_memory()
    config.addinivalue_line("markers", "slow_interpreter: too slow under Triton's interpreter, left out there only")
    config.addinivalue_line("markers", "implemented(operator): for the backends that implement it; the others refuse it by design")
    config.addinivalue_line("markers", "shared_code: what the losses share; GPU kernels on the CPU take one loss only")


def pytest_report_header(config):
    return f"rsloss seed: {SEED}; backends: {', '.join(backend.id for backend in harness.backends_under_test())}"


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        backends = harness.backends_under_test()
        metafunc.parametrize("backend", backends, ids=[backend.id for backend in backends], indirect=True, scope="session")
    is_chosen = any("loss" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "loss" in metafunc.fixturenames and not is_chosen:
        metafunc.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.hookimpl(trylast=True)  # after pytest has put tests of the same backend together
def pytest_collection_modifyitems(config, items):
    def is_kept(item):
        params = getattr(item, "callspec", None) and item.callspec.params or {}
        backend, loss = params.get("backend"), params.get("loss")
        if backend and backend.is_interpreted and item.get_closest_marker("slow_interpreter"):
            return False
        implemented = item.get_closest_marker("implemented")
        if backend and implemented and backend.name not in _library.implemented_by(*implemented.args):
            return False
        is_repeated = isinstance(loss, Loss) and loss is not next(iter(LOSSES.values()))
        return not (backend and backend.is_slow and is_repeated and item.get_closest_marker("shared_code"))

    dropped = [item for item in items if not is_kept(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if is_kept(item)]
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish():
    """Thousands of collected tests live as long as the process; no garbage collection need walk over them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    # Or libraries would report as leaks what is never freed.
    gc.unfreeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("random numbers", f"repeat with RSLOSS_TEST_SEED={SEED}"))


@pytest.fixture(scope="session")
def backend(request) -> harness.Backend:
    """Every backend under test in turn. One that was promised and cannot run fails the test."""
    chosen = request.param
    if chosen.id not in _reasons:
        try:
            _reasons[chosen.id] = chosen.why_not()
        except Exception as error:
            _reasons[chosen.id] = f"{type(error).__name__}: {error}"
    if _reasons[chosen.id] is not None:
        pytest.fail(f"backend {chosen.id} was promised but cannot run: {_reasons[chosen.id]}", pytrace=False)
    return chosen


@pytest.fixture
def generator(request) -> torch.Generator:
    return harness.generator(SEED, request.node.nodeid)


@pytest.fixture(scope="session")
def seed() -> int:
    return SEED


@pytest.fixture(scope="session")
def process_results(tmp_path_factory, seed) -> list[dict]:
    """What every process of distributed_worker.py got."""
    import distributed_worker as worker

    folder = tmp_path_factory.mktemp("processes")
    context = torch.multiprocessing.spawn(
        worker.work, args=(max(worker.WORLDS), str(folder), seed), nprocs=max(worker.WORLDS), join=False
    )
    try:
        while not context.join(timeout=5):
            pass
    except Exception:
        found = [path.read_text() for path in sorted(pathlib.Path(folder).glob("*.failed"))]
        pytest.fail("\n".join(found) or "a process died", pytrace=False)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(max(worker.WORLDS))]
