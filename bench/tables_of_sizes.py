"""Markdown of what is measured over several losses: how figures grow with a size, and what losses take of a training step."""
from bench import exponents


def number(value: float | None) -> str:
    """Three digits, or all of a large number; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def growth(section: str, records: list[dict]) -> str:
    """A table for times and one for memory: a column for each size, then the exponent of the upper half and its range."""
    parts = []
    sizes = sorted({record["x"] for record in records})
    for figure, what in exponents.FIGURES.items():
        rows = exponents.lines(records, figure)
        if not rows:
            continue
        size = exponents.AXES[section]
        heads = ["problem", "provider", *(f"{value:,}" for value in sizes), "exponent", "fitted over"]
        lines = [f"{what[0].upper()}{what[1:]}, against {size}:\n", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for (problem, provider), points in rows.items():
            of_size = dict(points)
            cells = [problem, provider, *(number(of_size.get(value)) for value in sizes), *_told(points)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def growth_in_short(sections: dict[str, list[dict]]) -> str:
    """The exponents alone. sections: {name: records}."""
    heads = ["problem", "provider", "grows with", "time as its power", "over", "memory as its power"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for section, records in sections.items():
        times, memory = (exponents.lines(records, figure) for figure in exponents.FIGURES)
        for key, points in times.items():
            exponent, over = _told(points)
            lines.append("| " + " | ".join([*key, exponents.AXES[section], exponent, over, _told(memory.get(key, []))[0]]) + " |")
    return "\n".join(lines) + "\n"


def _told(points: list[tuple[float, float]]) -> tuple[str, str]:
    fitted = exponents.fit(points)
    return ("-", "-") if fitted is None else (f"{fitted.exponent:.2f}", f"{fitted.low:,} to {fitted.high:,}")


def heads(records: list[dict]) -> str:
    """One row for each head and loss: as published, what such a head is trained with else, ours."""
    lines = ["Forward + backward of the loss alone, median milliseconds:\n"]
    lines += ["| head | logits | loss | as published | what it pays anyway | this library | published / this library |", "|---" * 7 + "|"]
    rows = {}
    for record in records:
        rows.setdefault((record["head"], record["elements"], record["loss"]), {})[record["role"]] = record
    for (head, elements, loss), of in rows.items():
        told = [f"{number(of[role]['median_ms'])} ({of[role]['skipped'] or of[role]['provider']})" for role in ("before", "anyway")]
        before, ours = of["before"]["median_ms"], of["ours"]["median_ms"]
        ratio = "-" if None in (before, ours) else f"{number(before / ours)} x"
        lines.append(f"| {head} | {elements:,} | {loss} | {' | '.join(told)} | {number(ours)} | {ratio} |")
    return "\n".join(lines) + "\n"


def steps(records: list[dict]) -> str:
    lines = ["The loss in a whole training step, median milliseconds, at the image size that was run:\n"]
    lines += ["| model | images | rows | positives | loss | by | step | loss in it | share |", "|---" * 9 + "|"]
    for record in records:
        sizes = f"{record['rows']:,} | {record['positives']:,} | {record['loss']} | {record['provider']}"
        share = f"{100 * record['loss_ms'] / record['step_ms']:.1f} %"
        times = f"{number(record['step_ms'])} | {number(record['loss_ms'])} | {share}"
        lines.append(f"| {record['model']} | {record['images']} | {sizes} | {times} |")
    return "\n".join(lines) + "\n"
