"""Hashes of what every loss returns on fixed inputs, to tell whether two machines, processors, runs or versions give the same bits.

    python -m tests.output_hashes                      into bench/results/<machine>/bits/hashes.json
    python -m tests.output_hashes --compare bench/results/epyc-2-cores/bits/hashes.json
                                                       beside another machine's; exit status 1 if any differs
    python -m tests.output_hashes --backends reference,cpp,cuda,triton
                                                       GPU kernels emulated and interpreted where there is no GPU

Each backend runs the cases of `rsloss_kernels.selfcheck`, on every dtype; `cpp`, and `cuda` and `triton` on a GPU, also those of
threads_at_work.py, which have several chunks. `cpp` runs on every set of instructions that the processor has. A hash is of the losses or of
the gradient: dtype, shape and bytes. Inputs are drawn in float64 from PyTorch's generator for CPUs and rounded; their hash is kept too.
"""
import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Also found where the file itself is the program.
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).resolve().parent)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

SCHEMA = 1
DIGITS = 12
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGE_DTYPES = (torch.bfloat16, torch.float32)
CAPABILITIES = {"AVX512": ("avx512", "avx2", "plain"), "AVX2": ("avx2", "plain")}
# problem -> who ran it -> dtype -> "losses gradient"; and the inputs of each problem under "inputs".
Hashes = dict[str, dict[str, dict[str, str] | str]]


def digest(*values: Tensor) -> str:
    found = hashlib.sha256()
    for value in values:
        value = value.detach().cpu().contiguous()
        found.update(f"{value.dtype} {list(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:DIGITS]


def problems(are_large: bool) -> Iterator[tuple[str, Tensor, Callable[[Tensor], tuple[Tensor, ...]], str]]:
    """(name, logits, losses of them, an operator that they take)."""
    import threads_at_work
    from rsloss_kernels import selfcheck

    if not are_large:
        for case in selfcheck.cases(0):
            # The last bits of a logarithm may differ between C libraries.
            yield case.name, case.logits.float().double(), case.run, case.operator
        return
    for name, (values, loss) in threads_at_work.calls(0).items():
        operator = "seesaw_forward" if name == "Seesaw" else "focal_forward"
        yield f"large: {name}", values, lambda x, loss=loss: (loss(x),), operator


def hashes(backend: str, device: str, are_large: bool, dtypes: tuple[torch.dtype, ...]) -> Hashes:
    import rsloss_kernels
    from rsloss_kernels import _library

    result: Hashes = {}
    for name, logits, losses_of, operator in problems(are_large):
        if backend not in _library.implemented_by(operator):
            continue
        result[name] = {"inputs": digest(logits), backend: {}}
        for dtype in dtypes:
            leaf = logits.to(device, dtype, copy=True).requires_grad_()
            with rsloss_kernels.use_backend(backend):
                losses = losses_of(leaf)
            (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses), leaf)
            result[name][backend][str(dtype).removeprefix("torch.")] = f"{digest(*losses)} {digest(gradient)}"
    return result


# --- one process per backend and set of instructions ---


def runs(backends: list[str]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(who, backend, environment)."""
    for backend in backends:
        if backend == "cpp":
            for capability in CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ("plain",)):
                yield f"cpp, {capability}", backend, {"RSLOSS_CPU_CAPABILITY": capability}
        elif torch.cuda.is_available() or backend == "reference":
            yield backend, backend, {}
        else:
            words = {"cuda": "cuda, emulated", "triton": "triton, interpreted"}
            yield words[backend], backend, {"TRITON_INTERPRET": "1"} if backend == "triton" else {}


def in_a_process(backend: str, environment: dict[str, str], *options: str) -> Hashes:
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--worker", backend, *options]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{backend}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def work(backend: str, threads: int, narrow: bool) -> Hashes:
    import harness

    torch.set_num_threads(threads)
    device = "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    chosen = harness.Backend(backend, device)
    reason = chosen.why_not()
    if reason is not None:
        raise SystemExit(f"{backend}: {reason}")
    if chosen.is_interpreted:
        __import__("quick_interpreter").quicken()
    found = hashes(backend, device, False, (torch.float32,) if narrow else DTYPES)
    if not chosen.is_slow and backend != "reference":
        found |= hashes(backend, device, True, (torch.float32,) if narrow else LARGE_DTYPES)
    return found


def collect(backends: list[str], *options: str) -> Hashes:
    result: Hashes = {}
    for who, backend, environment in runs(backends):
        print(f"{who} ...", flush=True, file=sys.stderr)
        for name, found in in_a_process(backend, environment, *options).items():
            result.setdefault(name, {"inputs": found["inputs"]})[who] = found[backend]
    return result


# --- the file ---


def platform() -> dict[str, object]:
    from bench import harness
    from rsloss_kernels import collect_env

    known = harness.machine("cuda" if torch.cuda.is_available() else "cpu")
    return {**known, "instructions of torch": torch.backends.cpu.get_cpu_capability(), "compiler": collect_env._compiler()}


def write(document: dict, path: pathlib.Path) -> None:
    """One line for each problem and backend."""
    lines = [f' "schema": {document["schema"]}', f' "machine": {json.dumps(document["machine"])}']
    entries = []
    for name, found in document["hashes"].items():
        of_problem = ",\n".join(f"   {json.dumps(who)}: {json.dumps(value)}" for who, value in found.items())
        entries.append(f"  {json.dumps(name)}: {{\n{of_problem}\n  }}")
    lines.append(' "hashes": {\n' + ",\n".join(entries) + "\n }")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(here: Hashes, there: Hashes) -> tuple[list[str], int]:
    """What differs in words, and how many hashes are the same. What only one of them ran is not compared."""
    differing, same = [], 0
    for name in here.keys() & there.keys():
        if here[name]["inputs"] != there[name]["inputs"]:
            differing.append(f"{name}: other inputs")
            continue
        for who in sorted(here[name].keys() & there[name].keys() - {"inputs"}):
            for dtype in sorted(here[name][who].keys() & there[name][who].keys()):
                pairs = zip(("losses", "gradient"), here[name][who][dtype].split(), there[name][who][dtype].split(), strict=True)
                others = [what for what, one, other in pairs if one != other]
                same += 2 - len(others)
                if others:
                    differing.append(f"{name}, {who}, {dtype}: {' and '.join(others)}")
    return sorted(differing), same


def uncompared(here: Hashes, there: Hashes) -> int:
    """How many hashes only one of them has."""
    keys = [{(name, who, dtype) for name in one for who in one[name].keys() - {"inputs"} for dtype in one[name][who]} for one in (here, there)]
    return 2 * len(keys[0] ^ keys[1])


def summary(found: Hashes) -> Iterator[str]:
    """What of one machine's backends has one answer: the sets of instructions of `cpp`."""
    names = [who for who in next(iter(found.values())) if who.startswith("cpp")]
    for who in names[1:]:
        of_both = [(problem[names[0]][dtype], problem[who][dtype]) for problem in found.values() if who in problem for dtype in problem[who]]
        yield f"{who}: {sum(a == b for a, b in of_both)} of {len(of_both)} have the bits of {names[0]}"


def main(arguments: list[str]) -> int:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.output_hashes", description=__doc__, formatter_class=shape)
    parser.add_argument("--backends", help="comma list; all that run here, emulated and interpreted ones left out, without")
    parser.add_argument("--out", type=pathlib.Path, help="folder of hashes.json; that of this machine without, none with --compare")
    parser.add_argument("--compare", type=pathlib.Path, metavar="FILE", help="hashes.json of another machine or version")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; makes no difference")
    parser.add_argument("--narrow", action="store_true", help="float32 alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        with contextlib.redirect_stdout(sys.stderr):
            found = work(options.worker, options.threads, options.narrow)
        print(json.dumps(found))
        return 0
    backends = ["reference", "cpp"] + (["cuda", "triton"] if torch.cuda.is_available() else [])
    if options.backends:
        backends = options.backends.split(",")
    more = ["--threads", str(options.threads), *["--narrow"] * options.narrow]
    document = {"schema": SCHEMA, "machine": platform(), "hashes": collect(backends, *more)}
    print(*summary(document["hashes"]), sep="\n")
    if options.out or not options.compare:
        path = (options.out or ROOT / "bench" / "results" / document["machine"]["slug"] / "bits") / "hashes.json"
        write(document, path)
        print(f"{len(document['hashes'])} problems in {path}")
    if options.compare is None:
        return 0
    other = json.loads(options.compare.read_text())
    if other["schema"] != SCHEMA:
        raise SystemExit(f"{options.compare}: schema {other['schema']}, wanted {SCHEMA}")
    for name in sorted(other["machine"].keys() | document["machine"].keys()):
        here, there = (one["machine"].get(name) for one in (document, other))
        if here != there:
            print(f"{name}: {here} here, {there} there")
    differing, same = compare(document["hashes"], other["hashes"])
    print(*differing, f"{same} hashes are the same, {len(differing)} differ", sep="\n")
    print(f"{uncompared(document['hashes'], other['hashes'])} were not compared: one of both has none")
    return int(bool(differing) or same == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
