"""What cases are drawn from: numbers, values of every kind, and views of memory in which these lie."""
import random
import zlib
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
NAN, INF = float("nan"), float("inf")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LAYOUTS = ("contiguous", "offset", "strided", "rows_strided", "permuted", "expanded")
# name -> values from standard normal ones and the type's limits.
FAMILIES = {
    "usual": lambda n, limits: 2 * n,
    "init": lambda n, limits: 0.02 * n - 4.6,
    "narrow": lambda n, limits: 1e-3 * n + n[..., :1].sum(),
    "ties": lambda n, limits: (2 * n).round() / 2,
    "halves": lambda n, limits: n.sign() / 2,
    "equal": lambda n, limits: torch.full_like(n, float(n.flatten()[0])),
    "wide": lambda n, limits: 300 * n,
    "saturated": lambda n, limits: 30 * n + 40 * n.sign(),
    "tiny": lambda n, limits: 1e-6 * n,
    "subnormal": lambda n, limits: n * limits.tiny / 8,
    "zeros": lambda n, limits: 0.0 * n,
    "huge": lambda n, limits: n * min(1e30, limits.max / 64),
    "largest": lambda n, limits: n.sign() * limits.max,
    "powers": lambda n, limits: n.sign() * (n.abs() * 30).exp() * 1e-12,
    "far": lambda n, limits: n + min(1e5, limits.max / 8) * (n > 0.7),
    "mixed": lambda n, limits: torch.where(n.abs() > 1, n, _specials(limits)[(n * 1e3).long().abs() % len(_specials(limits))]),
}
USUAL = ("usual", "init", "narrow", "ties", "halves", "equal", "tiny")


def _specials(limits: "Limits") -> Tensor:
    ends = [limits.max, limits.tiny, limits.tiny / 4, limits.eps, min(1e30, limits.max)]
    numbers = [0.0, 0.5, 1.0, 4.59512, 16.0, 88.5, 104.0, 710.0, 745.5, *ends]
    return torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.float64)


class Limits:
    """Of a dtype; of float64 no numbers whose sum would be more than a float64."""

    def __init__(self, dtype: torch.dtype):
        of_type = torch.finfo(dtype)
        self.max, self.tiny, self.eps = min(of_type.max, 1e300), of_type.tiny, of_type.eps


class Source:
    """Random numbers that depend on a name alone."""

    def __init__(self, name: str):
        self.random = random.Random(name)
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.notes: list[str] = []  # how the case came about
        self.given: list[Tensor] = []  # all that was laid out

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def pick(self, values: Sequence[T], *rarely: T) -> T:
        """One of `values`, in a tenth of the cases one of `rarely`."""
        return self.random.choice(rarely if rarely and self.chance(0.1) else values)

    def size(self, largest: int = 30_000) -> int:
        """Elements of a case: mostly few, with zero, and sometimes more than one chunk or thread has."""
        bounds = self.random.choices(((0, 0), (1, 8), (9, 80), (81, 1500), (1501, largest)), (3, 20, 60, 16, 1))[0]
        return self.random.randint(*bounds)

    def shape(self, size: int, most_dims: int = 4, fewest_dims: int = 1) -> tuple[int, ...]:
        """About `size` elements."""
        dims, shape, left = self.random.randint(fewest_dims, most_dims), [], size
        for place in range(dims):
            length = left if place == dims - 1 else min(left, int(self.random.choice((1, 2, 3, 5, max(left, 1) ** (1 / (dims - place))))))
            shape.append(length)
            left = left // length if length else 0
        self.random.shuffle(shape)
        return tuple(shape)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64)

    def mask(self, shape: Sequence[int], share: float) -> Tensor:
        return self.uniform(shape) < share

    def dtype(self) -> torch.dtype:
        return self.random.choices(FLOATS, (4, 3, 2, 2))[0]

    def values(self, shape: Sequence[int], dtype: torch.dtype, families: Sequence[str] = ()) -> Tensor:
        """Finite numbers of one family, or of two."""
        normal = self.normal(shape)
        if not normal.numel():
            return normal.to(dtype)
        chosen = families or (USUAL if self.chance(0.5) else tuple(FAMILIES))
        limits, name = Limits(dtype), self.pick(chosen)
        values = FAMILIES[name](normal if normal.dim() else normal[None], limits).reshape(normal.shape)
        if self.chance(0.15):
            other = self.pick(chosen)
            name = f"{name}/{other}"
            second = FAMILIES[other](normal.roll(1) if normal.dim() else normal[None], limits).reshape(normal.shape)
            values = torch.where(self.mask(shape, 0.3), second, values)
        self.notes.append(name)
        return values.clamp(-limits.max, limits.max).to(dtype)

    def broken(self, values: Tensor, share: float = 0.12, may_be: Sequence[float] = (NAN, INF, -INF)) -> Tensor:
        """In some cases with a few numbers, or half of all, that are not finite."""
        if not values.numel() or not self.chance(share):
            return values
        kinds = torch.tensor(self.pick([may_be, *([value] for value in may_be)]), dtype=values.dtype)
        holes = self.mask(values.shape, self.pick((1.5 / values.numel(), 0.1), 0.5, 1.0))
        chosen = torch.randint(len(kinds), values.shape, generator=self.generator)
        self.notes.append(f"{int(holes.sum())} of {kinds.tolist()}")
        return torch.where(holes, kinds[chosen], values)

    def lay(self, values: Tensor, may_expand: bool = False) -> Tensor:
        """The values as a view of larger memory, whose rest is NaN or -77. `may_expand`: the values of one dimension may become one."""
        layout = "contiguous" if self.chance(0.4) else self.pick(LAYOUTS)
        view = self._view(values, layout if layout != "expanded" or may_expand else "offset")
        self.given.append(view)
        return view

    def _view(self, values: Tensor, layout: str) -> Tensor:
        shape, dims = values.shape, values.dim()
        rest = NAN if values.is_floating_point() else False if values.dtype in (torch.bool, torch.uint8) else -77
        if layout in ("contiguous", "offset"):
            start = 0 if layout == "contiguous" else self.random.randint(1, 9)
            base = torch.full((values.numel() + 2 * start,), rest, dtype=values.dtype)
            return base[start : start + values.numel()].view(shape).copy_(values)
        if not dims:
            return values.clone()
        self.notes.append(layout)
        if layout == "expanded":
            dim = self.random.randrange(dims)
            return values.narrow(dim, 0, min(1, shape[dim])).clone().expand(shape)
        if layout == "permuted":
            order = self.random.sample(range(dims), dims)
            base = torch.full([shape[dim] for dim in order], rest, dtype=values.dtype)
            return base.permute([order.index(dim) for dim in range(dims)]).copy_(values)
        dim, step = (dims - 1 if layout == "strided" else 0), self.random.randint(2, 3)
        base = torch.full([size * step + 1 if place == dim else size for place, size in enumerate(shape)], rest, dtype=values.dtype)
        return base.narrow(dim, 1, shape[dim] * step)[(slice(None),) * dim + (slice(None, None, step),)].copy_(values)
