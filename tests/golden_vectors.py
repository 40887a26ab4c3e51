"""Reads golden/<family>.npz: outputs of the authors' published code, recorded on a CPU in float64 and in float32.

Keys are `case/in/NAME` and `case/out64/IMPLEMENTATION/NAME`; `__manifest__` is JSON with the name, hyper-parameters, tags and recorded
crashes of every case.
"""
import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = pathlib.Path(__file__).with_name("golden")


@dataclasses.dataclass(frozen=True)
class Case:
    family: str
    name: str
    hyper: dict
    tags: tuple[str, ...]
    crashed: frozenset[str]
    manifest: dict = dataclasses.field(compare=False)

    def inputs(self) -> dict[str, Tensor]:
        return self._arrays("in")

    def outputs(self, implementation: str, precision: int = 64) -> dict[str, Tensor]:
        """Outputs of one original; empty if it was not recorded."""
        return self._arrays(f"out{precision}/{implementation}")

    def _arrays(self, section: str) -> dict[str, Tensor]:
        prefix = f"{self.name}/{section}/"
        archive = _archive(self.family)
        return {key.removeprefix(prefix): torch.from_numpy(archive[key].copy()) for key in archive if key.startswith(prefix)}


@functools.cache
def _archive(family: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{family}.npz", allow_pickle=False) as archive:
        return dict(archive)


def cases(family: str) -> list[Case]:
    manifest = json.loads(bytes(_archive(family)["__manifest__"]).decode())
    return [
        Case(family, case["name"], case["hyper"], tuple(case["tags"]), frozenset(crash["impl"] for crash in case["crashes"]), case)
        for case in manifest["cases"]
    ]


def params(family: str) -> list:
    return [pytest.param(case, id=case.name) for case in cases(family)]
