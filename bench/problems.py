"""What a family of losses is measured on: cases, the inputs that belong to each, and the grids of them."""
import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every problem has. A family adds fields of its own, which come first, and a `title`."""

    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def as_dict(self) -> dict:
        return asdict(self)


class Inputs:
    """Of a case, with `logits`, the tensor or the levels that have a gradient, and `given()`, the tensors that the loss reads."""

    @property
    def elements(self) -> int:
        return sum(level.numel() for level in self.levels)

    @property
    def levels(self) -> list[Tensor]:
        return [self.logits] if isinstance(self.logits, Tensor) else self.logits

    @property
    def gradient_bytes(self) -> int:
        return sum(level.nbytes for level in self.levels)

    def _given_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.given())

    def minimal_bytes(self) -> int:
        """What forward and backward must move: everything given, twice, and the gradient."""
        return 2 * self._given_bytes() + self.gradient_bytes

    def working_set(self) -> int:
        """Everything given, and the gradient: what the caches would have to hold."""
        return self._given_bytes() + self.gradient_bytes

    def given(self) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Problems:
    """The problems of a family. An entry of a grid holds the first fields of a case, in their order.

    case: a frozen dataclass with `title`, `dtype`, `device`, `seed` and `as_dict()`, whose fields all but the seed are in the records.
    make_inputs: of a case; `logits`, the tensor that has a gradient, `minimal_bytes()` and `working_set()`.
    own: of the arguments; the entries of an own grid that they ask for, or none.
    full, memory: the grids of times and of peak memory; quick: a short one, in which `memory` counts too.
    small: of a case, little ones of its kind, which set up whatever is set up once.
    told: (loss, inputs) -> further figures of a draw for the records of speed.
    """

    case: type
    make_inputs: Callable
    add_options: Callable[[argparse.ArgumentParser], None]
    own: Callable[[argparse.Namespace], list[tuple]]
    full: Sequence[tuple]
    memory: Sequence[tuple]
    quick: Sequence[tuple]
    small: Callable
    told: Callable = lambda loss, inputs: {}

    def make_case(self, arguments: argparse.Namespace, *entry: object):
        return replace(self.case(*entry), dtype=arguments.dtype, device=arguments.device, seed=arguments.seeds[0])

    def entries(self, loss, arguments: argparse.Namespace) -> tuple[Sequence[tuple], Sequence[tuple]]:
        """For speed, and those of them for memory."""
        own = self.own(arguments)
        if own:
            return own, own
        if arguments.quick:
            return self.quick, [entry for entry in self.quick if entry in self.memory]
        return self.full, self.memory

    def grid(self, loss, arguments: argparse.Namespace) -> dict[str, list]:
        """The cases by what is measured. Counts and profiles take the short grid, where there is no own one."""
        speed, memory = self.entries(loss, arguments)
        short = self.own(arguments) or self.quick
        grids = {"speed": speed, "memory": memory, "syncs": short, "launches": short, "profile": short}
        return {name: [self.make_case(arguments, *entry) for entry in entries] for name, entries in grids.items()}
