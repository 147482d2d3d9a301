"""The training loop: four networks a step, one optimizer step, resumable to the same numbers.

Every random choice of a step (order, crops, widths, dropped paths) is drawn from the seed and the step's number alone,
so a resumed run needs no generator state to repeat what an uninterrupted one would have done.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.augment import mix, random_resized_crop_and_flip, soft_labels
from scala_model.train.data import ImageSet
from scala_model.train.objective import backward_scala, sample_widths
from scala_model.train.recipes import Recipe
from scala_model.vit import ScalaViT
from scala_model.width import Width

STATE, LOG = "state.pt", "log.jsonl"


class TrainingError(ValueError):
    """The run cannot go on; the last saved state is untouched."""


class Trainer:
    """One run in a folder: ``state.pt`` to resume from, ``log.jsonl`` with a line every ``log_every`` steps."""

    def __init__(self, recipe: Recipe, data: ImageSet, folder: Path, *, device: str = "cpu", seed: int = 0) -> None:
        if len(data.labels) < recipe.batch_size:
            raise TrainingError(f"{len(data.labels)} images do not fill one batch of {recipe.batch_size}")
        if (highest := int(data.labels.max())) >= recipe.config.num_classes:
            raise TrainingError(f"label {highest} is outside the recipe's {recipe.config.num_classes} classes")
        if recipe.config.distilled:
            raise TrainingError(
                "a distilled network learns from an external teacher, which training does not support yet"
            )
        self.recipe, self.folder, self.device, self.seed = recipe, folder, torch.device(device), seed
        self.data = ImageSet(data.pixels.to(self.device), data.labels.to(self.device))
        self.spec = Preprocessing(recipe.config.image_size)
        torch.manual_seed(seed)
        self.model = ScalaViT(recipe.config, drop_path=recipe.drop_path).to(self.device).train()
        self.optimizer = torch.optim.AdamW(_decay_groups(self.model, recipe.weight_decay), lr=0.0, fused=True)
        self.steps_per_epoch = len(data.labels) // recipe.batch_size
        self.num_steps = recipe.epochs * self.steps_per_epoch
        self.step = 0
        self._stopping = False
        self._forward: Callable[[Tensor, Width], Tensor] = self.model
        if recipe.compile:
            self._forward = torch.compile(self.model, dynamic=False)

    @property
    def signature(self) -> str:
        """What must not change between the parts of one run."""
        return json.dumps({"recipe": asdict(self.recipe), "seed": self.seed, "images": len(self.data.labels)})

    def resume(self) -> bool:
        """Take up the folder's saved state. False when there is none; TrainingError when it is of another run."""
        path = self.folder / STATE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            signature = state["signature"]
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError):
            raise TrainingError(f"{path} is damaged: delete it to start again") from None
        if signature != self.signature:
            raise TrainingError(f"{path} belongs to another recipe, seed or data set: use another folder or delete it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return True

    def save(self) -> None:
        """Replace the saved state as a whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{STATE}"
        state = {"signature": self.signature, "step": self.step}
        torch.save(state | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, temporary)
        temporary.replace(self.folder / STATE)

    def stop(self) -> None:
        """Make ``run`` return after the step in hand, its state saved. Safe to call from a signal handler."""
        self._stopping = True

    def run(self, *, log_every: int = 50, save_every: int = 200, progress: Callable[[int, str], None]) -> None:
        """Train to the end, or until ``stop``. ``progress`` is told the steps done and a short text at logged steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started, first = time.monotonic(), self.step
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            last = self.step >= self.num_steps
            while not last:
                losses = self.train_step()
                last = self._stopping or self.step == self.num_steps
                if last or self.step % save_every == 0:
                    self.save()
                if last or self.step % log_every == 0:
                    images_per_s = (self.step - first) * self.recipe.batch_size / (time.monotonic() - started)
                    record = self._record(losses, images_per_s)
                    print(json.dumps(record), file=log, flush=True)
                    text = " ".join(f"{width}:{loss:.2f}" for width, loss in losses.items())
                    progress(self.step, f"{images_per_s:.0f} images/s, loss {text}")

    def train_step(self) -> dict[Width, float]:
        """One optimizer step; the loss of each network that took part.

        Raises TrainingError, the weights untouched, when a loss or the gradient is not finite.
        """
        images, targets, widths = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast == "bfloat16"):
            losses = backward_scala(self._forward, images, targets, widths)
        most = math.inf if self.recipe.clip_grad_norm is None else self.recipe.clip_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most).item()
        if not all(map(math.isfinite, [*losses.values(), norm])):
            found = ", ".join(f"width {width}: {loss:.4g}" for width, loss in losses.items())
            raise TrainingError(
                f"step {self.step} gave a loss ({found}) or gradient (norm {norm:.4g}) that is not finite: lower the "
                f"learning rate or clip gradients; {self.folder / STATE} is as last saved"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return losses

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        warmup = self.recipe.warmup_epochs * self.steps_per_epoch
        if self.step < warmup:
            return self.recipe.learning_rate * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1.0, self.num_steps - warmup)
        return self.recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def _batch(self) -> tuple[Tensor, Tensor, tuple[Width, ...]]:
        recipe, epoch = self.recipe, self.step // self.steps_per_epoch
        generator = torch.Generator().manual_seed(self.seed * 10_007 + epoch)
        order = torch.randperm(len(self.data.labels), generator=generator)
        start = self.step % self.steps_per_epoch * recipe.batch_size
        chosen = order[start : start + recipe.batch_size].to(self.device)
        torch.manual_seed(self.seed * 1_000_003 + self.step)
        images = normalise(self.data.pixels[chosen], self.spec)
        images = random_resized_crop_and_flip(images, recipe.config.image_size, recipe.min_crop_area)
        targets = soft_labels(self.data.labels[chosen], recipe.config.num_classes, recipe.label_smoothing)
        images, targets = mix(images, targets, recipe.mixup, recipe.cutmix)
        if self.step < recipe.largest_only_epochs * self.steps_per_epoch:
            return images, targets, (recipe.config.widths[-1],)
        return images, targets, sample_widths(recipe.config, random.Random(f"{self.seed}-{self.step}"))

    def _record(self, losses: dict[Width, float], images_per_s: float) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 3),
            "lr": round(self.learning_rate(), 7),
            "images_per_s": round(images_per_s, 1),
            "loss": {str(width): round(loss, 4) for width, loss in losses.items()},
        }


def _decay_groups(model: ScalaViT, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms, tokens and the position embedding do not (as in DeiT)."""
    plain = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(("token", "pos_embed"))]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim < 2 or name.endswith(("token", "pos_embed")))]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
