"""One-stage heads and RPN of MMDetection trained by ranking, in real models, small: they learn, in one call of the loss per step."""
import copy
import pathlib
import re
import warnings

import frameworks
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

LOGGED = {"bbox_unbalanced", "SB_weight", "num_positives", "positives_iou"}
KEYS = {
    "RankSortRetinaHead": {"loss", "loss_rank", "loss_sort", "loss_bbox", *LOGGED},
    "RankSortATSSHead": {"loss", "loss_rank", "loss_sort", "loss_bbox", *LOGGED},
}


@pytest.fixture(scope="module")
def mm():
    return frameworks.mmdetection()


def one_stage(mm, head: str, seed: int = 0, test_cfg: dict | None = None, **parts):
    is_atss = "ATSS" in head
    training = mm.ATSS_TRAINING if is_atss else mm.RETINA_TRAINING
    config = {"bbox_head": mm.dense_head(head, **parts), "train_cfg": training, "test_cfg": test_cfg or mm.TESTING}
    return mm.detector("ATSS" if is_atss else "RetinaNet", seed, **config)


def rpn(mm):
    """The RPN of a two-stage detector, which stands alone."""
    head = {
        "type": "RankSortRPNHead",
        "in_channels": mm.CHANNELS,
        "feat_channels": mm.CHANNELS,
        "anchor_generator": mm.anchors(ratios=(0.5, 1.0, 2.0)),
        "bbox_coder": mm.coder((1.0,) * 4),
    }
    assigner = mm.MAX_IOU | {"pos_iou_thr": 0.7, "neg_iou_thr": 0.3, "min_pos_iou": 0.3, "match_low_quality": True}
    training = {"rpn": {"assigner": assigner, "sampler": None, "allowed_border": -1, "pos_weight": -1, "debug": False}}
    testing = {"rpn": {"nms_pre": 100, "max_per_img": 30, "nms": {"type": "nms", "iou_threshold": 0.7}, "min_bbox_size": 0}}
    return mm.detector("RPN", rpn_head=head, train_cfg=training, test_cfg=testing)


MODELS = {
    "retina": lambda mm: one_stage(mm, "RankSortRetinaHead"),
    "atss": lambda mm: one_stage(mm, "RankSortATSSHead"),
    "atss_ap": lambda mm: one_stage(mm, "RankSortATSSHead", loss_cls={"type": "APLoss"}, ranking={"box_weight": 2.0}),
    "retina_alrp": lambda mm: one_stage(mm, "RankSortRetinaHead", loss_cls={"type": "ALRPLoss"}, ranking={"balancing_period": 1}),
    "rpn": rpn,
}


@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_a_small_model(mm, generator, name):
    """One call of the ranking loss per step over three levels and two images, a smaller loss after ten steps, and detections."""
    model = MODELS[name](mm)
    head = model.bbox_head
    calls = []
    head.ranking.classification.register_forward_hook(lambda module, arguments, result: calls.append(arguments))
    batch = mm.training_batch()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(10):
        loss, log = mm.losses_of(model, copy.deepcopy(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert len(calls) == 10 and log[next(key for key in log if "num_positives" in key)] > 0
    assert losses[-1] < 0.9 * losses[0], losses
    without, empty = mm.losses_of(model, mm.make_batch(generator, boxes=0))
    assert list(empty) == list(log) and without == 0
    model.zero_grad()
    without.backward()
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters() if value.requires_grad)
    model.eval()
    with torch.no_grad():
        found = model(**model.data_preprocessor(batch, False), mode="predict")
    assert all(0 < len(sample.pred_instances) <= 30 for sample in found)


@pytest.fixture(scope="module")
def trained(mm):
    """An ATSS that has learnt one batch by heart, and the batch."""
    model = one_stage(mm, "RankSortATSSHead")
    batch = mm.make_batch(torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        loss, _ = mm.losses_of(model, copy.deepcopy(batch))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, batch


@pytest.mark.parametrize("head", KEYS)
def test_bfloat16_autocast(mm, generator, head):
    model = one_stage(mm, head)
    batch = mm.make_batch(generator)
    exact, log = mm.losses_of(model, copy.deepcopy(batch))
    assert set(log) == KEYS[head]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mm.losses_of(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.requires_grad)


def test_heads_see_flat_rows_in_the_order_of_their_targets(mm, generator):
    """The loss of RetinaHead is that of FlatRetinaHead, whose losses are called once."""
    loss_bbox = {"type": "SmoothL1Loss", "beta": 0.11}
    batch = mm.make_batch(generator)
    results, calls = [], []
    for kind in ("RetinaHead", "FlatRetinaHead"):
        model = one_stage(mm, kind, loss_cls={"type": "FocalLoss", "use_sigmoid": True}, loss_bbox=loss_bbox)
        for module in (model.bbox_head.loss_cls, model.bbox_head.loss_bbox):
            module.register_forward_hook(lambda *arguments, kind=kind: calls.append(kind))
        loss, log = mm.losses_of(model, copy.deepcopy(batch))
        loss.backward()
        results.append((log, [value.grad for value in model.parameters()]))
    assert calls.count("FlatRetinaHead") == 2 and calls.count("RetinaHead") == 2 * len(mm.STRIDES)
    (wanted, gradients), (got, own) = results
    for key in ("loss_cls", "loss_bbox"):
        assert float(got[key]) == pytest.approx(float(wanted[key]), rel=1e-6)
    for ours, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()) + 1e-9)


def test_equalized_focal_loss_in_one_call(mm, generator):
    """Its state advances once per step, by the gradients of all levels."""
    loss = {"type": "EqualizedFocalLoss", "use_sigmoid": True, "num_classes": mm.CLASSES, "process_group": None}
    model = one_stage(mm, "FlatRetinaHead", loss_cls=loss)
    before = model.bbox_head.loss_cls.neg_grad.clone()
    loss, _ = mm.losses_of(model, mm.make_batch(generator))
    loss.backward()
    assert not before.any() and (model.bbox_head.loss_cls.neg_grad > 0).all() and model.bbox_head.retina_cls.weight.grad.any()


def test_state_is_in_checkpoints(mm, generator):
    model = one_stage(mm, "RankSortRetinaHead")
    mm.losses_of(model, mm.make_batch(generator))
    factor = model.bbox_head.ranking.balancing.SB_weight.clone()
    assert factor != 50
    again = one_stage(mm, "RankSortRetinaHead", seed=1)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again.bbox_head.ranking.balancing.SB_weight, factor)
    plain = one_stage(mm, "RetinaHead").state_dict()
    with pytest.warns(UserWarning, match="SB_weight"):
        again.load_state_dict(plain, strict=True)
    assert torch.equal(again.bbox_head.ranking.balancing.SB_weight, factor)


def test_warnings_of_configurations_for_other_losses(mm):
    with pytest.warns(UserWarning, match="score_thr is 0.05, but ranking orders scores"):
        one_stage(mm, "RankSortRetinaHead", test_cfg=mm.TESTING | {"score_thr": 0.05})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*score_thr.*")
        one_stage(mm, "RankSortRetinaHead", test_cfg=mm.TESTING | {"score_thr": 0.4, "score_thr_is_calibrated": True})
        one_stage(mm, "RankSortATSSHead")
    sampled = mm.RETINA_TRAINING | {"sampler": {"type": "RandomSampler", "num": 64, "pos_fraction": 0.5, "neg_pos_ub": -1}}
    with pytest.warns(UserWarning, match="RandomSampler: anchors that it leaves out are not ranked"):
        mm.detector("RetinaNet", bbox_head=mm.dense_head("RankSortRetinaHead"), train_cfg=sampled, test_cfg=mm.TESTING)


def test_calibrated_threshold_keeps_the_right_detections(mm, generator, trained):
    from rsloss_kernels.integrations.mmdet import calibrate_score_thr

    model, batch = trained
    threshold = calibrate_score_thr(model, [copy.deepcopy(batch)], keep=1.0)
    assert model.training and model.bbox_head.test_cfg.score_thr_is_calibrated
    assert 0 < threshold == model.bbox_head.test_cfg.score_thr
    assert calibrate_score_thr(model, [copy.deepcopy(batch)], keep=0.3) > threshold
    with pytest.warns(UserWarning, match="no detection is right"):
        assert calibrate_score_thr(model, [mm.make_batch(generator, boxes=0)]) == 0
    with pytest.raises(ValueError, match="keep must be within"):
        calibrate_score_thr(model, [], keep=0)


def test_bad_configurations(mm):
    with pytest.raises(TypeError, match="loss_cls must be RankSortLoss, APLoss or ALRPLoss, got FocalLoss"):
        one_stage(mm, "RankSortRetinaHead", loss_cls={"type": "FocalLoss"})
    with pytest.raises(ValueError, match="reg_decoded_bbox must be True"):
        one_stage(mm, "RankSortATSSHead", reg_decoded_bbox=False)
    with pytest.raises(ValueError, match=r"loss_bbox must give one number per box, as GIoULoss does, but L1Loss gives \[2, 4\] for 2 boxes"):
        one_stage(mm, "RankSortRetinaHead", loss_bbox={"type": "L1Loss"})
    with pytest.raises(NotImplementedError, match="use_sigmoid must be True"):
        one_stage(mm, "RankSortRetinaHead", loss_cls={"type": "RankSortLoss", "use_sigmoid": False})


def with_fixed_norms(mm, process_group: str | None):
    return mm.fix_norms(one_stage(mm, "RankSortATSSHead", loss_cls={"type": "RankSortLoss", "process_group": process_group}))


def batch_of(mm, rank: int) -> dict:
    return mm.make_batch(torch.Generator().manual_seed(3 + rank), boxes=3 if rank == 0 else 0)


def gradient_of(model) -> torch.Tensor:
    return torch.cat([value.grad.flatten() for value in model.parameters()])


def train_in_process(rank: int, folder: str) -> None:
    mm = frameworks.mmdetection()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, group in (("local", None), ("global", "default")):
        model = with_fixed_norms(mm, group)
        parallel = DistributedDataParallel(model)
        losses = parallel(**model.data_preprocessor(batch_of(mm, rank), True), mode="loss")
        loss, log = model.parse_losses(losses)
        loss.backward()
        results[name] = {"log": dict(log), "gradient": gradient_of(model)}
    torch.save(results, pathlib.Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_one_without_positives(mm, tmp_path):
    torch.multiprocessing.spawn(train_in_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for name in ("local", "global"):
        assert list(first[name]["log"]) == list(second[name]["log"])
        assert torch.equal(first[name]["gradient"], second[name]["gradient"]) and first[name]["gradient"].any()
    assert second["local"]["log"]["loss"] == 0 and first["local"]["log"]["loss"] > 0
    assert second["local"]["log"]["num_positives"] == 0 and first["local"]["log"]["num_positives"] > 0
    # One ranking over both: what a process with the images of both gets.
    model, parts = with_fixed_norms(mm, None), [batch_of(mm, rank) for rank in range(2)]
    loss, log = mm.losses_of(model, {key: parts[0][key] + parts[1][key] for key in parts[0]})
    loss.backward()
    wanted = gradient_of(model)
    for key in ("loss_rank", "loss_sort", "loss_bbox", "SB_weight"):
        assert first["global"]["log"][key] == second["global"]["log"][key]
        assert first["global"]["log"][key].item() == pytest.approx(log[key].item(), rel=1e-5)
    torch.testing.assert_close(first["global"]["gradient"], wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert (first["local"]["gradient"] - wanted).abs().max() > 0.01 * wanted.abs().max()


OF_README = [
    ("GHM", ["RetinaHead", "FusedGHMC", "FusedGHMR"]),
    ("ATSS", ["RankSortATSSHead"]),
    ("Faster R-CNN", ["RankSortRPNHead", "RankSortBBoxHead"]),
]


@pytest.mark.parametrize("title, heads", OF_README)
def test_configurations_of_the_readme_build(mm, tmp_path, title, heads):
    """On top of the framework's own configurations, and without a warning of the heads."""
    import mmdet
    import rsloss_kernels.integrations.mmdet as adapter
    from mmdet.registry import MODELS as registry
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    readme = pathlib.Path(adapter.__file__).with_name("README.md").read_text()
    config = tmp_path / "config.py"
    found = next(block for block in re.findall("```python\n(.*?)```", readme, re.DOTALL) if block.startswith(f"# config: {title}\n"))
    # mmengine finds "mmdet::" by pkg_resources, which a setuptools of 2026 has no more.
    config.write_text(found.replace("mmdet::", f"{pathlib.Path(mmdet.__file__).parent}/.mim/configs/"))
    settings = Config.fromfile(config).model
    settings.backbone.update(depth=18, init_cfg=None)
    settings.neck.in_channels = [64, 128, 256, 512]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(score_thr|sampler).*")
        model = registry.build(settings)
    assert set(heads) <= {type(module).__name__ for module in model.modules()}
