"""Tables as text and as markdown, results as JSON with what is needed to read them later."""

import json
import os
import pathlib
import platform
import sys

import numpy
import torch

import rsloss_kernels


def table(header: list[str], rows: list[list[str]], markdown: bool = False) -> str:
    """Columns aligned; the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells):
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|" + "|".join("-" * (width + 1) + (":" if column else "-") for column, width in enumerate(widths)) + "|"
    else:
        rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def spread(values: list[float], digits: int = 1) -> str:
    """The mean, and with several values the sample standard deviation."""
    mean = f"{numpy.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {numpy.std(values, ddof=1):.{digits}f}"


def surroundings(device: str) -> dict:
    """Versions and machine."""
    import matplotlib
    import pycocotools
    import sklearn

    modules = (torch, numpy, sklearn, matplotlib)
    versions = {"python": platform.python_version(), "rsloss_kernels": rsloss_kernels.__version__}
    versions |= {module.__name__: module.__version__ for module in modules}
    versions["pycocotools"] = getattr(pycocotools, "__version__", "unknown")
    return {
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "device": device,
            "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        },
        "backends": rsloss_kernels.backend_report().splitlines(),
        "command": sys.argv[1:],
    }


def _processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def write_json(path: pathlib.Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1, default=str) + "\n")
    unfinished.replace(path)
