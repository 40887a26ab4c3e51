"""The ranking losses refuse bad input by name, change nothing, and its operators cannot be made to read or write out of bounds."""
import functools
import itertools
import re
import warnings

import harness
import pytest
import rsloss_kernels
import torch
from rsloss_kernels import _library
from samples import LOSSES, RankingSample

INT_MAX = 2**31 - 1


def good(form: str = "index") -> dict:
    """Arguments of Rank & Sort; those of another loss follow from them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((6, 4), generator=generator)
    if form == "dense":
        return {"logits": logits, "targets": (torch.rand((6, 4), generator=generator) - 0.7).clamp(min=0)}
    return {"logits": logits, "targets": torch.tensor([0, 4, 2, 4, -1, 4]), "quality": torch.rand(6, generator=generator)}


def good_for(loss, form: str) -> dict:
    names = ("logits", "targets", loss.third)
    return dict(zip(names, loss.arguments(*good(form).values()), strict=False))


# (form, argument, value from the good arguments, exception, what was wanted, what was got)
FAULTS = {
    "logits_list": ("dense", "logits", lambda a: a["logits"].tolist(), TypeError, "a Tensor", "list"),
    "logits_int64": ("dense", "logits", lambda a: a["logits"].long(), TypeError, "float16", "torch.int64"),
    "logits_bool": ("dense", "logits", lambda a: a["logits"] > 0, TypeError, "float16", "torch.bool"),
    "targets_shape": ("dense", "targets", lambda a: a["targets"][:, :3], ValueError, r"\[6, 4\]", r"\[6, 3\]"),
    "targets_numel": ("dense", "targets", lambda a: a["targets"].flatten(), ValueError, r"\[6, 4\]", r"\[24\]"),
    "targets_complex": ("dense", "targets", lambda a: a["targets"].to(torch.complex64), TypeError, "real", "torch.complex64"),
    "targets_meta": ("dense", "targets", lambda a: a["targets"].to("meta"), ValueError, "device", "meta"),
    "labels_length": ("index", "targets", lambda a: a["targets"][:5], ValueError, r"\[6, 4\]", r"\[5\]"),
    "labels_float": ("index", "targets", lambda a: a["targets"].float(), TypeError, "integers .*class indices", "torch.float32"),
    "labels_bool": ("index", "targets", lambda a: a["targets"] > 0, TypeError, "integers .*class indices", "torch.bool"),
    "quality_int64": ("index", "quality", lambda a: a["quality"].long(), TypeError, "floating", "torch.int64"),
    "quality_shape": ("index", "quality", lambda a: a["quality"][:5], ValueError, r"\[6\]", r"\[5\]"),
    "quality_2d": ("index", "quality", lambda a: a["quality"][:, None], ValueError, r"\[6\]", r"\[6, 1\]"),
    "quality_with_dense": ("dense", "quality", lambda a: a["targets"], ValueError, "None", "Tensor"),
    "delta_too_small": ("index", "delta", lambda a: 1e-31, ValueError, "0 or within", "1e-31"),
    "delta_tensor": ("index", "delta", lambda a: torch.tensor(0.5), TypeError, "float", "Tensor"),
    "background_unknown": ("index", "background", lambda a: "middle", ValueError, "'last', 'first'", "middle"),
    "max_positives_zero": ("index", "max_positives", lambda a: 0, ValueError, "at least 1", "0"),
    "max_positives_float": ("index", "max_positives", lambda a: 2.0, ValueError, "int", "2.0"),
    "group_of_ranks": ("index", "process_group", lambda a: [0, 1], TypeError, "ProcessGroup", r"\[0, 1\]"),
    "group_object": ("index", "process_group", lambda a: torch.nn.Identity(), TypeError, "ProcessGroup", "Identity$"),
}
# Of the modules alone.
WEIGHT_FAULTS = {
    f"loss_weight_{value}": ("index", "loss_weight", lambda a, value=value: value, ValueError, "a finite number", str(value))
    for value in (float("nan"), float("inf"), True, None, "1")
}


def snapshot(arguments: dict) -> list:
    return [(value.clone(), value._version) for value in arguments.values() if isinstance(value, torch.Tensor)]


def assert_unchanged(arguments: dict, before: list) -> None:
    for value, (copy, version) in zip(filter(torch.is_tensor, arguments.values()), before, strict=True):
        assert value._version == version
        assert value.is_meta or torch.equal(value, copy)


# Regression losses may come with dense targets; one per positive is as good as one per row: their number is known on the device only.
NO_FAULT_OF_REGRESSION_LOSSES = ("quality_with_dense", "quality_shape")


def applies(loss, fault: str) -> bool:
    if FAULTS[fault][1] != "quality" or loss.third == "quality":
        return True
    return loss.third is not None and fault not in NO_FAULT_OF_REGRESSION_LOSSES


@pytest.mark.parametrize(
    "loss, fault",
    [
        pytest.param(loss, fault, id=f"{loss.name}-{fault}")
        for loss, fault in itertools.product(LOSSES.values(), FAULTS)
        if applies(loss, fault)
    ],
)
def test_bad_argument_is_refused_by_name(backend, loss, fault):
    form, argument, make, exception, wanted, got = FAULTS[fault]
    if argument == "quality" and loss.third != "quality":
        argument = loss.third
        make_of_quality, make = make, lambda a: make_of_quality(a | {"quality": a["regression_losses"]})
        wanted, got = {"quality_2d": ("one dimension", r"\[6, 1\]")}.get(fault, (wanted, got))
    arguments = good_for(loss, form)
    arguments[argument] = make(arguments)
    arguments = {name: v.to(backend.device) if torch.is_tensor(v) and not v.is_meta else v for name, v in arguments.items()}
    before = snapshot(arguments)
    with rsloss_kernels.use_backend(backend.name), pytest.raises(exception) as raised:
        loss.function(**arguments)
    message = str(raised.value)
    assert re.search(rf"^{loss.function.__name__}: {argument} must .*({wanted}).*, got .*({got})", message), message
    assert_unchanged(arguments, before)


@pytest.mark.parametrize("form", ["dense", "index"])
def test_good_arguments_are_not_changed(backend, loss, form):
    arguments = {name: value.to(backend.device) for name, value in good_for(loss, form).items()}
    arguments["logits"].requires_grad_()
    before = snapshot(arguments)
    with rsloss_kernels.use_backend(backend.name):
        sum(harness.losses_in(loss.function(**arguments))).backward()
    assert_unchanged(arguments, before)


@pytest.mark.parametrize("fault", [name for name in FAULTS | WEIGHT_FAULTS if name.startswith(("delta", "background", "max", "group", "loss"))])
def test_module_refuses_bad_argument_by_name(loss, fault):
    """When it is made, not in the first step of a training run."""
    _, argument, make, exception, wanted, got = (FAULTS | WEIGHT_FAULTS)[fault]
    with pytest.raises(exception, match=rf"^{loss.module.__name__}: {argument} must .*({wanted}).*, got .*({got})"):
        loss.module(**{argument: make({})})


DEBUG_FAULTS = {
    "label_above_classes": ("index", {"targets": torch.tensor([0, 4, 5, 4, -1, 4])}, ValueError, "targets must .* up to 4, got 5"),
    "label_above_first": (
        "index", {"targets": torch.tensor([0, 4, 5, 4, -1, 4]), "background": "first"}, ValueError, "targets must .* up to 4, got 5"
    ),
    "quality_above_1": ("index", {"quality": torch.full((6,), 1.5)}, ValueError, r"quality must .*\[0, 1\].*, got \[1.5, 1.5\]"),
    "quality_negative": ("index", {"quality": torch.full((6,), -0.25)}, ValueError, r"quality must .*\[0, 1\].*, got \[-0.25"),
    "quality_of_one": ("index", {"quality": torch.tensor([0.5, 9, 1.5, 9, 9, 9])}, ValueError, r"quality must .*\[0, 1\].*, got \[0.5, 1.5\]"),
    "quality_nan": ("index", {"quality": torch.full((6,), float("nan"))}, ValueError, r"quality must .*\[0, 1\].*, got \[nan"),
    "smoothed_targets": ("dense", {"targets": torch.full((6, 4), 0.01)}, ValueError, "targets must .* at most half .*, got 24 of 24"),
    "dense_above_1": ("dense", {"targets": torch.eye(6, 4) * 3}, ValueError, "targets must .* at most 1, got 3"),
}


@pytest.mark.parametrize(
    "loss, fault",
    [
        pytest.param(loss, fault, id=f"{loss.name}-{fault}")
        for loss, fault in itertools.product(LOSSES.values(), DEBUG_FAULTS)
        if loss.third == "quality" or "quality" not in DEBUG_FAULTS[fault][1]
    ],
)
def test_debug_checks_refuse_values(backend, loss, monkeypatch, fault):
    form, changed, exception, message = DEBUG_FAULTS[fault]
    logits, targets, quality = (*(good(form) | {name: v for name, v in changed.items() if name != "background"}).values(), None)[:3]
    arguments = [value.to(backend.device) for value in loss.arguments(logits, targets, quality)]
    options = {name: value for name, value in changed.items() if name == "background"}
    with rsloss_kernels.use_backend(backend.name):
        losses = harness.losses_in(loss.function(*arguments, **options))
        assert all(value.isfinite() or fault == "quality_nan" for value in losses)
        monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
        with pytest.raises(exception, match=f"^{loss.function.__name__}: {message}"):
            loss.function(*arguments, **options)


@pytest.mark.parametrize("form", ["dense", "index"])
def test_debug_checks_accept_good_input(backend, loss, monkeypatch, generator, form):
    arguments = loss.draw(RankingSample("debug", 20, 100, form=form, ignored=5), generator).arguments
    expected = loss.evaluate(backend, *arguments)
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    assert loss.evaluate(backend, *arguments) == expected


def test_debug_checks_warn_of_labels_beside_squeezed_logits(monkeypatch):
    """A head of one class: its labels, 0 for an object, would be read as dense targets, 0 for a negative."""
    logits, targets = torch.randn(6), torch.tensor([0, 0, 1, 0, 0, 1])
    cases = {
        "squeezed": (logits, targets),
        "floating": (logits, targets.float()),
        "bool": (logits, targets > 0),
        "one class": (logits[:, None], 1 - targets),
        "one-hot": (logits[:, None], targets[:, None]),
    }
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    for name, arguments in cases.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rsloss_kernels.rank_sort_loss(*arguments)
        told = [str(warning.message) for warning in caught]
        assert len(told) == (name == "squeezed")
        assert all(re.search(r"^rank_sort_loss: targets are integers .* 1 is a positive .* \[6, 1\]", words) for words in told)
        assert all(warning.filename == __file__ for warning in caught)


def test_debug_checks_look_at_the_quality_of_positives_only(backend, monkeypatch):
    """Elsewhere it may be anything: on background and ignored rows, and on rows of no segment."""
    arguments = {name: value.to(backend.device) for name, value in good().items()}
    arguments["quality"][[1, 3, 4]] = torch.tensor([torch.nan, 7.0, -1.0], device=backend.device)
    options = {"segments": torch.tensor([0, 0, -1, 0, 0, 1], device=backend.device), "num_segments": 2}
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    with rsloss_kernels.use_backend(backend.name):
        assert rsloss_kernels.rank_sort_loss(**arguments).ranking > 0
        arguments["quality"][2] = torch.nan
        assert rsloss_kernels.rank_sort_loss(**arguments, **options).ranking > 0
        with pytest.raises(ValueError, match="quality must be within"):
            rsloss_kernels.rank_sort_loss(**arguments)


# --- the operators themselves ---

OPERATOR_ARGUMENTS = {
    "ranking_collect": ["logits", "targets", "quality", "segments", "num_segments", "max_positives", "maps", "background_first"],
    "ranking_bin": ["logits", "negatives", "positives", "counts", "segments", "num_segments", "delta"],
    "rank_sort_finalize": [
        "logits", "negatives", "ranked", "counts", "bins", "segments", "num_segments", "delta", "gradient_scale", "upstream_parity",
    ],
    "average_precision_finalize": [
        "logits", "negatives", "ranked", "counts", "bins", "segments", "num_segments", "delta", "gradient_scale", "interpolated",
    ],
    "alrp_finalize": ["logits", "negatives", "ranked", "counts", "bins", "segments", "num_segments", "delta", "gradient_scale"],  # fmt: skip
    "ranking_backward": [
        "logits", "negatives", "gradients", "lines", "counts", "segments", "num_segments", "grad_first", "grad_second",
    ],  # fmt: skip
}


def operator_arguments(backend, form: str = "index") -> dict:
    """Good arguments of every operator: two feature maps of 70 rows and 9 rows, 12 positives."""
    return dict(_operator_arguments(backend, form))


@functools.cache
def _operator_arguments(backend, form: str) -> dict:
    values = [value for value in RankingSample("operators", 12, 62, 5, form=form).draw(torch.Generator().manual_seed(0)) if value is not None]
    split = [list(value.to(backend.device).split([70, values[1].shape[0] - 70])) for value in values]
    pipeline = LOSSES["rank_sort"].pipeline(backend, *split)
    positives, negatives, counts = pipeline.collect()
    ranked, bins = pipeline.bin(negatives, positives, counts)
    ranking, _, gradients, lines = pipeline.finish(pipeline.logits, negatives, ranked, counts, bins)
    arguments = {
        "logits": pipeline.logits, "targets": pipeline.targets, "quality": pipeline.quality, "positives": positives,
        "negatives": negatives, "counts": counts, "ranked": ranked, "bins": bins, "gradients": gradients, "lines": lines,
        "segments": None, "num_segments": 1, "max_positives": 12, "maps": False, "background_first": False, "delta": 0.5, "gradient_scale": 1.0,
        "upstream_parity": False, "interpolated": True, "grad_first": torch.ones_like(ranking), "grad_second": torch.ones_like(ranking),
    }  # fmt: skip
    for operator in ALL:
        call_operator(backend, operator, arguments)
    return arguments


def call_operator(backend, operator: str, arguments: dict):
    return _library.operator(operator, backend.name)(*[arguments[name] for name in OPERATOR_ARGUMENTS[operator]])


COLLECT, BIN, *FINALIZES, BACKWARD = OPERATOR_ARGUMENTS
ALL = tuple(OPERATOR_ARGUMENTS)
TABLE_FAULTS = {
    "flat": lambda t: t.flatten(),
    "one_row_less": lambda t: t[:-1],
    "one_row_more": lambda t: torch.cat([t, t[:1]]),
    "transposed": lambda t: t.t(),
    "float32": lambda t: t.to(torch.float32),
    "int32": lambda t: t.to(torch.int32),
    "meta": lambda t: t.to("meta"),
    "empty": lambda t: t.new_empty(0),
}
VECTOR_FAULTS = {
    "shorter": lambda t: t[:-1],
    "longer": lambda t: torch.cat([t, t[:1]]),
    "empty": lambda t: t[:0],
    "2d": lambda t: t[None],
    "float64": lambda t: t.double(),
    "int32": lambda t: t.to(torch.int32),
    "meta": lambda t: t.to("meta"),
}


def operator_faults() -> dict[str, tuple[str, str, object]]:
    """name -> (operator, argument, function from the good value to a bad one)"""
    faults = {}

    def add(operators, argument, fault, change):
        for operator in [operators] if isinstance(operators, str) else operators:
            faults[f"{operator}-{argument}-{fault}"] = (operator, argument, change)

    add(ALL, "logits", "none_at_all", lambda levels: [])
    add(ALL, "logits", "int64", lambda levels: [level.long() for level in levels])
    add(ALL, "logits", "mixed_dtypes", lambda levels: [levels[0], levels[1].double()])
    add(ALL, "logits", "mixed_devices", lambda levels: [levels[0], levels[1].to("meta")])
    add(ALL, "logits", "one_level_less", lambda levels: levels[:1])
    add(ALL[1:], "logits", "longer_than_mask", lambda levels: [*levels, levels[0]])
    for argument in ("targets", "quality"):
        add(COLLECT, argument, "one_level_less", lambda levels: levels[:1])
        add(COLLECT, argument, "one_level_more", lambda levels: [*levels, levels[0]])
        add(COLLECT, argument, "fewer_rows", lambda levels: [levels[0][:-1], levels[1]])
        add(COLLECT, argument, "more_rows", lambda levels: [torch.cat([levels[0], levels[0]]), levels[1]])
        add(COLLECT, argument, "swapped", lambda levels: levels[::-1])
        add(COLLECT, argument, "complex", lambda levels: [level.to(torch.complex64) for level in levels])
        add(COLLECT, argument, "meta", lambda levels: [level.to("meta") for level in levels])
    add(COLLECT, "targets", "int16", lambda levels: [level.to(torch.int16) for level in levels])
    add(COLLECT, "quality", "int64", lambda levels: [level.long() for level in levels])
    add(COLLECT, "max_positives", "negative", lambda value: -1)
    tables = [(operator, argument) for operator in FINALIZES for argument in ("ranked", "bins")]
    for operator, argument in [*tables, (BIN, "positives"), (BACKWARD, "gradients"), (BACKWARD, "lines")]:
        for fault, change in TABLE_FAULTS.items():
            add(operator, argument, fault, change)
    add(FINALIZES, "bins", "one_column_less", lambda t: t[:, :-1].contiguous())
    add(FINALIZES, "bins", "one_column_more", lambda t: torch.cat([t, t[:, :1]], 1))
    add(FINALIZES, "ranked", "one_column_more", lambda t: torch.cat([t, t[:, :1]], 1))
    add(BACKWARD, "lines", "one_column_less", lambda t: t[:, :-1].contiguous())
    add(BACKWARD, "gradients", "one_column_more", lambda t: torch.cat([t, t[:, :1]], 1))
    for argument in ("negatives", "counts"):
        for fault, change in VECTOR_FAULTS.items():
            add(ALL[1:], argument, fault, change)
    for operator in ALL:
        for fault, change in {
            "vector": lambda rows: torch.zeros(rows, dtype=torch.int32),
            "int64": lambda rows: torch.zeros((rows, 1), dtype=torch.int64),
            "fewer_rows": lambda rows: torch.zeros((rows - 1, 1), dtype=torch.int32),
            "meta": lambda rows: torch.zeros((rows, 1), dtype=torch.int32, device="meta"),
        }.items():
            add(operator, "segments", fault, lambda _, change=change: change(79))
        add(operator, "num_segments", "zero", lambda _: 0)
        add(operator, "num_segments", "does_not_divide", lambda _: 3)
    for argument in ("grad_first", "grad_second"):
        add(BACKWARD, argument, "vector", lambda t: t.expand(3))
        add(BACKWARD, argument, "meta", lambda t: t.to("meta"))
        add(BACKWARD, argument, "int64", lambda t: t.long())
    for fault, delta in (("negative", -0.5), ("nan", float("nan")), ("inf", float("inf"))):
        add((BIN, *FINALIZES), "delta", fault, lambda _, delta=delta: delta)
    return faults


OPERATOR_FAULTS = operator_faults()


@pytest.mark.parametrize("fault", OPERATOR_FAULTS)
def test_operator_refuses_bad_argument(backend, fault):
    operator, argument, change = OPERATOR_FAULTS[fault]
    arguments = operator_arguments(backend)
    arguments[argument] = change(arguments[argument])
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)) as raised:
        call_operator(backend, operator, arguments)
    # Where two arguments disagree, either may be named.
    either = {"logits": "logits|targets|quality|negatives|segments", "ranked": "ranked|bins", "gradients": "gradients|lines"}
    named = either.get(argument, argument)
    assert re.search(rf"\b{operator}: ({named}) (must|has the wrong)", str(raised.value)), raised.value


@pytest.mark.parametrize("fault", ["fewer_columns", "more_rows", "int32", "levels"])
def test_collect_refuses_bad_dense_targets(backend, fault):
    arguments = operator_arguments(backend, form="dense")
    first, second = arguments["targets"]
    arguments["targets"] = {
        "fewer_columns": [first[:-1], second],
        "more_rows": [torch.cat([first, first]), second],
        "int32": [first.int(), second.int()],
        "levels": [first],
    }[fault]
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        call_operator(backend, COLLECT, arguments)


@pytest.mark.parametrize("index", [-5, 10**6, INT_MAX, float("nan"), float("inf"), -1e300])
def test_backward_never_writes_outside_the_gradient(backend, index):
    """Flat indices come from a tensor that anyone can hand in."""
    if backend.name == "reference":
        pytest.skip("plain PyTorch cannot write out of bounds; its indexing raises")
    arguments = operator_arguments(backend)
    arguments["gradients"] = arguments["gradients"].clone()
    arguments["gradients"][0, 3] = index
    expected = call_operator(backend, BACKWARD, operator_arguments(backend))
    got = call_operator(backend, BACKWARD, arguments)
    differing = sum(int((a != b).sum()) for a, b in zip(got, expected, strict=True))
    assert differing <= 1


def with_first_row(table: torch.Tensor, value: float | torch.Tensor) -> torch.Tensor:
    """The table with other logits (counts, breakpoints) alone, beside indices and segments that are right."""
    changed = table.clone()
    changed[0] = value
    return changed


GARBAGE = {
    "nan": lambda table: torch.full_like(table, float("nan")),
    "inf": lambda table: torch.full_like(table, float("inf")),
    "minus_inf": lambda table: torch.full_like(table, -float("inf")),
    "unsorted": lambda table: table.flip(1),
    "huge": lambda table: torch.where(torch.arange(table.shape[1], device=table.device) % 3 == 1, -1e30, table),
    "minus_inf_logits": lambda table: with_first_row(table, -float("inf")),
    "logits_below_float32": lambda table: with_first_row(table, -1e39),
    "logits_between_float32": lambda table: with_first_row(table, 1 + 1e-12),
    "nan_logit_first": lambda table: with_first_row(table, torch.cat([torch.full_like(table[0, :1], torch.nan), table[0, 1:]])),
    "huge_index": lambda table: table.where(torch.arange(len(table), device=table.device)[:, None] != 3, 1e18),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_operators_survive_tables_with_garbage(backend, garbage):
    """Contents of a table may be wrong (a peer's memory, a bit flip): results may then be anything, accesses must stay inside."""
    arguments = operator_arguments(backend)
    for name in ("positives", "ranked", "gradients", "lines"):
        arguments[name] = GARBAGE[garbage](arguments[name])
    arguments["counts"] = torch.full_like(arguments["counts"], INT_MAX)
    operators = ALL[1:] if backend.is_compiled or backend.name == "triton" else ALL[1:2]
    for operator in operators:
        results = call_operator(backend, operator, arguments)
        assert len(results) == {BIN: 2, BACKWARD: 2, "average_precision_finalize": 3}.get(operator, 4)
    assert all(level.isnan().all() for level in call_operator(backend, BACKWARD, arguments)), "counts say overflow"


@pytest.mark.parametrize("is_segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", ["positives", "ranked", "bins", "gradients", "lines"])
def test_operators_survive_one_table_with_garbage(backend, name, garbage, is_segmented):
    """Beside counts that are right; an operator may also say what is wrong with the table."""
    arguments = operator_arguments(backend)
    if is_segmented:
        rows = sum(len(level) for level in arguments["logits"])
        ids = torch.arange(rows, dtype=torch.int32, device=backend.device)[:, None] % 3
        arguments |= {"segments": ids, "num_segments": 3}
    broken = GARBAGE[garbage](arguments[name].double()).to(arguments[name].dtype)
    for operator in ALL[1:]:
        if name not in OPERATOR_ARGUMENTS[operator]:
            continue
        for distance, delta in ((0, None), (1e4, None), (-1e30, None), (0, 1e-30)):
            given = arguments | {"logits": [level + distance for level in arguments["logits"]]}
            given |= {} if delta is None else {"delta": delta}
            wanted = call_operator(backend, operator, given)
            try:
                got = call_operator(backend, operator, given | {name: broken})
            except (RuntimeError, ValueError, IndexError) as error:
                assert backend.name == "reference" or re.search(rf"\b{operator}: (lines|{name}) must", str(error)), error
            else:
                assert [value.shape for value in got] == [value.shape for value in wanted]
            for before, after in zip(wanted, call_operator(backend, operator, given), strict=True):
                assert torch.equal(before.nan_to_num(-7e30), after.nan_to_num(-7e30)), operator


def test_bits_behind_the_last_element_count_for_nothing(backend):
    """The mask of a level fills whole words, its elements need not."""
    arguments = operator_arguments(backend)
    good = {operator: call_operator(backend, operator, arguments) for operator in (BIN, BACKWARD)}
    is_stray = torch.cat([torch.arange(-(-level.numel() // 64) * 64) >= level.numel() for level in arguments["logits"]])
    stray = (is_stray.view(-1, 8).int() << torch.arange(8)).sum(1).to(torch.uint8)
    assert stray.any() and stray.shape == arguments["negatives"].shape
    arguments["negatives"] = arguments["negatives"] | stray.to(backend.device)
    for operator, wanted in good.items():
        for mine, theirs in zip(call_operator(backend, operator, arguments), wanted, strict=True):
            assert torch.equal(mine, theirs), operator
