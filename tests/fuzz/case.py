"""One case: a call of a loss, and what it must return."""
import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor


@dataclasses.dataclass
class Wanted:
    """The float64 truth. What is None is beyond its oracle: there the backends must agree."""

    losses: tuple[Tensor | float | None, ...]
    gradient: Tensor | None  # in the order of `Case.to_canonical`, for the case's upstream factors
    statistics: Callable | None = None  # (backend, statistics that the loss returned) -> None, raises AssertionError


@dataclasses.dataclass
class Case:
    name: str  # SEED:NUMBER
    loss: str
    function: Callable  # of logits (one tensor, or the list), `others` and `options`
    logits: list[Tensor]  # in the memory layout of the case
    is_list: bool
    others: tuple
    options: dict
    upstream: tuple[float | Tensor | None, ...]  # of each loss; None drops it from the graph
    truth: Callable[[], Wanted]
    given: list[Tensor]  # all arguments that must not change
    notes: list[str]
    narrow: float = 1e-6  # the gate of float32 gradients
    slack: float = 1.0  # what the gates are multiplied with where options lie beyond what they are promised for
    noise: float = 0.0  # PyTorch's own sigmoid is 0 where its value would be less than this
    has_gradient: bool = True
    to_canonical: Callable[[Sequence[Tensor]], Tensor] = lambda levels: levels[0].reshape(-1)
    is_elementwise: bool = False  # the loss has the shapes of the logits
    # More checks of the loss, beside its values: (backend) -> None, raises AssertionError.
    also: Callable | None = None

    @property
    def elements(self) -> int:
        return sum(level.numel() for level in self.logits)

    def describe(self) -> str:
        def told(value) -> str:
            if isinstance(value, Tensor):
                if value.dim() == 0:
                    return f"{value.item()!r} ({value.dtype})"
                return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"
            if isinstance(value, (list, tuple)):
                return f"[{', '.join(map(told, value))}]"
            return repr(value)

        options = ", ".join(f"{name}={told(value)}" for name, value in self.options.items())
        arguments = ", ".join(map(told, [*self.logits, *self.others]))
        return f"{self.loss}({arguments}; {options}), upstream {told(self.upstream)}, drawn: {', '.join(self.notes)}"
