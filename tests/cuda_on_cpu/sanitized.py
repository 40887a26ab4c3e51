"""Runs the emulated CUDA backend under address and undefined-behaviour sanitizers; a program, as they must be loaded first.

`python sanitized.py past_the_end`, or `past_the_table`: instead a kernel that writes behind the end of a buffer, or of its shared
memory, which must be reported.
"""
import ctypes
import itertools
import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from cuda_on_cpu.build import compile_library, load_emulated_cuda  # noqa: E402


def plant(fault: str) -> None:
    library = ctypes.CDLL(str(compile_library("faults", [HERE / "faults.cu"], sanitize=True)))
    out = torch.zeros(40, dtype=torch.int32)
    getattr(library, fault)(ctypes.c_void_p(out.data_ptr()), out.numel(), ctypes.create_string_buffer(256))


def pipeline(logits, targets, quality, capacity, background_first, delta, segments=None, num_segments=1, maps=False) -> None:
    ops = torch.ops.rsloss_kernels
    positives, negatives, counts = ops.ranking_collect.cuda(
        logits, targets, quality, segments, num_segments, capacity, maps, background_first
    )
    # One record of another process; its index is never an address.
    if capacity > 0:
        positives[3, 0] = -5e9
    ranked, bins = ops.ranking_bin.cuda(logits, negatives, positives, counts, segments, num_segments, delta)
    shared = (logits, negatives, ranked, counts, bins, segments, num_segments, delta, 1.0)
    *_, gradients, lines = ops.average_precision_finalize.cuda(*shared, True)
    *_, gradients, lines = ops.alrp_finalize.cuda(*shared)
    ranking, sorting, gradients, lines = ops.rank_sort_finalize.cuda(*shared, False)
    results = ops.ranking_backward.cuda(
        logits, negatives, gradients, lines, counts, segments, num_segments, ranking, sorting
    )
    assert all(result.shape == level.shape for result, level in zip(results, logits, strict=True))
    # Tables that no operator made: any result, no access outside of them.
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(table.shape, generator=generator, dtype=torch.float64) * 20 for table in (ranked, gradients, lines)]
    shared = (logits, negatives, noise[0], counts, bins, segments, num_segments, delta, 1.0)
    ops.average_precision_finalize.cuda(*shared, True)
    ops.alrp_finalize.cuda(*shared)
    ops.rank_sort_finalize.cuda(*shared, False)
    ops.ranking_bin.cuda(logits, negatives, noise[0], counts, segments, num_segments, delta)
    ops.ranking_backward.cuda(logits, negatives, *noise[1:], counts, segments, num_segments, ranking, sorting)


def harmonizing(preds, targets, weights, bins, mu, background_first=False) -> None:
    ops = torch.ops.rsloss_kernels
    histogram = ops.ghm_histogram.cuda(preds, targets, weights, bins, mu, background_first)
    state = torch.rand(bins), torch.zeros(bins, dtype=torch.int64)
    shared = (bins, mu, background_first)
    ops.ghm_finalize.cuda(preds, targets, weights, histogram, None, None, *shared, 0.0, True, 1.0)
    loss, *_, bin_weights = ops.ghm_finalize.cuda(preds, targets, weights, histogram, *state, *shared, 0.75, False, 2.0)
    ops.ghm_forward.cuda(preds, targets, weights, *state, *shared, 0.75, False)
    results = ops.ghm_backward.cuda(preds, targets, weights, bin_weights, loss, mu, background_first)
    assert all(result.shape == pred.shape for result, pred in zip(results, preds, strict=True))


def harmonize_all(generator: torch.Generator) -> None:
    """Every type of predictions, targets and weights, rows shorter and longer than a thread's elements, ends inside of them."""
    half, single, double = torch.float16, torch.float32, torch.float64
    types = [(half, single, double), (torch.bfloat16, torch.bfloat16, half), (single, half, torch.bfloat16)]
    types += [(single, single, single), (single, double, double), (double, double, single)]
    shapes = [(0, 3), (1, 1), (70, 3), (257, 1), (40, 81)]
    for bins, offset in ((1, 0), (10, 1), (256, 3)):
        for pred_type, target_type, weight_type in types:

            def numbers(shape, type_, scale=1.0, offset=offset):
                flat = torch.randn(torch.Size(shape).numel() + offset, generator=generator, dtype=torch.float64)[offset:] * scale
                # `clone` ends the buffer where the data ends.
                return (flat.to(type_) if offset else flat.to(type_).clone()).view(shape)

            preds = [numbers(shape, pred_type, 4) for shape in shapes]
            preds[2][0] = torch.tensor([torch.inf, -torch.inf, torch.nan])
            soft = [numbers(shape, target_type).clamp(0, 1) for shape in shapes]
            soft[4][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            by_element, by_row = [numbers(shape, weight_type) for shape in shapes], [numbers(shape[:1], weight_type) for shape in shapes]
            labels = [torch.randint(-2, shape[1] + 3, shape[:1], generator=generator) for shape in shapes]
            labels[2], labels[4][:2] = labels[2].int(), torch.tensor([2**63 - 1, -(2**63)])
            for weights in ([], by_element, by_row):
                harmonizing(preds, soft, weights, bins, None)
                harmonizing(preds, labels, weights, bins, None, background_first=offset == 1)
            maps = [numbers(shape, pred_type, 4) for shape in ((2, 6, 7, 9), (1, 3, 0), (1, 6, 1), (3, 3, 130))]
            rows = [(pred.shape[0], pred.shape[1] // 3, *pred.shape[2:]) for pred in maps]
            of_maps = [torch.randint(-2, 6, row, generator=generator) for row in rows]
            harmonizing(maps, of_maps, [numbers(row, weight_type) for row in rows], bins, None, background_first=offset == 1)
            harmonizing(preds, soft, by_element, bins, 0.02)
            harmonizing(preds, soft, [], bins, 1e30)


def focal(generator: torch.Generator) -> None:
    """Every layout and type, classes that fill no quad, ends inside of quads, labels and targets that mean nothing."""
    ops = torch.ops.rsloss_kernels
    half, single, double = torch.float16, torch.float32, torch.float64
    layouts = [([(70, 8), (0, 8), (1, 8)], False, 8), ([(41, 3)], False, 3), ([(3, 301)], False, 301), ([(257, 1)], False, 1)]
    layouts += [([(2, 9, 5, 3), (1, 6, 1, 1)], True, 3), ([(1, 20, 8)], True, 20)]
    types = [(single, single), (half, single), (torch.bfloat16, half), (single, double), (double, double)]
    for ((shapes, maps, classes), (logits_type, other_type)), offset in itertools.product(itertools.product(layouts, types), (0, 1)):

        def numbers(shape, dtype, scale=1.0, offset=offset):
            flat = torch.randn(torch.Size(shape).numel() + offset, generator=generator, dtype=double)[offset:] * scale
            return (flat.to(dtype) if offset else flat.to(dtype).clone()).view(shape)

        rows = [(shape[0], shape[1] // classes, *shape[2:]) if maps else shape[:-1] for shape in shapes]
        logits = [numbers(shape, logits_type, 6) for shape in shapes]
        logits[0].view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        labels = [torch.randint(-2, classes + 3, row, generator=generator) for row in rows]
        labels[0].view(-1)[:2] = torch.tensor([2**63 - 1, -(2**63)])
        dense = [numbers(shape, other_type).clamp(-0.1, 1) for shape in shapes]
        dense[0].view(-1)[:2] = torch.tensor([torch.nan, torch.inf])
        by_row, by_element = [numbers(row, other_type) for row in rows], [numbers(shape, other_type) for shape in shapes]
        table = torch.rand((3, classes), generator=generator, dtype=double)
        if offset:
            table[0] = 2
        cases = [(labels, [], []), (labels, by_row, by_row), (dense, [], by_element)]
        for modulator, (targets, qualities, weights) in enumerate(cases):
            arguments = (logits, targets, qualities, weights, table, None)
            options = (modulator, maps, offset == 1, 1, 2.0)
            for class_sums in (False, True):
                ops.focal_forward.cuda(*arguments, *options, class_sums)
            losses = ops.focal_elements.cuda(*arguments, *options)
            ops.focal_backward.cuda(*arguments, [torch.ones(())], *options)
            results = ops.focal_backward.cuda(*arguments, losses, *options)
            assert all(result.shape == level.shape for result, level in zip(results, logits, strict=True))


def group_softmax(generator: torch.Generator) -> None:
    """Every type; columns that lie in no group, keys that are no numbers, labels that mean nothing, ends inside of a warp's columns."""
    ops = torch.ops.rsloss_kernels
    starts, others, background = [0, 2, 3, 36, 101], [1, -1, 3, 36], 0
    for rows, dtype in itertools.product((0, 1, 9, 1100), (torch.float16, torch.bfloat16, torch.float32, torch.float64)):
        if rows == 1100 and dtype != torch.float32:
            continue
        logits = (torch.randn((rows, 101), generator=generator) * 9).to(dtype)
        if rows > 1:
            logits[0, 4:7] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        labels = torch.randint(-2, 104, (rows,), generator=generator, dtype=torch.int32 if dtype == torch.float32 else torch.int64)
        if rows > 4 and labels.dtype == torch.int64:
            labels[:2] = torch.tensor([2**63 - 1, -(2**63)])
        columns = torch.randperm(101, generator=generator)[:98].int()
        columns[:3] = torch.tensor([-5, 2**31 - 1, 101], dtype=torch.int32)
        keys = torch.randn((4, rows), generator=generator)
        keys[:, ::3] = torch.nan
        groups = (starts, others)
        for ratio in (0.0, 0.4, torch.inf):
            weights = ops.group_softmax_sample.cuda(labels, columns, keys, *groups, background, True, ratio)
        losses, averages, tables = ops.group_softmax_forward.cuda(logits, labels, columns, weights, *groups, True)
        gradient = ops.group_softmax_backward.cuda(
            logits, labels, columns, weights, averages, tables, losses, *groups, True
        )
        scores = ops.group_softmax_scores.cuda(logits, columns, *groups, background, False)
        assert gradient.shape == logits.shape and scores.shape == (rows, 98)


def smooth_l1(generator: torch.Generator) -> None:
    """Every mix of types, weights of rows and elements, one block and several, ends inside of quads, data that is not aligned."""
    ops = torch.ops.rsloss_kernels
    half, single, double = torch.float16, torch.float32, torch.float64
    shapes = [(0, 3), (1, 1), (70, 3), (257, 1), (5003, 5), (9,)]
    types = [(half, single, double), (torch.bfloat16, torch.bfloat16, half), (single, half, torch.bfloat16), (single, single, single)]
    for shape, kinds, offset in itertools.product(shapes, types + [(double, single, double)], (0, 1)):

        def numbers(shape, dtype, offset=offset):
            flat = torch.randn(torch.Size(shape).numel() + offset, generator=generator, dtype=double)[offset:]
            return (flat.to(dtype) if offset else flat.to(dtype).clone()).view(shape)

        pred, target = (numbers(shape, kind) for kind in kinds[:2])
        pred.view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])[: pred.numel()]
        for weight in (None, numbers(shape, kinds[2]), *([numbers(shape[:-1], kinds[2])] if len(shape) > 1 else [])):
            for beta in (None, numbers((), kinds[2])):
                arguments = (pred, target, weight, beta, beta)
                ops.smooth_l1_forward.cuda(*arguments, 0.4, 1.5)
                (losses,) = ops.smooth_l1_elements.cuda(*arguments, 0.4, 1.5)
                for grad in (losses, torch.ones(())):
                    assert ops.smooth_l1_backward.cuda(*arguments, grad, 0.4, 1.5).shape == pred.shape


def main() -> None:
    load_emulated_cuda(sanitize=True)
    generator = torch.Generator().manual_seed(0)
    harmonize_all(generator)
    focal(generator)
    group_softmax(generator)
    smooth_l1(generator)
    half, single, double = torch.float16, torch.float32, torch.float64
    runs = [(single, [0], 0.5, 4), (single, [1], 0.0, 0), (half, [63, 64, 65], 0.5, 5), (single, [63, 64, 65], 0.0, 64)]
    runs += [(torch.bfloat16, [3001], 0.5, 5), (single, [3001], 0.5, 64), (double, [3001], 0.5, 64)]
    for dtype, sizes, delta, capacity in runs:
        # Odd offsets into a larger tensor are not 16-byte aligned; `clone` ends the buffer where the data ends.
        for is_aligned in (True, False):
            logits = [torch.randn(size + 3, generator=generator).to(dtype)[3:] for size in sizes]
            logits = [level.clone() for level in logits] if is_aligned else logits
            targets = [(torch.rand(size, generator=generator) * 20 - 19).clamp(-0.1).to(torch.float32) for size in sizes]
            if sizes[0] > 60:
                logits[0][7], logits[0][8], logits[0][9] = torch.inf, -torch.inf, torch.nan
            pipeline(logits, targets, [], capacity, False, delta)
        rows = [size // 3 for size in sizes]
        boxes = [torch.randn(size, 3, generator=generator).to(dtype) for size in rows]
        labels = [torch.randint(-1, 6, (size,), generator=generator) for size in rows]
        quality = [torch.rand(size, generator=generator).to(dtype) for size in rows]
        capacity = 2000 if dtype == single else 7
        pipeline(boxes, labels, quality, capacity, True, delta)
        by_row = torch.randint(-1, 40, (sum(rows), 1), generator=generator, dtype=torch.int32)
        pipeline(boxes, labels, quality, capacity, True, delta, by_row, 30)
        by_column = torch.tensor([[1, -7, 3]], dtype=torch.int32)
        pipeline(boxes, labels, quality, capacity, True, delta, by_column, 4)
        pipeline(boxes, labels, quality, capacity, True, delta, None, 3)
        shapes = [(2, 6, 7, 9), (1, 3, 0), (1, 3, 1), (1, 3, 65), (3, 3, 31)]
        maps = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        of_maps = [torch.randint(-2, 6, (shape[0], shape[1] // 3, *shape[2:]), generator=generator) for shape in shapes]
        quality = [torch.rand(label.shape, generator=generator) for label in of_maps]
        pipeline(maps, of_maps, quality, capacity, dtype == half, delta, maps=True)
    print("clean")


if __name__ == "__main__":
    plant(sys.argv[1]) if sys.argv[1:] else main()
