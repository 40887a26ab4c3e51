"""Reads and writes a folder in COCO format: DIR/images/* and DIR/instances.json."""

import contextlib
import io
import json
import pathlib

import numpy as np
import torch
from PIL import Image

from digits_detector.data import Canvases

HELD_OUT_EVERY = 5


def write_coco_folder(canvases: Canvases, folder: str | pathlib.Path) -> None:
    folder = pathlib.Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for row in range(len(canvases)):
        name = f"{row:06d}.png"
        pixels = canvases.images[row].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": row + 1, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
    (folder / "instances.json").write_text(json.dumps({**coco_annotations(canvases), "images": images}))


def coco_annotations(canvases: Canvases) -> dict:
    """The objects of `canvases` as COCO's dictionary; image ids and category ids count from 1."""
    annotations = []
    for row, slot in (canvases.labels >= 0).nonzero().tolist():
        x1, y1, x2, y2 = canvases.boxes[row, slot].tolist()
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": row + 1,
                "category_id": int(canvases.labels[row, slot]) + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
        )
    return {
        "images": [{"id": row + 1} for row in range(len(canvases))],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(canvases.class_names)],
    }


def read_coco_folder(folder: str | pathlib.Path, image_size: int) -> tuple[Canvases, Canvases]:
    """(training, held-out) canvases; every fifth image is held out. Images are scaled to fit `image_size` squared, the rest is grey.

    Everything is kept in memory. Crowd annotations are left out.
    """
    from pycocotools.coco import COCO

    folder = pathlib.Path(folder)
    if not (folder / "instances.json").is_file() or not (folder / "images").is_dir():
        raise FileNotFoundError(f"--data: wanted the folder images/ and the file instances.json in {folder}")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "instances.json"))
    categories = sorted(coco.getCatIds())
    names = tuple(category["name"] for category in coco.loadCats(categories))
    image_ids = sorted(coco.getImgIds())
    objects = {image: coco.loadAnns(coco.getAnnIds(imgIds=image, iscrowd=False)) for image in image_ids}
    most = max([1, *map(len, objects.values())])
    images = np.full((len(image_ids), image_size, image_size, 3), 128, np.uint8)
    boxes, labels = np.zeros((len(image_ids), most, 4), np.float32), np.full((len(image_ids), most), -1)
    for row, image in enumerate(image_ids):
        with Image.open(folder / "images" / coco.loadImgs(image)[0]["file_name"]) as opened:
            picture = opened.convert("RGB")
        scale = image_size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        images[row, :height, :width] = picture if scale == 1 else picture.resize((width, height), Image.Resampling.BILINEAR)
        for slot, found in enumerate(objects[image]):
            x, y, w, h = found["bbox"]
            boxes[row, slot] = np.array([x, y, x + w, y + h]) * scale
            labels[row, slot] = categories.index(found["category_id"])
    everything = Canvases(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(boxes), torch.from_numpy(labels), names
    )
    is_held_out = np.arange(len(image_ids)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    if not is_held_out.any():
        raise ValueError(f"--data: wanted at least {HELD_OUT_EVERY} images, so that one can be held out, got {len(image_ids)}")
    return everything.take(torch.from_numpy(~is_held_out)), everything.take(torch.from_numpy(is_held_out))
