"""The configuration lines of integrations/mmdet/roi_heads.md, merged into MMDetection's own configurations: they build what they say."""
import copy
import json
import pathlib
import re

import frameworks
import pytest
import rsloss_kernels

PAGE = pathlib.Path(rsloss_kernels.__file__).parent / "integrations" / "mmdet" / "roi_heads.md"
RANKED, SOFTMAX = "RankSortBBoxHead", "Shared2FCBBoxHead"
# Section of the page, MMDetection's configuration, RPN, RoI, box and mask heads.
CASES = {
    "Rank & Sort: Faster R-CNN": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "RankSortRPNHead", "StandardRoIHead", [RANKED], None),
    "Cascade R-CNN": ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", "RPNHead", "CascadeRoIHead", [RANKED] * 3, None),
    "Mask R-CNN": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "RankSortRPNHead", "StandardRoIHead", [RANKED], "RankSortMaskHead"),
    "Dynamic R-CNN": ("dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py", "RPNHead", "FusedDynamicRoIHead", [SOFTMAX], None),
    "Balanced group softmax": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "RPNHead", "StandardRoIHead", [SOFTMAX], None),
}


def lines_of(section: str) -> str:
    """The first block of code of a section that sets the model."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    blocks = ["\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)]
    return next(block for block in blocks if "model = dict(" in block)


def merged(base: dict, section: str, folder: pathlib.Path) -> dict:
    from mmengine.config import Config

    lines = lines_of(section).replace("data/lvis_v1/annotations/lvis_v1_train.json", str(folder / "counts.json"))
    names: dict = {}
    if "[...]" in lines:  # what its comment asks for
        names["stages"] = copy.deepcopy(base["model"]["train_cfg"]["rcnn"])
        for stage in names["stages"]:
            stage["sampler"]["num"] = 10**9
        lines = lines.replace("[...]", "stages")
    exec(lines, names)
    return Config._merge_a_into_b({"model": names["model"]}, base)


@pytest.mark.parametrize("section", CASES)
def test_lines_of_the_page(section, tmp_path):
    mm = frameworks.mmdetection()
    import mmdet
    from mmengine.config import Config, ConfigDict

    path, rpn, roi, boxes, mask = CASES[section]
    (tmp_path / "counts.json").write_text(json.dumps([3] * 20 + [2000] * 60))
    config = Config.fromfile(pathlib.Path(mmdet.__file__).parent / ".mim" / "configs" / path).to_dict()
    if mask:  # "as Faster R-CNN, and"
        config = merged(config, "Rank & Sort: Faster R-CNN", tmp_path)
    model = ConfigDict(merged(config, section, tmp_path)["model"])
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.in_channels = [64, 128, 256, 512]
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 8
    kind = model.pop("type")
    built = mm.detector(kind, **model)
    own = list(built.roi_head.bbox_head) if len(boxes) > 1 else [built.roi_head.bbox_head]
    assert [type(built.rpn_head).__name__, type(built.roi_head).__name__] == [rpn, roi]
    assert [type(head).__name__ for head in own] == boxes
    assert mask is None or type(built.roi_head.mask_head).__name__ == mask
    samplers = built.roi_head.bbox_sampler if len(boxes) > 1 else [built.roi_head.bbox_sampler]
    if RANKED in boxes:
        assert all(sampler.num == 10**9 and sampler.add_gt_as_proposals for sampler in samplers)
        assert all(head.fc_cls.out_features == 80 for head in own) and built.roi_head.test_cfg.score_thr == 0
    elif "group" in section:
        assert own[0].loss_cls.groups.groups == [list(range(20)), [], [], list(range(20, 80))]
        assert own[0].fc_cls.out_features == 2 + 80 + 4
    else:
        assert built.roi_head.label_assignment.topk == 75 and own[0].loss_bbox.topk == 10
