"""Trains the digits detector, killed at random and resumed, beside a run that nothing disturbs: both must end with the same bits.

    python -m tests.soak --minutes 30
    python -m tests.soak --minutes 2 --loss ghm --seed 7

Each round takes the next loss and a new seed. The disturbed run is killed without warning (SIGKILL) after a random time, and started again
with --resume, until it ends by itself. Weights, the state of the loss, the optimizer's and the curves are compared bit by bit. Prints the
seed; exit status 1 if a round differs, or a run fails by itself.
"""
import argparse
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOSSES = ("rank_sort", "ghm", "alrp", "ap", "focal")
STEPS = 240
KEPT = ("step", "model", "loss", "optimizer", "curves")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--loss", nargs="+", default=LOSSES, help="losses in turn")
    parser.add_argument("--steps", type=int, default=STEPS, help="of a run")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 20), help="of everything random")
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}", flush=True)
    chance = random.Random(arguments.seed)
    end = time.monotonic() + 60 * arguments.minutes
    rounds = kills = differing = 0
    while rounds == 0 or time.monotonic() < end:
        loss, seed = arguments.loss[rounds % len(arguments.loss)], chance.randrange(1000)
        with tempfile.TemporaryDirectory() as folder:
            undisturbed, disturbed = pathlib.Path(folder) / "undisturbed", pathlib.Path(folder) / "disturbed"
            finish(start(loss, seed, arguments.steps, undisturbed))
            killed = run_disturbed(loss, seed, arguments.steps, disturbed, chance)
            difference = compare(undisturbed, disturbed)
        rounds, kills, differing = rounds + 1, kills + killed, differing + bool(difference)
        print(f"round {rounds}: {loss}, seed {seed}, killed {killed} times: {difference or 'the same bits'}", flush=True)
    print(f"{rounds} rounds, {kills} kills, {differing} differ")
    return int(differing > 0)


def start(loss: str, seed: int, steps: int, out: pathlib.Path) -> subprocess.Popen:
    options = {"loss": loss, "seed": seed, "steps": steps, "out": out, "pool": 320, "held-out": 8, "compare-steps": 0, "checkpoint-every": 15}
    command = [sys.executable, str(ROOT / "python" / "train_detector.py"), "--resume"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a run that was not killed failed:\n{output[-3000:]}")


def run_disturbed(loss: str, seed: int, steps: int, out: pathlib.Path, chance: random.Random) -> int:
    """How often it was killed. At most 20 times, so that it ends on a slow machine too."""
    for killed in range(20):
        process = start(loss, seed, steps, out)
        try:
            # A start takes seconds; a run that never gets beyond it would never end.
            process.wait(timeout=chance.uniform(4, 20 + 5 * killed))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            continue
        finish(process)
        return killed
    finish(start(loss, seed, steps, out))
    return 20


def compare(first: pathlib.Path, second: pathlib.Path) -> str:
    """What differs between the last checkpoints of two runs; "" if nothing does."""
    checkpoints = [next(folder.rglob("*.pt")) for folder in (first, second)]
    states = [torch.load(path, weights_only=True) for path in checkpoints]
    return ", ".join(name for name in KEPT if not same(states[0][name], states[1][name]))


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


if __name__ == "__main__":
    sys.exit(main())
