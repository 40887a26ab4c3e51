"""The processes of test_distributed.py: four of them, which take the groups of the first 1, 2, 3 and 4 through all cases.

A case is a batch cut into parts along one dimension. Every process evaluates its part with the group and returns what it got; the
first one also evaluates the whole batch without a group, and the test compares.
"""

import contextlib
import copy
import dataclasses
import datetime
import os
import pathlib
import traceback

import harness
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rsloss_kernels
from rsloss_kernels import (
    RankSortLoss,
    SelfBalancing,
    alrp_loss,
    alrp_regression_loss,
    average_precision_loss,
    distributed,
    rank_sort_loss,
    score_weighted_mean,
    score_weights,
)

WORLDS = (1, 2, 3, 4)
# A run of other backends alone collects this file too.
BACKENDS = [name for name in ("cpp", "reference") if name in {b.name for b in harness.backends_under_test()}] or ["reference"]
SPLITS = ("even", "uneven", "empty", "no_positives")
ROWS, CLASSES, CHUNKS, CAPACITY = 60, 5, 3, 128
UPSTREAM = (1.0, 0.5)
SHARES = (1, 5, 2, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    loss: str
    backend: str
    form: str = "index"
    dtype: torch.dtype = torch.float32
    split: str = "uneven"
    segments: str | None = None
    regression: str = "rows"  # of aLRP: a value per row, or per positive in "flat" order
    nan: str | None = None
    max_positives: int | None = CAPACITY
    average: bool = False
    rows: int = ROWS

    @property
    def name(self) -> str:
        words = [self.loss, self.backend, self.form, str(self.dtype).removeprefix("torch."), self.split]
        words += [f"segments_{self.segments}"] * (self.segments is not None)
        words += [self.regression] * (self.loss == "alrp") + [f"nan_{self.nan}"] * (self.nan is not None)
        words += ["default_capacity"] * (self.max_positives is None)
        words += [f"{self.rows}_rows"] * (self.rows != ROWS)
        words += [f"capacity_{self.max_positives}"] * (self.max_positives not in (None, CAPACITY)) + ["average"] * self.average
        return "-".join(words)


def _cases():
    for backend in BACKENDS:
        for loss in ("rank_sort", "ap", "alrp"):
            for form in ("dense", "index"):
                for dtype in (torch.float32, torch.float64, torch.bfloat16):
                    for regression in ("flat", "rows") if loss == "alrp" and form == "index" else ("flat",):
                        yield Case(loss, backend, form, dtype, regression=regression)
            for split in SPLITS:
                if split != "uneven":
                    yield Case(loss, backend, split=split)
            yield Case(loss, backend, max_positives=None)
            # What a backend chooses by the number of elements (16-bit logits are counted by value) must not depend on the split.
            yield Case(loss, backend, "index", torch.bfloat16, "even", max_positives=1 << 15, rows=60_000)
            yield Case(loss, backend, average=True)
            yield Case(loss, backend, nan="negative")
            yield Case(loss, backend, nan="positive")
            if loss != "alrp":
                for segments in ("ids", "chunks", "class"):
                    yield Case(loss, backend, segments=segments)


CASES = {case.name: case for case in _cases()}
BY_NAME = Case("rank_sort", BACKENDS[0])  # with the group of all processes given as "default"
OVERFLOWS = {case.name: case for case in (Case(loss, BACKENDS[0], max_positives=1) for loss in ("rank_sort", "ap", "alrp"))}


@dataclasses.dataclass
class Batch:
    logits: Tensor  # [R, C], or [chunks, R, C]
    labels: Tensor  # of the rows
    quality: Tensor  # of the rows
    ids: Tensor  # of the rows
    form: str
    num_classes: int = CLASSES

    @property
    def is_positive(self) -> Tensor:
        return (self.labels >= 0) & (self.labels < self.num_classes)

    @property
    def dense(self) -> Tensor:
        targets = torch.zeros(self.logits.shape)
        rows = self.is_positive
        targets[rows] = nn.functional.one_hot(self.labels[rows], self.num_classes) * self.quality[rows][:, None]
        targets[self.labels < 0] = -1
        return targets

    def part(self, dim: int, first: int, size: int) -> "Batch":
        cut = {name: getattr(self, name).narrow(dim, first, size) for name in ("logits", "labels", "quality", "ids")}
        return dataclasses.replace(self, **cut)


def draw(case: Case, seed: int) -> Batch:
    generator = harness.generator(seed, f"{case.form} {case.segments} {case.split} {case.nan}")
    shape = (CHUNKS, case.rows) if case.segments == "chunks" else (case.rows,)
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.6] = CLASSES
    labels[torch.rand(shape, generator=generator) < 0.1] = -1
    if case.split == "no_positives":
        labels[..., : 3 * case.rows // 4] = CLASSES
    labels[..., -1] = 2
    logits = 1.5 * torch.randn((*shape, CLASSES), generator=generator, dtype=torch.float64) - 1
    logits[..., -1, 2] = logits[..., -1, 2] if case.nan != "positive" else torch.inf
    if case.nan == "negative":
        logits[..., -1, 0] = torch.nan
    quality = torch.rand(shape, generator=generator) * 0.9 + 0.1
    ids = torch.randint(-1, 4, shape, generator=generator)
    return Batch(logits.to(case.dtype), labels, quality, ids, case.form)


def sizes(split: str, world: int, rows: int = ROWS) -> list[int]:
    shares = {"uneven": SHARES, "empty": (0, *SHARES)}.get(split, (1,) * world)[:world] if world > 1 else (1,)
    bounds = [rows * sum(shares[:rank]) // sum(shares) for rank in range(world + 1)]
    return [last - first for first, last in zip(bounds, bounds[1:], strict=False)]


def own_part(case: Case, batch: Batch, group, split: str | None = None) -> Batch:
    lengths = sizes(split or case.split, dist.get_world_size(group), case.rows)
    rank = dist.get_rank(group)
    return batch.part(1 if case.segments == "chunks" else 0, sum(lengths[:rank]), lengths[rank])


def evaluate(case: Case, batch: Batch, group: object | None = None) -> dict[str, object]:
    """Losses and gradients of a batch, or of a part of it with a group."""
    logits = batch.logits.detach().clone().requires_grad_()
    options = {"process_group": group, "average_gradients": case.average}
    shared = dict(options)
    if case.segments is not None:
        shared["segments"] = {"ids": batch.ids, "chunks": CHUNKS, "class": "class"}[case.segments]
        shared["num_segments"] = 4 if case.segments == "ids" else None
    if group is not None:
        shared["max_positives"] = case.max_positives
    targets = batch.labels if case.form == "index" else batch.dense
    result = {}
    with rsloss_kernels.use_backend(case.backend):
        if case.loss == "rank_sort":
            losses = rank_sort_loss(logits, targets, batch.quality if case.form == "index" else None, **shared)
        elif case.loss == "ap":
            losses = (average_precision_loss(logits, targets, **shared),)
        else:
            regression = batch.quality if case.regression == "rows" else batch.quality[batch.is_positive]
            regression = regression.detach().clone().requires_grad_()
            classification, rank, order = alrp_loss(logits, targets, regression, **shared)
            box = alrp_regression_loss(regression, rank, order, **options)
            losses = (classification, box)
            result["rank"] = rank
    sum(factor * loss for factor, loss in zip(UPSTREAM, losses, strict=False)).backward()
    if case.loss == "alrp":
        result["regression_gradient"] = regression.grad
    return {"losses": [loss.detach() for loss in losses], "gradient": logits.grad, **result}


def caught(call) -> str:
    """What a call raised, as text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def mismatches(group) -> dict[str, str]:
    """Calls that differ from process to process, which must fail on all; after each the group is as good as before."""
    rank = dist.get_rank(group)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 3])

    def call(logits=logits, labels=labels, **options):
        options = {"max_positives": 8, **options}
        return rank_sort_loss(logits, labels, process_group=group, **options)

    found = {
        "dtype": caught(lambda: call(logits.double() if rank == 1 else logits)),
        "capacity": caught(lambda: call(max_positives=8 + rank)),
        "delta": caught(lambda: call(delta=0.5 + rank)),
        "segments": caught(lambda: call(segments=1 if rank == 0 else 2)),
    }
    with debug_checks():
        found["overflow"] = caught(lambda: call(labels=labels if rank == 1 else labels.clamp(min=3), max_positives=2))
    found["afterwards"] = caught(call)
    return found


def graph_mismatch(group) -> dict[str, object]:
    """In a graph, as on a GPU, nothing can be read on the host: processes of different dtypes all get an overflow.

    What those check before is the first capacity of a group.
    """
    rank, labels = dist.get_rank(group), torch.tensor([0, 1, 2, 3, 3, 3])
    logits = torch.randn(6, 3, dtype=torch.float64 if rank == 1 else torch.float32, requires_grad=True)

    def call(logits):
        return rank_sort_loss(logits, labels, max_positives=8, process_group=group)

    losses = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    names = ("the dtype of logits", "max_positives")

    def agree(capacity, group=group):
        distributed._agree("f", torch.tensor([1.0, 2.0, 18.0, 2.0, capacity], dtype=torch.float64), capacity, group, names)

    return {
        "losses": [loss.detach() for loss in losses],
        "gradient": torch.autograd.grad(sum(losses), logits)[0],
        "first": caught(lambda: agree(8 + rank)),
        "equal": caught(lambda: agree(8)),
        # Known by now: no collective, so that one process alone can ask.
        "again": caught(lambda: agree(8)) if rank == 0 else "not asked",
    }


@contextlib.contextmanager
def debug_checks():
    os.environ["RSLOSS_DEBUG_CHECKS"] = "1"
    try:
        yield
    finally:
        del os.environ["RSLOSS_DEBUG_CHECKS"]


class Detector(nn.Module):
    """Class logits and one box value per row, from features; its loss is that of a detector trained with Rank & Sort."""

    def __init__(self, group: object | None, average: bool):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(7, 16, dtype=torch.float64)
        self.classify = nn.Linear(16, CLASSES, dtype=torch.float64)
        self.regress = nn.Linear(16, 1, dtype=torch.float64)
        self.options = {"process_group": group, "average_gradients": average}
        self.ranking = RankSortLoss(max_positives=CAPACITY if group is not None else None, **self.options)
        self.balancing = SelfBalancing(process_group=group)

    def forward(self, features: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        hidden = self.trunk(features).tanh()
        logits, boxes = self.classify(hidden), self.regress(hidden).squeeze(-1)
        ranking, sorting = self.ranking(logits, labels, quality)
        errors = (boxes - quality.double()).abs()
        box = score_weighted_mean(errors, score_weights(logits, labels), **self.options)
        return ranking + sorting + self.balancing(ranking + sorting, box)


def training_step(group, seed: int, how: str) -> dict[str, object]:
    """A step of gradient descent on the part of this process. `how`: "ddp", "sum" (a reducer that sums) or "alone" (the whole)."""
    case = Case("rank_sort", BACKENDS[0])
    whole = draw(case, seed)
    features = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    part = whole if how == "alone" else own_part(case, whole, group)
    first = 0 if how == "alone" else sum(sizes(case.split, dist.get_world_size(group))[: dist.get_rank(group)])
    model = Detector(None if how == "alone" else group, average=how == "ddp")
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group) if how == "ddp" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = wrapped(features[first : first + len(part.labels)], part.labels, part.quality)
        loss.backward()
        if how == "sum":
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
    # A reducer that outlives its group can hang when the process ends.
    del wrapped
    return {"loss": loss.detach(), "state": copy.deepcopy(model.state_dict())}


def balance(group) -> dict[str, list]:
    """Factors and state of self-balancing with losses that differ between the processes, one of them not finite in one step."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    result = {}
    for mode in ("step", "running"):
        period = {"period": 3} if mode == "running" else {}
        together, alone = SelfBalancing(mode, process_group=group, **period), SelfBalancing(mode, **period)
        steps = []
        for step in range(8):
            pairs = [(1.0 + step + other, 0.5 + (step * other) % 3) for other in range(world)]
            if step == 4:
                pairs[-1] = (1.0, float("nan"))
            reference, value = (torch.tensor(number, dtype=torch.float64) for number in pairs[rank])
            means = torch.tensor(pairs, dtype=torch.float64).mean(0)
            scaled = together(reference, value.requires_grad_())
            alone(*means)
            factor = torch.autograd.grad(scaled, value)[0]
            steps.append((factor, copy.deepcopy(together.state_dict()), copy.deepcopy(alone.state_dict())))
        result[mode] = steps
    return result


def compiled(group, seed: int) -> dict[str, object]:
    case = Case("rank_sort", BACKENDS[0], form="dense")
    part = own_part(case, draw(case, seed), group)
    targets = part.dense

    def call(logits):
        return rank_sort_loss(logits, targets, max_positives=CAPACITY, process_group=group, average_gradients=False)

    logits = part.logits.clone().requires_grad_()
    losses = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    sum(factor * loss for factor, loss in zip(UPSTREAM, losses, strict=True)).backward()
    return {"losses": [loss.detach() for loss in losses], "gradient": logits.grad}


def weighted_mean(group, seed: int) -> dict[str, object]:
    """A weighted mean over the group with garbage where the weight is 0, and one of nothing; value and gradient."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(ROWS, generator=generator)
    weights = torch.rand(ROWS, generator=generator) * (torch.rand(ROWS, generator=generator) < 0.5)
    losses[weights == 0] = torch.nan
    lengths, rank = sizes("empty", dist.get_world_size(group)), dist.get_rank(group)
    cut = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    result = {}
    for name, values, factors, own in (
        ("together", losses[cut], weights[cut], {"process_group": group, "average_gradients": False}),
        ("average", losses[cut], weights[cut], {"process_group": group}),
        ("whole", losses, weights, {}),
        ("zero", losses[cut], torch.zeros_like(losses[cut]), {"process_group": group}),
    ):
        leaf = values.clone().requires_grad_()
        mean = score_weighted_mean(leaf, factors, **own)
        result[name] = (mean.detach(), torch.autograd.grad(mean, leaf)[0])
    return result


def come_late(group) -> str:
    """All but the last process call a loss; the last one never comes."""
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        return "absent"
    return caught(lambda: rank_sort_loss(torch.randn(4, 2), torch.tensor([0, 1, 2, 2]), max_positives=4, process_group=group))


def copies(group) -> bool:
    module = copy.deepcopy(nn.Sequential(SelfBalancing(process_group=group), RankSortLoss(process_group=group)))
    return all(part.process_group is group for part in module)


def wrong_number_of_regression_losses(group) -> dict[str, object]:
    """On the last process alone: it must not raise, the others would wait for it."""
    logits = torch.zeros(4, requires_grad=True)
    own = 2 if dist.get_rank(group) == dist.get_world_size(group) - 1 else 1
    losses = alrp_loss(logits, torch.tensor([1.0, 0, 0, 0]), torch.ones(own), process_group=group)
    losses.classification.backward()
    return {"losses": [losses.classification.detach()], "gradient": logits.grad}


def outside(group) -> str:
    """What a process that is not in the group is told."""
    try:
        rank_sort_loss(torch.zeros(2), torch.zeros(2), process_group=group)
    except TypeError as error:
        return str(error)
    return "nothing was raised"


def work(rank: int, world: int, folder: str, seed: int) -> None:
    """One process: writes its results, or the traceback of what stopped it, to a file."""
    torch.set_num_threads(1)
    path = pathlib.Path(folder) / f"{rank}.pt"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=300)
    )
    try:
        results = {}
        for size in WORLDS:
            group = dist.new_group(list(range(size)), timeout=datetime.timedelta(seconds=300))
            if rank < size:
                results[size] = _all_results(group, seed)
            else:
                results["outside"] = outside(group)
        results["default"] = evaluate(BY_NAME, own_part(BY_NAME, draw(BY_NAME, seed), dist.group.WORLD), "default")
        impatient = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
        results["late"] = come_late(impatient) if rank < 2 else None
        torch.save(results, path)
        dist.barrier()
    except BaseException:
        path.with_suffix(".failed").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def _all_results(group, seed: int) -> dict:
    import distributed_dynamic
    import distributed_equalized  # which import this file
    import distributed_ghm
    import distributed_maps
    import distributed_seesaw
    import distributed_survival

    results = {"ghm": distributed_ghm.all_results(group, seed), "equalized": distributed_equalized.all_results(group, seed)}
    results["seesaw"] = distributed_seesaw.all_results(group)
    results["dynamic"] = distributed_dynamic.all_results(group)
    results["maps"] = distributed_maps.all_results(group, seed)
    if dist.get_world_size(group) == 2:
        results["survival"] = distributed_survival.all_results(group, seed)
    for name, case in {**CASES, **OVERFLOWS}.items():
        batch = draw(case, seed)
        try:
            results[name] = evaluate(case, own_part(case, batch, group), group)
            if dist.get_rank(group) == 0:
                results[name, "whole"] = evaluate(case, batch)
        except (RuntimeError, TypeError, ValueError):
            # What fails on every process alike is a failure of that case alone.
            results[name] = {"error": traceback.format_exc()}
    results["mismatches"] = mismatches(group)
    for how in ("ddp", "sum", "alone"):
        results["step", how] = training_step(group, seed, how)
    results["balancing"] = balance(group)
    results["mean"] = weighted_mean(group, seed)
    results["copies"] = copies(group)
    results["repr"] = repr(RankSortLoss(process_group=group))
    results["wrong number"] = wrong_number_of_regression_losses(group)
    if dist.get_world_size(group) == 2:
        results["compiled"] = compiled(group, seed)
        results["graph_mismatch"] = graph_mismatch(group)
    results["rows"] = distributed.gather_rows("test", torch.arange(dist.get_rank(group), dtype=torch.float64), group)
    return results
