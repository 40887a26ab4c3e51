"""Random cases of every loss, on every backend, against the float64 truths of the other tests.

    python -m tests.fuzz --seconds 60                # or --cases 1000; --losses, --backends, --jobs, --seed
    python -m tests.fuzz --case 1234:77              # one case again, as a failure prints it

source.py draws numbers, values and memory layouts, *_cases.py the cases of the losses, checks.py holds what must be true of each.
A case is a function of its name alone, SEED:NUMBER.
"""
import pathlib
import sys

# The oracles and gates of the other tests.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
