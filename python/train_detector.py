"""Trains a small detector with focal, focal + centerness, Rank & Sort, AP, aLRP and GHM loss; proves the swap of the published loss live.

    python python/train_detector.py                       # the five losses in turn, about six minutes on two cores
    python python/train_detector.py --loss rank_sort --steps 3000
    python python/train_detector.py --loss ghm            # GHM-C for the classes, GHM-R for the boxes
    torchrun --nproc-per-node 2 python/train_detector.py --global-ranking --loss rank_sort   # one ranking over two processes
    python python/train_detector.py --data DIR            # a folder in COCO format: DIR/images and DIR/instances.json
    python python/train_detector.py --seeds 3 --ablation  # learning rates, score weights, box weight; goes on where it was stopped
    python python/train_detector.py --long-tail --seeds 3 # some digits are rare: focal, EQL v2, EFL, Seesaw, group softmax; likewise
    python python/train_detector.py --model two_stage     # Faster R-CNN: Dynamic R-CNN, and samplers for CE and Rank & Sort; likewise
    python python/train_detector.py --imbalance           # CE, OHEM, focal, GHM-C; smooth L1, ASL1, GHM-R; goes on likewise

Under torchrun every process takes its part of each batch, DistributedDataParallel averages the gradients and the first process
evaluates; each ranks its own images, with --global-ranking all rank them together. Without the comparison and the tables.

Input, model and losses are in digits_detector/. Results go to --out: results.json, checkpoints and pictures.
"""

import argparse
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from digits_detector import app, processes  # noqa: E402
from digits_detector.losses import ALL_LOSSES, LOSSES  # noqa: E402


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells the defaults, but not those of switches nor of options that explain their own."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=WithDefaults)
    parser.add_argument(
        "--loss",
        action="append",
        choices=ALL_LOSSES,
        metavar="NAME",
        help=f"{', '.join(ALL_LOSSES)}; may be given more than once (default: the first {len(LOSSES)})",
    )
    parser.add_argument(
        "--no-score-weights", action="store_true", help="Rank & Sort, AP: every positive counts alike in the box loss"
    )
    parser.add_argument(
        "--box-weight", type=float, help="fixed weight of the box loss (default: ranking losses self-balancing, GHM-R 10, others 2)"
    )
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the best found for each loss)")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds")
    parser.add_argument("--steps", type=int, default=1500, help="gradient steps of a run")
    parser.add_argument("--batch-size", type=int, default=16, help="images of all processes together")
    parser.add_argument(
        "--global-ranking",
        action="store_true",
        help="under torchrun: losses, means and balancing over the batch of all processes, as one process would compute them",
    )
    parser.add_argument(
        "--group-norm",
        action="store_true",
        help="no batch normalisation, whose statistics are those of a process: with --global-ranking the number of processes then "
        "makes no difference but rounding",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of everything that is written")
    parser.add_argument("--data", type=pathlib.Path, help="a COCO-format folder instead of the digits")
    parser.add_argument(
        "--image-size", type=int, default=96, help="--data: images are scaled to fit this square, a multiple of 16"
    )
    parser.add_argument("--pool", type=int, default=6400, help="number of training canvases made")
    parser.add_argument("--held-out", type=int, default=300, help="number of held-out canvases made")
    parser.add_argument("--compare-steps", type=int, default=150, help="steps beside the published loop, 0: none")
    parser.add_argument(
        "--loop-dtype", choices=("float32", "float64"), default="float32", help="arithmetic of the published loop"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS", help="steps from one checkpoint to the next")
    parser.add_argument(
        "--model",
        choices=("one_stage", "two_stage"),
        default="one_stage",
        help="two_stage: torchvision's Faster R-CNN, the tables of Dynamic R-CNN and of a sampler's worth instead",
    )
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument(
        "--ablation", action="store_true", help="the table of learning rates, score weights and box weight instead"
    )
    tables.add_argument(
        "--imbalance",
        action="store_true",
        help="the table of losses for the classes, with smooth L1 for the boxes, and of losses for the boxes, with focal loss, instead",
    )
    tables.add_argument(
        "--long-tail",
        action="store_true",
        help="the table of losses for digits of very different frequency instead, and of what becomes of a softmax detector whose "
        "classifier is trained on",
    )
    parser.add_argument("--tail-ratio", type=float, default=100.0, help="--long-tail: the most frequent digit over the rarest")
    parser.add_argument("--tune-steps", type=int, default=500, help="--long-tail: steps of a detector that is trained on")
    parser.add_argument(
        "--time-steps", type=int, default=30, help="--imbalance: steps of each loss, taken in turns, for the times; 0: no times"
    )
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "batch_size", "pool", "held_out", "checkpoint_every", "tune_steps", "tail_ratio"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    for name in ("ablation", "imbalance", "long_tail"):
        if getattr(options, name) and processes.are_several():
            parser.error(f"--{name.replace('_', '-')} takes one process, got more from torchrun")
    for name in ("imbalance", "long_tail"):
        if getattr(options, name) and options.loss:
            parser.error(f"--{name.replace('_', '-')} has losses of its own, got --loss")
    if options.model == "two_stage":
        if processes.are_several():
            parser.error("--model two_stage takes one process, got more from torchrun")
        for name in ("ablation", "imbalance", "long_tail", "loss"):
            if getattr(options, name):
                parser.error(f"--model two_stage has tables and losses of its own, got --{name.replace('_', '-')}")
    if options.long_tail and options.data is not None:
        parser.error("--long-tail makes its own canvases, got --data")
    for name in ("compare_steps", "time_steps"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(options, name)}")
    if options.image_size < 32 or options.image_size % 16:
        parser.error(f"--image-size must be a multiple of 16 of at least 32, got {options.image_size}")
    return options


def main(arguments: list[str] | None = None) -> dict | None:
    options = parse(arguments)
    with processes.started(options.device) as options.device:
        if options.ablation:
            return app.run_ablation(options)
        if options.long_tail:
            return app.run_long_tail(options)
        if options.model == "two_stage":
            return app.run_two_stage(options)
        return app.run_imbalance(options) if options.imbalance else app.run(options)


if __name__ == "__main__":
    main()
