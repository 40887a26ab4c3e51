"""What the swap_in_* programs share: frameworks made importable on a CPU, and the time of a step and of the loss in it."""
