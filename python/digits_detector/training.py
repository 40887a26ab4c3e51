"""The training loop: one gradient step, timed; the learning-rate schedule; checkpoints from which a run goes on bit by bit."""

import dataclasses
import math
import pathlib
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from digits_detector import memory, processes
from digits_detector.assignment import assign
from digits_detector.class_and_box_loss import PAIRS
from digits_detector.data import Canvases, batch_rows
from digits_detector.losses import FIRST_LOGIT, make_loss, score
from digits_detector.model import Detector, Predictions

# The middle of the grid that the ablation searches.
LEARNING_RATES = {"focal": 1e-2, "focal_centerness": 1e-2, "rank_sort": 2e-2, "ap": 2e-2, "alrp": 2e-2}
LEARNING_RATES |= dict.fromkeys(PAIRS, 1e-2)
WARMUP_STEPS = 100
WEIGHT_DECAY = 1e-2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made of; two runs of equal settings on one machine's CPU are equal to the bit.

    `batch_size` counts the images of all processes. With `global_ranking` and `group_norm` their number makes no difference
    but that of rounding.
    """

    loss: str
    steps: int = 1500
    seed: int = 0
    lr: float | None = None
    batch_size: int = 16
    use_score_weights: bool = True
    box_weight: float | None = None
    group_norm: bool = False
    global_ranking: bool = False
    processes: int = dataclasses.field(default_factory=processes.count)

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.loss] if self.lr is None else self.lr


@dataclasses.dataclass
class StepTimes:
    loss_ms: float
    step_ms: float


class Trainer:
    """A detector in training on a pool of canvases."""

    def __init__(self, settings: Settings, pool: Canvases, device: str | torch.device = "cpu"):
        self.settings = settings
        self.pool = pool.to(device)
        self.device = torch.device(device)
        self.loss = self._make_loss().to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = self._make_model().to(self.device)
        self.network = processes.replicated(self.model)
        decays = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=0.0
        )
        self.step = 0
        self.curves: dict[str, list[float]] = {}
        self.times: list[StepTimes] = []

    def _make_loss(self) -> nn.Module:
        settings = self.settings
        group = "default" if settings.global_ranking else None
        epoch_steps = max(1, len(self.pool) // settings.batch_size)
        return make_loss(settings.loss, settings.use_score_weights, settings.box_weight, group, epoch_steps)

    def _make_model(self) -> nn.Module:
        loss = self.settings.loss
        return Detector(len(self.pool.class_names), FIRST_LOGIT[loss], self.settings.group_norm, loss == "focal_centerness")

    def _set_mode(self) -> None:
        self.model.train()

    def score(self, predictions: Predictions) -> Tensor:
        """Scores [B, A, C] that rank detections."""
        return score(predictions, self.settings.loss)

    def learning_rate(self) -> float:
        """Linear warm-up, then a half cosine down to zero."""
        steps, peak = self.settings.steps, self.settings.learning_rate
        warmup = min(WARMUP_STEPS, max(1, steps // 5))
        if self.step < warmup:
            return peak * (self.step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, steps - warmup)))

    def predict_batch(self):
        """(predictions, assignment) of the present step's batch, as far as it is this process's."""
        rows = batch_rows(len(self.pool), self.settings.batch_size, self.settings.seed, self.step)
        rows = processes.own_part(rows).to(self.device)
        images, boxes, labels = self.pool.images[rows], self.pool.boxes[rows], self.pool.labels[rows]
        assigned = assign(boxes, labels, len(self.pool.class_names), *images.shape[-2:])
        return self.network(images), assigned

    def train_step(self, loss: nn.Module | None = None) -> dict[str, Tensor]:
        """One step; `loss` instead of the settings' own. Returns the parts of the loss, detached."""
        self._set_mode()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        started = self._clock()
        parts, loss_seconds = self._set_gradients(loss or self.loss)
        self.optimizer.step()
        self.step += 1
        self.times.append(StepTimes(loss_seconds * 1e3, (self._clock() - started) * 1e3))
        values = processes.mean_over_processes(torch.stack([value.detach().double() for value in parts.values()]))
        for name, value in zip(parts, values.tolist(), strict=True):
            self.curves.setdefault(name, []).append(value)
        return dict(zip(parts, values, strict=True))

    def _set_gradients(self, loss: nn.Module) -> tuple[dict[str, Tensor], float]:
        """The parts of the loss of the present batch, whose gradients the parameters then have, and the seconds that the loss took."""
        predictions, assigned = self.predict_batch()
        # The loss is differentiated by itself first, so that its time, backward included, can be told from the network's.
        leaves = Predictions(*(part.detach().requires_grad_() for part in predictions))
        before_loss = self._clock()
        parts = loss(leaves, assigned)
        gradients = torch.autograd.grad(sum(parts.values()), leaves, allow_unused=True)
        after_loss = self._clock()
        used = [
            (part, gradient)
            for part, gradient in zip(predictions, gradients, strict=True)
            if gradient is not None and part.requires_grad
        ]
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(*map(list, zip(*used, strict=True)))
        return parts, after_loss - before_loss

    def train(self, checkpoint: pathlib.Path | None = None, every: int = 500, resume: bool = False) -> "Trainer":
        """Trains to the end of the settings' steps, with a checkpoint `every` so many steps and at the end."""
        if resume and checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        memory.reset_peak(self.device)
        title = f"{self.settings.loss} seed {self.settings.seed}"
        is_quiet = not processes.is_first()
        with tqdm(
            total=self.settings.steps, initial=self.step, desc=title, unit="step", mininterval=0.5, disable=is_quiet
        ) as bar:
            while self.step < self.settings.steps:
                parts = self.train_step()
                bar.update()
                if self.step % 25 == 0:
                    recent = self.times[-25:]
                    bar.set_postfix(
                        loss=f"{float(sum(parts.values())):.3f}",
                        ms=f"{sum(times.step_ms for times in recent) / len(recent):.1f}",
                        loss_ms=f"{sum(times.loss_ms for times in recent) / len(recent):.1f}",
                    )
                is_due = self.step % every == 0 or self.step == self.settings.steps
                if checkpoint is not None and processes.is_first() and is_due:
                    self.save(checkpoint)
        self.peak_memory_mb = memory.peak_mb(self.device)
        return self

    def save(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curves": self.curves,
            "times": [dataclasses.astuple(times) for times in self.times],
        }
        # A run that is interrupted while it writes keeps its last whole checkpoint.
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: pathlib.Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != dataclasses.asdict(self.settings):
            raise ValueError(f"--resume: {path} holds a run of other settings: {state['settings']}, wanted {self.settings}")
        self.model.load_state_dict(state["model"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curves = state["step"], state["curves"]
        self.times = [StepTimes(*times) for times in state["times"]]

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
