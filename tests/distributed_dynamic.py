"""What the processes of distributed_worker.py do with Dynamic R-CNN: steps with their own images, and with all of them."""
import torch
import torch.distributed as dist
from torch import nn

from rsloss_kernels import DynamicLabelAssignment, DynamicSmoothL1Loss

STEPS, INTERVAL = 7, 3


def images_of(rank: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """IoUs, regression targets and weights of a process's images: none of the last process at times, no positives of the second."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    count = 0 if rank == 2 and step % 3 == 1 else 1 + (rank + step) % 2
    images = []
    for _ in range(count):
        ious = torch.rand(int(torch.randint(0, 30, (), generator=generator)), generator=generator)
        targets = torch.randn((int(torch.randint(1, 20, (), generator=generator)), 4), generator=generator)
        weights = (torch.rand(len(targets), generator=generator) < (0.0 if rank == 1 else 0.5)).float()
        images.append((ious, targets, weights))
    return images


def steps(ranks: list[int], variant: str, group) -> dict[str, torch.Tensor]:
    options = {"update_iter_interval": INTERVAL, "variant": variant, "process_group": group, "max_images": 2}
    pair = nn.ModuleList([DynamicLabelAssignment(6, **options), DynamicSmoothL1Loss(3, **options)])
    for step in range(STEPS):
        images = [image for rank in ranks for image in images_of(rank, step)]
        pair[0].update([ious for ious, _, _ in images])
        pair[1].update([targets for _, targets, _ in images], [weights for _, _, weights in images])
    return pair.state_dict()


def too_many(group) -> str:
    module = DynamicSmoothL1Loss(process_group=group, max_images=2)
    try:
        module.update([torch.ones(4, 4)] * 3)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def all_results(group) -> dict[str, dict]:
    own, everyone = [dist.get_rank(group)], list(range(dist.get_world_size(group)))
    return {
        variant: {
            "together": steps(own, variant, group),
            "alone": steps(own, variant, None),
            "whole": steps(everyone, variant, None),
            "too many": too_many(group),
        }
        for variant in ("mmdet", "original")
    }
