"""Draws a results file. Its speed section: time against N, P, the number of segments and that of bins, one line per provider; the
sections of scaling.py: time and memory against one size, with the exponents.

    python bench/plot.py bench/results/<machine>/rank_sort.json

Writes <loss>_time_against_n.png, _p.png and so on, or scaling_against_n.png, beside the file, as far as it holds two problems that
differ in that alone.
"""
import argparse
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

from bench import exponents, results  # noqa: E402

# Ours in strong blues with filled markers, the field in warm tones, focal in greens, the floor in grey: told apart without
# colour by marker and dash as well.
OURS = {"cpp": "#0b5fa5", "cuda": "#0b5fa5", "triton": "#2f9fd8", "reference": "#7fb2dd"}
FORMS_OF_OURS = {
    "": ("o", "-"),
    "chunks": ("o", "-"),
    "row ids": ("s", "-"),
    "without segments": (".", "-."),
    "a call per segment": ("v", "--"),
}
STYLES = {
    "published loop": ("#b3261e", "v", "--"),
    "bucketed": ("#e0731d", "^", "--"),
    "vectorised": ("#8e5bb5", "<", "--"),
    "vectorised, torch.compile": ("#c48bd8", ">", "--"),
    "MMDetection's": ("#b3261e", "v", "--"),
    "published groups": ("#b3261e", "v", "--"),
    "published EFL": ("#b3261e", "v", "--"),
    "published EQL v2": ("#b3261e", "v", "--"),
    "plain softmax, eager": ("#1f7a4d", "P", ":"),
    "smooth L1, eager": ("#1f7a4d", "P", ":"),
    "smooth L1, torch.compile": ("#6fbf8f", "X", ":"),
    "focal, eager": ("#1f7a4d", "P", ":"),
    "focal, torch.compile": ("#6fbf8f", "X", ":"),
    "cat + permute [cpp]": ("#e0731d", "^", "--"),
    "cat + permute focal, eager": ("#1f7a4d", "P", ":"),
    "sigmoid_focal_loss [cpp]": ("#0f5132", "D", "-."),
    "copy floor": ("#777777", ".", "-."),
}
OTHER = ("#333333", "x", "-")
RANKING_AXES = {"n": ("negatives", "N, negatives"), "p": ("positives", "P, positives"), "s": ("segments", "S, equal segments")}
AXES = {
    "focal": {"n": ("size", "N, elements"), "c": ("classes", "C, classes")},
    "ghm": {"n": ("size", "N, elements"), "b": ("bins", "bins")},
    "group_softmax": {"r": ("rows", "rows")},
    "maps": {"n": ("pixels", "pixels of a side")},
    "seesaw": {"r": ("rows", "rows"), "c": ("classes", "C, classes")},
    "smooth_l1": {"n": ("size", "N, elements")},
}


def axes_of(loss: str) -> dict[str, tuple[str, str]]:
    """{name of the picture: (field, label)}."""
    return AXES.get(loss, RANKING_AXES)


def style(provider: str) -> tuple[str, str, str]:
    """Ours are named `function [backend]`, with segments `function [backend], form`."""
    if provider in STYLES or not is_ours(provider):
        return STYLES.get(provider, OTHER)
    backend, _, form = provider.partition("[")[2].partition("]")
    return OURS.get(backend, OTHER[0]), *FORMS_OF_OURS.get(form.removeprefix(", "), OTHER[1:])


def is_ours(provider: str) -> bool:
    return "[" in provider


def series(loss: str, records: list[dict], axis: str) -> tuple[dict, dict]:
    """The longest run of problems that differ in `axis` alone: what is fixed, and {provider: [(x, record)]}."""
    key = axes_of(loss)[axis][0]
    # The capacity follows the number of positives.
    names = [name for name in results.problem(loss) if name != "max_positives"] + ["mode", "timing"]
    groups = {}
    for record in records:
        # One segment has other providers than many.
        if axis == "s" and record["segments"] == 1:
            continue
        fixed = {name: record[name] for name in names if name != key}
        groups.setdefault(tuple(fixed.items()), []).append(record)
    if not groups:
        return {}, {}
    fixed, chosen = max(groups.items(), key=lambda item: len({record[key] for record in item[1]}))
    lines = {}
    for record in sorted(chosen, key=lambda record: record[key]):
        if record["median_ms"] is not None:
            lines.setdefault(record["provider"], []).append((record[key], record))
    return dict(fixed), lines


def draw(document: dict, axis: str, path: pathlib.Path) -> bool:
    """False, and no picture, where nothing varies along the axis."""
    loss, axes = document["loss"], axes_of(document["loss"])
    fixed, lines = series(loss, document["sections"]["speed"]["records"], axis)
    if max((len(points) for points in lines.values()), default=0) < 2:
        return False
    figure, plot = plt.subplots(figsize=(9, 5.4), constrained_layout=True)
    for provider, points in sorted(lines.items(), key=lambda item: -item[1][-1][1]["median_ms"]):
        colour, marker, dash = style(provider)
        x = [value for value, _ in points]
        middle, low, high = ([record[name] for _, record in points] for name in ("median_ms", "q1_ms", "q3_ms"))
        width = 2.4 if is_ours(provider) else 1.5
        plot.plot(x, middle, color=colour, marker=marker, linestyle=dash, linewidth=width, markersize=6, label=provider)
        plot.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    plot.set(xscale="log", yscale="log", xlabel=axes[axis][1], ylabel="milliseconds, median and quartiles")
    others = [f"{label.split(',')[0]} = {fixed[key]:,}" for name, (key, label) in axes.items() if name not in (axis, "s")]
    machine = document["machine"]
    threads = document["sections"]["speed"]["settings"]["threads"]
    where = machine["gpu"] or f"{machine['cpu']}, {threads} thread{'s' * (threads != 1)}"
    passes = {"full": "forward + backward"}.get(fixed["mode"], fixed["mode"])
    of_logits = [f"{fixed['distribution']} logits"] if "distribution" in fixed else []
    of_form = [f"{fixed['form']} {'weights' if loss == 'smooth_l1' else 'targets'}"] if "form" in fixed else []
    problem = ", ".join([*of_logits, *others, fixed["dtype"], *of_form])
    plot.set_title(
        f"{fixed.get('loss', loss.replace('_', ' '))}, {passes}: {problem}\n{where}, torch {machine['torch']}",
        fontsize=10,
        loc="left",
    )
    plot.grid(which="major", color="#dddddd", linewidth=0.8)
    plot.set_axisbelow(True)
    plot.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_growth(document: dict, section: str, path: pathlib.Path) -> bool:
    """Time and memory against one size, a line for each problem and provider; False, and no picture, without two sizes."""
    part = document["sections"][section]
    panels = {figure: exponents.lines(part["records"], figure) for figure in exponents.FIGURES}
    panels = {figure: lines for figure, lines in panels.items() if any(len(points) > 1 for points in lines.values())}
    if not panels:
        return False
    problems = list(dict.fromkeys(record["problem"] for record in part["records"]))
    figure, plots = plt.subplots(1, len(panels), figsize=(6.2 * len(panels), 6), squeeze=False, layout="constrained")
    for plot, (name, lines) in zip(plots[0], panels.items(), strict=True):
        for key, points in lines.items():
            problem, provider = key
            _, _, dash = style(provider)
            colour = plt.get_cmap("tab10")(problems.index(problem))
            fitted = exponents.fit(points)
            told = f"{provider}: {problem}" + (f", exponent {fitted.exponent:.2f}" if fitted else "")
            plot.plot(*zip(*points, strict=True), dash, color=colour, marker=style(provider)[1], label=told)
        plot.set(xscale="log", yscale="log", xlabel=exponents.AXES[section], ylabel=exponents.FIGURES[name])
        plot.grid(which="major", color="#dddddd", linewidth=0.8)
        plot.set_axisbelow(True)
        plot.spines[["top", "right"]].set_visible(False)
        plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=8)
    machine, threads = document["machine"], part["settings"]["threads"]
    where = f"{machine['cpu']}, {threads} threads, torch {machine['torch']}"
    figure.suptitle(f"forward + backward, float32; {where}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    for file in parser.parse_args(argv).files:
        document = results.read(file)
        growing = [section for section in exponents.AXES if section in document["sections"]]
        if "speed" not in document["sections"] and not growing:
            parser.error(f"{file} holds neither a speed section nor one of a growing size")
        for section in growing:
            path = file.with_name(f"{document['loss']}_{section}.png")
            if draw_growth(document, section, path):
                print(path)
        for axis in axes_of(document["loss"]) if "speed" in document["sections"] else ():
            path = file.with_name(f"{document['loss']}_time_against_{axis}.png")
            if draw(document, axis, path):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
