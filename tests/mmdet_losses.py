"""MMDetection 3's own loss modules, a living oracle: the files that hold them, without the framework that its package imports."""
import functools
import importlib.util
import pathlib
import sys
import types

import harness
import pytest


def ghm() -> types.ModuleType:
    """`mmdet.models.losses.ghm_loss`, with classes `GHMC` and `GHMR`."""
    return load("ghm_loss")


@functools.cache
def load(name: str) -> types.ModuleType:
    """`mmdet.models.losses.<name>`."""
    if harness.WITHOUT_FRAMEWORKS:
        pytest.skip("RSLOSS_TEST_WITHOUT_FRAMEWORKS is set: not compared with MMDetection")
    folder = pathlib.Path(importlib.util.find_spec("mmdet").origin).parent / "models" / "losses"
    stubs = {name: types.ModuleType(name) for name in ("mmdet", "mmdet.registry", "mmcv", "mmcv.ops", "mmengine", "mmengine.logging")}
    stubs["mmdet.registry"].MODELS = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    stubs["mmcv.ops"].sigmoid_focal_loss = None  # of GPUs alone
    stubs["mmengine.logging"].print_log = lambda *arguments, **options: None
    package = types.ModuleType("mmdet_losses_")
    package.__path__ = [str(folder)]
    loaded = ("mmdet_losses_", "mmdet_losses_.utils", "mmdet_losses_.accuracy", f"mmdet_losses_.{name}")
    replaced = (*stubs, *loaded, "mmdet.models", "mmdet.models.losses", "mmdet.models.losses.utils")
    before = {module: sys.modules.get(module) for module in replaced}
    try:
        sys.modules |= stubs | {"mmdet_losses_": package}
        # Some files import it by its full name.
        sys.modules |= {module: types.ModuleType(module) for module in ("mmdet.models", "mmdet.models.losses")}
        sys.modules["mmdet.models.losses.utils"] = importlib.import_module("mmdet_losses_.utils")
        return importlib.import_module(f"mmdet_losses_.{name}")
    finally:
        for module, value in before.items():
            if value is None:
                sys.modules.pop(module, None)
            else:
                sys.modules[module] = value
