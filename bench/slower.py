"""Where this library is slower than somebody in its own table, and why: told below the table, never left to be found."""
import re

from bench import results

OURS = re.compile(r"\w+ \[(cpp|cuda|triton)\]")
# {loss: [(beginning of the other's name, why)]}
RANKING = [("focal", "a focal loss ranks nothing; the tables of P positives and their order among each other come on top of the passes over N")]
CALL = "so few elements that only the call counts, which autograd in Python makes dearer"
WHY = {
    "rank_sort": RANKING,
    "ap": RANKING,
    "alrp": RANKING,
    "focal": [("focal", "the equalized losses have a power and weights of each class and sum gradients for their state, a focal loss not")],
    "ghm": [
        ("focal", "GHM needs all gradient norms binned before the first weight is known: one pass more"),
        ("smooth L1", "GHM needs all gradient norms binned before the first weight is known: one pass more"),
    ],
    "smooth_l1": [("smooth L1, eager", CALL), ("smooth L1, torch.compile", CALL)],
    "seesaw": [("plain softmax", "Seesaw reads a weight for each pair of classes, and counts")],
    "group_softmax": [("plain softmax", "others are drawn anew in each group and step")],
    "maps": [(f"cat + permute {name}", "maps that are this small cost more by their number than by their size") for name in ("[", "focal")],
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
            found.setdefault(record["provider"], []).append(f"{own / record['median_ms']:.3g} x ({_told(record, loss)})")
    lines = [f"- `{provider}`: {', '.join(places)}: {_why(loss, provider)}." for provider, places in found.items()]
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


def _why(loss: str, provider: str) -> str:
    return next((why for beginning, why in WHY.get(loss, ()) if provider.startswith(beginning)), UNKNOWN)
