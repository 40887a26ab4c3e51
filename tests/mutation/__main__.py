"""Plants faults in a copy of the sources, one at a time, and tells which of them the test suite does not notice.

    python -m tests.mutation                      every fault
    python -m tests.mutation reference triton     those of some backends
    python -m tests.mutation --only tail          those whose name contains the word
    python -m tests.mutation --check              only that every fault can be planted

A fault is a piece of text of one source file, which must occur there once, what replaces it, and the tests that are to fail then
(faults.py). The copy is a checkout of what is committed, compiled like any other; a fault is compiled by as much as it touches. Before
a fault counts as killed its tests have passed without it. Exit status 1 if a fault survives.
"""
import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutation.faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 900  # of one run of tests: a fault may make a kernel hang


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", help="reference, cpp, cuda or triton; all by default")
    parser.add_argument("--only", help="faults whose name contains this")
    parser.add_argument("--check", action="store_true", help="plant nothing, look whether every fault can be")
    parser.add_argument("--tree", type=pathlib.Path, help="keep the copy here, and use it again")
    arguments = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if not arguments.backends or fault.backend in arguments.backends]
    chosen = [fault for fault in chosen if arguments.only is None or arguments.only in fault.name]
    if not chosen:
        parser.error("no fault is chosen")
    for fault in chosen:
        mutated(ROOT, fault)
    print(f"{len(chosen)} faults can be planted", flush=True)
    if arguments.check:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tree = arguments.tree or pathlib.Path(folder) / "tree"
        copy_sources(tree, {fault.backend for fault in chosen})
        survivors = [fault for fault in chosen if not is_killed(tree, fault)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are noticed")
    for fault in survivors:
        print(f"SURVIVES {fault.backend} {fault.name} ({fault.file})")
    return int(bool(survivors))


def mutated(tree: pathlib.Path, fault: Fault) -> str:
    """The text of the fault's file with the fault."""
    text = (tree / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: the text must occur once in {fault.file}, found {text.count(fault.old)} times:\n{fault.old}")
    return text.replace(fault.old, fault.new)


def copy_sources(tree: pathlib.Path, backends: set[str]) -> None:
    """The committed files, compiled."""
    if not tree.exists():
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(tree)], check=True)
    if "cpp" in backends or not list(tree.glob("rsloss_kernels/*.so")):
        compile_in(tree)


def compile_in(tree: pathlib.Path) -> bool:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    return done.returncode == 0


def compiled_in(tree: pathlib.Path) -> list[pathlib.Path]:
    return [tree / "build", *tree.glob("rsloss_kernels/*.so")]


def copy(one: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """A file or folder with its times, in place of what is there."""
    if to.is_dir():
        shutil.rmtree(to)
    return pathlib.Path((shutil.copytree if one.is_dir() else shutil.copy2)(one, to))


def environment(tree: pathlib.Path, fault: Fault | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RSLOSS_", "TRITON_"))}
    kept |= {"PYTHONPATH": str(tree)}
    if fault is not None:
        kept["RSLOSS_TEST_BACKENDS"] = fault.backend
        if fault.backend == "triton":
            kept["TRITON_INTERPRET"] = "1"
    return kept


_passing: set[tuple[str, str]] = set()


def is_killed(tree: pathlib.Path, fault: Fault) -> bool:
    begin = time.monotonic()
    if (fault.backend, fault.tests) not in _passing:
        status, output = run_tests(tree, fault)
        if status != 0:
            raise SystemExit(f"{fault.name}: its tests fail without it, or are none:\n{output}")
        _passing.add((fault.backend, fault.tests))
    path = tree / fault.file
    touched = [path, *(compiled_in(tree) if fault.backend == "cpp" else ())]
    with tempfile.TemporaryDirectory() as aside:
        kept = [copy(place, pathlib.Path(aside) / str(number)) for number, place in enumerate(touched)]
        path.write_text(mutated(tree, fault))
        try:
            compiles = fault.backend != "cpp" or compile_in(tree)
            status = run_tests(tree, fault)[0] if compiles else 1
        finally:
            # With the times of before: nothing is to be compiled again.
            for original, place in zip(kept, touched, strict=True):
                copy(original, place)
    # 1: tests failed. Others are no verdict: no tests, a usage error, an interruption; a crash or a hang is one.
    verdict = "does not compile" if not compiles else {0: "SURVIVES", 1: "noticed"}.get(status, f"noticed (exit status {status})")
    if not compiles or status in (2, 4, 5):
        raise SystemExit(f"{fault.name}: no verdict, {verdict}")
    print(f"{fault.backend:<10} {fault.name:<58} {verdict} after {time.monotonic() - begin:.0f} s", flush=True)
    return status != 0


def run_tests(tree: pathlib.Path, fault: Fault) -> tuple[int, str]:
    """Exit status and the end of the output; 124 for a hang, negative for a signal."""
    shutil.rmtree(tree / ".pytest_cache", ignore_errors=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests.split()]
    try:
        done = subprocess.run(command, cwd=tree, env=environment(tree, fault), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, "out of time"
    return done.returncode, (done.stdout + done.stderr)[-3000:]


if __name__ == "__main__":
    sys.exit(main())
