"""Every loss with several threads inside each call, and from two Python threads at a time: what a sanitizer of threads looks at.

Takes the folder of the package whose library it must be. Prints "done" at the end. Sizes give each pass several tasks; ragged ones make
neighbours share cache lines.
"""
import pathlib
import sys
import threading
from collections.abc import Callable

import torch

import rsloss_kernels as r

THREADS = 4
ROWS, CLASSES = 2003, 80  # 160,240 elements: nine of the smallest parts


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    logits = normal(generator, ROWS, CLASSES) - 4
    labels = torch.where(torch.rand(ROWS, generator=generator) < 0.1, torch.randint(0, CLASSES, (ROWS,), generator=generator), CLASSES)
    return logits, labels, generator


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Rounded from float64: float32 has other normal numbers on every kind of processor."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64).float()


def calls(seed: int) -> dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """name -> (logits, loss of them, 0-d or of each)."""
    logits, labels, generator = inputs(seed)
    quality = torch.rand(ROWS, generator=generator)
    dense = torch.nn.functional.one_hot(labels, CLASSES + 1)[:, :CLASSES].float()
    state = torch.rand(CLASSES, generator=generator)
    groups = r.ClassGroups.from_counts(torch.arange(1, CLASSES + 1) * 20)
    grouped = normal(generator, ROWS, groups.num_logits)
    images, counts = torch.arange(ROWS) % 7, torch.rand(CLASSES + 1, generator=generator).double() * 100
    # Levels of a head, ragged, two anchors, some rows ignored.
    sides = ((37, 41), (19, 5))
    maps = normal(generator, 2 * 2 * CLASSES * sum(a * b for a, b in sides)) - 4
    map_labels = torch.randint(-1, CLASSES + 1, (2, 2 * sum(a * b for a, b in sides)), generator=generator)
    map_labels[torch.rand(map_labels.shape, generator=generator) < 0.9] = CLASSES

    def of_maps(loss):
        def call(flat: torch.Tensor) -> torch.Tensor:
            parts = flat.split([4 * CLASSES * a * b for a, b in sides])
            levels = [part.view(2, 2 * CLASSES, a, b) for part, (a, b) in zip(parts, sides, strict=True)]
            return loss(levels, map_labels, layout="anchor_major", num_classes=CLASSES)

        return maps, call

    def of_groups(x: torch.Tensor) -> torch.Tensor:
        keys = torch.Generator().manual_seed(seed)
        return r.group_softmax_loss(x, (labels + 1) % (CLASSES + 1), groups, generator=keys).sum()

    # By the bits of 16-bit logits, from a quarter of a million elements on; many positives.
    chance = torch.rand(300_000, generator=generator)
    many, many_targets = normal(generator, 300_000), torch.rand(40_000, generator=generator).round()
    many_qualities = (chance - 0.99).clamp(min=0)
    # Sums of so many classes that tasks share them out.
    of_classes = torch.Generator().manual_seed(seed)
    of_many_classes, many_state = normal(of_classes, 300, 1203) - 4, torch.rand(1203, generator=of_classes)
    return {
        "ranking, maps": of_maps(lambda *given, **options: sum(r.rank_sort_loss(*given, **options))),
        "GHM-C, maps": of_maps(r.ghm_classification_loss),
        "focal, maps": of_maps(lambda *given, **options: r.sigmoid_focal_loss(*given, reduction="sum", **options)),
        "ranking": (logits, lambda x: sum(r.rank_sort_loss(x, labels, quality))),
        "ranking, dense": (logits, lambda x: sum(r.rank_sort_loss(x, dense))),
        "segments": (logits, lambda x: sum(r.rank_sort_loss(x, labels, quality, segments=images, num_segments=7))),
        "AP": (logits, lambda x: r.average_precision_loss(x, labels)),
        "aLRP": (logits, lambda x: r.alrp_loss(x, labels, quality).classification),
        "GHM-C": (logits, lambda x: r.ghm_classification_loss(x, labels)),
        "GHM-C, dense": (logits, lambda x: r.ghm_classification_loss(x, dense, bins=30)),
        "GHM-R": (logits, lambda x: r.ghm_regression_loss(x, torch.zeros_like(x))),
        "focal": (logits, lambda x: r.sigmoid_focal_loss(x, labels, reduction="sum")),
        "focal, each": (logits, lambda x: r.sigmoid_focal_loss(x, dense, gamma=1.5)),
        "EFL": (logits, lambda x: r.equalized_focal_loss(x, labels, state).loss),
        "group softmax": (grouped, of_groups),
        "Seesaw": (normal(generator, ROWS, CLASSES + 2), lambda x: sum(r.seesaw_loss(x, labels, counts))),
        "smooth L1": (logits, lambda x: r.smooth_l1_loss(x, torch.zeros_like(x), 0.5)),
        "ranking, many": (many, lambda x: sum(r.rank_sort_loss(x, many_qualities))),
        "ranking, many of few exponents": (many - 6, lambda x: sum(r.rank_sort_loss(x, many_qualities))),
        "ranking, many positives": (many[:40_000], lambda x: sum(r.rank_sort_loss(x, many_targets))),
        "EFL, many classes": (of_many_classes, lambda x: r.equalized_focal_loss(x, torch.arange(300) * 4, many_state).loss),
    }


def losses(seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name, (values, loss) in calls(seed).items():
            is_for_16_bits = name in ("ranking, many", "ranking, many of few exponents")
            if (is_for_16_bits and dtype == torch.float32) or (name == "ranking, many positives" and dtype == torch.bfloat16):
                continue
            leaf = values.to(dtype, copy=True).requires_grad_()
            loss(leaf).sum().backward()
            assert leaf.grad is not None and leaf.grad.isfinite().all(), name


def main(package: pathlib.Path) -> None:
    with open("/proc/self/maps") as maps:
        assert str(package.resolve() / "_ops_cpu.so") in maps.read(), "another library is loaded"
    torch.set_num_threads(THREADS)
    losses(0)
    callers = [threading.Thread(target=losses, args=(seed,)) for seed in (1, 2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    print("done")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
