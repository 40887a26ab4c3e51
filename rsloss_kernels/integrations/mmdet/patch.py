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
    """What `patch_mmdet` replaced; its string is a report. As a context manager it takes the patch back at the end."""

    def __init__(self, swaps: tuple[Swap, ...]):
        self.swaps = swaps

    def unpatch(self) -> None:
        """Puts back what was replaced here; what was put back before is left alone."""
        for swap in self.swaps:
            if MODELS.get(swap.name) is swap.replacement:
                MODELS.register_module(name=swap.name, module=swap.original, force=True)
            for module in (sys.modules.get(name) for name in swap.modules):
                if vars(module).get(swap.name) is swap.replacement:
                    setattr(module, swap.name, swap.original)

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


def patch_mmdet(*names: str) -> MMDetPatch:
    """Replaces losses of MMDetection by this library's: in its registry, and in every loaded module that imported one by its name.

    Models that are built afterwards have them, from the configurations that they always had; models built before stay as they are.

    Args:
        names: of the losses, as in a configuration; none: all that can be replaced (`REPLACEMENTS`).

    Returns the patch: `print` it for a report, `unpatch()` takes it back. What is replaced already is not in it.

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
        importers = [key for key, module in list(sys.modules.items()) if module is not sys.modules[__name__] and holds(module, name, original)]
        for importer in importers:
            setattr(sys.modules[importer], name, replacement)
        swaps.append(Swap(name, original, replacement, tuple(importers)))
    return MMDetPatch(tuple(swaps))


def holds(module: object, name: str, value: object) -> bool:
    return getattr(module, "__dict__", {}).get(name) is value


def unpatch_mmdet() -> None:
    """Puts back everything that any `patch_mmdet` replaced."""
    swaps = []
    for name, original in ORIGINALS.items():
        replacement = REPLACEMENTS[name]
        importers = tuple(key for key, module in list(sys.modules.items()) if holds(module, name, replacement))
        swaps.append(Swap(name, original, replacement, importers))
    MMDetPatch(tuple(swaps)).unpatch()
