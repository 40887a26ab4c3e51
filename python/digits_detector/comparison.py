"""The swap, proved live: the published Rank & Sort loop trains a detector while ours runs on the same logits.

Then ours trains alone from the same seed, and both loss curves are laid over each other.
"""

import dataclasses
import statistics
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.peers.published_loop import published_rank_sort
from digits_detector.data import Canvases
from digits_detector.losses import RankSortDetectionLoss
from digits_detector.training import Settings, Trainer

GRADIENT_LIMIT = 1e-5


@dataclasses.dataclass
class Comparison:
    """`differences`: per step, largest gradient difference over the largest entry of the loop's gradient."""

    differences: list[float]
    loop_loss: list[float]
    our_loss: list[float]
    loop_ms: float
    our_ms: float
    loop_step_ms: float
    our_step_ms: float
    loop_dtype: str

    @property
    def largest_difference(self) -> float:
        return max(self.differences)


def check_gradients(theirs: Tensor, ours: Tensor, step: int, limit: float = GRADIENT_LIMIT) -> float:
    """Largest difference relative to the largest entry of `theirs`; raises `AssertionError` above `limit`, or if it is NaN."""
    largest = float(theirs.abs().max())
    difference = float((theirs - ours).abs().max())
    relative = difference / largest if largest > 0 else difference
    if not relative <= limit:
        raise AssertionError(
            f"step {step}: gradients of the two losses differ by {relative:.3g} of the largest entry, limit {limit:g}"
        )
    return relative


class _SideBySide(nn.Module):
    """The detection loss with the published loop in place of ours; measures both on the same logits and compares their gradients."""

    def __init__(self, own: RankSortDetectionLoss, loop_dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.own = own
        self.loop_dtype = loop_dtype
        self.device = device
        self.differences, self.loop_ms, self.our_ms, self.beside_ms = [], [], [], []

    def forward(self, predictions, assigned):
        giou, quality = self.own.boxes_and_quality(predictions, assigned)
        logits, labels = predictions.logits, assigned.labels
        num_classes = logits.shape[-1]
        one_hot = torch.nn.functional.one_hot(labels, num_classes + 1)[..., :num_classes]
        dense = one_hot.to(self.loop_dtype) * quality[..., None].to(self.loop_dtype)

        wide = logits.detach().to(self.loop_dtype).requires_grad_()
        losses, theirs, loop_ms = self._timed(lambda: published_rank_sort(wide, dense), wide)
        twin = logits.detach().requires_grad_()
        _, ours, our_ms = self._timed(lambda: self.own.classification(twin, labels, quality), twin)
        started = self._clock()
        self.differences.append(check_gradients(theirs, ours.to(theirs.dtype), len(self.differences)))
        self.loop_ms.append(loop_ms)
        self.our_ms.append(our_ms)
        self.beside_ms.append(our_ms + (self._clock() - started) * 1e3)

        ranking, sorting = (loss.detach().to(logits.dtype) for loss in losses)
        box = self.own.box(ranking + sorting, giou, predictions, assigned)
        # Zero in value: it carries the loop's gradient, computed above, to the logits.
        gradient = theirs.to(logits.dtype)
        carrier = (logits * gradient).sum()
        return {"ranking": ranking + (carrier - carrier.detach()), "sorting": sorting, "box": box}

    def _timed(self, function, logits: Tensor):
        started = self._clock()
        losses = function()
        (gradient,) = torch.autograd.grad(sum(losses), logits)
        return losses, gradient, (self._clock() - started) * 1e3

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def compare(
    settings: Settings, steps: int, pool: Canvases, device: str = "cpu", loop_dtype: torch.dtype = torch.float32
) -> Comparison:
    """Trains `steps` steps twice from one seed: with the published loop, watched by ours, and with ours alone."""
    settings = dataclasses.replace(settings, loss="rank_sort", steps=steps)
    with_loop, alone = Trainer(settings, pool, device), Trainer(settings, pool, device)
    both = _SideBySide(with_loop.loss, loop_dtype, with_loop.device)
    with tqdm(range(steps), desc="published loop, ours beside it", unit="step", mininterval=0.5) as bar:
        for step in bar:
            with_loop.train_step(both)
            if step % 10 == 0:
                bar.set_postfix(gradient_difference=f"{max(both.differences):.1e}")
    for _ in tqdm(range(steps), desc="ours alone, same seed", unit="step", mininterval=0.5):
        alone.train_step()

    loop_ms, our_ms = statistics.median(both.loop_ms), statistics.median(both.our_ms)
    # A step of the loop alone: the step that held both, without ours and the check.
    loop_step_ms = statistics.median(
        times.step_ms - extra for times, extra in zip(with_loop.times, both.beside_ms, strict=True)
    )
    return Comparison(
        both.differences,
        _classification(with_loop),
        _classification(alone),
        loop_ms,
        our_ms,
        loop_step_ms,
        statistics.median(times.step_ms for times in alone.times),
        str(loop_dtype).removeprefix("torch."),
    )


def _classification(trainer: Trainer) -> list[float]:
    return [ranking + sorting for ranking, sorting in zip(trainer.curves["ranking"], trainer.curves["sorting"], strict=True)]
