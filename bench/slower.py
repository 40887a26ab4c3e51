"""Where this library is slower than somebody in its own table, and why: told below the table, never left to be found."""
import re

from bench import results

OURS = re.compile(r"\w+ \[(cpp|cuda|triton)\]")


def every_record(record: dict) -> bool:
    return True


# {loss: [(beginning of the other's name, of which records, why)]}
OF_RANKS = "a focal loss ranks nothing; the tables of P positives and their order among each other come on top of the passes over N"
OF_CLASSES = "the equalized losses have a power and weights of each class and sum gradients for their state, a focal loss not"
RANKING = [("focal", every_record, OF_RANKS)]
CALL = "so few elements that only the call counts, which autograd in Python makes dearer"
WHY = {
    "rank_sort": RANKING,
    "ap": RANKING,
    "alrp": RANKING,
    "focal": [("focal", lambda record: record["loss"] != "focal", OF_CLASSES)],
    "ghm": [
        ("focal", every_record, "GHM needs all gradient norms binned before the first weight is known: one pass more"),
        ("smooth L1", every_record, "GHM needs all gradient norms binned before the first weight is known: one pass more"),
    ],
    "smooth_l1": [("smooth L1", lambda record: record["size"] <= 100_000, CALL)],
    "seesaw": [("plain softmax", every_record, "Seesaw reads a weight for each pair of classes, and counts")],
    "group_softmax": [("plain softmax", every_record, "others are drawn anew in each group and step")],
}
UNKNOWN = "why is not known"


def slower(loss: str, records: list[dict]) -> str:
    """Markdown, empty where nobody is faster. The copy is no loss, the other functions of this library no competitors.

    records: of speed, one mode and timing.
    """
    names = [name for name, (_, head) in results.problem(loss).items() if head]
    ours = {}
    for record in records:
        if record["median_ms"] and OURS.match(record["provider"]):
            ours.setdefault(_problem(record, names), record["median_ms"])
    found = {}
    for record in records:
        own, is_other = ours.get(_problem(record, names)), not OURS.match(record["provider"])
        if own and is_other and record["provider"] != "copy floor" and record["median_ms"] and own > record["median_ms"]:
            place = f"{own / record['median_ms']:.3g} x ({_told(record, loss)})"
            found.setdefault((record["provider"], _why(loss, record)), []).append(place)
    lines = [f"- `{provider}`: {', '.join(places)}: {why}." for (provider, why), places in found.items()]
    return "\n".join(["Slower than another, times its time:\n", *lines]) + "\n" if lines else ""


def _problem(record: dict, names: list[str]) -> tuple:
    return tuple(record[name] for name in names)


def _told(record: dict, loss: str) -> str:
    """Numbers with the head of their column, words as they are; what is the same in nearly every row is left out."""
    parts = []
    for name, (_, head) in results.problem(loss).items():
        value = record[name]
        if head and value not in ("float32", "dense", "index") and (name, value) not in (("segments", 1), ("momentum", 0)):
            parts.append(value if isinstance(value, str) else f"{head} {value:,}")
    return " ".join(parts)


def _why(loss: str, record: dict) -> str:
    reasons = (why for name, holds, why in WHY.get(loss, ()) if record["provider"].startswith(name) and holds(record))
    return next(reasons, UNKNOWN)
