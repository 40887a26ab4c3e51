"""Balanced group softmax in MMDetection's RoI heads: the loss tells any bbox head its channels, its scores and its accuracy.

    loss_cls=dict(type="GroupSoftmaxLoss", counts="data/lvis_v1/annotations/lvis_v1_train.json")

in place of the head's `CrossEntropyLoss`, in each of the three heads of Cascade R-CNN. The head itself stays as it is.
"""
import collections
import functools
import json
import os
from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from torch import Tensor

from rsloss_kernels import ClassGroups
from rsloss_kernels import GroupSoftmaxLoss as _GroupSoftmaxLoss


@MODELS.register_module()
class GroupSoftmaxLoss(_GroupSoftmaxLoss):
    """`rsloss_kernels.GroupSoftmaxLoss` built from what a config can hold; labels as MMDetection has them, the background last.

    Args:
        counts: training instances of each of the C classes in the order of the labels: numbers, or the path of a JSON file for
            `read_class_counts`. Either this or `groups`.
        groups: class numbers of each group, see `ClassGroups`.
        boundaries, background_form: of `ClassGroups.from_counts`.
        classes: names of the classes where the file of `counts` holds more than these.
        others_ratio, loss_weight: of `rsloss_kernels.GroupSoftmaxLoss`.
        class_weights: C numbers, factors of the weights of foreground rows in the group of their class.
        return_dict: the head logs the loss of each group, as `loss_cls_group0` (the background) and so on, in place of their sum.

    Raises TypeError, ValueError: wrong types or ranges, neither or both of `counts` and `groups`.
    """

    def __init__(
        self,
        counts: Sequence[int] | str | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        boundaries: Sequence[float] = (10, 100, 1000),
        background_form: str = "softmax",
        classes: Sequence[str] | None = None,
        others_ratio: float | None = 8.0,
        loss_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        return_dict: bool = False,
    ):
        if (counts is None) == (groups is None):
            got = "none" if counts is None else "both"
            raise ValueError(f"GroupSoftmaxLoss: one of counts and groups must be given, got {got}")
        if groups is not None:
            table = ClassGroups(groups, background_form=background_form)
        else:
            if isinstance(counts, (str, os.PathLike)):
                counts = read_class_counts(counts, classes)
            table = ClassGroups.from_counts(counts, boundaries, background_form)
        super().__init__(
            table,
            others_ratio,
            loss_weight,
            background="last",
            class_weights=None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32),
        )
        self.return_dict = return_dict

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """As the library's module; with `return_dict` the losses of the groups by name."""
        if not self.return_dict:
            return super().forward(cls_score, label, weight, avg_factor, reduction_override)
        losses = super().forward(cls_score, label, weight, avg_factor, "none")
        return {f"loss_cls_group{group}": loss for group, loss in enumerate(losses.unbind())}


def read_class_counts(path: str | os.PathLike, classes: Sequence[str] | None = None) -> list[int]:
    """Training instances of each class, in the order of MMDetection's labels.

    Args:
        path: a JSON file. Either a list of numbers; or annotations in the format of COCO or LVIS: their instances are counted by
            category, in the order of the file's categories, crowds and those marked `ignore` left out. Where the file has no
            annotations, its categories' `instance_count` (LVIS) is taken.
        classes: names of the categories to keep, as in the dataset's `metainfo`; None: all. As in MMDetection, the order stays that
            of the file.

    Raises:
        OSError, ValueError: the file cannot be read, is neither of these, or lacks a name in `classes`.
    """
    path = os.fspath(path)
    # The heads of a cascade read the same file; of LVIS it takes half a minute.
    return list(_read_class_counts(path, None if classes is None else tuple(classes), os.stat(path).st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _read_class_counts(path: str, classes: tuple[str, ...] | None, modified: int) -> tuple[int, ...]:
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    if isinstance(content, list):
        if classes is not None:
            raise ValueError(f"read_class_counts: classes must be None for a list of counts, which has no names: {path}")
        return tuple(content)
    if not (isinstance(content, dict) and "categories" in content):
        raise ValueError(f"read_class_counts: {path} must hold a list of counts or annotations with categories")
    categories = content["categories"]
    if classes is not None:
        missing = sorted(set(classes) - {category["name"] for category in categories})
        if missing:
            raise ValueError(f"read_class_counts: the categories of {path} must hold all classes, missing {missing[:5]}")
        categories = [category for category in categories if category["name"] in classes]
    if not content.get("annotations"):
        if any("instance_count" not in category for category in categories):
            raise ValueError(f"read_class_counts: {path} has no annotations, and no instance_count of its categories")
        return tuple(category["instance_count"] for category in categories)
    found = collections.Counter(
        annotation["category_id"]
        for annotation in content["annotations"]
        if not (annotation.get("iscrowd") or annotation.get("ignore"))
    )
    return tuple(found[category["id"]] for category in categories)
