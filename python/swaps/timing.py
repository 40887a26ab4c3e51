"""The time of a training step and of the losses in it, for programs that swap losses."""
import argparse
import statistics
import time
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import harness


class Variant(NamedTuple):
    """A model with one of the losses that are compared."""

    name: str
    step: Callable[[], object]  # forward, backward and optimiser, on the same batch every time
    losses: tuple[nn.Module, ...]  # called in the step


class Times(NamedTuple):
    """Median milliseconds."""

    name: str
    step: float
    loss: float  # forward and backward of the losses, called as the step calls them

    @property
    def share(self) -> float:
        return self.loss / self.step


def measure(variants: Iterable[Variant], rounds: int = 10, warmup: int = 1) -> list[Times]:
    """Times of all variants, which take turns, so that a load that comes and goes meets them all."""
    variants = list(variants)
    calls = [record(variant) for variant in variants]
    spans = [([], []) for _ in variants]
    for _ in range(warmup):
        for variant in variants:
            variant.step()
    for _ in range(rounds):
        for variant, recorded, (steps, losses) in zip(variants, calls, spans, strict=True):
            steps.append(milliseconds(variant.step))
            losses.append(sum(milliseconds(lambda call=call: replay(*call)) for call in recorded))
    return [Times(variant.name, *map(statistics.median, span)) for variant, span in zip(variants, spans, strict=True)]


def record(variant: Variant) -> list[tuple]:
    """The calls of the losses in one step: module, arguments, keywords."""
    calls, hooks = [], []
    for loss in variant.losses:
        hooks.append(loss.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True))
    variant.step()
    for hook in hooks:
        hook.remove()
    if not calls:
        raise ValueError(f"{variant.name}: the step calls none of its losses")
    return calls


def replay(loss: nn.Module, arguments: tuple, keywords: dict) -> None:
    """One call again, forward and backward. Only the first argument, the predictions, gets a gradient."""
    first, *rest = arguments
    results = loss(leaves(first), *detached(rest), **detached(keywords))
    if isinstance(results, dict):
        results = results.values()
    results = [results] if isinstance(results, Tensor) else results
    sum(value.sum() for value in results if isinstance(value, Tensor) and value.requires_grad).backward()


def leaves(value):
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return type(value)(map(leaves, value))


def detached(value):
    """Tensors in lists, tuples and dictionaries, without their graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return type(value)(map(detached, value)) if isinstance(value, (list, tuple)) else value


def milliseconds(function: Callable[[], object]) -> float:
    """Of one call, on a GPU until it is done."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return 1000 * (time.perf_counter() - start)


def publish(title: str, times: list[Times], settings: argparse.Namespace, name: str, command: str, framework: types.ModuleType) -> None:
    """Prints the table; with `settings.out` also writes it to <name>.md in that folder, and how `command` measured it."""
    text = table(title, times)
    print(text, end="\n\n", flush=True)
    if settings.out:
        machine = f"{harness.machine('cpu')['cpu']}, {torch.get_num_threads()} threads"
        versions = f"torch {torch.__version__}, {framework.__name__} {framework.__version__}"
        settings.out.mkdir(parents=True, exist_ok=True)
        (settings.out / f"{name}.md").write_text(
            f"{text}\n\n{machine}, {versions}; medians of {settings.rounds} rounds in turns. By `{command}`.\n"
        )


def figure(value: float) -> str:
    """Three digits, or all of a whole number."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table(title: str, times: list[Times]) -> str:
    """In Markdown; how many times faster than the first."""
    first = times[0]
    lines = [f"**{title}**", "", "| loss | step, ms | loss in it, ms | share of the step | step | loss |", "|---|---|---|---|---|---|"]
    for row in times:
        quick = f"{figure(first.step / row.step)} x as fast | {figure(first.loss / row.loss)} x as fast" if row is not first else "|"
        lines.append(f"| {row.name} | {figure(row.step)} | {figure(row.loss)} | {100 * row.share:.1f} % | {quick} |")
    return "\n".join(lines)
