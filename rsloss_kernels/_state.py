"""What modules share: the base of losses that keep state in buffers, which stay in full precision under `.half()` and load
checkpoints of another loss; and the weight of a loss."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import Self


class StatefulLoss(nn.Module):
    """A module whose buffers keep their dtype whatever the model is cast to, and start anew when a checkpoint lacks them.

    Statistics gathered over thousands of steps do not survive 16 bits. A model trained with another loss has no such keys, or
    others under the same name: those are left out, the missing buffers keep their values, and one warning says so.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own_missing: list[str] = []
        own_unexpected: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, own_missing, own_unexpected, error_msgs)
        if strict and (own_missing or own_unexpected):
            parts = ["the checkpoint is of a model with another loss, another mode of it, or none in this place"]
            if own_missing:
                parts.append(f"it has no {', '.join(own_missing)}, which keep the values that they have now")
            if own_unexpected:
                parts.append(f"its {', '.join(own_unexpected)} is left out")
            warnings.warn(f"{type(self).__name__}: {'; '.join(parts)}", stacklevel=2)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a forward may change the module's state: in training mode with gradients enabled."""
    return module.training and torch.is_grad_enabled()


def store(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrites a buffer in place with a value of its shape, outside of autograd."""
    if buffer.dim() == 0:
        # Through a view: torch.compile (2.13) takes a 0-d float64 CPU tensor for a Python number and loses a write to it itself.
        buffer, value = buffer.view(1), value.reshape(1)
    buffer.copy_(value.detach() if value.requires_grad else value)


def weighted(loss: torch.Tensor, loss_weight: float | torch.Tensor) -> torch.Tensor:
    """The loss times its weight. A weight of 1 costs nothing, in forward and backward."""
    return loss if type(loss_weight) in (float, int) and loss_weight == 1 else loss * loss_weight
