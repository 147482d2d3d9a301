"""From pictures to measured checkpoints: all that ``scala-serve train`` and ``evaluate`` do, without a command line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scala_model.card import preprocessing_from_card
from scala_model.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    write_card,
)
from scala_model.correctness import write_correctness
from scala_model.preprocess import Preprocessing
from scala_model.train import evaluation
from scala_model.train.data import EncodedSet, Images, available_bytes, fits
from scala_model.train.layouts import has_split, open_split
from scala_model.train.loop import Teacher, Trainer
from scala_model.train.parallel import Processes
from scala_model.train.plot import Point, plot_accuracy
from scala_model.train.recipe import Recipe, find, with_epochs
from scala_model.train.transfer import transferred
from scala_model.vit import ScalaViT
from scala_model.width import Width


@dataclass(frozen=True)
class Run:
    """A trainer, and what its checkpoints' cards will say. ``folder`` receives state, log and checkpoints."""

    name: str
    folder: Path
    trainer: Trainer
    card: Mapping[str, Any]

    def save_checkpoints(self) -> list[Path]:
        """Write the weights as float16 to ``checkpoint/NAME``, their average, if kept, to ``checkpoint/NAME-ema``."""
        trainer = self.trainer
        written = [self._save(self.name, trainer.model.state_dict(), "as trained")]
        if trainer.ema:
            average = f"moving average, decay {trainer.recipe.ema_decay}"
            written.append(self._save(f"{self.name}-ema", trainer.ema, average))
        return written

    def _save(self, name: str, weights: Mapping[str, Tensor], kind: str) -> Path:
        model = ScalaViT(self.trainer.recipe.config)
        model.load_state_dict(weights)
        folder = self.folder / "checkpoint" / name
        card = {**self.card, "training": self.card["training"] | {"weights": f"{kind}, stored as float16"}}
        save_checkpoint(folder, model.half(), card)
        return folder


def prepare(
    name: str,
    data: Path,
    out: Path | None = None,
    *,
    device: torch.device,
    processes: Processes,
    seed: int = 0,
    epochs: float | None = None,
    init: Path | None = None,
    teacher: Path | None = None,
    say: Callable[[str], None],
) -> Run:
    """Read recipe, data and the weights to start from, and take up the state that the folder may hold.

    ``out`` is ``runs/NAME`` by default; ``init`` and ``teacher`` are checkpoints' folders; ``say`` tells people what is
    going on. Raises ValueError for whatever does not fit, before any training.
    """
    start = None if init is None else read_checkpoint(init)
    recipe = find(name, None if start is None else start.config)
    recipe = recipe if epochs is None else with_epochs(recipe, epochs)
    images = open_split(data, "train")
    if has_split(data, "val") and not _same_classes(images.classes, open_split(data, "val").classes):
        raise ValueError(f"{data} has other classes in val than in train: give both the same")
    recipe = replace(recipe, config=replace(recipe.config, num_classes=len(images.classes)))
    base, _, method = name.partition(":")
    short = Path(base).stem + (f"-{method}" if method else "")
    folder = out or Path("runs") / short
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = Preprocessing(recipe.config.image_size)
    if start is not None:
        preprocessing = replace(start.preprocessing, image_size=recipe.config.image_size)
    weights = None if start is None else _start(start, recipe, images, say)
    if images.num_skipped:
        say(f"{images.num_skipped} files of {data} are hidden or no images: left out")
    trainer = Trainer(
        recipe,
        load_images(images, Preprocessing(recipe.resident_size), device, processes, say),
        folder,
        device=device,
        seed=seed,
        preprocessing=preprocessing,
        teacher=None if teacher is None else _teacher(teacher, recipe, images),
        processes=processes,
        init=None if start is None else start.card["weights_sha256"],
        fingerprint=images.fingerprint,
    )
    if recipe.autocast == "bfloat16" and not trainer.in_bfloat16:
        say("Training in float32: this processor could only emulate bfloat16")
    if weights is not None:
        trainer.start_from(weights)
    if trainer.resume():
        say(f"Going on from step {trainer.step} of {trainer.num_steps}, saved in {folder}")
    facts = _facts(short, method, trainer, f"{data.resolve().name}, {len(images.labels)} images")
    facts |= {} if init is None else {"started from": init.resolve().name}
    facts |= {} if teacher is None else {"external teacher": teacher.resolve().name}
    card = {"classes": images.classes, "training": facts, "preprocessing": asdict(preprocessing)}
    return Run(short, folder, trainer, card)


def load_images(
    images: EncodedSet, spec: Preprocessing, device: torch.device, processes: Processes, say: Callable[[str], None]
) -> Images:
    """The images decoded into the device's memory if they take at most half of what this process has, else streamed."""
    if fits(len(images.labels), spec.image_size, available_bytes(device, processes.world)):
        say(f"Decoding {len(images.labels)} images into memory")
        return images.decode_all(spec).to(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, cores // processes.world)
    say(f"Streaming {len(images.labels)} images, which decoded would not fit into memory, with {workers} processes")
    return images.stream(spec, workers)


def measure(
    folder: Path,
    data: Path,
    *,
    device: torch.device,
    write: bool = True,
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Evaluate a checkpoint on the data's val split and return its card with what was measured.

    Writes the card, the matrix of what each width gets right and ``accuracy.png`` unless told not to. ``progress`` is
    told images done and in all, each width counting. Raises ValueError when the data are not the network's.
    """
    model = load_checkpoint(folder)
    split = open_split(data, "val")
    if not _same_classes(model.card["classes"], split.classes):
        raise ValueError(f"{data} has other classes than {folder}: evaluate on the classes that it was trained for")
    images = load_images(split, preprocessing_from_card(model.card), device, Processes(), say)
    done, total = 0, len(images.labels) * len(model.config.widths)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    result = evaluation.evaluate(model, images, device=str(device), progress=advance)
    dataset = f"{data.resolve().name} val"
    card = evaluation.measured_card(model.card, result, dataset)
    if write:
        write_card(folder, card)
        write_correctness(folder, result.matrix(dataset))
        points = [Point(entry["macs"], entry["accuracy"], tuple(entry["accuracy_ci95"])) for entry in card["widths"]]
        plot_accuracy(folder / "accuracy.png", {card["name"]: points})
    return card


def _start(start: Checkpoint, recipe: Recipe, images: EncodedSet, say: Callable[[str], None]) -> dict[str, Tensor]:
    keep_head = _same_classes(start.card["classes"], images.classes)
    if not keep_head:
        count = len(images.classes)
        say(f"The data's {count} classes are not those of the checkpoint: its head is replaced by a new one")
    if recipe.config.image_size != start.config.image_size:
        say(f"Position embedding resized from {start.config.image_size} to {recipe.config.image_size} px")
    weights = build_model(start).state_dict()
    return transferred(weights, start.config, recipe.config, keep_head=keep_head)


def _same_classes(known: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ids or labels agree, in their order; where one side has only numbers, how many there are must do."""
    numbers = [str(i) for i in range(len(known))]
    ids, labels = ([[entry[key] for entry in classes] for classes in (known, given)] for key in ("id", "label"))
    return len(known) == len(given) and (ids[0] == ids[1] or labels[0] == labels[1] or numbers in labels)


def _teacher(folder: Path, recipe: Recipe, images: EncodedSet) -> Teacher:
    model = load_checkpoint(folder)
    if not _same_classes(model.card["classes"], images.classes):
        raise ValueError(f"the teacher {folder} has other classes than the data: take one that was trained on them")
    network = model.subnet(model.config.widths[-1])
    if recipe.compile:
        for block in network.blocks:
            block.compile(dynamic=False)
    return Teacher(model.card["weights_sha256"], network, preprocessing_from_card(model.card))


def _facts(name: str, method: str, trainer: Trainer, dataset: str) -> dict[str, Any]:
    """What the card tells people of how a network was made; of the recipe, what is switched on."""
    recipe = trainer.recipe
    switched = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    facts = {
        "recipe": name,
        "data set": dataset,
        "objective": _objective(recipe),
        **{
            key.replace("_", " "): value
            for key, value in switched.items()
            if type(value) in (int, float, str) and value
        },
        "autocast": "bfloat16" if trainer.in_bfloat16 else "float32",
        "steps": trainer.num_steps,
        "seed": trainer.seed,
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "processes": trainer.processes.world,
        "torch": torch.__version__,
    }
    return facts | ({"width": float(Width(method.removeprefix("separate-")))} if method.startswith("separate-") else {})


def _objective(recipe: Recipe) -> str:
    if len(recipe.config.widths) == 1:
        return "one width, labels alone"
    parts = {
        "Isolated Activation": recipe.config.isolated_activation,
        "Progressive Knowledge Transfer": recipe.objective.progressive_transfer,
        "Stable Sampling": recipe.objective.sampling == "stable",
        "Noise Calibration": recipe.objective.noise_calibration,
    }
    off = [part for part, on in parts.items() if not on]
    if not off:
        return f"Scala: {', '.join(parts)}"
    return "US-Net" if len(off) == len(parts) else f"Scala without {', '.join(off)}"
