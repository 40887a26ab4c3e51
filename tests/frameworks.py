"""The frameworks that the adapters are for. Importing one takes seconds, so tests do it in a fixture, through these functions."""
import importlib
import pathlib
import sys
import types

PROGRAMS = str(pathlib.Path(__file__).resolve().parents[1] / "python")
if PROGRAMS not in sys.path:
    sys.path.insert(0, PROGRAMS)

from swaps.frameworks import use_mmdetection, use_torchvision, use_ultralytics  # noqa: E402

__all__ = ["mmdetection", "use_mmdetection", "use_torchvision", "use_ultralytics"]


def mmdetection() -> types.ModuleType:
    """`mmdet_samples`, with the adapter's losses and heads registered."""
    use_mmdetection()
    importlib.import_module("rsloss_kernels.integrations.mmdet")
    return importlib.import_module("mmdet_samples")
