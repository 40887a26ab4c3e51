"""Writes the tables of the READMEs from the committed results, so that they never hold a figure that no file holds.

    python bench/report.py            prints all tables
    python bench/report.py --write    puts them between the marks in results/README.md, and the headlines in the README of the library
    python bench/report.py --check    exit status 1 if a file says something else

Both take other files instead. The marks are `<!-- bench:begin -->` and `<!-- bench:end -->` around all tables, `headlines` in place
of `bench` around the headlines.
"""
import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

BENCH = pathlib.Path(__file__).resolve().parent
sys.path.append(str(BENCH.parent))

from bench import exponents, results, targets  # noqa: E402
from bench import tables_of_sizes as of_sizes  # noqa: E402
from bench.slower import OURS, slower  # noqa: E402
from bench.tables_of_sizes import number  # noqa: E402

# In the order of the tables; other losses follow by name.
TITLES = {
    "rank_sort": "Rank & Sort loss",
    "ap": "AP loss",
    "alrp": "aLRP loss",
    "focal": "Sigmoid focal loss, EFL and EQL v2",
    "ghm": "GHM losses",
    "group_softmax": "Balanced group softmax",
    "seesaw": "Seesaw loss",
    "smooth_l1": "Smooth L1 loss",
    "bucketed": "Bucketed against exact Rank & Sort loss",
    "maps": "Levels of a head as they come",
    "whole_step": "What a loss takes of a training step",
    "scaling": "How time and memory grow",
}
BUCKETED = (
    "The bucketed loss (ECCV 2024) sorts all logits and takes the negatives between two neighbouring positives as so many of their mean "
    "logit. For delta above 0 that is another loss. Against the exact one in float64, the worst of {worst_of}:\n"
)
OF_STEP = {"heads": of_sizes.heads, "steps": of_sizes.steps}
FILES = [BENCH.parent / "README.md", BENCH / "results" / "README.md"]


def documents(folder: pathlib.Path) -> Iterator[dict]:
    def place(path: pathlib.Path) -> tuple:
        is_other = path.stem not in TITLES
        return path.parent.name, is_other, path.stem if is_other else list(TITLES).index(path.stem)

    return map(results.read, sorted(folder.glob("*/*.json"), key=place))


def tables(folder: pathlib.Path) -> str:
    """Markdown: for every results file its machine, the medians, the memory and the rows that must hold."""
    parts = []
    for document in documents(folder):
        parts.append(_heading(document))
        sections = document["sections"]
        if "speed" in sections:
            parts.append(_speed(document["loss"], sections["speed"]["records"]))
        if "memory" in sections:
            parts.append("Peak memory of forward + backward beyond the inputs, MiB:\n")
            parts.append(_by_problem(document["loss"], sections["memory"]["records"], lambda record: number(_mebibytes(record))))
        for name in ("syncs", "launches"):
            if name in sections:
                parts.append(_counts(document["loss"], sections[name]["records"]))
        if "targets" in sections:
            parts.append(_targets(sections["targets"]["records"]))
        if "distance" in sections:
            parts.append(_distance(sections["distance"]))
        parts += [of_sizes.growth(name, sections[name]["records"]) for name in exponents.AXES if name in sections]
        parts += [make(sections[name]["records"]) for name, make in OF_STEP.items() if name in sections]
    return "\n".join(parts)


def headlines(folder: pathlib.Path) -> str:
    """Markdown: for every results file its machine, the others as multiples of this library, and the rows that do not hold."""
    parts = []
    for document in documents(folder):
        parts.append(_heading(document))
        sections = document["sections"]
        if "speed" in sections:
            records = [record for record in sections["speed"]["records"] if (record["mode"], record["timing"]) == ("full", "call")]
            for part, in_segments in _by_segments(records):
                words = f"Forward + backward{in_segments}, median milliseconds"
                parts.append(_multiples(document["loss"], words, part, lambda record: record["median_ms"]))
            parts += filter(None, [slower(document["loss"], records)])
        if "memory" in sections:
            words = "Peak memory of forward + backward beyond the inputs, MiB"
            parts.append(_multiples(document["loss"], words, sections["memory"]["records"], _mebibytes))
        for name in ("syncs", "launches"):
            if name in sections:
                parts.append(_largest_counts(document["loss"], sections[name]["records"]))
        if "targets" in sections:
            records = sections["targets"]["records"]
            others = [record for record in records if targets.verdict(record) in ("FAIL", "missed")]
            parts.append(targets.summary(records) + (". The others:\n" if others else ".\n"))
            parts += [_targets(others)] if others else []
        if "distance" in sections:
            parts.append(_worst_distances(sections["distance"]))
        grown = {name: sections[name]["records"] for name in exponents.AXES if name in sections}
        parts += [of_sizes.growth_in_short(grown)] if grown else []
        parts += [make(sections[name]["records"]) for name, make in OF_STEP.items() if name in sections]
    return "\n".join(parts)


def _heading(document: dict) -> str:
    machine = document["machine"]
    settings = next(iter(document["sections"].values()))["settings"]
    where = machine["gpu"] or f"{machine['cpu']}, {settings['threads']} threads"
    draws = f"{len(settings['seeds'])} draws" if len(settings["seeds"]) > 1 else "1 draw"
    return f"**{TITLES.get(document['loss'], document['loss'])}**, {where}, torch {machine['torch']}, {draws}, {settings['date']}\n"


def _speed(loss: str, records: list[dict]) -> str:
    parts = []
    for mode, timing in sorted({(record["mode"], record["timing"]) for record in records}):
        words = {"full": "Forward + backward"}.get(mode, mode.capitalize()) + (", captured" if timing == "captured" else "")
        chosen = [record for record in records if (record["mode"], record["timing"]) == (mode, timing)]
        for part, in_segments in _by_segments(chosen):
            parts.append(f"{words}{in_segments}, median milliseconds:\n")
            parts.append(_by_problem(loss, part, lambda record: number(record["median_ms"])))
        parts += filter(None, [slower(loss, chosen)])
    return "\n".join(parts)


def _by_segments(records: list[dict]) -> list[tuple[list[dict], str]]:
    """Without segments and with, as far as there are any, and words for it: they have other providers."""
    parts = ([record for record in records if (record.get("segments", 1) > 1) == several] for several in (False, True))
    return [(part, words) for part, words in zip(parts, ("", " in S equal segments"), strict=True) if part]


def _mebibytes(record: dict) -> float | None:
    return None if record["extra_bytes"] is None else record["extra_bytes"] / 2**20


def _multiples(loss: str, words: str, records: list[dict], value: Callable[[dict], float | None]) -> str:
    """The value of this library's compiled function, and those of the others over it."""
    found = [record["provider"] for record in records if OURS.match(record["provider"])]
    if not found:
        return ""
    ours = found[0]

    def problem(record: dict) -> tuple:
        return tuple(record[name] for name, (_, head) in results.problem(loss).items() if head)

    of_ours = {problem(record): value(record) for record in records if record["provider"] == ours}

    def cell(record: dict) -> str:
        base, own = of_ours.get(problem(record)), value(record)
        if record["provider"] == ours or None in (base, own):
            return number(own if record["provider"] == ours else None)
        return f"{number(own / base)} x"

    records = [record | {"relevant": None} for record in records if record["provider"] != "copy floor"]
    records.sort(key=lambda record: record["provider"] != ours)
    return f"{words} of `{ours}`, and how many times as much the others take:\n\n{_by_problem(loss, records, cell)}"


def _count(record: dict) -> str:
    return "-" if record["forward"] is None else f"{record['forward']:,} + {record['backward']:,}"


def _counts(loss: str, records: list[dict]) -> str:
    return f"{records[0]['counted'].capitalize()}, forward + backward:\n\n{_by_problem(loss, records, _count)}"


def _largest_counts(loss: str, records: list[dict]) -> str:
    """One sentence, of the first problem with the most elements."""
    largest = max(records, key=lambda record: record["elements"])
    chosen = [record for record in records if all(record[name] == largest[name] for name in results.problem(loss))]
    told = ", ".join(f"`{record['provider']}` {_count(record)}" for record in chosen if record["forward"] is not None)
    return f"{largest['counted'].capitalize()} for {largest['elements']:,} elements, forward + backward: {told}.\n"


def _by_problem(loss: str, records: list[dict], cell: Callable[[dict], str]) -> str:
    """One row per problem, one column per provider. `relevant`: the fraction of negatives that can reach a positive."""
    providers = list(dict.fromkeys(record["provider"] for record in records))
    columns = {name: head for name, (_, head) in results.problem(loss).items() if head}
    # What hardly ever differs has a column only where it does.
    for name, usual in (("segments", 1), ("momentum", 0)):
        if all(record.get(name, usual) == usual for record in records):
            columns.pop(name, None)
    names, heads = list(columns), list(columns.values())
    if records[0].get("relevant"):
        heads.append("relevant")
    rows = {}
    for record in records:
        key = [record[name] if isinstance(record[name], str) else f"{record[name]:,}" for name in names]
        if record.get("relevant"):
            key.append(f"{statistics.median(record['relevant']):.2g}")
        rows.setdefault(tuple(key), {})[record["provider"]] = cell(record)
    lines = ["| " + " | ".join([*heads, *providers]) + " |", "|---" * (len(heads) + len(providers)) + "|"]
    for key, cells in rows.items():
        lines.append("| " + " | ".join([*key, *(cells.get(provider, "-") for provider in providers)]) + " |")
    return "\n".join(lines) + "\n"


def _targets(records: list[dict]) -> str:
    lines = ["| row | got | limit or aim | verdict |", "|---|---|---|---|"]
    for record in records:
        got = "-" if record["got"] is None else f"{record['got']:.3g}"
        aim = "-" if record["aim"] is None else f"aim {record['aim']:.3g}"
        limit = aim if record["limit"] is None else f"{record['limit']:.3g}"
        lines.append(f"| {record['target']} | {got} {record['unit']} | {limit} | {targets.verdict(record)} |")
    return "\n".join(lines) + "\n"


def _distance(section: dict) -> str:
    lines = [BUCKETED.format(worst_of=f"{len(section['settings']['seeds'])} draws")]
    lines.append("| logits | P | N | delta | ranking loss, difference | gradient, relative L2 | largest entry | cosine |")
    lines.append("|---" * 8 + "|")
    for record in section["records"]:
        problem = f"{record['distribution']} | {record['positives']:,} | {record['negatives']:,} | {record['delta']:g}"
        lines.append(f"| {problem} | {_errors(record)} |")
    return "\n".join(lines) + "\n"


def _worst_distances(section: dict) -> str:
    """One row per delta."""
    problems = {(record["distribution"], record["positives"], record["negatives"]) for record in section["records"]}
    lines = [BUCKETED.format(worst_of=f"{len(problems)} problems and {len(section['settings']['seeds'])} draws")]
    lines += ["| delta | ranking loss, difference | gradient, relative L2 | largest entry | cosine |", "|---" * 5 + "|"]
    for delta in dict.fromkeys(record["delta"] for record in section["records"]):
        records = [record for record in section["records"] if record["delta"] == delta]
        worst = {name: max(record[name] for record in records) for name in ("ranking_loss", "gradient_l2", "gradient_largest")}
        lines.append(f"| {delta:g} | {_errors(worst | {'gradient_cosine': min(r['gradient_cosine'] for r in records)})} |")
    return "\n".join(lines) + "\n"


def _errors(record: dict) -> str:
    errors = [f"{record[name]:.1e}" for name in ("ranking_loss", "gradient_l2", "gradient_largest")]
    return f"{' | '.join(errors)} | {record['gradient_cosine']:.5f}"


def splice(text: str, folder: pathlib.Path) -> str:
    """`text` with what stands between its marks replaced."""
    found = False
    for name, make in (("bench", tables), ("headlines", headlines)):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text and end not in text:
            continue
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"report: the file must hold {begin} and then {end}, once each")
        text, found = f"{text[: text.index(begin)]}{begin}\n{make(folder)}{text[text.index(end) :]}", True
    if not found:
        raise ValueError("report: the file must hold the marks of all tables or of the headlines, got neither")
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=BENCH / "results")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", nargs="*")
    parser.add_argument("--check", type=pathlib.Path, metavar="FILE", nargs="*")
    arguments = parser.parse_args(argv)
    if arguments.write is None and arguments.check is None:
        print(tables(arguments.results), end="")
        return 0
    for path in FILES if arguments.write == [] else arguments.write or []:
        path.write_text(splice(path.read_text(), arguments.results))
    differing = []
    if arguments.check is not None:
        differing = [path for path in arguments.check or FILES if splice(path.read_text(), arguments.results) != path.read_text()]
    for path in differing:
        print(f"{path} does not hold the tables of {arguments.results}; --write brings them")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
