"""Runs the benchmarks, all of them or those of the named losses, and writes results/<machine>/<loss>.json.

    python bench/run.py                                   every loss
    python bench/run.py rank_sort --metric memory         one loss, memory only; syncs, launches, counts (both), all
    python bench/run.py rank_sort --profile --out traces  where the time of a step goes
    python bench/run.py rank_sort --must-show             the rows that must hold; exit status 1 if one fails

Every option that is not named here goes to the benchmarks themselves; `python bench/bench_<loss>.py --help` lists them.
"""
import argparse
import importlib
import pathlib
import sys

import torch

BENCH = pathlib.Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))

from bench import harness, loss_bench  # noqa: E402


def stems() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    # The names come first; whatever follows an unknown option is its value, not a name.
    first_option = next((number for number, text in enumerate(argv) if text.startswith("-")), len(argv))
    losses, options = argv[:first_option], argv[first_option:]
    parser = argparse.ArgumentParser(
        usage="run.py [loss ...] [options]",
        description=__doc__,
        epilog=f"losses: {', '.join(stems())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--metric", choices=tuple(loss_bench.METRICS), default="both")
    parser.add_argument("--profile", action="store_true", help="a trace and a table of kernels, into the folder of --out")
    parser.add_argument("--mode", choices=("forward", "backward", "full", "all"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), default="float32")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results, default bench/results/<machine>")
    arguments, others = parser.parse_known_args(options)
    unknown = [loss for loss in losses if loss not in stems()]
    if unknown:
        parser.error(f"no benchmark for {', '.join(unknown)}; there are: {', '.join(stems())}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if arguments.profile and not arguments.out:
        parser.error("--profile writes traces: name a folder with --out")
    out = arguments.out or BENCH / "results" / harness.machine_slug(arguments.device)
    command = ["--metric", arguments.metric, "--mode", arguments.mode, "--device", arguments.device, "--dtype", arguments.dtype]
    command += ["--out", str(out), *["--profile"] * arguments.profile, *others]
    status = 0
    for stem in losses or stems():
        status |= importlib.import_module(f"bench.bench_{stem}").main(command)
    return status


if __name__ == "__main__":
    sys.exit(main())
