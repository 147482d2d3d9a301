"""The training loop: up to four networks a step, one optimizer step, resumable to the same numbers.

Every random choice of a step (order, crops, widths, dropped paths) is drawn from the seed, the step's number and the
process's rank alone, so a resumed run needs no generator state to repeat what an uninterrupted one would have done: to
the last bit on a CPU, up to the order of sums on a GPU. The host waits for the device once a step, when the next batch
is on its way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scala_model.normalise import Standardise
from scala_model.preprocess import Preprocessing
from scala_model.train.augment import mix, random_erasing, random_resized_crop_and_flip, soft_labels
from scala_model.train.data import Images
from scala_model.train.objective import backward, sample_widths
from scala_model.train.parallel import Processes
from scala_model.train.rand_augment import rand_augment
from scala_model.train.recipe import Recipe
from scala_model.vit import ScalaViT
from scala_model.width import Width

STATE, LOG = "state.pt", "log.jsonl"
RAND_AUGMENT_LAYERS = 2  # as in DeiT


class TrainingError(ValueError):
    """The run cannot go on; the last saved state is untouched."""


class Teacher:
    """An external teacher for the distilled variant: standardised images (B, 3, S, S) -> logits (B, classes)."""

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing) -> None:
        self.name, self.image_size = name, preprocessing.image_size
        self.network, self.standardise = network.eval(), Standardise(preprocessing)

    def to(self, device: torch.device) -> Teacher:
        self.network.to(device)
        self.standardise.to(device)
        return self


class Trainer:
    """One run in a folder: ``state.pt`` to resume from, ``log.jsonl`` with a line every ``log_every`` steps.

    ``preprocessing`` is how the network wants its images (default: ImageNet's mean and deviation); ``init`` names the
    weights that ``start_from`` will be given and ``fingerprint`` the data (default: their labels), for a saved state to
    be compared with. Raises TrainingError when data,
    recipe, teacher and number of processes do not fit together.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Images,
        folder: Path,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        preprocessing: Preprocessing | None = None,
        teacher: Teacher | None = None,
        processes: Processes | None = None,
        init: str | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self.recipe, self.folder, self.init, self.device, self.seed = recipe, folder, init, torch.device(device), seed
        self.data, self.teacher, self.processes = data, teacher and teacher.to(self.device), processes or Processes()
        self.preprocessing = preprocessing or Preprocessing(recipe.config.image_size)
        self._check()
        self._fingerprint = fingerprint or hashlib.sha256(data.labels.cpu().numpy().tobytes()).hexdigest()
        torch.manual_seed(seed)
        self.model = ScalaViT(recipe.config, drop_path=recipe.drop_path).to(self.device).train()
        self.ema: dict[str, Tensor] = {}
        if recipe.ema_decay is not None:
            self.ema = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._standardise = Standardise(self.preprocessing).to(self.device)
        self.in_bfloat16 = recipe.autocast == "bfloat16" and has_bfloat16(self.device)
        self.optimizer = torch.optim.AdamW(_decay_groups(self.model, recipe.weight_decay), lr=0.0, fused=True)
        self.steps_per_epoch = len(data.labels) // recipe.batch_size
        self.num_steps = round(recipe.epochs * self.steps_per_epoch)
        if self.num_steps < 1:
            raise TrainingError(
                f"{recipe.epochs:g} epochs of {self.steps_per_epoch} steps are no step: give more epochs"
            )
        self._labels = data.labels.to(self.device)
        self.step = 0
        self._stop_asked = self._stopping = False
        if recipe.compile:
            self._compile()

    def _check(self) -> None:
        recipe, labels = self.recipe, self.data.labels
        if len(labels) < recipe.batch_size:
            raise TrainingError(f"{len(labels)} images do not fill one batch of {recipe.batch_size}")
        if (highest := int(labels.max())) >= recipe.config.num_classes or int(labels.min()) < 0:
            raise TrainingError(f"label {highest} is outside the recipe's {recipe.config.num_classes} classes")
        if recipe.batch_size % self.processes.world:
            raise TrainingError(f"{self.processes.world} processes cannot share a batch of {recipe.batch_size} evenly")
        if recipe.config.distilled and self.teacher is None and self.init is None:
            raise TrainingError("a distilled network needs an external teacher: name its checkpoint with --teacher DIR")
        if self.teacher is None:
            return
        if not recipe.config.distilled:
            raise TrainingError("only a distilled network has a head for an external teacher: leave --teacher out")
        if (size := self.teacher.image_size) != recipe.config.image_size:
            raise TrainingError(
                f"the teacher takes images of {size} px, the recipe makes {recipe.config.image_size} px"
            )

    def _compile(self, **options: Any) -> None:
        """Compile one block: each width, at any depth, is a call of it. Whole networks would compile for minutes."""
        torch._dynamo.config.recompile_limit = max(64, 4 * len(self.recipe.config.widths))
        for block in self.model.blocks:
            block.compile(dynamic=False, **options)

    @property
    def signature(self) -> dict[str, Any]:
        """What must not change between the parts of one run."""
        facts = {
            "recipe": asdict(self.recipe),
            "preprocessing": asdict(self.preprocessing),
            "seed": self.seed,
            "data set": self._fingerprint,
            "processes": self.processes.world,
            "teacher": self.teacher and self.teacher.name,
            "weights to start from": self.init,
        }
        return json.loads(json.dumps(facts))  # type: ignore[no-any-return]

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin with the given weights, and with random ones only where there are none."""
        self.model.load_state_dict(self.model.state_dict() | weights)
        for name in self.ema.keys() & weights.keys():
            self.ema[name].copy_(weights[name])

    def resume(self) -> bool:
        """Take up the folder's saved state. False when there is none; TrainingError when it is of another run."""
        path = self.folder / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            signature = json.loads(state["signature"])
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError):
            raise TrainingError(f"{path} is damaged: delete it to start again") from None
        if different := [what for what, value in self.signature.items() if signature.get(what) != value]:
            raise TrainingError(
                f"{path} belongs to a run with another {', '.join(different)}: use another folder or delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema = {name: average.to(self.device) for name, average in state["ema"].items()}
        self.step = state["step"]
        return True

    def save(self) -> None:
        """Replace the saved state as a whole. With several processes the first one does it for all."""
        if self.processes.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{STATE}"
        state = {
            "signature": json.dumps(self.signature),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
        }
        torch.save(state, temporary)
        with temporary.open("rb") as file:  # or a power cut might leave an empty file under the good one's name
            os.fsync(file.fileno())
        temporary.replace(self.folder / STATE)

    def stop(self) -> None:
        """Make ``run`` return after a step, its state saved, in all processes. Safe to call from a signal handler."""
        self._stop_asked = True

    def run(self, *, log_every: int = 10, saving_share: float = 0.02, progress: Callable[[int, str], None]) -> None:
        """Train to the end, or until ``stop``. ``progress`` is told the steps done and a short text at logged steps.

        The state is saved after the first step, at the end, and in between as often as takes ``saving_share`` of the
        time.
        """
        self._cut_log()
        logged_at, logged, next_save = time.monotonic(), self.step, 0.0
        for record in self.steps():
            last = self._stopping or self.step == self.num_steps
            if last or time.monotonic() >= next_save:
                started = time.monotonic()
                self.save()
                saved = time.monotonic()
                next_save = saved + (saved - started) / saving_share
            if last or self.step % log_every == 0:
                images, now = (self.step - logged) * self.recipe.batch_size, time.monotonic()
                record["images_per_s"] = round(images / (now - logged_at), 1)
                logged_at, logged = now, self.step
                self._log(record)
                text = " ".join(f"{width}:{loss:.2f}" for width, loss in record["loss"])
                progress(self.step, f"{record['images_per_s']:.0f} images/s, loss {text}")

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train step by step; of each, what the log says of it.

        Raises TrainingError, the weights untouched, when a loss or the gradient is not finite.
        """
        self._check_alike()
        batches = self._batches()
        batch = next(batches, None)
        while batch is not None and not self._stopping:
            widths, losses = self._backward(*batch)
            batch = next(batches, None)  # while the device is still at work
            yield self._update(widths, losses)

    def _backward(self, images: Tensor, targets: Tensor) -> tuple[tuple[Width, ...], Tensor]:
        """Queue all forward and backward passes of the step; nothing waits for them."""
        widths, recipe = self._widths(), self.recipe
        torch.manual_seed(self._seed_of("dropped paths", self.step))
        classes = None if self.teacher is None else self._ask(self.teacher, images)
        return widths, backward(self._heads, images, targets, widths, recipe.objective, classes)

    def _heads(self, images: Tensor, width: Width) -> tuple[Tensor, ...]:
        with self._autocast():
            return self.model.heads(images, width)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16)

    def _update(self, widths: tuple[Width, ...], losses: Tensor) -> dict[str, Any]:
        recipe, parameters = self.recipe, list(self.model.parameters())
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        stop = torch.full_like(losses[:1], float(self._stop_asked))
        *gradients, losses, stop = self.processes.average([*own, losses, stop])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        total = nn.utils.get_total_norm(gradients)
        *values, norm, stopping = torch.cat([losses, total[None], stop]).tolist()  # the step's one wait for the device
        if not all(map(math.isfinite, [*values, norm])):
            found = ", ".join(f"width {width}: {loss:.4g}" for width, loss in zip(widths, values, strict=True))
            raise TrainingError(
                f"step {self.step} gave a loss ({found}) or gradient (norm {norm:.4g}) that is not finite: start again "
                f"in another folder with a lower learning rate or clipped gradients; what {self.folder} holds is good"
            )
        if recipe.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, recipe.clip_grad_norm, total)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._update_ema()
        self._stopping = stopping > 0  # of any process: they stop together
        return {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 3),
            "lr": round(rate, 7),
            "gradient_norm": round(norm, 4),
            "loss": [(str(width), round(loss, 4)) for width, loss in zip(widths, values, strict=True)],
        }

    def _log(self, record: dict[str, Any]) -> None:
        if self.processes.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                print(json.dumps(record), file=log)

    def _cut_log(self) -> None:
        """Forget what was logged of steps that are to be done again."""
        path = self.folder / LOG
        if self.processes.rank == 0 and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            path.write_text("".join(kept), encoding="utf-8")

    def _check_alike(self) -> None:
        """Raises TrainingError unless all processes have the same weights, after the same number of steps."""
        sums = [parameter.detach().double().sum() for parameter in self.model.parameters()]
        own = torch.stack([torch.tensor(float(self.step), dtype=torch.float64, device=self.device), *sums])
        (mean,) = self.processes.average([own])
        if not torch.allclose(mean, own, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise TrainingError(
                f"the processes start from different states: all must see the same folder {self.folder}"
            )

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = self.recipe.warmup_epochs * self.steps_per_epoch
        if self.step < warmup:
            return min(1.0, (self.step + 1) / warmup) * self.recipe.learning_rate
        done = (self.step - warmup) / max(1.0, self.num_steps - warmup)
        return self.recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def _widths(self) -> tuple[Width, ...]:
        if self.step < self.recipe.largest_only_epochs * self.steps_per_epoch:
            return (self.recipe.config.widths[-1],)
        rng = random.Random(f"{self.seed}-{self.step}")  # the same in every process
        return sample_widths(self.recipe.config, self.recipe.objective, rng)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images (B, 3, S, S) and soft labels (B, classes) of every step that is left."""
        steps = range(self.step, self.num_steps)
        pixels = self.data.batches(map(self._chosen, steps), self.device)
        for step, batch in zip(steps, pixels, strict=True):
            yield self._augment(step, batch, self._labels[self._chosen(step).to(self.device, non_blocking=True)])

    def _chosen(self, step: int) -> Tensor:
        """The images that this process sees in a step: its share of the epoch's order."""
        order = _order(self.seed, step // self.steps_per_epoch, len(self.data.labels), self.data.labels.device)
        start = step % self.steps_per_epoch * self.recipe.batch_size
        return order[start : start + self.recipe.batch_size][self.processes.rank :: self.processes.world]

    def _augment(self, step: int, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        torch.manual_seed(self._seed_of("augmentation", step))
        images = pixels.permute(0, 3, 1, 2).float() / 255
        images = random_resized_crop_and_flip(images, recipe.config.image_size, recipe.min_crop_area)
        if recipe.rand_augment is not None:
            images = rand_augment(images, RAND_AUGMENT_LAYERS, recipe.rand_augment)
        images = self._standardise(images)
        if recipe.erasing:
            images = random_erasing(images, recipe.erasing)
        return mix(
            images, soft_labels(labels, recipe.config.num_classes, recipe.label_smoothing), recipe.mixup, recipe.cutmix
        )

    @torch.no_grad()
    def _ask(self, teacher: Teacher, images: Tensor) -> Tensor:
        """The class (B) that the teacher sees in each image, normalised as it wants."""
        with self._autocast():
            classes: Tensor = teacher.network(teacher.standardise(self._standardise.undo(images))).argmax(-1)
        return classes

    def _update_ema(self) -> None:
        """The moving average of the weights. Its decay grows with the steps, so that it forgets its random start."""
        if self.recipe.ema_decay is not None:
            decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
            current = self.model.state_dict()
            torch._foreach_lerp_(list(self.ema.values()), [current[name] for name in self.ema], 1 - decay)

    def _seed_of(self, purpose: str, step: int) -> int:
        return random.Random(f"{purpose} {self.seed} {step} {self.processes.rank}").getrandbits(63)


@lru_cache(maxsize=2)
def has_bfloat16(device: torch.device) -> bool:
    """Whether it computes in bfloat16. A processor that does not emulates it, at a tenth of float32's speed."""
    if device.type != "cpu":
        return True
    asks = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent where torch is without oneDNN
    return asks is not None and bool(asks())


def _order(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """All images in the order of one epoch, where the labels are: a resident set is indexed without a copy."""
    generator = torch.Generator().manual_seed(random.Random(f"order {seed} {epoch}").getrandbits(63))
    return torch.randperm(count, generator=generator).to(device)


def _decay_groups(model: ScalaViT, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, tokens and the position embedding do not (as in DeiT)."""
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(("token", "pos_embed"))]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or name.endswith(("token", "pos_embed")))]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
