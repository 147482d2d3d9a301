"""Image sets held whole in memory as uint8, read from Parquet shards (columns ``image``, ``label``)."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
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

    Raises ValueError when there is no such shard, or a shard has other columns or an image that does not decode.
    """
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards:
        raise ValueError(f"no {split}-*.parquet in {folder}: give the folder that holds the Parquet shards")
    pixels: list[Tensor] = []
    labels: list[int] = []
    with ThreadPoolExecutor() as pool:
        for shard in shards:
            encoded, shard_labels = _read(shard)
            pixels.extend(pool.map(partial(_decode, spec, shard), range(len(encoded)), encoded))
            labels.extend(shard_labels)
    if not labels:
        raise ValueError(f"the {split} shards in {folder} hold no images")
    return ImageSet(torch.stack(pixels), torch.tensor(labels))


def _read(shard: Path) -> tuple[list[bytes], list[int]]:
    table = pq.read_table(shard)
    if missing := {"image", "label"} - set(table.column_names):
        raise ValueError(f"{shard} lacks the column {', '.join(sorted(missing))}")
    labels = table["label"]
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise ValueError(f"{shard}: every label must be a whole number")
    return table["image"].to_pylist(), labels.to_pylist()


def _decode(spec: Preprocessing, shard: Path, row: int, encoded: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return torch.from_numpy(to_pixels(image, spec))
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise ValueError(f"{shard}: row {row} is not an image: {error}") from None


def read_classes(folder: Path) -> list[dict[str, object]]:
    """``classes.tsv`` (row = class: id, names) as the card's list of classes.

    Raises ValueError when the file is missing.
    """
    path = folder / "classes.tsv"
    if not path.is_file():
        raise ValueError(f"no classes.tsv in {folder}: one row a class, its id and its name separated by a tab")
    rows = [line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"class_id": i, "id": row[0], "label": row[-1].split(",")[0].strip()} for i, row in enumerate(rows)]
