"""What the backends written in Python make of the losses of single rows."""
import torch
from torch import Tensor

from rsloss_kernels.losses.focal.arguments import REDUCTIONS

# Sums that are added up apart.
LANES = 64


def reduce_rows(
    losses: Tensor, logits: Tensor, labels: Tensor, reduction: int, avg_factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[2, N] losses -> objectness, classes and what divided them, float64 [2]; `reduction` as REDUCTIONS number it."""
    divisors = losses.new_ones(2)
    if REDUCTIONS[reduction] == "none":
        return losses[0].clone(), losses[1].clone(), divisors
    if avg_factor is not None:
        divisors = divisors * avg_factor
    elif REDUCTIONS[reduction] == "mean":
        is_used = labels >= 0
        divisors = torch.stack([is_used.sum(), (is_used & (labels < logits.shape[1] - 2)).sum()]).clamp(min=1).double()
    # In an order that does not depend on the number of threads.
    padded = torch.nn.functional.pad(losses, (0, -losses.shape[1] % LANES))
    sums = padded.view(2, padded.shape[1] // LANES, LANES).sum(1).sum(1) / divisors
    objectness, classes = sums.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return objectness.clone(), classes.clone(), divisors


def spread_gradients(of_objectness: Tensor | None, of_classes: Tensor | None, divisors: Tensor, rows: int) -> Tensor:
    """Upstream gradients of single rows, float64 [2, N]."""
    parts = [divisors.new_zeros(()) if part is None else part.double() for part in (of_objectness, of_classes)]
    return torch.stack([(part / divisor).expand(rows) for part, divisor in zip(parts, divisors, strict=True)])
