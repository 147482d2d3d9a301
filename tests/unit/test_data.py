"""Image sets read from Parquet shards, which each test writes for itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from scala_model.preprocess import Preprocessing, to_pixels
from scala_model.train.data import load_split, read_classes

SPEC = Preprocessing(8)


def image(seed: int, mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(picture: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format)
    return file.getvalue()


def write_shard(path: Path, images: list[Any], labels: Any, **others: Any) -> None:
    pq.write_table(pa.table({"image": images, "label": labels, **others}), path)


def test_reads_the_shards_of_a_split_in_order(tmp_path: Path) -> None:
    pictures = [image(i) for i in range(5)]
    write_shard(tmp_path / "train-00001-of-00002.parquet", [encoded(p) for p in pictures[3:]], [0, 3])
    write_shard(
        tmp_path / "train-00000-of-00002.parquet",
        [encoded(p) for p in pictures[:3]],
        [2, 0, 1],
        filename=["a.png", "b.png", "c.png"],  # further columns are no matter
    )
    write_shard(tmp_path / "val-00000-of-00001.parquet", [encoded(image(9))], [4])

    train = load_split(tmp_path, "train", SPEC)
    assert train.labels.tolist() == [2, 0, 1, 0, 3]
    assert train.labels.dtype == torch.int64
    assert train.pixels.dtype == torch.uint8
    assert train.pixels.shape == (5, 8, 8, 3)
    for pixels, picture in zip(train.pixels, pictures, strict=True):
        assert np.array_equal(pixels.numpy(), to_pixels(picture, SPEC))
    assert load_split(tmp_path, "val", SPEC).labels.tolist() == [4]


def test_images_of_every_kind_become_rgb_of_one_size(tmp_path: Path) -> None:
    pictures = [encoded(image(1, "L"), "JPEG"), encoded(image(2, "RGBA")), encoded(image(3, size=(5, 40)), "WEBP")]
    write_shard(tmp_path / "val-0.parquet", pictures, [0, 0, 0])
    loaded = load_split(tmp_path, "val", Preprocessing(8, crop_ratio=0.875))
    assert loaded.pixels.shape == (3, 8, 8, 3)
    grey = loaded.pixels[0].float()
    assert torch.equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [b"x"]}, "val-0.parquet lacks the column label"),
        ({"picture": [b"x"], "class": [1]}, "val-0.parquet lacks the column image, label"),
        ({"image": [b"x"], "label": ["cat"]}, "val-0.parquet: every label must be a whole number"),
        ({"image": [b"x"], "label": [1.5]}, "val-0.parquet: every label must be a whole number"),
        ({"image": [b"x", b"y"], "label": [1, None]}, "val-0.parquet: every label must be a whole number"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "hold no images"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "val-0.parquet")
    with pytest.raises(ValueError, match=words):
        load_split(tmp_path, "val", SPEC)


@pytest.mark.parametrize("broken", [b"", b"no image", encoded(image(5))[:150], None])
def test_a_broken_image_is_named_by_its_shard_and_row(tmp_path: Path, broken: bytes | None) -> None:
    write_shard(tmp_path / "train-0.parquet", [encoded(image(1)), broken], [0, 1])
    with pytest.raises(ValueError, match=r"train-0\.parquet: row 1 is not an image"):
        load_split(tmp_path, "train", SPEC)


def test_a_shard_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "val-0.parquet").write_bytes(b"PAR0" * 10)
    with pytest.raises(ValueError, match=r"(?i)parquet"):
        load_split(tmp_path, "val", SPEC)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no test-\*\.parquet in .*: give the folder that holds the Parquet shards"):
        load_split(tmp_path, "test", SPEC)


def test_classes_are_the_rows_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text(
        "n01443537\tgoldfish, Carassius auratus\nn01629819\tżaba\nplain\n\n", encoding="utf-8"
    )
    assert read_classes(tmp_path) == [
        {"class_id": 0, "id": "n01443537", "label": "goldfish"},
        {"class_id": 1, "id": "n01629819", "label": "żaba"},
        {"class_id": 2, "id": "plain", "label": "plain"},
    ]


def test_a_missing_table_of_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no classes\.tsv in"):
        read_classes(tmp_path)
