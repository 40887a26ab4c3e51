"""GHM-C and GHM-R refuse bad input by name and change nothing, and their operators cannot be made to read or write out of bounds."""
import re

import numpy
import pytest
import rsloss_kernels
import torch
from ghm_samples import CLASSIFICATION, GHM_LOSSES, REGRESSION, GHMSample
from rsloss_kernels import GHMC, GHMR, _library, authentic_smooth_l1_loss, gradient_density

LOSSES = pytest.mark.parametrize("loss", GHM_LOSSES.values(), ids=GHM_LOSSES)


def good(loss, form: str = "dense") -> dict:
    generator = torch.Generator().manual_seed(0)
    pred, target, weight = loss.draw(GHMSample("good", rows=6, form=form, weight="element"), generator).arguments
    return {
        "pred" if loss.is_regression else "logits": pred,
        "target": target,
        "weight": weight,
        "momentum": 0.5,
        "acc_sum": torch.ones(10, dtype=torch.float64),
        "num_updates": torch.ones(10, dtype=torch.int64),
    }


# name -> (argument, from the good arguments to the bad value, exception, what was wanted, what was got)
FAULTS = {
    "pred_list": ("pred", lambda v: v.tolist(), TypeError, "a Tensor", "list"),
    "pred_int64": ("pred", lambda v: v.long(), TypeError, "floating dtype", "torch.int64"),
    "target_shape": ("target", lambda v: v[:, :3], ValueError, r"\[6, 4\]", r"\[6, 3\]"),
    "target_flat": ("target", lambda v: v.flatten(), ValueError, r"\[6, 4\]", r"\[24\]"),
    "target_complex": ("target", lambda v: v.to(torch.complex64), TypeError, "real", "torch.complex64"),
    "weight_complex": ("weight", lambda v: v.to(torch.complex64), TypeError, "float64, integers or bool", "torch.complex64"),
    "weight_float8": ("weight", lambda v: v.to(torch.float8_e5m2), TypeError, "float64, integers or bool", "torch.float8_e5m2"),
    "weight_shape": ("weight", lambda v: v[:5], ValueError, r"\[6, 4\]", r"\[5, 4\]"),
    "weight_columns": ("weight", lambda v: v[0], ValueError, r"\[6, 4\]", r"\[4\]"),
    "bins_zero": ("bins", lambda v: 0, ValueError, r"within 1\.\.256", "0"),
    "bins_257": ("bins", lambda v: 257, ValueError, r"within 1\.\.256", "257"),
    "momentum_1": ("momentum", lambda v: 1.0, ValueError, r"within \[0, 1\)", "1.0"),
    "acc_sum_missing": ("acc_sum", lambda v: None, ValueError, r"given, momentum 0.5 needs it, at first torch.zeros\(10\)", "None"),
    "acc_sum_size": ("acc_sum", lambda v: v[:9], ValueError, r"per bin, \[10\]", r"\[9\]"),
    "acc_sum_2d": ("acc_sum", lambda v: v[None], ValueError, r"per bin, \[10\]", r"\[1, 10\]"),
    "acc_sum_int64": ("acc_sum", lambda v: v.long(), TypeError, "torch.float32 or torch.float64", "torch.int64"),
    "acc_sum_float16": ("acc_sum", lambda v: v.half(), TypeError, "torch.float32 or torch.float64", "torch.float16"),
    "num_updates_size": ("num_updates", lambda v: v[:9], ValueError, r"per bin, \[10\]", r"\[9\]"),
    "num_updates_int32": ("num_updates", lambda v: v.int(), TypeError, "torch.int64", "torch.int32"),
    "empty_bins": ("empty_bins", lambda v: "drop", ValueError, "'skip', 'count'", "'drop'"),
    "mu_zero": ("mu", lambda v: 0.0, ValueError, r"within \[1e-30, 1e\+30\]", "0.0"),
    "mu_inf": ("mu", lambda v: float("inf"), ValueError, r"within \[1e-30, 1e\+30\]", "inf"),
    "mu_tensor": ("mu", lambda v: torch.tensor(0.02), TypeError, "a float", "Tensor"),
}
OF_ONE_LOSS = {"background": CLASSIFICATION, "mu": REGRESSION}


def snapshot(arguments: dict) -> list:
    return [(value.clone(), value._version) for value in arguments.values() if torch.is_tensor(value)]


def assert_unchanged(arguments: dict, before: list) -> None:
    for value, (content, version) in zip(filter(torch.is_tensor, arguments.values()), before, strict=True):
        assert value._version == version
        if not value.is_meta and not value.is_sparse:
            assert torch.equal(value, content)


@pytest.mark.parametrize(
    "loss, fault",
    [
        pytest.param(loss, fault, id=f"{loss.name}-{fault}")
        for loss in GHM_LOSSES.values()
        for fault in FAULTS
        if OF_ONE_LOSS.get(FAULTS[fault][0], loss) is loss
    ],
)
def test_bad_argument_is_refused_by_name(backend, loss, fault):
    argument, make, exception, wanted, got = FAULTS[fault]
    arguments = good(loss)
    argument = "logits" if argument == "pred" and not loss.is_regression else argument
    arguments[argument] = make(arguments.get(argument))
    arguments = {name: v.to(backend.device) if torch.is_tensor(v) and not v.is_meta else v for name, v in arguments.items()}
    before = snapshot(arguments)
    with rsloss_kernels.use_backend(backend.name), pytest.raises(exception) as raised:
        loss.function(**arguments)
    message = str(raised.value)
    assert re.search(rf"^{loss.function.__name__}: {argument} must .*({wanted}).*, got .*({got})", message), message
    assert_unchanged(arguments, before)


@LOSSES
def test_good_arguments_are_not_changed(backend, loss):
    arguments = {name: v.to(backend.device) if torch.is_tensor(v) else v for name, v in good(loss).items()}
    before = snapshot(arguments)
    next(iter(arguments.values())).requires_grad_()
    with rsloss_kernels.use_backend(backend.name):
        loss.function(**arguments).loss.backward()
    assert_unchanged(arguments, before)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.uint64], ids=str)
def test_integral_weights_count_where_they_are_above_0(backend, loss, generator, dtype):
    """MMDetection casts them."""
    pred, target, weight = loss.draw(GHMSample("weights", weight="element"), generator).arguments
    weight = weight > 0
    expected = loss.evaluate(backend, pred, target, weight.float())
    largest = 1 if dtype == torch.bool else min(torch.iinfo(dtype).max, 2**62)
    for value in (1, largest):
        assert loss.evaluate(backend, pred, target, (weight.long() * value).to(dtype)) == expected


@pytest.mark.parametrize("avg_factor", [None, 7, 2.5, numpy.float32(2.5), torch.tensor(3)], ids=repr)
def test_avg_factor_has_no_effect(avg_factor):
    assert torch.equal(GHMC()(X, X.abs(), None, avg_factor), GHMC()(X, X.abs()))


CLASS_INDEX_FAULTS = {
    "length": (lambda v: v[:5], ValueError, r"target must .*class indices.*, \[6, 4\], got \[5\]"),
    "uint64": (lambda v: v.to(torch.uint64), TypeError, "target must be class indices that int64 can hold, got torch.uint64"),
    "meta": (lambda v: v.to("meta"), ValueError, "target must be on the device of logits"),
    "float": (lambda v: v.float(), TypeError, r"target must be integers .*\(class indices\), got torch.float32"),
    "bool": (lambda v: v > 0, TypeError, r"target must be integers .*\(class indices\), got torch.bool"),
}


@pytest.mark.parametrize("fault", CLASS_INDEX_FAULTS)
def test_bad_class_indices_are_refused(backend, fault):
    make, exception, message = CLASS_INDEX_FAULTS[fault]
    logits, labels = CLASSIFICATION.draw(GHMSample("labels", rows=6, form="index"), torch.Generator().manual_seed(0)).arguments
    with rsloss_kernels.use_backend(backend.name), pytest.raises(exception, match=f"^ghm_classification_loss: {message}"):
        CLASSIFICATION.function(logits.to(backend.device), make(labels).to("meta" if fault == "meta" else backend.device))
    with pytest.raises(ValueError, match=r"^ghm_regression_loss: target must have the shape of pred, \[6, 4\], got \[6\]"):
        REGRESSION.function(logits, labels)


@LOSSES
def test_state_arguments_need_each_other(loss):
    arguments = {name: value for name, value in good(loss).items() if name not in ("momentum", "acc_sum", "num_updates")}
    with pytest.raises(ValueError, match=r"acc_sum must be given, momentum 0.5 needs it, at first torch.zeros\(10\), got None"):
        loss.function(**arguments, momentum=0.5)
    with pytest.raises(ValueError, match="acc_sum must be given with num_updates, got None"):
        loss.function(**arguments, num_updates=torch.zeros(10, dtype=torch.int64))


X = torch.zeros(4, 3)
CALLS = {
    "ghmc_bins": (lambda: GHMC(bins=0), ValueError, r"^GHMC: bins must be within 1\.\.256, got 0"),
    "ghmc_momentum": (lambda: GHMC(momentum=1), ValueError, r"^GHMC: momentum must be within \[0, 1\), got 1"),
    "ghmc_softmax": (lambda: GHMC(use_sigmoid=False), NotImplementedError, "^GHMC: use_sigmoid must be True"),
    "ghmc_sum": (lambda: GHMC(reduction="sum"), ValueError, "^GHMC: reduction must be one of 'none', 'mean', got 'sum'"),
    "ghmc_background": (lambda: GHMC(background="none"), ValueError, "^GHMC: background must be one of"),
    "ghmc_empty_bins": (lambda: GHMC(empty_bins=True), ValueError, "^GHMC: empty_bins must be one of 'skip', 'count', got True"),
    "ghmc_group": (lambda: GHMC(process_group="all"), TypeError, "^GHMC: process_group must be None, 'default' or"),
    "ghmr_mu": (lambda: GHMR(mu=0), ValueError, r"^GHMR: mu must be within \[1e-30, 1e\+30\], got 0"),
    "ghmr_sum": (lambda: GHMR()(X, X, reduction_override="sum"), ValueError, "^GHMR: reduction_override must be one of .* got 'sum'"),
    "ghmr_shape": (lambda: GHMR()(X, X[:2]), ValueError, r"^GHMR: target must have the shape of pred, \[4, 3\], got \[2, 3\]"),
    "ghmc_weight": (lambda: GHMC()(X, X, X[0]), ValueError, r"^GHMC: weight must have .* got \[3\]"),
    "ghmc_override": (lambda: GHMC()(X, X, X, "none"), TypeError, r"^GHMC: avg_factor must .* reduction_override by keyword\), got 'none'"),
    "ghmr_avg_factor": (lambda: GHMR()(X, X, None, X), TypeError, r"^GHMR: avg_factor must .* got a Tensor of shape \[4, 3\]"),
    "ghmc_keyword": (lambda: GHMC()(X, X, ignore_index=-1), TypeError, "ignore_index"),
    "density_bins": (lambda: gradient_density(X, X, bins=300), ValueError, r"^gradient_density: bins must be within 1\.\.256, got 300"),
    "density_mu": (lambda: gradient_density(X, X, mu=-1.0), ValueError, "^gradient_density: mu must be within"),
    "asl1_mu": (lambda: authentic_smooth_l1_loss(X, X, mu=0.0), ValueError, "^authentic_smooth_l1_loss: mu must be within"),
    "asl1_shape": (lambda: authentic_smooth_l1_loss(X, X, X[0]), ValueError, "^authentic_smooth_l1_loss: weight must have the shape"),
    "asl1_dtype": (lambda: authentic_smooth_l1_loss(X.long(), X), TypeError, "^authentic_smooth_l1_loss: pred must have a floating"),
    "asl1_reduction": (lambda: authentic_smooth_l1_loss(X, X, reduction="max"), ValueError, "reduction must be one of .* got 'max'"),
    "asl1_meta": (lambda: authentic_smooth_l1_loss(X, X.to("meta")), ValueError, "target must be on the device of pred, cpu, got meta"),
}


@pytest.mark.parametrize("name", CALLS)
def test_modules_and_other_functions_refuse_bad_arguments_by_name(name):
    call, exception, message = CALLS[name]
    with pytest.raises(exception, match=message):
        call()


DEBUG_FAULTS = {
    "target_above_1": ("dense", torch.full((6, 4), 1.5), r"target must be within \[0, 1\], got \[1.5, 1.5\]"),
    "target_below_0": ("dense", torch.full((6, 4), -0.25), r"target must be within \[0, 1\], got \[-0.25, -0.25\]"),
    "label_above_classes": ("index", torch.tensor([0, 4, 5, 4, -1, 4]), "target must be class indices up to 4, got 5"),
}


@pytest.mark.parametrize("fault", DEBUG_FAULTS)
def test_debug_checks_refuse_values(backend, monkeypatch, fault):
    form, target, message = DEBUG_FAULTS[fault]
    logits, target = good(CLASSIFICATION, form)["logits"].to(backend.device), target.to(backend.device)
    with rsloss_kernels.use_backend(backend.name):
        assert CLASSIFICATION.function(logits, target).isfinite()
        monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
        with pytest.raises(ValueError, match=f"^ghm_classification_loss: {message}"):
            CLASSIFICATION.function(logits, target)


@pytest.mark.parametrize("form", ["dense", "soft", "index"])
def test_debug_checks_accept_good_input(backend, monkeypatch, generator, form):
    arguments = CLASSIFICATION.draw(GHMSample("debug", form=form), generator).arguments
    expected = CLASSIFICATION.evaluate(backend, *arguments)
    monkeypatch.setenv("RSLOSS_DEBUG_CHECKS", "1")
    assert CLASSIFICATION.evaluate(backend, *arguments) == expected
    offsets = REGRESSION.draw(GHMSample("debug"), generator).arguments
    assert REGRESSION.evaluate(backend, *offsets).losses[0].isfinite()


# --- the operators themselves ---

OPERATOR_ARGUMENTS = {
    "ghm_histogram": ["preds", "targets", "weights", "bins", "mu", "background_first"],
    "ghm_finalize": [
        "preds", "targets", "weights", "histogram", "acc_sum", "num_updates", "bins", "mu", "background_first", "momentum",
        "count_empty_bins", "gradient_scale",
    ],
    "ghm_forward": [
        "preds", "targets", "weights", "acc_sum", "num_updates", "bins", "mu", "background_first", "momentum", "count_empty_bins",
    ],
    "ghm_backward": ["preds", "targets", "weights", "bin_weights", "grad_loss", "mu", "background_first"],
}  # fmt: skip
ALL = tuple(OPERATOR_ARGUMENTS)
HISTOGRAM, FINALIZE, FORWARD, BACKWARD = ALL


def operator_arguments(backend) -> dict:
    """Good arguments of every operator: two levels of 5 and 3 rows."""
    generator = torch.Generator().manual_seed(0)
    values = CLASSIFICATION.draw(GHMSample("operators", rows=8, weight="element"), generator).arguments
    preds, targets, weights = (list(value.to(backend.device).split([5, 3])) for value in values)

    def number(value, size, dtype=torch.float64):
        return torch.full(size, value, dtype=dtype, device=backend.device)

    return {
        "preds": preds, "targets": targets, "weights": weights, "bins": 10, "mu": None, "background_first": False,
        "histogram": number(1, (2, 11)) * (torch.arange(11, device=backend.device) < 10), "acc_sum": number(1, (10,)),
        "num_updates": number(1, (10,), torch.int64), "momentum": 0.5, "count_empty_bins": False, "gradient_scale": 1.0,
        "bin_weights": number(0.1, (10,)), "grad_loss": number(1, (), torch.float32),
    }  # fmt: skip


def call_operator(backend, operator: str, arguments: dict):
    return _library.operator(operator, backend.name)(*[arguments[name] for name in OPERATOR_ARGUMENTS[operator]])


VECTOR_FAULTS = {
    "shorter": lambda t: t[:-1].contiguous(),
    "longer": lambda t: torch.cat([t, t[:1]]),
    "empty": lambda t: t[:0],
    "more_dimensions": lambda t: t[None],
    "float16": lambda t: t.half(),
    "int32": lambda t: t.to(torch.int32),
    "meta": lambda t: t.to("meta"),
}


def operator_faults() -> dict[str, tuple[str, str, object]]:
    """name -> (operator, argument, function from the good value to a bad one)"""
    faults = {}

    def add(operators, argument, fault, change):
        for operator in [operators] if isinstance(operators, str) else operators:
            faults[f"{operator}-{argument}-{fault}"] = (operator, argument, change)

    add(ALL, "preds", "none_at_all", lambda levels: [])
    add(ALL, "preds", "int64", lambda levels: [level.long() for level in levels])
    add(ALL, "preds", "mixed_dtypes", lambda levels: [levels[0], levels[1].double()])
    add(ALL, "preds", "mixed_devices", lambda levels: [levels[0], levels[1].to("meta")])
    add(ALL, "preds", "strided", lambda levels: [torch.cat([level, level], 1)[:, ::2] for level in levels])
    for argument in ("preds", "targets", "weights"):
        add(ALL, argument, "one_level_less", lambda levels: levels[:1])
        add(ALL, argument, "one_level_more", lambda levels: [*levels, levels[0]])
        add(ALL, argument, "fewer_rows", lambda levels: [levels[0][:-1], levels[1]])
        add(ALL, argument, "more_rows", lambda levels: [torch.cat([levels[0], levels[0]]), levels[1]])
        add(ALL, argument, "swapped", lambda levels: levels[::-1])
        add(ALL, argument, "complex", lambda levels: [level.to(torch.complex64) for level in levels])
        add(ALL, argument, "meta", lambda levels: [level.to("meta") for level in levels])
    for argument in ("targets", "weights"):
        add(ALL, argument, "strided", lambda levels: [torch.cat([level, level], 1)[:, ::2] for level in levels])
        add(ALL, argument, "int16", lambda levels: [level.to(torch.int16) for level in levels])
    add(ALL, "targets", "labels_of_fewer_rows", lambda levels: [level[:-1, 0].long() for level in levels])
    add(ALL, "targets", "labels_in_the_shape_of_logits", lambda levels: [level.long() for level in levels])
    add(ALL, "weights", "int64", lambda levels: [level.long() for level in levels])
    add(ALL, "weights", "columns", lambda levels: [level[0].contiguous() for level in levels])
    for bins in (0, -1, 257, 2**31):
        add((HISTOGRAM, FINALIZE, FORWARD), "bins", f"{bins}", lambda _, bins=bins: bins)
    for mu in (0.0, -1.0, 1e-31, 1e31, float("inf"), float("nan")):
        add(ALL, "mu", f"{mu}", lambda _, mu=mu: mu)
    for momentum in (1.0, -0.1, float("nan"), float("inf")):
        add((FINALIZE, FORWARD), "momentum", f"{momentum}", lambda _, momentum=momentum: momentum)
    for argument in ("acc_sum", "num_updates"):
        for fault, change in VECTOR_FAULTS.items():
            add((FINALIZE, FORWARD), argument, fault, change)
    add((FINALIZE, FORWARD), "acc_sum", "none", lambda t: None)
    add(FINALIZE, "histogram", "transposed", lambda t: t.t())
    for fault, change in VECTOR_FAULTS.items():
        add(FINALIZE, "histogram", fault, change)
    add(FINALIZE, "histogram", "one_column_less", lambda t: t[:, :-1].contiguous())
    for fault in ("empty", "more_dimensions", "float16", "int32", "meta"):
        add(BACKWARD, "bin_weights", fault, VECTOR_FAULTS[fault])
    add(BACKWARD, "bin_weights", "257", lambda t: t.new_ones(257))
    add(BACKWARD, "grad_loss", "vector", lambda t: t.expand(3).contiguous())
    add(BACKWARD, "grad_loss", "meta", lambda t: t.to("meta"))
    add(BACKWARD, "grad_loss", "int64", lambda t: t.long())
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
    either = {name: "preds|targets|weights" for name in ("preds", "targets", "weights")}
    either |= {"bins": "bins|histogram|acc_sum", "bin_weights": "bin_weights|bins"}
    named = either.get(argument, argument)
    assert re.search(rf"\b{operator}: ({named}) (must|has the wrong)", str(raised.value)), raised.value


@pytest.mark.parametrize("operator", ALL)
def test_operator_accepts_good_arguments(backend, operator):
    """Those from which each fault above departs."""
    arguments = operator_arguments(backend)
    for changed in ({}, {"mu": 0.02}, {"weights": []}, {"acc_sum": None, "num_updates": None, "momentum": 0.0}):
        call_operator(backend, operator, arguments | changed)


@pytest.mark.parametrize("operator", ALL)
def test_operator_of_regression_refuses_class_indices_and_weights_of_rows(backend, operator):
    for name, change in (("targets", lambda level: level[:, 0].long()), ("weights", lambda level: level[:, 0].contiguous())):
        arguments = operator_arguments(backend)
        arguments[name] = [change(level) for level in arguments[name]]
        call_operator(backend, operator, arguments)
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{operator}: {name} must"):
            call_operator(backend, operator, arguments | {"mu": 0.02})


def test_operators_survive_tables_with_garbage(backend):
    """Anyone can hand in a histogram, weights of bins and labels; nothing may be read or written out of bounds."""
    arguments = operator_arguments(backend)
    for value in (float("nan"), float("inf"), -1e300, 1e300):
        call_operator(backend, FINALIZE, arguments | {"histogram": torch.full_like(arguments["histogram"], value)})
        gradients = call_operator(backend, BACKWARD, arguments | {"bin_weights": torch.full_like(arguments["bin_weights"], value)})
        assert [gradient.shape for gradient in gradients] == [level.shape for level in arguments["preds"]]
    for label in (-(2**62), -1, 4, 2**31 - 1, 2**62):
        labels = [torch.full_like(level[:, 0], label, dtype=torch.int64) for level in arguments["targets"]]
        histogram = call_operator(backend, HISTOGRAM, arguments | {"targets": labels})
        assert histogram[0, :10].sum() == sum((level > 0).sum() for level in arguments["weights"])
