"""The command: see --help."""
import argparse
import os
import random
import sys
from collections.abc import Sequence

BACKENDS = ("reference", "cpp", "cuda", "triton")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random cases of every loss against float64 truths.")
    parser.add_argument("--seconds", type=float, help="how long; 60 without --cases")
    parser.add_argument("--cases", type=int, help="how many, of the chosen losses")
    parser.add_argument("--seed", type=int, default=None, help="of the cases; drawn and printed without")
    parser.add_argument("--losses", help="comma list; all without")
    parser.add_argument("--backends", default="cpp,reference", help="comma list of reference, cpp, cuda, triton: emulated and "
                        "interpreted where there is no GPU (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--case", help="SEED:NUMBER of one case to repeat")
    options = parser.parse_args(arguments)
    options.backends = options.backends.split(",")
    if not set(options.backends) <= set(BACKENDS):
        parser.error(f"--backends: wanted some of {', '.join(BACKENDS)}, got {','.join(options.backends)}")
    if options.cases is None and options.seconds is None:
        options.seconds = 60.0
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if "triton" in options.backends and "TRITON_INTERPRET" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            # Before Triton is imported, here and in every process.
            os.environ["TRITON_INTERPRET"] = "1"
    from . import cases, runner

    if options.case is None:
        return runner.run(options)
    ran, wrong = runner.run_case(options.case, runner.open_backends(options.backends))
    if wrong is None:
        print(f"{options.case} on {', '.join(ran)}: {cases.draw(options.case).describe()}")
        return 0
    runner.report_failure(options.case, wrong, options.backends)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
