"""How a figure grows with one size of the problem: a line per loss and provider, and the exponent that fits its upper part."""
import math
from typing import NamedTuple

# {section of the results: label of its size}
AXES = {
    "against_n": "N, elements",
    "against_p": "P, positives",
    "against_c": "C, classes",
    "against_bins": "bins",
    "against_world": "processes",
}
# {field of a record: what it tells}
FIGURES = {"median_ms": "time, ms", "extra_bytes": "peak memory beyond the inputs, MiB"}
FEWEST = 3


class Fit(NamedTuple):
    """y grows as x^exponent for x from `low` to `high`."""

    exponent: float
    low: float
    high: float


def fit(points: list[tuple[float, float]]) -> Fit | None:
    """Least squares of log y against log x over the upper half of the logarithmic range, three points at least; None for fewer.

    points: ascending (x, y), all above 0.
    """
    if len(points) < FEWEST:
        return None
    middle = math.sqrt(points[0][0] * points[-1][0])
    upper = [point for point in points if point[0] >= middle]
    upper = upper if len(upper) >= FEWEST else points[-FEWEST:]
    x, y = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return Fit(covariance / sum((a - mean_x) ** 2 for a in x), upper[0][0], upper[-1][0])


def lines(records: list[dict], figure: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """{(problem, provider): ascending points} of a section, without what was left out. Memory that is too little to be seen is too."""
    found = {}
    for record in sorted(records, key=lambda record: record["x"]):
        if record[figure]:
            scale = 2**20 if figure == "extra_bytes" else 1
            found.setdefault((record["problem"], record["provider"]), []).append((record["x"], record[figure] / scale))
    return found
