"""The operators of the aLRP loss. The quality of a positive is its regression loss here."""
import torch

from rsloss_kernels import _library
from rsloss_kernels.losses.ranking.op import (
    COUNT_ENTRIES,
    define_loss,
    loss_type,
    make_backward_of,
    mask_bytes,
    save_for_gradient,
    table_shapes,
)

define_loss("alrp", "alrp", "", losses="classification", statistics="rank")

# All steps in one call where the tables are made to measure and one tensor holds the logits, [..., C]: `rank` and `order` come as the
# public function returns them. is_per_row: the regression losses have the shape of class indices, else there is one per positive.
FORWARD_SCHEMA = (
    "(Tensor[] logits, Tensor[] targets, Tensor regression_losses, bool is_per_row, bool background_first, float delta) -> "
    "(Tensor classification, Tensor rank, Tensor order, Tensor negatives, Tensor counts, Tensor gradients, Tensor lines)"
)


def _forward_fake(logits, targets, regression_losses, is_per_row, background_first, delta):
    first = logits[0]
    capacity = torch.library.get_ctx().new_dynamic_size() if is_per_row else regression_losses.numel()
    return (
        first.new_empty((), dtype=loss_type(logits)),
        torch.empty_like(regression_losses, dtype=torch.float64),
        torch.empty_like(regression_losses, dtype=torch.int64),
        first.new_empty((mask_bytes(logits),), dtype=torch.uint8),
        first.new_empty((COUNT_ENTRIES,), dtype=torch.int64),
        *(first.new_empty(shape, dtype=torch.float64) for shape in table_shapes(capacity)),
    )


def _save_for_forward(ctx, inputs, output):
    negatives, counts = output[-4:-2]
    save_for_gradient(ctx, inputs[0], output, negatives, counts, num_losses=1)
    ctx.no_gradients = [[None] * len(inputs[1]), *[None] * (len(inputs) - 2)]


_library.define(
    "alrp",
    "alrp_forward",
    FORWARD_SCHEMA,
    _forward_fake,
    _save_for_forward,
    make_backward_of(1),
    num_tables=4,
    num_saved_tables=4,
    backends=("cpp",),
)
