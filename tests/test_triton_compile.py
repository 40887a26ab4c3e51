"""Compiles every Triton kernel ahead of time for real GPUs, without one: no spills, shared memory within the limit.

The kernels are compiled in processes of their own, because Triton decides at import whether it interprets or compiles. Run as a
program, this file is the first of them: it prints one JSON record per kernel, argument types and target.
"""
import concurrent.futures
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Compute capability: shared memory of one block in bytes.
TARGETS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MAIN_TARGET = 90
FLOATS = ("fp16", "bf16", "fp32", "fp64")
ANY_FLAG = (False, True)
# Integer arguments by name; the others are 32 bits wide, as the launcher passes small numbers.
WIDE_INTEGERS = {
    *("delta_bits", "scale_bits", "mu_bits", "fixed_beta_bits", "momentum_bits", "log_momentum_bits", "ratio_bits", "p_bits", "q_bits"),
    "log_eps_bits",
}


def _double(*types: str) -> bool:
    return "fp64" in types


def _choices(**values):
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# The pass of every kernel in the table of configurations (losses/triton_common.py).
PASSES = {
    **dict.fromkeys(("mask_kernel", "record_kernel", "value_gradient_kernel"), "ranking stream"),
    **dict.fromkeys(("bin_kernel", "negative_gradient_kernel"), "ranking search"),
    **dict.fromkeys(("windows_kernel", "ranges_kernel", "breakpoints_kernel", "sum_copies_kernel"), "ranking table"),
    **dict.fromkeys(("positive_gradient_kernel", "gradients_kernel", "interpolation_kernel"), "ranking table"),
    **dict.fromkeys(("value_bins_kernel", "value_table_kernel"), "ranking table"),
    **dict.fromkeys(("rank_kernel", "false_positives_kernel", "lines_kernel", "rank_sort_terms_kernel"), "ranking pairs"),
    **dict.fromkeys(("pull_kernel", "precision_kernel", "alrp_terms_kernel"), "ranking pairs"),
    **{"losses_kernel": "ranking losses", "value_histogram_kernel": "ranking values"},
    **dict.fromkeys(("edges_kernel", "finalize_kernel"), "ghm table"),
    **{"histogram_kernel": "ghm histogram", "gradient_kernel": "ghm gradient"},
    **{"focal_loss_kernel": "focal sums", "focal_class_sums_kernel": "focal class sums"},
    **{"focal_total_kernel": "focal total", "focal_elements_kernel": "focal elements"},
    **{f"group_softmax_{name}_kernel": "group softmax" for name in ("forward", "backward", "statistics", "scores")},
    **{f"group_softmax_{name}_kernel": f"group softmax {name}" for name in ("sample", "losses")},
    **dict.fromkeys(("seesaw_forward_kernel", "seesaw_backward_kernel"), "seesaw"),
    **{f"smooth_l1_{name}_kernel": "smooth l1 sums" for name in ("forward", "combine")},
    **{f"smooth_l1_{name}_kernel": "smooth l1 elements" for name in ("elements", "backward")},
}
# Sizes of tensors that variants take in turns, so that the configurations of both are compiled.
SIZES = (1 << 30, 1 << 12)


# How the kernels see segments of elements, and of ranks.
FORMS = [
    {"FORM": form, "segments_ptr": None if form in ("whole", "chunks") else "i32"}
    for form in ("whole", "chunks", "rows", "columns")
]
RANGES = [{"SEGMENTED": False, "ranges_ptr": None}, {"SEGMENTED": True, "ranges_ptr": "i32"}]


def _collect_variants() -> dict[str, list[dict]]:
    """For every kernel its variants: pointer types (None: the argument is None), wider integers, constants, warps."""
    mask, record = [], []
    for target in (*FLOATS, "i32", "i64"):
        is_dense = target in FLOATS
        kinds = _choices(IS_DENSE=(is_dense,), IS_MAP=(False,) if is_dense else ANY_FLAG, BACKGROUND_FIRST=(False,) if is_dense else ANY_FLAG)
        pointers = {"targets_ptr": target, "negatives_ptr": "u8", "block_counts_ptr": "i32", "DOUBLE": _double(target)}
        forms = FORMS if target in ("fp32", "i64") else FORMS[:1]
        mask += [{**pointers, **kind, **form} for kind in kinds for form in forms]
        if target in FLOATS:
            sources = [(logit, None) for logit in FLOATS]
        else:
            sources = [("bf16", None), ("fp64", "fp32"), ("fp32", "fp64"), ("fp32", "bf16"), ("fp16", "fp16")]
        pointers = {"targets_ptr": target, "found_ptr": "i64", "positives_ptr": "fp64", **kinds[0]}
        record += [
            {**pointers, **form, "logits_ptr": logit, "quality_ptr": quality, "DOUBLE": _double(logit, target, quality or "")}
            for logit, quality in sources
            for form in (FORMS if (logit, target) in (("fp32", "fp32"), ("fp64", "i64")) else FORMS[:1])
        ]
    record += [{**record[-1], "IS_MAP": True}, {**record[-1], **FORMS[1], "IS_MAP": True, "places": "i64"}]
    mask += [{**mask[-1], **form, "size": "i64", "places": "i64", "period": "i64"} for form in FORMS]
    return {"mask_kernel": mask, "record_kernel": record}


def _sweep_variants(impl) -> dict[str, list[dict]]:
    """The kernels of `ranking_bin` and `ranking_backward`."""
    records = {"positives_ptr": "fp64", "counts_ptr": "i64", "ranked_ptr": "fp64"}
    marks = {"sizes_ptr": "i32", "slots_ptr": "i32", "bounds_ptr": "fp64", "ranked_ptr": "fp64"}
    streamed = []
    for logit, size in (*((logit, "i32") for logit in FLOATS), ("bf16", "i64")):
        for form in FORMS if logit != "fp16" else FORMS[:1]:
            double = _double(logit)
            types = {"logits_ptr": logit, "negatives_ptr": "u8", "edges_ptr": "fp64" if double else "fp32", "counts_ptr": "i64"}
            ranges = {"ranges_ptr": None if form["FORM"] == "whole" else "i32"}
            sizes = {"size": size, "period": size, "DOUBLE": double}
            streamed.append({**types, **form, **ranges, **sizes})
    copies = {"sizes_ptr": "i32", "copies_ptr": "i64", "MAX_COPIES": impl.MAX_COPIES}
    upstream = [
        {"grad_first_ptr": first, "grad_second_ptr": second}
        for first, second in (("fp32", "fp64"), ("fp64", None), (None, "fp32"))
    ]
    return {
        "rank_kernel": [{**records, **ranges} for ranges in RANGES],
        "windows_kernel": [{**marks, "DOUBLE": double} for double in ANY_FLAG],
        "ranges_kernel": [{**marks, "keys_ptr": "fp64", "ranges_ptr": "i32", "sizes_ptr": sizes} for sizes in (None, "i32")],
        "breakpoints_kernel": [{**marks, "edges_ptr": edge, **ranges} for edge in ("fp32", "fp64") for ranges in RANGES],
        "bin_kernel": [
            {**base, **copies, "IS_STEP": is_step}
            for base in streamed
            for is_step in (ANY_FLAG if base["FORM"] == "whole" else (False,))
        ],
        "sum_copies_kernel": [{**copies, "bins_ptr": "i64"}],
        "negative_gradient_kernel": [
            {**base, "lines_ptr": "fp64", "grad_first_ptr": grad, "results_ptr": base["logits_ptr"]}
            for base in streamed
            for grad in ("fp64" if base["DOUBLE"] else "fp32", None)[: 2 if base["FORM"] == "whole" else 1]
        ],
        "positive_gradient_kernel": [
            {"gradients_ptr": "fp64", "counts_ptr": "i64", **grads, "results_ptr": result}
            for result in FLOATS
            for grads in upstream
        ],
    }


def _value_variants(values) -> dict[str, list[dict]]:
    """Many 16-bit logits, by value."""
    streams = [
        {
            **{"logits_ptr": logit, "table_ptr": logit, "results_ptr": logit, "negatives_ptr": "u8", "size": size},
            **{"edges_ptr": "fp32", "lines_ptr": "fp64", "counts_ptr": "i64", "sizes_ptr": "i32", "histogram_ptr": "i32"},
            **{"bins_ptr": "i64", "copies_ptr": "i64", "grad_first_ptr": grad},
        }
        for logit, size, grad in (("bf16", "i32", "fp32"), ("fp16", "i32", None), ("bf16", "i64", None))
    ]
    return {
        "value_histogram_kernel": [{**variant, "QUARTER": values.QUARTER} for variant in streams],
        "value_bins_kernel": [{**streams[number], "IS_STEP": is_step} for number, is_step in enumerate(ANY_FLAG)],
        "value_table_kernel": streams[:2],
        "value_gradient_kernel": streams,
    }


def _finalize_variants() -> dict[str, list[dict]]:
    tables = {
        **{name: "fp64" for name in ("ranked_ptr", "edges_ptr", "terms_ptr", "gradients_ptr", "lines_ptr")},
        **{"bins_ptr": "i64", "counts_ptr": "i64", "slots_ptr": "i32", "sizes_ptr": "i32"},
    }
    pairs = [{**tables, **ranges, "IS_STEP": is_step} for ranges in RANGES for is_step in ANY_FLAG]
    over_pairs = ("lines_kernel", "rank_sort_terms_kernel", "pull_kernel", "precision_kernel")
    # A unit of 2^-52 or 2^-44 is one number among others: one of the two is compiled per form of segments.
    false_positives = [{**variant, "DOUBLE": variant["SEGMENTED"]} for variant in pairs]
    gradients = [
        {**tables, **ranges, "HAS_SECOND": statistic is None, "statistic_ptr": statistic}
        for ranges in RANGES
        for statistic in (None, "fp64")
    ]
    losses = [
        {**tables, **ranges, "first_ptr": loss, "second_ptr": second}
        for ranges in RANGES
        for loss, second in (("fp32", None), ("fp32", "fp32"), ("fp64", "fp64"))
    ]
    interpolation = [{**tables, **ranges, "INTERPOLATED": flag} for ranges in RANGES for flag in ANY_FLAG]
    return {
        "false_positives_kernel": false_positives,
        **{name: pairs for name in (*over_pairs, "alrp_terms_kernel")},
        **{"gradients_kernel": gradients, "losses_kernel": losses, "interpolation_kernel": interpolation},
    }


def _ghm_variants() -> dict[str, list[dict]]:
    """Types of prediction and target, weights, and the size of a pass; every number of columns that a power of two makes apart."""
    tables = {"partials_ptr": "fp64", "bin_weights_ptr": "fp64"}
    elements = [
        {
            **{"preds_ptr": pred, "targets_ptr": target, "weights_ptr": weight, "edges_ptr": "fp64", "size": size},
            **{"WEIGHT_PER_ROW": per_row, "BACKGROUND_FIRST": target == "i64", "IS_INDEX": target in ("i32", "i64")},
            **{"IS_REGRESSION": is_regression, "COLUMNS": columns, "results_ptr": pred},
            "IS_MAP": pred == "fp16" or size == "i64",
            "grad_loss_ptr": "fp64" if pred == "fp64" else "fp32",
        }
        for pred, target, weight, per_row, is_regression, size, columns in (
            ("fp32", "i64", None, False, False, "i32", 16),
            ("fp16", "i32", "fp32", True, False, "i32", 32),
            ("bf16", "i64", "bf16", False, False, "i64", 512),
            ("fp64", "i32", None, False, False, "i32", 4),
            ("fp32", "fp32", "fp32", False, False, "i32", 16),
            ("fp16", "fp16", "fp16", True, False, "i32", 512),
            ("bf16", "fp32", None, False, False, "i64", 32),
            ("fp64", "bf16", "fp64", True, False, "i32", 512),
            ("fp32", "fp32", "fp32", False, True, "i32", 16),
            ("bf16", "bf16", None, False, True, "i64", 512),
            ("fp64", "fp64", "fp16", False, True, "i32", 32),
        )
    ]
    states = [
        {
            **{"histogram_ptr": "fp64", "bin_weights_ptr": "fp64", "acc_sum_ptr": acc_sum, "num_updates_ptr": num_updates},
            **{"loss_ptr": loss, "new_acc_sum_ptr": acc_sum or "fp64", "new_num_updates_ptr": "i64"},
            **{"HAS_MOMENTUM": has_momentum, "COUNT_EMPTY_BINS": has_momentum, "COLUMNS": columns},
        }
        for acc_sum, num_updates, loss, has_momentum, columns in (
            (None, None, "fp32", False, 16),
            ("fp32", None, "fp32", True, 1),
            ("fp64", "i64", "fp64", True, 256),
            ("fp64", "i64", "fp32", False, 32),
        )
    ]
    return {
        "edges_kernel": [{"edges_ptr": "fp64", "IS_REGRESSION": flag, "COLUMNS": 512} for flag in ANY_FLAG],
        "histogram_kernel": [{**element, **tables} for element in elements],
        "finalize_kernel": states,
        "gradient_kernel": [{**element, **tables} for element in elements],
    }


def _focal_variants(common, impl) -> dict[str, list[dict]]:
    """Types of logits, targets, qualities and weights, layout and size; every modulator with hard and with soft targets."""
    levels = [
        {
            **{"logits_ptr": logit, "targets_ptr": target, "qualities_ptr": quality, "weights_ptr": weight, "size": size},
            **{"class_table_ptr": "fp64", "normalizer_ptr": weight, "MODULATOR": modulator, "MAPS": maps, "inner": size},
            **{"IS_INDEX": target in ("i32", "i64"), "BACKGROUND_FIRST": target == "i64", "WEIGHT_PER_ROW": maps},
            **{"ignore_index": "i64" if maps else "i32", "results_ptr": logit},
            "grad": "fp64" if logit == "fp64" else "fp32",
        }
        for logit, target, quality, weight, modulator, maps, size in (
            ("fp32", "i64", None, None, 0, True, "i32"),
            ("bf16", "i32", None, "fp32", 0, False, "i32"),
            ("fp16", "i64", "fp16", "bf16", 1, True, "i32"),
            ("fp64", "i32", "fp32", None, 2, False, "i32"),
            ("bf16", "i64", "bf16", "fp64", 3, True, "i64"),
            ("fp64", "i32", None, "fp64", 2, False, "i64"),
            ("fp32", "fp32", None, None, 0, True, "i32"),
            ("fp16", "fp32", None, "fp16", 1, False, "i32"),
            ("bf16", "bf16", None, "bf16", 2, True, "i32"),
            ("fp64", "fp64", None, "fp32", 3, False, "i64"),
        )
    ]
    run = common.choose("focal class sums", SIZES[0], MAIN_TARGET)
    tiles = [
        dict(zip(("TILE_ROWS", "TILE_CLASSES"), impl.tile_shape(1 << 20, classes, level["MAPS"], run), strict=True))
        for level, classes in zip(levels, itertools.cycle((80, 1, 1203)))
    ]
    elements = [
        {**level, "grads_ptr": grad, "GRAD_PER_ELEMENT": per_element}
        for number, level in enumerate(levels)
        for grad, per_element in ((None, False), (level["grad"], False), (level["grad"], True))[number % 3 :][:1]
    ]
    totals = [
        {"partials_ptr": "fp64", "normalizer_ptr": normalizer, "loss_ptr": loss}
        for normalizer, loss in ((None, "fp32"), ("bf16", "fp32"), ("fp32", "fp64"))
    ]
    return {
        "focal_loss_kernel": [{**level, "partials_ptr": "fp64"} for level in levels],
        "focal_class_sums_kernel": [
            {**level, **tile, "partials_ptr": "fp64", "class_partials_ptr": "fp64"}
            for level, tile in zip(levels, tiles, strict=True)
        ],
        "focal_total_kernel": totals,
        "focal_elements_kernel": elements,
    }


def _group_softmax_variants() -> dict[str, list[dict]]:
    """Types of logits, labels, weights and keys, and the layouts of the authors and of the EQL v2 repository, of 1231 classes."""
    layouts = [
        {"STARTS": starts, "OTHERS": others, "BACKGROUND_GROUP": place, "BACKGROUND_FIRST": place == 0}
        for starts, others, place in (
            ((0, 2, 71, 400, 862, 1236), (1, 2, 71, 400, 862), 0),
            ((0, 70, 399, 861, 1235, 1236), (0, 70, 399, 861, -1), 4),
        )
    ]
    variants = [
        {
            **{"logits_ptr": logit, "labels_ptr": label, "weights_ptr": weight, "class_columns_ptr": "i32"},
            **{"tables_ptr": wide, "grad_losses_ptr": wide, "losses_ptr": wide, "gradient_ptr": logit, "scores_ptr": logit},
            **{name: "fp64" for name in ("partials_ptr", "averages_ptr", "statistics_ptr")},
            **layout,
            "tile": (512, 462 if number < 4 else 12),
        }
        for number, (logit, label, weight) in enumerate(
            (("fp32", "i64", "fp32"), ("bf16", "i32", "bf16"), ("fp16", "i64", "fp16"), ("fp64", "i32", "fp64"), ("bf16", "i64", "fp32"))
        )
        for layout in layouts[number % 2 :][:1]
        for wide in ("fp64" if logit == "fp64" else "fp32",)
    ]
    samples = [
        {
            **{"labels_ptr": label, "class_columns_ptr": "i32", "keys_ptr": keys, "weights_ptr": "fp32"},
            **layout,
        }
        for label, keys, layout in (("i64", "fp32", layouts[0]), ("i32", "fp32", layouts[1]), ("i64", None, layouts[1]))
    ]
    passes = ("forward", "backward", "statistics", "scores")
    return {
        "group_softmax_sample_kernel": samples,
        **{f"group_softmax_{name}_kernel": variants for name in passes},
        "group_softmax_losses_kernel": [variants[0], variants[3]],
    }


def _seesaw_variants() -> dict[str, list[dict]]:
    variants = [
        {
            **{"logits_ptr": logit, "labels_ptr": label, "weights_ptr": weight, "gradient_ptr": logit, "NUM_CLASSES": classes},
            **{name: "fp64" for name in ("log_counts_ptr", "losses_ptr", "tables_ptr", "grad_losses_ptr")},
            "tile": (512, classes),
        }
        for logit, label, weight, classes in (
            ("fp32", "i64", None, 1203),
            ("bf16", "i32", "fp32", 80),
            ("fp16", "i64", "fp16", 1203),
            ("fp64", "i32", "fp64", 3),
        )
    ]
    return {f"seesaw_{name}_kernel": variants for name in ("forward", "backward")}


def _smooth_l1_variants() -> dict[str, list[dict]]:
    passes = [
        {
            **{"pred_ptr": pred, "target_ptr": target, "weight_ptr": weight, "beta_ptr": beta, "normalizer_ptr": normalizer},
            **{"result_ptr": pred, "grad_ptr": pred, "sums_ptr": "fp64", "size": size, "BY_ROW": by_row, "GRAD_OF_LOSS": of_loss},
        }
        for pred, target, weight, by_row, beta, normalizer, size, of_loss in (
            ("fp32", "fp32", "fp32", False, "fp64", None, "i32", True),
            ("bf16", "fp32", None, False, None, "fp32", "i64", False),
            ("fp16", "fp16", "fp16", True, "fp32", "fp64", "i32", True),
            ("fp64", "bf16", "fp64", True, None, None, "i32", False),
        )
    ]
    combine = [
        {"sums_ptr": "fp64", "normalizer_ptr": normalizer, "result_ptr": loss, "PROGRAMS": programs}
        for normalizer, loss, programs in ((None, "fp32", 1), ("fp64", "fp64", 512))
    ]
    kernels = {f"smooth_l1_{name}_kernel": passes for name in ("forward", "elements", "backward")}
    return {**kernels, "smooth_l1_combine_kernel": combine}


def _variants() -> dict[str, list[dict]]:
    common, focal, binning, values = (
        importlib.import_module(f"rsloss_kernels.losses.{name}")
        for name in ("triton_common", "focal.triton_impl", "ranking.triton_bin", "ranking.triton_values")
    )
    return {
        **_collect_variants(),
        **_sweep_variants(binning),
        **_value_variants(values),
        **_finalize_variants(),
        **_ghm_variants(),
        **_focal_variants(common, focal),
        **_group_softmax_variants(),
        **_seesaw_variants(),
        **_smooth_l1_variants(),
    }


@functools.cache
def _find_kernels() -> dict:
    """Every jit function of every `triton_*.py` that no other one names: those that are launched."""
    from triton.runtime.jit import JITFunction

    functions = {}
    for path in sorted((ROOT / "rsloss_kernels" / "losses").glob("*/triton_*.py")):
        module = importlib.import_module(f"rsloss_kernels.losses.{path.parent.name}.{path.stem}")
        functions.update({name: value for name, value in vars(module).items() if isinstance(value, JITFunction)})
    named = {
        name
        for caller, function in functions.items()
        for name in re.findall(r"\w+", function.src)
        if name in functions and name != caller
    }
    return {name: function for name, function in functions.items() if name not in named}


def _shaped(kernel, variant: dict, elements: int, capability: int) -> tuple[dict, dict]:
    """The variant with the constants of its configuration, and the options of the launch."""
    common = importlib.import_module("rsloss_kernels.losses.triton_common")
    run = common.choose(PASSES[kernel.__name__], elements, capability)
    shapes = {"BLOCK": run.block, "TILE": run.rows, "RUN": run.block, "SUMS_AT_ONCE": run.block}
    tile = run.tile(*variant["tile"]) if "ROWS" in kernel.arg_names else {}
    return {**{name: shapes[name] for name in shapes if name in kernel.arg_names}, **variant, **tile}, run.options


def _compile(kernel, variant: dict, elements: int, capability: int) -> dict:
    """Compiles for one target; registers, stack and local memory in bytes as the assembler reports them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant, options = _shaped(kernel, variant, elements, capability)
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr") and variant[name] is not None:
            signature[name] = f"*{variant[name]}"
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name.endswith("_ptr") or name.isupper():
            signature[name], constants[name] = "constexpr", variant[name]
        else:
            signature[name] = "i64" if name in WIDE_INTEGERS else variant.get(name, "i32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout + report.stderr)}
    return {**usage, "shared": compiled.metadata.shared}


def _targets_of(number: int, variants: int) -> list[int]:
    """The targets of one variant of a kernel: every variant is compiled for one of them, and as the targets differ little, one variant
    for each other target. Of a few variants each is compiled for all."""
    others = [capability for capability in TARGETS if capability != MAIN_TARGET]
    chosen = others if variants < len(others) else [other for k, other in enumerate(others) if number == k * variants // len(others)]
    return [MAIN_TARGET, *chosen]


def _record(task: tuple[str, dict, int, int]) -> dict:
    name, variant, elements, capability = task
    record = {"kernel": name, "variant": variant, "elements": elements, "capability": capability}
    try:
        return {**record, **_compile(_find_kernels()[name], variant, elements, capability)}
    except Exception as error:
        return {**record, "error": f"{type(error).__name__}: {str(error)[-2000:]}"}


def main() -> None:
    kernels, variants = _find_kernels(), _variants()
    print(json.dumps({"kernels": sorted(kernels), "listed": sorted(variants), "with_pass": sorted(PASSES)}))
    tasks = [
        (name, variant, SIZES[number % len(SIZES)], capability)
        for name in sorted(kernels.keys() & variants.keys())
        for number, variant in enumerate(variants[name])
        for capability in _targets_of(number, len(variants[name]))
    ]
    # Processes that start anew: the compiler has threads of its own, which a fork would not survive.
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        for record in pool.map(_record, tasks, chunksize=4):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
else:
    import pytest

    @pytest.fixture(scope="module")
    def compiled(tmp_path_factory) -> tuple[dict, list[dict]]:
        """What there is, and a record of every compilation."""
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment.update(
            TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton_cache")), PYTHONPATH=str(ROOT), TRITON_DEFAULT_FP_FUSION="1"
        )
        result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-4000:]
        there, *records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        return there, records

    def test_every_kernel_is_listed(compiled):
        there, _ = compiled
        assert there["kernels"] == there["listed"] == there["with_pass"]

    @pytest.mark.parametrize("capability", TARGETS)
    def test_kernels_compile_without_spills(compiled, capability):
        there, records = compiled
        mine = [record for record in records if record["capability"] == capability]
        assert {record["kernel"] for record in mine} == set(there["kernels"])
        failed = [record for record in mine if "error" in record]
        assert not failed, failed[0]
        spilled = [record for record in mine if record["STACK"] > 0 or record["LOCAL"] > 0]
        assert not spilled, spilled
        too_large = [record for record in mine if record["shared"] > TARGETS[capability]]
        assert not too_large, too_large
