"""Prints the tables of the README from the committed results, so that it never holds a figure that no file holds.

    python bench/report.py                      prints the tables
    python bench/report.py --write README.md    puts them between the two marks in that file
    python bench/report.py --check README.md    exit status 1 if the file says something else

The marks are `<!-- bench:begin -->` and `<!-- bench:end -->`.
"""
import argparse
import pathlib
import statistics
import sys

BENCH = pathlib.Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))

from bench import results  # noqa: E402

TITLES = {"rank_sort": "Rank & Sort loss", "ap": "AP loss", "alrp": "aLRP loss", "bucketed": "Bucketed against exact"}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def tables(folder: pathlib.Path) -> str:
    """Markdown: for every results file its machine, the medians, the memory and the rows that must hold."""
    parts = []
    for path in sorted(folder.glob("*/*.json")):
        document = results.read(path)
        parts.append(_heading(document))
        sections = document["sections"]
        if "speed" in sections:
            parts.append(_speed(sections["speed"]["records"]))
        if "memory" in sections:
            parts.append("Peak memory of forward + backward beyond the inputs, MiB:\n")
            parts.append(_by_problem(sections["memory"]["records"], lambda record: _number(record["extra_bytes"], 1 / 2**20)))
        if "targets" in sections:
            parts.append(_targets(sections["targets"]["records"]))
        if "distance" in sections:
            parts.append(_distance(sections["distance"]))
    return "\n".join(parts)


def _heading(document: dict) -> str:
    machine = document["machine"]
    settings = next(iter(document["sections"].values()))["settings"]
    where = machine["gpu"] or f"{machine['cpu']}, {settings['threads']} threads"
    return f"**{TITLES.get(document['loss'], document['loss'])}**, {where}, torch {machine['torch']}, {settings['date']}\n"


def _speed(records: list[dict]) -> str:
    parts = []
    for mode, timing in sorted({(record["mode"], record["timing"]) for record in records}):
        words = {"full": "Forward + backward"}.get(mode, mode.capitalize()) + (", captured" if timing == "captured" else "")
        chosen = [record for record in records if (record["mode"], record["timing"]) == (mode, timing)]
        for is_segmented, title in ((False, words), (True, f"{words} in S equal segments")):
            part = [record for record in chosen if (record["segments"] > 1) == is_segmented]
            if part:
                parts.append(f"{title}, median milliseconds:\n")
                parts.append(_by_problem(part, lambda record: _number(record["median_ms"])))
    return "\n".join(parts)


def _by_problem(records: list[dict], cell) -> str:
    """One row per problem, one column per provider. `relevant`: the fraction of negatives that can reach a positive."""
    providers = list(dict.fromkeys(record["provider"] for record in records))
    names = ["distribution", "positives", "negatives", "form", "dtype"]
    heads = ["logits", "P", "N", "targets", "type"]
    if any(record["segments"] > 1 for record in records):
        names, heads = [*names, "segments"], [*heads, "S"]
    if "relevant" in records[0]:
        heads.append("relevant")
    rows = {}
    for record in records:
        key = [f"{record[name]:,}" if isinstance(record[name], int) else record[name] for name in names]
        if "relevant" in record:
            key.append(f"{statistics.median(record['relevant']):.2g}")
        rows.setdefault(tuple(key), {})[record["provider"]] = cell(record)
    lines = ["| " + " | ".join([*heads, *providers]) + " |", "|---" * (len(heads) + len(providers)) + "|"]
    for key, cells in rows.items():
        lines.append("| " + " | ".join([*key, *(cells.get(provider, "-") for provider in providers)]) + " |")
    return "\n".join(lines) + "\n"


def _targets(records: list[dict]) -> str:
    lines = ["| must hold | got | limit | |", "|---|---|---|---|"]
    for record in records:
        got = "-" if record["got"] is None else f"{record['got']:.3g}"
        verdict = "pass" if record["passed"] else "fail"
        limit = "-" if record["limit"] is None else f"{record['limit']:.3g}"
        lines.append(f"| {record['target']} | {got} {record['unit']} | {limit} | {verdict} |")
    return "\n".join(lines) + "\n"


def _distance(section: dict) -> str:
    draws = len(section["settings"]["seeds"])
    lines = [f"Rank & Sort with one mean per bucket of negatives against the exact loss, float64, the worst of {draws} draws:\n"]
    lines.append("| logits | P | N | delta | ranking loss, difference | gradient, relative L2 | largest entry | cosine |")
    lines.append("|---" * 8 + "|")
    for record in section["records"]:
        problem = f"{record['distribution']} | {record['positives']:,} | {record['negatives']:,} | {record['delta']:g}"
        errors = [f"{record[name]:.1e}" for name in ("ranking_loss", "gradient_l2", "gradient_largest")]
        lines.append(f"| {problem} | {' | '.join(errors)} | {record['gradient_cosine']:.5f} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, factor: float = 1) -> str:
    if value is None:
        return "-"
    scaled = value * factor
    return f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.3g}"


def splice(text: str, inner: str) -> str:
    """`text` with what stands between the marks replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"report: the file must hold {BEGIN} and then {END}, once each")
    return text[: text.index(BEGIN)] + BEGIN + "\n" + inner + text[text.index(END) :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=BENCH / "results")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--check", type=pathlib.Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    inner = tables(arguments.results)
    if arguments.write:
        arguments.write.write_text(splice(arguments.write.read_text(), inner))
    elif arguments.check:
        text = arguments.check.read_text()
        if splice(text, inner) != text:
            print(f"{arguments.check} does not hold the tables of {arguments.results}; --write brings them")
            return 1
    else:
        print(inner, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
