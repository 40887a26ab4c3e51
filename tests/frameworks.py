"""The frameworks that the adapters are for. Importing one takes seconds: do it in the tests and fixtures that need it, through these."""
import pathlib
import sys

PROGRAMS = str(pathlib.Path(__file__).resolve().parents[1] / "python")
if PROGRAMS not in sys.path:
    sys.path.insert(0, PROGRAMS)

from swaps.frameworks import use_mmdetection, use_torchvision, use_ultralytics  # noqa: E402

__all__ = ["use_mmdetection", "use_torchvision", "use_ultralytics"]
