"""`patch_mmdet`: the framework's own losses replaced by those of this library, under their own names, and back."""
import sys
from typing import NamedTuple

from mmdet.models import losses as theirs
from mmdet.registry import MODELS

from rsloss_kernels.integrations.mmdet.losses import FUSED

REPLACEMENTS = {loss.__name__.removeprefix("Fused"): loss for loss in FUSED}
# As the framework has them, whatever is patched when.
ORIGINALS = {name: getattr(theirs, name) for name in REPLACEMENTS}


class Swap(NamedTuple):
    """One loss that was replaced."""

    name: str
    original: type
    replacement: type
    modules: tuple[str, ...]  # that had imported it


class MMDetPatch:
    """What `patch_mmdet` replaced, `swaps`; its string is a report. As a context manager it takes the patch back at the end."""

    def __init__(self, swaps: tuple[Swap, ...]):
        self.swaps = swaps
        self._modules_before = frozenset(sys.modules)

    def unpatch(self) -> None:
        """Puts back what was replaced here, also in modules that were imported since; what was put back before is left alone."""
        later = [key for key in list(sys.modules) if key not in self._modules_before]
        for swap in self.swaps:
            if MODELS.get(swap.name) is swap.replacement:
                MODELS.register_module(name=swap.name, module=swap.original, force=True)
            for module in modules_that_hold(swap.name, swap.replacement, (*swap.modules, *later)):
                setattr(sys.modules[module], swap.name, swap.original)
        if self in _active:
            _active.remove(self)

    def __enter__(self) -> "MMDetPatch":
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()

    def __str__(self) -> str:
        lines = [f"{len(self.swaps)} losses of MMDetection replaced"]
        for swap in self.swaps:
            where = f"{swap.replacement.__module__}.{swap.replacement.__name__}"
            lines.append(f"  {swap.name}: {where}, in the registry and {len(swap.modules)} modules")
        return "\n".join(lines)


_active: list[MMDetPatch] = []


def patch_mmdet(*names: str) -> MMDetPatch:
    """Replaces losses of MMDetection by this library's: in its registry, and in every loaded module that imported one by its name.

    Models that are built afterwards have them, from the configurations that they always had; models built before stay as they are.
    So do losses that somebody derived from the framework's before; where these call the constructor of their base by its name rather
    than by `super()`, leave that name out.

    Args:
        names: of the losses, as in a configuration; none: all that can be replaced (`REPLACEMENTS`).

    Returns the patch: `print` it for a report, `unpatch()` takes it back. What is replaced already, or was registered anew by somebody
    else, is not in it.

    Raises ValueError for a name that cannot be replaced.
    """
    unknown = [name for name in names if name not in REPLACEMENTS]
    if unknown:
        raise ValueError(f"patch_mmdet: names must be among {', '.join(REPLACEMENTS)}, got {', '.join(unknown)}")
    swaps = []
    for name in names or REPLACEMENTS:
        original, replacement = ORIGINALS[name], REPLACEMENTS[name]
        if MODELS.get(name) is not original:
            continue
        MODELS.register_module(name=name, module=replacement, force=True)
        importers = modules_that_hold(name, original, tuple(sys.modules))
        for importer in importers:
            setattr(sys.modules[importer], name, replacement)
        swaps.append(Swap(name, original, replacement, importers))
    _active.append(MMDetPatch(tuple(swaps)))
    return _active[-1]


def unpatch_mmdet() -> None:
    """Takes back every patch that is in force."""
    for patch in list(_active):
        patch.unpatch()


def modules_that_hold(name: str, value: object, among: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the modules in which this name is this very object."""
    return tuple(key for key in among if getattr(sys.modules.get(key), "__dict__", {}).get(name) is value)
