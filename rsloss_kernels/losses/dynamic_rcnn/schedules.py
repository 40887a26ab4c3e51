"""What the modules of Dynamic R-CNN share: selecting the k-th smallest on the device, and values that change at the end of a window."""
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from rsloss_kernels import _checks, distributed
from rsloss_kernels._state import StatefulLoss, store

if TYPE_CHECKING:
    import torch.distributed as dist

VARIANTS = ("mmdet", "original")
# Of the boxes' offsets: what a new beta must reach.
EPS = 1e-15


class Schedule(NamedTuple):
    """The updates so far, on the CPU."""

    steps: Tensor  # int64 [U]: how many steps had been taken
    values: Tensor  # float64 [U]: the value from then on


class Statistic(NamedTuple):
    """Of one step."""

    value: Tensor  # 0-d float64; NaN if a number that counts is not finite
    exists: Tensor  # 0-d bool: whether anything counts


class WindowedValue(distributed.HoldsGroup, StatefulLoss):
    """A 0-d float64 buffer, `value_name`, that may change at the end of each window of `update_iter_interval` steps."""

    num_steps: Tensor
    num_recorded: Tensor
    num_updates: Tensor
    schedule_steps: Tensor
    schedule_values: Tensor
    value_name: str

    def __init__(
        self,
        first_value: float,
        topk: int,
        update_iter_interval: int,
        variant: str,
        process_group: object | None,
        max_images: int,
        schedule_length: int,
    ):
        super().__init__()
        name = type(self).__name__
        self.topk = topk
        self.update_iter_interval = _checks.read_count(name, "update_iter_interval", update_iter_interval)
        _checks.check_choice(name, "variant", variant, VARIANTS)
        self.variant = variant
        distributed.resolve_group(name, process_group)
        self.process_group = process_group
        self.max_images = _checks.read_count(name, "max_images", max_images)
        length = _checks.read_count(name, "schedule_length", schedule_length)
        self.register_buffer(self.value_name, torch.tensor(first_value, dtype=torch.float64))
        for counter in ("num_steps", "num_recorded", "num_updates"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64))
        self.register_buffer("schedule_steps", torch.zeros(length, dtype=torch.int64))
        self.register_buffer("schedule_values", torch.zeros(length, dtype=torch.float64))

    def schedule(self) -> Schedule:
        """Every update so far, oldest first: the steps taken by then (steps that were not finite do not count) and the new value, which may
        be the old one. The last `schedule_length` of them. Waits for the device."""
        count, length = int(self.num_updates), len(self.schedule_steps)
        places = [i % length for i in range(max(0, count - length), count)]
        return Schedule(self.schedule_steps.cpu()[places].clone(), self.schedule_values.cpu()[places].clone())

    def _group(self) -> "dist.ProcessGroup | None":
        return distributed.resolve_group(type(self).__name__, self.process_group)

    def _check_images(self, num_images: int) -> None:
        if self._group() is not None and num_images > self.max_images:
            raise ValueError(
                f"{type(self).__name__}: max_images must be at least the images of every process in a step, {num_images}, "
                f"got {self.max_images}"
            )

    def _kth_smallest(self, values: Tensor, counts: Tensor, num_images: int) -> Statistic:
        """The min(topk * images, how many count)-th smallest of `values` (float64 [N]) where `counts` (bool [N]), of the whole group."""
        group = self._group()
        is_broken = (counts & ~values.isfinite()).any()
        values = torch.where(counts & values.isfinite(), values, torch.inf)
        most = self.topk * (num_images if group is None else self.max_images * distributed.world_size(group))
        smallest = values.topk(min(most, len(values)), largest=False).values
        # Images, numbers that count, whether any of them is not finite.
        found = torch.stack([torch.full_like(is_broken, num_images, dtype=torch.float64), counts.sum().double(), is_broken.double()])
        if group is not None:
            padded = pad(smallest, (0, most - len(smallest)), value=torch.inf)
            rows = distributed.gather_equal(torch.cat([found, padded]), group)
            found, smallest = rows[:, :3].sum(0), rows[:, 3:].flatten().sort().values
        images, available, broken = found.unbind()
        place = torch.minimum(self.topk * images, available).long() - 1
        # Of nothing: any value.
        kth = pad(smallest, (0, 1)).index_select(0, place.clamp(min=0)[None])[0]
        return Statistic(torch.where(broken > 0, torch.nan, kth), available > 0)

    @torch.no_grad()
    def _advance(self, statistic: Statistic) -> None:
        """Takes the step whose statistic this is."""
        is_finite = statistic.value.isfinite() | ~statistic.exists
        records = is_finite & statistic.exists
        self._record(statistic.value, records)
        recorded, steps = self.num_recorded + records, self.num_steps + is_finite
        ends = (steps % self.update_iter_interval == 0) & (is_finite if self.variant == "mmdet" else records)
        old = getattr(self, self.value_name)
        found, is_usable = self._summary(recorded)
        value = torch.where(ends & is_usable, found, old)

        place = torch.arange(len(self.schedule_steps), device=steps.device) == self.num_updates % len(self.schedule_steps)
        store(self.schedule_steps, torch.where(place & ends, steps, self.schedule_steps))
        store(self.schedule_values, torch.where(place & ends, value, self.schedule_values))
        store(self.num_updates, self.num_updates + ends)
        store(self.num_steps, steps)
        store(self.num_recorded, torch.where(ends, 0, recorded))
        store(old, value)
        self._clear(ends)

    def _record(self, value: Tensor, records: Tensor) -> None:
        """Puts `value` into the window where `records`; `num_recorded` is what it held."""
        raise NotImplementedError

    def _summary(self, recorded: Tensor) -> tuple[Tensor, Tensor]:
        """The new value by a window of `recorded` entries, and whether there is one."""
        raise NotImplementedError

    def _clear(self, ends: Tensor) -> None:
        """Empties the window where `ends`."""

    def _shown(self) -> dict[str, object]:
        shown = {"update_iter_interval": self.update_iter_interval, "variant": self.variant}
        if self.process_group is not None:
            shown |= {"process_group": distributed.describe_group(self.process_group), "max_images": self.max_images}
        return shown

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
