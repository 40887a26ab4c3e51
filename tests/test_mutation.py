"""The list of planted faults fits the sources."""
import pathlib

from mutation.faults import FAULTS


def test_every_fault_can_be_planted():
    root = pathlib.Path(__file__).resolve().parent.parent
    assert len({(fault.backend, fault.name) for fault in FAULTS}) == len(FAULTS) >= 60
    for fault in FAULTS:
        text = (root / fault.file).read_text()
        assert text.count(fault.old) == 1 and text.replace(fault.old, fault.new) != text, f"{fault.backend}: {fault.name}, {fault.file}"
        for name in fault.tests.split():
            file, _, function = name.partition("::")
            assert f"def {function}" in (root / file).read_text(), f"{fault.name}: no {name}"
