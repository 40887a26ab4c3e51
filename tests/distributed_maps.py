"""Ranking losses of a head's maps in a process group, for test_distributed.py: every process has an image."""
import harness
import torch
import torch.distributed as dist
from head_samples import Head
from torch import Tensor

from rsloss_kernels import alrp_loss, rank_sort_loss


def all_results(group: "dist.ProcessGroup", seed: int) -> dict:
    """What this process gets for its image; of the first one also what all images give without a group, as rows."""
    head = Head(harness.generator(seed, "maps"), dist.get_world_size(group), 2, 3, ((5, 4), (3, 1)))
    head.maps = [level.round() for level in head.maps]  # with ties between images
    image = slice(dist.get_rank(group), dist.get_rank(group) + 1)
    maps = [level[image] for level in head.maps]
    settings = {"process_group": group, "average_gradients": False, "max_positives": 64, **head.options}
    results = {"own": _evaluate(maps, head.labels[image], head.quality[image], **settings)}
    if dist.get_rank(group) == 0:
        results["whole"] = _evaluate([head.rows(head.maps)], head.labels, head.quality)
    results["own"]["gradients"] = {
        name: head.image().rows(gradients) for name, gradients in results["own"]["gradients"].items()
    }
    return results


def _evaluate(levels: list[Tensor], labels: Tensor, quality: Tensor, **settings) -> dict:
    """Losses, gradients and ranks; regression losses by row and by positive."""
    of_positives = quality[(labels >= 0) & (labels < 3)]
    calls = {"rank_sort": (rank_sort_loss, quality), "rows": (alrp_loss, quality), "positives": (alrp_loss, of_positives)}
    results = {"losses": {}, "gradients": {}, "ranks": {}}
    for name, (loss, third) in calls.items():
        leaves = [level.clone().requires_grad_() for level in levels]
        first, *rest = loss(leaves if settings else leaves[0], labels, third, **settings)
        gradients = torch.autograd.grad(first, leaves)
        results["losses"][name] = first.detach()
        results["gradients"][name] = list(gradients) if settings else gradients[0]
        if loss is alrp_loss:
            results["ranks"][name] = rest[0]
    return results
