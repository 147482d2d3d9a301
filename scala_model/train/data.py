"""Image sets held whole in memory as uint8, read from Parquet shards (columns ``image``, ``label``)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from scala_model.preprocess import Preprocessing, to_pixels


@dataclass(frozen=True)
class ImageSet:
    """``pixels`` uint8 (N, R, R, 3), ``labels`` int64 (N)."""

    pixels: Tensor
    labels: Tensor


def load_split(folder: Path, split: str, spec: Preprocessing) -> ImageSet:
    """Decode every ``<split>-*.parquet`` of the folder to the size that ``spec`` names.

    Raises ValueError when there is no such shard or a shard has other columns.
    """
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards:
        raise ValueError(f"no {split}-*.parquet in {folder}: give the folder that holds the Parquet shards")
    pixels, labels = [], []
    with ThreadPoolExecutor() as pool:
        for encoded, label in _rows(shards):
            pixels.extend(pool.map(lambda data: _decode(data, spec), encoded))
            labels.extend(label)
    return ImageSet(torch.stack(pixels), torch.tensor(labels))


def _rows(shards: list[Path]) -> Iterator[tuple[list[bytes], list[int]]]:
    for shard in shards:
        table = pq.read_table(shard)
        missing = {"image", "label"} - set(table.column_names)
        if missing:
            raise ValueError(f"{shard.name} lacks the column {', '.join(sorted(missing))}")
        yield table["image"].to_pylist(), table["label"].to_pylist()


def _decode(encoded: bytes, spec: Preprocessing) -> Tensor:
    with Image.open(io.BytesIO(encoded)) as image:
        return torch.from_numpy(to_pixels(image, spec))


def read_classes(folder: Path) -> list[dict[str, object]]:
    """``classes.tsv`` (row = class: id, names) as the card's list of classes.

    Raises ValueError when the file is missing.
    """
    path = folder / "classes.tsv"
    if not path.is_file():
        raise ValueError(f"no classes.tsv in {folder}: one row a class, its id and its name separated by a tab")
    rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"class_id": i, "id": row[0], "label": row[-1].split(",")[0].strip()} for i, row in enumerate(rows)]
