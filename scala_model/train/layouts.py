"""Finding a split's images: a folder a class, or Parquet shards. Everything is read but the pixels."""

from __future__ import annotations

import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from scala_model.train.data import EncodedSet, Files, Shard, Shards

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CLASSES = "classes.tsv"

_NAMES = {"train": ("train",), "val": ("val", "valid", "validation")}  # the last two as on the Hugging Face Hub


def open_split(folder: Path, split: Literal["train", "val"]) -> EncodedSet:
    """The split of a data set in either layout, found by looking; ``val`` may also be called valid or validation.

    A folder a class: ``train/CLASS/**/*.jpg`` and other suffixes. Classes are the sorted names of train's folders, in
    val too, where there is a train; ``classes.tsv`` beside train may tell their names by id.
    Parquet: ``train-*.parquet``, here or in ``data``, with the columns ``image`` (binary, or a struct with ``bytes``)
    and ``label``. Classes are the rows of ``classes.tsv``, else the names that Hugging Face's schema holds, else
    numbered up to train's highest label.

    Raises ValueError for no layout or several at once; a shard, label, class or table of classes that is damaged or
    unknown; a class without images, which is a copy gone wrong far more often than meant.
    """
    place = _find(folder, split)
    return _open_shards(folder, place) if place.suffix == ".parquet" else _open_tree(folder, place)


def has_split(folder: Path, split: Literal["train", "val"]) -> bool:
    """Whether there is anything that ``open_split`` would try to open."""
    return bool(_places(folder, split))


def _read_classes(folder: Path) -> list[dict[str, object]]:
    """``classes.tsv`` (row = class: id, names, separated by a tab) as the card's list of classes."""
    path = folder / CLASSES
    try:
        rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as such") from None
    return _classes([row[0] for row in rows], [row[-1] for row in rows])


def _classes(ids: list[str], names: list[str]) -> list[dict[str, object]]:
    """The card's list of classes; of several names, separated by commas, the first is shown."""
    labels = [name.split(",")[0].strip() for name in names]
    return [{"class_id": i, "id": id_, "label": label} for i, (id_, label) in enumerate(zip(ids, labels, strict=True))]


def _places(folder: Path, split: str) -> list[Path]:
    """Where the split lies: folders that exist, and patterns (``train-*.parquet``) that match a file."""
    names = _NAMES.get(split, (split,))
    patterns = [base / f"{name}-*.parquet" for base in (folder, folder / "data") for name in names]
    trees = [folder / name for name in names if (folder / name).is_dir()]
    return [pattern for pattern in patterns if any(pattern.parent.glob(pattern.name))] + trees


def _find(folder: Path, split: str) -> Path:
    places = _places(folder, split)
    if not places:
        raise ValueError(
            f"no {split} images in {folder}: expected Parquet shards {split}-*.parquet with the columns image and "
            f"label, or a folder a class, {split}/CLASS/*.jpg"
        )
    if len(places) > 1:
        raise ValueError(f"{split} images lie in {' and '.join(map(str, places))}: move all but one out of the way")
    return places[0]


def _open_shards(folder: Path, pattern: Path) -> EncodedSet:
    shards: list[Shard] = []
    labels: list[Tensor] = []
    names: list[str] | None = None
    for path in sorted(pattern.parent.glob(pattern.name)):
        table = _read_columns(path, ["image", "label"])
        names = names or _hugging_face_names(table.schema)
        labels.append(_labels(path, table))
        shards.append(_shard(path, table))
    starts = [0, *accumulate(map(len, labels))]
    if starts[-1] == 0:
        raise ValueError(f"{pattern} holds no images: give a folder whose shards have rows")
    if (folder / CLASSES).is_file():
        classes = _read_classes(folder)
    elif names:
        classes = _classes(names, names)
    else:
        classes = _numbered(_highest_label(folder, labels))
    for shard, shard_labels in zip(shards, labels, strict=True):
        for row in ((shard_labels < 0) | (shard_labels >= len(classes))).nonzero()[:1].flatten().tolist():
            raise ValueError(
                f"{shard.path}: row {row} has the label {shard_labels[row]}; there are {len(classes)} classes, from 0"
            )
    return EncodedSet(torch.cat(labels), classes, Shards(shards, starts[:-1]))


def _read_columns(path: Path, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            if missing := set(columns) - set(file.schema_arrow.names):
                raise ValueError(f"{path} lacks the column {', '.join(sorted(missing))}")
            return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read ({error}): copy it again") from None


def _labels(path: Path, table: pa.Table) -> Tensor:
    labels = table["label"]
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise ValueError(f"{path}: every label must be a whole number")
    return torch.from_numpy(labels.to_numpy().astype(np.int64))


def _shard(path: Path, table: pa.Table) -> Shard:
    """The images of a table, copied out of Arrow's memory. A row without one becomes an image of no bytes."""
    column = table["image"]
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise ValueError(f"{path}: the column image is {column.type}; it must be binary, or a struct with bytes")
    images = [image or b"" for image in column.to_pylist()]
    data = np.frombuffer(bytearray().join(images), np.uint8)  # of a bytearray, for torch wants memory it may write to
    return Shard(path, torch.from_numpy(data), np.array([0, *accumulate(map(len, images))]))


def _hugging_face_names(schema: pa.Schema) -> list[str] | None:
    """The names of a ``ClassLabel``, as the library ``datasets`` writes them into the schema's metadata."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def _numbered(highest: int) -> list[dict[str, object]]:
    numbers = [str(i) for i in range(highest + 1)]
    return _classes(numbers, numbers)


def _highest_label(folder: Path, labels: list[Tensor]) -> int:
    """Of the train shards, where there are any; else of these labels."""
    train = [place for place in _places(folder, "train") if place.suffix == ".parquet"]
    paths = [path for place in train for path in place.parent.glob(place.name)]
    known = [_labels(path, _read_columns(path, ["label"])) for path in paths] or labels
    return int(torch.cat(known).max())


def _open_tree(folder: Path, tree: Path) -> EncodedSet:
    train = folder / "train" if (folder / "train").is_dir() else tree
    ids = [entry.name for entry in _class_folders(train)]
    paths: list[str] = []
    labels: list[int] = []
    num_skipped = sum(not entry.is_dir() for entry in tree.iterdir())
    for entry in _class_folders(tree):
        if entry.name not in ids:
            raise ValueError(f"{entry} is a class that {train} does not have: its folders are the classes")
        images, skipped = _images_under(entry)
        if not images:
            raise ValueError(f"{entry} holds no images ({', '.join(SUFFIXES)}): add some or remove the folder")
        paths += images
        labels += [ids.index(entry.name)] * len(images)
        num_skipped += skipped
    if not paths:
        raise ValueError(f"{tree} holds no folder of a class: expected {tree.name}/CLASS/*.jpg")
    return EncodedSet(torch.tensor(labels), _named(folder, ids), Files(paths), num_skipped)


def _class_folders(tree: Path) -> list[Path]:
    return sorted(entry for entry in tree.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_under(folder: Path) -> tuple[list[str], int]:
    """The images' paths in order of their names, and how many other files there are."""
    images: list[str] = []
    num_files = 0
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        num_files += len(files)
        names = sorted(name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        images += [os.path.join(parent, name) for name in names]
    return images, num_files - len(images)


def _named(folder: Path, ids: list[str]) -> list[dict[str, object]]:
    """Classes of these ids, with the names that ``classes.tsv`` gives them; an id is its own name otherwise."""
    table = _read_classes(folder) if (folder / CLASSES).is_file() else []
    known = {entry["id"]: str(entry["label"]) for entry in table}
    return _classes(ids, [known.get(id_, id_) for id_ in ids])
