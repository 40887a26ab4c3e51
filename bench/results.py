"""The file that a benchmark writes, `results/<machine>/<loss>.json`: one fixed schema, checked when written and when read.

A document holds the machine and sections, each with its own settings and records: `speed`, `memory`, `syncs`, `launches` and
`targets` of a loss, `distance` (of the bucketed loss to the exact one), and what scaling.py and whole_step.py measure over several
losses. What a problem is differs between the losses.
A run replaces the sections that it measured; sections of another machine or other versions are dropped, never mixed.
"""
import json
import pathlib

from bench import exponents

SCHEMA = 3
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
OPTIONAL_TEXT = (str, type(None))
# What a problem is, in the order of the tables, with the head of its column; None: in no column.
RANKING_PROBLEM = {
    "distribution": (str, "logits"),
    "positives": (int, "P"),
    "negatives": (int, "N"),
    "form": (str, "targets"),
    "dtype": (str, "type"),
    "segments": (int, "S"),
    "device": (str, None),
    "max_positives": ((int, type(None)), None),
}
GHM_PROBLEM = {
    "loss": (str, "loss"),
    "distribution": (str, "logits"),
    "size": (int, "N"),
    "bins": (int, "bins"),
    "momentum": (NUMBER, "momentum"),
    "form": (str, "targets"),
    "dtype": (str, "type"),
    "device": (str, None),
}
GROUP_SOFTMAX_PROBLEM = {
    "rows": (int, "rows"),
    "classes": (str, "classes"),
    "others_ratio": (NUMBER, "ratio"),
    "dtype": (str, "type"),
    "device": (str, None),
}
FOCAL_PROBLEM = {
    "loss": (str, "loss"),
    "distribution": (str, "logits"),
    "size": (int, "N"),
    "classes": (int, "C"),
    "form": (str, "targets"),
    "dtype": (str, "type"),
    "device": (str, None),
}
SEESAW_PROBLEM = {
    "rows": (int, "rows"),
    "classes": (int, "C"),
    "dtype": (str, "type"),
    "device": (str, None),
}
SMOOTH_L1_PROBLEM = {
    "size": (int, "N"),
    "form": (str, "weights"),
    "dtype": (str, "type"),
    "device": (str, None),
}
MAPS_PROBLEM = {
    "loss": (str, "loss"),
    "images": (int, "images"),
    "pixels": (int, "pixels"),
    "anchors": (int, "anchors"),
    "dtype": (str, "type"),
    "device": (str, None),
}
PROBLEMS = {
    "focal": FOCAL_PROBLEM,
    "ghm": GHM_PROBLEM,
    "group_softmax": GROUP_SOFTMAX_PROBLEM,
    "maps": MAPS_PROBLEM,
    "seesaw": SEESAW_PROBLEM,
    "smooth_l1": SMOOTH_L1_PROBLEM,
}
CASE_FIELDS = {"elements": int, "provider": str, "skipped": OPTIONAL_TEXT}
# Their records say which problem of the loss they are about.
OF_PROBLEMS = ("speed", "memory", "syncs", "launches")
# What is counted differs between a CPU and CUDA, see counts.py.
COUNT_FIELDS = {"counted": str, "forward": (int, type(None)), "backward": (int, type(None))}
FIELDS = {
    "speed": CASE_FIELDS
    | {
        "mode": str,
        "timing": str,
        "median_ms": OPTIONAL_NUMBER,
        "q1_ms": OPTIONAL_NUMBER,
        "q3_ms": OPTIONAL_NUMBER,
        "repetitions": int,
        "ns_per_element": OPTIONAL_NUMBER,
        "moved_bytes": int,
        "gb_per_s": OPTIONAL_NUMBER,
        "ratio_to_floor": OPTIONAL_NUMBER,
        "ratio_to_focal": OPTIONAL_NUMBER,
    },
    "memory": CASE_FIELDS | {"extra_bytes": OPTIONAL_NUMBER, "bytes_per_element": OPTIONAL_NUMBER},
    "syncs": CASE_FIELDS | COUNT_FIELDS,
    "launches": CASE_FIELDS | COUNT_FIELDS,
    "targets": {
        "target": str,
        "limit": OPTIONAL_NUMBER,
        "aim": OPTIONAL_NUMBER,
        "unit": str,
        "got": OPTIONAL_NUMBER,
        "passed": bool,
        "note": OPTIONAL_TEXT,
    },
    "distance": {
        "distribution": str,
        "positives": int,
        "negatives": int,
        "delta": NUMBER,
        "ranking_loss": NUMBER,
        "gradient_l2": NUMBER,
        "gradient_largest": NUMBER,
        "gradient_cosine": NUMBER,
    },
}
# Time and memory against one size of the problem, see scaling.py.
SCALING_FIELDS = {"problem": str, "x": int, "provider": str, "skipped": OPTIONAL_TEXT}
SCALING_FIELDS |= dict.fromkeys(("repetitions", "median_ms", "q1_ms", "q3_ms", "extra_bytes"), OPTIONAL_NUMBER)
FIELDS |= dict.fromkeys(exponents.AXES, SCALING_FIELDS)
# What a loss takes of a training step, see whole_step.py.
FIELDS["heads"] = {"head": str, "loss": str, "elements": int, "role": str, "provider": str, "skipped": OPTIONAL_TEXT, "repetitions": int}
FIELDS["heads"] |= dict.fromkeys(("median_ms", "q1_ms", "q3_ms"), OPTIONAL_NUMBER)
FIELDS["steps"] = dict.fromkeys(("model", "images", "loss", "provider"), str) | {"rows": int, "positives": int}
FIELDS["steps"] |= dict.fromkeys(("step_ms", "loss_ms"), NUMBER)
# Of problems of a ranking loss: the fraction of negatives that can reach a positive, per draw.
RANKING_SPEED = {"relevant": list}
SETTING_FIELDS = {"date": str, "threads": int, "seeds": list, "budget_s": NUMBER, "foreign_load": OPTIONAL_NUMBER, "cache": str}
MACHINE_FIELDS = ("slug", "cpu", "cores", "gpu", "compute_capability", "cuda", "torch", "triton", "python", "system")


def problem(loss: str) -> dict[str, tuple]:
    """What tells the problems of a loss apart: {field: (type, head of its column or None)}."""
    return PROBLEMS.get(loss, RANKING_PROBLEM)


def fields(loss: str, section: str) -> dict:
    """The fields of a record and their types."""
    if section not in OF_PROBLEMS:
        return FIELDS[section]
    of_problem = {name: kind for name, (kind, _) in problem(loss).items()}
    return of_problem | FIELDS[section] | (RANKING_SPEED if section == "speed" and loss not in PROBLEMS else {})


def validate(document: dict) -> None:
    """Raises `ValueError` naming the place and the field that is missing, unknown or of a wrong type."""
    _check_keys("document", document, {"schema": int, "loss": str, "machine": dict, "sections": dict})
    if document["schema"] != SCHEMA:
        raise ValueError(f"results: schema must be {SCHEMA}, got {document['schema']}")
    _check_keys("machine", document["machine"], dict.fromkeys(MACHINE_FIELDS, (str, int, type(None))))
    for name, section in document["sections"].items():
        if name not in FIELDS:
            raise ValueError(f"results: section must be one of {', '.join(FIELDS)}, got {name!r}")
        _check_keys(name, section, {"settings": dict, "records": list})
        _check_keys(f"{name}.settings", section["settings"], SETTING_FIELDS)
        for number, record in enumerate(section["records"]):
            _check_keys(f"{name}.records[{number}]", record, fields(document["loss"], name))


def _check_keys(place: str, value: dict, fields: dict) -> None:
    if value.keys() != fields.keys():
        raise ValueError(f"results: {place} must have the keys {sorted(fields)}, got {sorted(value)}")
    for key, wanted in fields.items():
        if not isinstance(value[key], wanted):
            raise ValueError(f"results: {place}.{key} must be {wanted}, got {value[key]!r}")


def path_of(folder: pathlib.Path, loss: str) -> pathlib.Path:
    return pathlib.Path(folder) / f"{loss}.json"


def read(path: pathlib.Path) -> dict:
    document = json.loads(pathlib.Path(path).read_text())
    validate(document)
    return document


def update(folder: pathlib.Path, loss: str, machine: dict, sections: dict) -> pathlib.Path:
    """Writes `sections` ({name: {"settings", "records"}}) into the file of `loss`, keeping others of the very same machine."""
    path = path_of(folder, loss)
    document = {"schema": SCHEMA, "loss": loss, "machine": machine, "sections": {}}
    # A file of another schema is as good as none: its figures may mean something else.
    if path.exists() and json.loads(path.read_text()).get("schema") == SCHEMA:
        previous = read(path)
        if previous["machine"] == machine:
            document["sections"] = previous["sections"]
    document["sections"] = {**document["sections"], **sections}
    validate(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One record per line, so that a change of one figure is one line of a diff.
    text = json.dumps({**document, "sections": {}}, indent=1)
    blocks = []
    for name, section in document["sections"].items():
        records = ",\n    ".join(json.dumps(record) for record in section["records"])
        head = f'  "{name}": {{\n   "settings": {json.dumps(section["settings"])},\n   "records": [\n    '
        blocks.append(head + records + "\n   ]\n  }")
    path.write_text(text.replace('"sections": {}', '"sections": {\n' + ",\n".join(blocks) + "\n }") + "\n")
    read(path)
    return path
