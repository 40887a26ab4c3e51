"""The programs python/swap_in_*.py, in miniature. That of MMDetection is in test_mmdet_patch.py."""
import importlib.util
import pathlib

import frameworks  # noqa: F401  puts the programs in the path
import pytest

SMALL = ["--image-size", "64", "--images", "1", "--rounds", "1"]
TITLES = "| loss | step, ms | loss in it, ms | share of the step | step | loss |"


def assert_measured(times: list, names: list[str], printed: str) -> None:
    assert [row.name for row in times] == names
    assert all(0 < row.loss < row.step and 0 < row.share < 1 for row in times)
    assert TITLES in printed and all(f"| {name} |" in printed for name in names)


def test_torchvision(capsys, tmp_path):
    import swap_in_torchvision

    times = swap_in_torchvision.main([*SMALL, "--classes", "11", "--loss", "rank_sort", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert_measured(times, ["torchvision's focal", 'use_loss(model, "rank_sort")'], printed)
    assert "rank_sort logs rank" in printed and "SB_weight" in printed
    table, origin = (tmp_path / "torchvision_retinanet.md").read_text().rsplit("\n\n", 1)
    assert table in printed
    assert "medians of 1 rounds in turns. By `python/swap_in_torchvision.py --model retinanet`" in origin and "torchvision 0." in origin


def test_figures_of_a_table():
    import swap_in_torchvision  # noqa: F401  puts what it needs in the path
    from swaps import timing

    table = timing.table("title", [timing.Times("before", 1803.6, 52.74), timing.Times("after", 901.8, 0.04)])
    assert "| before | 1804 | 52.7 | 2.9 % | | |" in table and "| after | 902 | 0.04 | 0.0 % | 2 x as fast | 1318 x as fast |" in table


def test_ultralytics(capsys, tmp_path):
    import swap_in_ultralytics

    times = swap_in_ultralytics.main([*SMALL, "--loss", "varifocal", "--out", str(tmp_path)])
    assert "ultralytics 8." in (tmp_path / "ultralytics_yolov8n.md").read_text()
    assert_measured(times, ["binary cross entropy", 'use_loss(model, "varifocal")'], capsys.readouterr().out)


def test_detectron2_is_marked_as_untested():
    import swap_in_detectron2

    assert "UNTESTED" in swap_in_detectron2.__doc__
    if importlib.util.find_spec("detectron2") is None:
        with pytest.raises(SystemExit, match="needs Detectron2"):
            swap_in_detectron2.main([])


@pytest.mark.parametrize("framework", ["torchvision", "mmdet", "ultralytics", "detectron2"])
def test_a_program_is_short(framework):
    folder = pathlib.Path(__file__).resolve().parents[1] / "python"
    assert len((folder / f"swap_in_{framework}.py").read_text().splitlines()) < 120
    assert f"python python/swap_in_{framework}.py" in (folder / "README.md").read_text()
