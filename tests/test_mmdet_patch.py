"""`patch_mmdet`: what is swapped, where, that models are the same but faster, and that all of it can be undone."""
import copy
import sys
import types

import frameworks
import pytest
import torch

NAMES = {"FocalLoss", "QualityFocalLoss", "VarifocalLoss", "GHMC", "GHMR", "EQLV2Loss", "SeesawLoss", "SmoothL1Loss"}


@pytest.fixture
def mm():
    """Every test begins and ends with the framework as it was."""
    samples = frameworks.mmdetection()
    from rsloss_kernels.integrations.mmdet import unpatch_mmdet

    unpatch_mmdet()
    yield samples
    unpatch_mmdet()


def everything() -> dict:
    """What each name of a loss is, in the registry and in every module of the framework."""
    from mmdet.registry import MODELS

    modules = {key: module for key, module in sys.modules.items() if key.startswith("mmdet") and module is not None}
    return {"registry": dict(MODELS.module_dict)} | {key: {name: vars(module).get(name) for name in NAMES} for key, module in modules.items()}


def test_patch_and_unpatch(mm):
    from mmdet.models import dense_heads, losses
    from mmdet.registry import MODELS
    from rsloss_kernels.integrations.mmdet import FUSED, patch_mmdet

    before = everything()
    patch = patch_mmdet()
    assert {swap.name for swap in patch.swaps} == NAMES == {loss.__name__.removeprefix("Fused") for loss in FUSED}
    for swap in patch.swaps:
        assert MODELS.get(swap.name) is swap.replacement is getattr(losses, swap.name) and swap.replacement in FUSED
        assert swap.name in str(patch) and swap.replacement.__name__ in str(patch)
    # Heads ask `isinstance(self.loss_cls, QualityFocalLoss)` of the name that they imported.
    assert sys.modules["mmdet.models.dense_heads.dino_head"].QualityFocalLoss is MODELS.get("QualityFocalLoss")
    assert dense_heads.DINOHead is before["registry"]["DINOHead"]
    assert patch_mmdet().swaps == ()  # nothing is left to swap
    patch.unpatch()
    assert everything() == before
    patch.unpatch()
    assert everything() == before


def test_some_losses_alone_and_as_a_context(mm):
    from mmdet.registry import MODELS
    from rsloss_kernels.integrations.mmdet import patch_mmdet, unpatch_mmdet

    before = everything()
    with patch_mmdet("GHMC", "GHMR") as patch:
        assert [swap.name for swap in patch.swaps] == ["GHMC", "GHMR"]
        assert MODELS.get("FocalLoss") is before["registry"]["FocalLoss"]
        rest = patch_mmdet()
        assert {swap.name for swap in rest.swaps} == NAMES - {"GHMC", "GHMR"}
    # The context took back its own two.
    assert MODELS.get("GHMC") is before["registry"]["GHMC"] and MODELS.get("FocalLoss") is not before["registry"]["FocalLoss"]
    unpatch_mmdet()
    assert everything() == before
    with pytest.raises(ValueError, match="names must be among FocalLoss, .*, got CrossEntropyLoss"):
        patch_mmdet("CrossEntropyLoss")


def test_modules_imported_since_the_patch_are_restored_too(mm, monkeypatch):
    from mmdet.registry import MODELS
    from rsloss_kernels.integrations.mmdet import losses, patch_mmdet

    earlier, later = types.ModuleType("earlier"), types.ModuleType("later")
    earlier.GHMC = losses.FusedGHMC  # by its owner's will
    monkeypatch.setitem(sys.modules, "earlier", earlier)
    patch = patch_mmdet()
    later.GHMC = MODELS.get("GHMC")
    monkeypatch.setitem(sys.modules, "later", later)
    patch.unpatch()
    assert later.GHMC is MODELS.get("GHMC") is not losses.FusedGHMC and earlier.GHMC is losses.FusedGHMC


def test_a_loss_registered_by_somebody_else_stays(mm):
    from mmdet.registry import MODELS
    from rsloss_kernels.integrations.mmdet import patch_mmdet

    original = MODELS.get("GHMR")
    own = type("GHMR", (torch.nn.Module,), {})
    MODELS.register_module(name="GHMR", module=own, force=True)
    try:
        assert "GHMR" not in {swap.name for swap in patch_mmdet().swaps} and MODELS.get("GHMR") is own
    finally:
        MODELS.register_module(name="GHMR", module=original, force=True)


def test_heads_that_ask_for_the_kind_of_their_loss(mm):
    """DETR's heads give a QualityFocalLoss other targets, and look for it in every step by the name that may be patched since."""
    from mmdet.models import losses
    from mmdet.registry import MODELS
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData
    from rsloss_kernels.integrations.mmdet import FUSED, patch_mmdet

    assigner = {"type": "HungarianAssigner", "match_costs": [{"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"}]}
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(1, 7, 5, generator=generator), torch.rand(1, 7, 4, generator=generator) * 0.3 + 0.3
    objects = InstanceData(bboxes=torch.tensor([[3.0, 4, 30, 40], [10, 10, 50, 60]]), labels=torch.tensor([1, 4]))

    def head(kind: str = "QualityFocalLoss") -> torch.nn.Module:
        config = {"type": "DETRHead", "num_classes": 5, "embed_dims": 8, "loss_cls": {"type": kind, "use_sigmoid": True}}
        return MODELS.build(ConfigDict(config | {"train_cfg": {"assigner": assigner}}))

    def loss(of_head: torch.nn.Module) -> float:
        return float(of_head.loss_by_feat_single(logits, boxes, [objects], [{"img_shape": (64, 64)}])[0])

    before = head()
    wanted = pytest.approx(loss(before), rel=1e-5)
    with patch_mmdet():
        under = head()
        assert loss(before) == wanted and loss(under) == wanted
    assert loss(under) == wanted and loss(head("FusedQualityFocalLoss")) == wanted
    originals = [getattr(losses, fused.__name__.removeprefix("Fused")) for fused in FUSED]
    for fused, original in zip(FUSED, originals, strict=True):
        options = {"num_classes": 5} if fused.__name__ in ("FusedEQLV2Loss", "FusedSeesawLoss") else {}
        ours, theirs = fused(**options), original(**options)
        for other, name in zip(FUSED, originals, strict=True):
            assert isinstance(ours, name) == isinstance(theirs, other) == (other is fused)
        assert not isinstance(theirs, type("Own", (fused,), {}))


GHM = {
    "loss_cls": {"type": "GHMC", "bins": 30, "momentum": 0.75, "use_sigmoid": True, "loss_weight": 1.0},
    "loss_bbox": {"type": "GHMR", "mu": 0.02, "bins": 10, "momentum": 0.7, "loss_weight": 10.0},
}
FOCAL = {"loss_cls": {"type": "FocalLoss", "use_sigmoid": True}, "loss_bbox": {"type": "SmoothL1Loss", "beta": 0.11}}


@pytest.mark.parametrize("losses", [GHM, FOCAL], ids=["ghm", "focal"])
def test_a_patched_retinanet_trains_as_before(mm, generator, losses):
    """Losses and gradients of three steps from one seed, and of a batch without boxes."""
    from rsloss_kernels.integrations.mmdet import patch_mmdet

    batches = [mm.make_batch(generator, boxes=count) for count in (3, 0, 4)]
    runs = []
    for is_patched in (False, True):
        patch = patch_mmdet() if is_patched else None
        head = mm.dense_head("RetinaHead", **losses)
        model = mm.detector("RetinaNet", bbox_head=head, train_cfg=mm.RETINA_TRAINING, test_cfg=mm.TESTING)
        assert ("rsloss_kernels" in type(model.bbox_head.loss_cls).__module__) == is_patched
        if patch:
            patch.unpatch()
        steps = []
        for batch in batches:
            loss, log = mm.losses_of(model, copy.deepcopy(batch))
            model.zero_grad()
            loss.backward()
            steps.append((log, torch.cat([value.grad.flatten() for value in model.parameters()])))
        runs.append(steps)
    for (wanted, gradient), (got, own) in zip(*runs, strict=True):
        assert list(got) == list(wanted)
        for key, value in wanted.items():
            assert got[key].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-7)
        torch.testing.assert_close(own, gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()) + 1e-9)


def test_swap_program(mm, tmp_path, capsys):
    """Both models in miniature: our losses take less of the step than the loop's and MMDetection's, and the patch is taken back."""
    import swap_in_mmdet

    before = everything()
    arguments = ["--image-size", "128", "--images", "1", "--boxes", "8", "--classes", "20", "--rounds", "3", "--out", str(tmp_path)]
    results = swap_in_mmdet.main(arguments)
    assert everything() == before
    printed = capsys.readouterr().out
    for model, (theirs, ours) in zip(("atss", "retinanet"), results, strict=True):
        assert 0 < ours.loss < theirs.loss < theirs.step and ours.share < theirs.share
        table = (tmp_path / f"mmdet_{model}.md").read_text()
        assert f"| {ours.name} | {ours.step:.3g} | {ours.loss:.3g} |" in table and table.split("\n\n")[1] in printed
    assert "8 losses of MMDetection replaced" in printed
