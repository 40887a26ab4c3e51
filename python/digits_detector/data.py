"""Canvases: handwritten digits blended into crops of photographs, all of which ship with scikit-learn.

Training and held-out canvases share no digit (indices 0-1399 / 1400-1796) and no part of a photograph (left 70 % / right 30 %).
A pool of canvases is made once; training walks through it in a shuffled order that depends on seed and epoch alone.
"""

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS_SIZE = 96
DIGIT_SIZES = (20, 24, 28, 32, 38, 44)
DIGIT_RANGES = {"train": (0, 1400), "held_out": (1400, 1797)}
PHOTO_SHARE = 0.7
INK_THRESHOLD = 0.2
MOST_DIGITS = 5
# Photographs keep this share of their contrast around mid-grey.
PHOTO_CONTRAST = 0.5
# Offsets keep the random streams of the splits apart for every seed. "tuning" canvases are new ones from the training material.
STREAMS = {"train": 0, "held_out": 1, "tuning": 2}


@dataclasses.dataclass(frozen=True)
class Canvases:
    """Images and their objects; rows are padded to the largest number of objects with label -1."""

    images: Tensor  # uint8 [n, 3, S, S]
    boxes: Tensor  # float32 [n, M, 4], x1 y1 x2 y2 in pixels
    labels: Tensor  # int64 [n, M]
    class_names: tuple[str, ...]
    # What each canvas is made of: index of every digit (-1: padding), and photo, first and last column of the crop.
    digits: Tensor | None = None  # int64 [n, M]
    crops: Tensor | None = None  # int64 [n, 3]

    def __len__(self) -> int:
        return self.images.shape[0]

    def take(self, rows) -> "Canvases":
        picked = {name: None if (value := getattr(self, name)) is None else value[rows] for name in ("digits", "crops")}
        return dataclasses.replace(self, images=self.images[rows], boxes=self.boxes[rows], labels=self.labels[rows], **picked)

    def to(self, device) -> "Canvases":
        return dataclasses.replace(
            self, images=self.images.to(device), boxes=self.boxes.to(device), labels=self.labels.to(device)
        )


@functools.cache
def _digits() -> tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Labels [1797]; for every size the ink [1797, s, s] in [0, 1] and the extents of the ink [1797, 4]."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    small = torch.from_numpy(bundle.images / 16.0).float()[:, None]
    ink, extents = {}, {}
    for size in DIGIT_SIZES:
        scaled = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)[:, 0].numpy()
        inked = scaled > INK_THRESHOLD
        sides = []
        for axis in (1, 2):  # columns, then rows
            any_ink = inked.any(axis)
            sides += [any_ink.argmax(1), size - any_ink[:, ::-1].argmax(1)]
        ink[size], extents[size] = scaled, np.stack([sides[0], sides[2], sides[1], sides[3]], 1)
    return bundle.target, ink, extents


@functools.cache
def _photos() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(np.asarray(image) for image in load_sample_images().images)


def make_canvases(split: str, count: int, seed: int = 0, tail_ratio: float | None = None) -> Canvases:
    """`count` canvases of 1 to 5 digits; the same for the same arguments. `split`: "train", "held_out" or "tuning".

    `tail_ratio`: digit 0 is that many times as frequent as digit 9, the others fall geometrically in between; None: as they come.
    """
    random = np.random.default_rng([seed, STREAMS[split]])
    made = [_make_canvas(random, "train" if split == "tuning" else split, tail_ratio) for _ in range(count)]
    images, boxes, labels, digits, crops = zip(*made, strict=True)
    boxes = np.stack([np.pad(box, ((0, MOST_DIGITS - len(box)), (0, 0))) for box in boxes])
    labels, digits = (
        np.stack([np.pad(row, (0, MOST_DIGITS - len(row)), constant_values=-1) for row in rows]) for rows in (labels, digits)
    )
    return Canvases(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(boxes).float(),
        torch.from_numpy(labels),
        tuple(str(digit) for digit in range(10)),
        torch.from_numpy(digits),
        torch.tensor(crops),
    )


def _draw_digit(random: np.random.Generator, split: str, tail_ratio: float | None) -> int:
    first, end = DIGIT_RANGES[split]
    if tail_ratio is None:
        return int(random.integers(first, end))
    frequency = tail_ratio ** -np.linspace(0, 1, 10)
    number = random.choice(10, p=frequency / frequency.sum())
    return first + int(random.choice(np.flatnonzero(_digits()[0][first:end] == number)))


def _make_canvas(random: np.random.Generator, split: str, tail_ratio: float | None):
    canvas, crop = _background(random, split)
    targets, ink, extents = _digits()
    taken = np.zeros((0, 4), int)
    chosen = []
    for _ in range(random.integers(1, MOST_DIGITS + 1)):
        digit = _draw_digit(random, split, tail_ratio)
        size = int(random.choice(DIGIT_SIZES))
        for _ in range(10):
            x, y = random.integers(0, CANVAS_SIZE - size + 1, 2)
            box = extents[size][digit] + [x, y, x, y]
            overlap = np.minimum(taken[:, 2:], box[2:]) - np.maximum(taken[:, :2], box[:2])
            if not (overlap > 0).all(1).any():
                break
        else:
            continue
        strength = (random.uniform(0.8, 1.0) * ink[size][digit])[..., None]
        colour = random.uniform(220, 255) if random.random() < 0.5 else random.uniform(0, 35)
        patch = canvas[y : y + size, x : x + size]
        patch[:] = patch * (1 - strength) + colour * strength
        taken = np.vstack([taken, box])
        chosen.append(digit)
    return canvas.astype(np.uint8), taken, targets[chosen], np.array(chosen), crop


def _background(random: np.random.Generator, split: str) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A crop of one photograph at full or half resolution, mirrored or not, inside the columns of the split."""
    index = int(random.integers(len(_photos())))
    photo = _photos()[index]
    height, width, _ = photo.shape
    border = int(PHOTO_SHARE * width)
    first, last = (0, border) if split == "train" else (border, width)
    stride = int(random.integers(1, 3))
    span = CANVAS_SIZE * stride
    x, y = int(random.integers(first, last - span + 1)), int(random.integers(0, height - span + 1))
    crop = photo[y : y + span : stride, x : x + span : stride].astype(np.float32)
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    return 128 + PHOTO_CONTRAST * (crop - 128), (index, x, x + span)


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Rows of the pool that make up batch `step`: a new permutation every epoch, a function of the arguments alone."""
    per_epoch = max(1, count // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch, 3]).permutation(count)
    return torch.from_numpy(order[place * batch_size : (place + 1) * batch_size])
