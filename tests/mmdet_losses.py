"""MMDetection 3's own GHM modules, a living oracle: the two files that hold them, without the framework that its package imports."""
import functools
import importlib.util
import pathlib
import sys
import types


@functools.cache
def ghm() -> types.ModuleType:
    """`mmdet.models.losses.ghm_loss`, with classes `GHMC` and `GHMR`."""
    folder = pathlib.Path(importlib.util.find_spec("mmdet").origin).parent / "models" / "losses"
    registry = types.ModuleType("mmdet.registry")
    registry.MODELS = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    names = ("mmdet", "mmdet.registry", "mmdet_losses_", "mmdet_losses_.utils", "mmdet_losses_.ghm_loss")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules |= {"mmdet": types.ModuleType("mmdet"), "mmdet.registry": registry}
    package = sys.modules["mmdet_losses_"] = types.ModuleType("mmdet_losses_")
    package.__path__ = [str(folder)]
    try:
        return importlib.import_module("mmdet_losses_.ghm_loss")
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
