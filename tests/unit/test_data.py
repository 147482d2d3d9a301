"""Image sets read from Parquet shards and from folders, which each test writes for itself."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from scala_model.preprocess import Preprocessing, to_pixels
from scala_model.train import data
from scala_model.train.data import EncodedSet, ImageSet, available_bytes, fits
from scala_model.train.layouts import has_split, open_split

SPEC = Preprocessing(8)
CPU = torch.device("cpu")


def image(seed: int, mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(picture: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format)
    return file.getvalue()


def write_shard(path: Path, images: Any, labels: Any, **others: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels, **others}), path)


def write_tree(folder: Path, files: Iterable[str]) -> None:
    """Images where the suffix is that of one, which differ; text elsewhere."""
    for i, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_image = path.suffix.lower() in Image.registered_extensions()
        path.write_bytes(encoded(image(i), Image.registered_extensions()[path.suffix.lower()]) if is_image else b"text")


@pytest.fixture
def shards(tmp_path: Path) -> EncodedSet:
    """Images 0 to 4 in two shards."""
    write_shard(tmp_path / "train-0.parquet", [encoded(image(i)) for i in range(3)], [2, 0, 1])
    write_shard(tmp_path / "train-1.parquet", [encoded(image(i)) for i in (3, 4)], [0, 3])
    return open_split(tmp_path, "train")


@pytest.fixture
def tree(tmp_path: Path) -> EncodedSet:
    write_tree(tmp_path / "tree", [f"train/{name}/{i}.png" for name in "ab" for i in range(3)])
    return open_split(tmp_path / "tree", "train")


def test_reads_the_shards_of_a_split_in_order(tmp_path: Path) -> None:
    pictures = [image(i) for i in range(5)]
    write_shard(tmp_path / "train-00001-of-00002.parquet", [encoded(p) for p in pictures[3:]], [0, 3])
    write_shard(
        tmp_path / "train-00000-of-00002.parquet",
        [encoded(p) for p in pictures[:3]],
        [2, 0, 1],
        filename=["a.png", "b.png", "c.png"],  # further columns are no matter
    )
    write_shard(tmp_path / "val-00000-of-00001.parquet", [encoded(image(9))], [3])

    train = open_split(tmp_path, "train").decode_all(SPEC)
    assert train.labels.tolist() == [2, 0, 1, 0, 3]
    assert train.labels.dtype == torch.int64
    assert train.pixels.dtype == torch.uint8
    assert train.pixels.shape == (5, 8, 8, 3)
    for pixels, picture in zip(train.pixels, pictures, strict=True):
        assert np.array_equal(pixels.numpy(), to_pixels(picture, SPEC))
    assert open_split(tmp_path, "val").decode_all(SPEC).labels.tolist() == [3]


def test_images_of_every_kind_become_rgb_of_one_size(tmp_path: Path) -> None:
    pictures = [encoded(image(1, "L"), "JPEG"), encoded(image(2, "RGBA")), encoded(image(3, size=(5, 40)), "WEBP")]
    write_shard(tmp_path / "val-0.parquet", pictures, [0, 0, 0])
    loaded = open_split(tmp_path, "val").decode_all(Preprocessing(8, crop_ratio=0.875))
    assert loaded.pixels.shape == (3, 8, 8, 3)
    grey = loaded.pixels[0].float()
    assert torch.equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("stem", ["data/train-0", "train-0"])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()])
def test_shards_as_hugging_face_lays_them_out(tmp_path: Path, stem: str, binary: pa.DataType) -> None:
    structs = pa.array(
        [{"bytes": encoded(image(i)), "path": f"{i}.png"} for i in range(3)],
        pa.struct([("bytes", binary), ("path", pa.string())]),
    )
    info = {"info": {"features": {"label": {"names": ["tench, Tinca tinca", "cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": structs, "label": [1, 0, 1]})
    path = tmp_path / f"{stem}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)

    train = open_split(tmp_path, "train")
    assert train.classes == [
        {"class_id": 0, "id": "tench, Tinca tinca", "label": "tench"},
        {"class_id": 1, "id": "cat", "label": "cat"},
        {"class_id": 2, "id": "dog", "label": "dog"},
    ]
    pixels = train.decode_all(SPEC).pixels
    assert np.array_equal(pixels[2].numpy(), to_pixels(image(2), SPEC))

    (tmp_path / "classes.tsv").write_text("n1\tone\nn2\ttwo\n", encoding="utf-8")
    assert [entry["id"] for entry in open_split(tmp_path, "train").classes] == ["n1", "n2"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_names_of_the_second_split(tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / f"{name}-0.parquet", [encoded(image(1))], [0])
    assert not has_split(tmp_path, "train")
    assert has_split(tmp_path, "val")
    assert open_split(tmp_path, "val").labels.tolist() == [0]


@pytest.mark.parametrize("metadata", [{}, {"huggingface": "{"}, {"huggingface": "[]"}, {"pandas": "{}"}])
def test_classes_without_names_are_numbered_up_to_the_highest_of_train(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    for split, labels in (("train-0", [0, 1]), ("train-1", [3]), ("val-0", [1])):
        table = pa.table({"image": [encoded(image(1))] * len(labels), "label": labels})
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{split}.parquet")
    val = open_split(tmp_path, "val")
    assert [(entry["id"], entry["label"]) for entry in val.classes] == [(str(i), str(i)) for i in range(4)]


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_classes(tmp_path: Path, label: int) -> None:
    (tmp_path / "classes.tsv").write_text("a\tA\nb\tB\n", encoding="utf-8")
    write_shard(tmp_path / "train-0.parquet", [b"x"] * 3, [0, 1, label])
    with pytest.raises(ValueError, match=rf"train-0\.parquet: row 2 has the label {label}; there are 2 classes"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": [b"x"]}, "val-0.parquet lacks the column label"),
        ({"picture": [b"x"], "class": [1]}, "val-0.parquet lacks the column image, label"),
        ({"image": [b"x"], "label": ["cat"]}, "val-0.parquet: every label must be a whole number"),
        ({"image": [b"x"], "label": [1.5]}, "val-0.parquet: every label must be a whole number"),
        ({"image": [b"x", b"y"], "label": [1, None]}, "val-0.parquet: every label must be a whole number"),
        ({"image": ["a.png"], "label": [1]}, "the column image is string; it must be binary, or a struct with bytes"),
        ({"image": [{"path": "a"}], "label": [1]}, "the column image is struct<path: string>; it must be binary"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, r"val-\*.parquet holds no images"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "val-0.parquet")
    with pytest.raises(ValueError, match=words):
        open_split(tmp_path, "val")


def test_a_shard_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "val-0.parquet").write_bytes(b"PAR0" * 10)
    with pytest.raises(
        ValueError, match=r"val-0\.parquet is not a Parquet file that can be read \(.*\): copy it again"
    ):
        open_split(tmp_path, "val")


def test_a_folder_a_class(tmp_path: Path) -> None:
    files = [
        "train/dog/1.png",
        "train/dog/more/2.JPEG",
        "train/cat/b.webp",
        "train/cat/a.Bmp",
        "train/ant/x.tif",
        "train/cat/.hidden.png",
        "train/cat/notes.txt",
        "train/cat/.thumbnails/a.png",
        "train/README",
        "train/.cache/x.png",
        "val/dog/1.gif",
    ]
    write_tree(tmp_path, files)
    (tmp_path / "classes.tsv").write_text("cow\tCattle\ndog\tDog, hound\n", encoding="utf-8")

    train, val = open_split(tmp_path, "train"), open_split(tmp_path, "val")
    assert [entry["id"] for entry in train.classes] == ["ant", "cat", "dog"]
    assert [entry["label"] for entry in train.classes] == ["ant", "cat", "Dog"]
    assert train.labels.tolist() == [0, 1, 1, 2, 2]
    assert [train.source.name(i) for i in range(5)] == [str(tmp_path / files[i]) for i in (4, 3, 2, 0, 1)]
    assert train.num_skipped == 3  # those that lie in no hidden folder
    assert np.array_equal(train.decode_all(SPEC).pixels[3].numpy(), to_pixels(image(0), SPEC))
    assert val.labels.tolist() == [2]
    assert val.classes == train.classes


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/a/1.png", "val/images/1.png"], r"val/images is a class that .*train does not have"),
        (["train/a/1.png", "val/a/1.txt"], r"val/a holds no images \(\.jpg, .*\): add some or remove the folder"),
        (["train/a/1.png", "val/1.png"], r"val holds no folder of a class: expected val/CLASS/\*\.jpg"),
    ],
)
def test_folders_that_are_no_classes(tmp_path: Path, files: list[str], words: str) -> None:
    write_tree(tmp_path, files)
    with pytest.raises(ValueError, match=words):
        open_split(tmp_path, "val")


def test_a_val_alone_has_classes_of_its_own(tmp_path: Path) -> None:
    write_tree(tmp_path, ["val/b/1.png", "val/a/1.png"])
    val = open_split(tmp_path, "val")
    assert [entry["id"] for entry in val.classes] == ["a", "b"]
    assert val.labels.tolist() == [0, 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_not_there(tmp_path: Path, split: Literal["train", "val"]) -> None:
    words = rf"no {split} images in .*: expected Parquet shards {split}-\*\.parquet .* or .* {split}/CLASS/\*\.jpg"
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=words):
            open_split(folder, split)


def test_two_layouts_at_once(tmp_path: Path) -> None:
    write_tree(tmp_path, ["train/a/1.png"])
    write_shard(tmp_path / "train-0.parquet", [b"x"], [0])
    with pytest.raises(ValueError, match=r"train images lie in .*/train-\*\.parquet and .*/train: move all but one"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("broken", [b"", b"no image", encoded(image(5))[:150], None])
def test_a_broken_image_is_named_by_its_shard_and_row(tmp_path: Path, broken: bytes | None) -> None:
    write_shard(tmp_path / "train-0.parquet", [encoded(image(1))], [0])
    write_shard(tmp_path / "train-1.parquet", [encoded(image(1)), broken], [0, 1])
    with pytest.raises(ValueError, match=r"train-1\.parquet: row 1 is not an image .*: repair or remove it") as caught:
        open_split(tmp_path, "train").decode_all(SPEC)
    assert "BytesIO" not in str(caught.value)


def test_a_broken_image_is_named_by_its_path_and_leaves_no_file_open(tmp_path: Path, tree: EncodedSet) -> None:
    before = psutil.Process().num_fds()
    tree.decode_all(SPEC)
    (tmp_path / "tree/train/b/1.png").write_bytes(encoded(image(5))[:150])
    with pytest.raises(ValueError, match=r"tree/train/b/1\.png is not an image"):
        tree.decode_all(SPEC)
    (tmp_path / "tree/train/b/1.png").unlink()
    with pytest.raises(ValueError, match=r"tree/train/b/1\.png is not an image that can be read \(.*No such file"):
        tree.decode_all(SPEC)
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("max_pixels", [100, 50])  # Pillow warns above its limit and raises above twice that
def test_a_huge_image_is_an_error(shards: EncodedSet, max_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", max_pixels)
    words = r"row 0 is too large: .*192 pixels.* exceeds limit of 100 pixels: scale it down or remove it"
    with pytest.raises(ValueError, match=words):
        shards.decode_all(SPEC)
    with pytest.raises(ValueError, match=words):
        next(shards.stream(SPEC, 0).batches([torch.tensor([0])], CPU))


def test_neither_an_error_nor_an_interrupt_waits_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_decoded, interrupt_at = 0, 50

    def slow(picture: Image.Image, spec: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
        nonlocal num_decoded
        num_decoded += 1
        if num_decoded == interrupt_at:
            raise KeyboardInterrupt
        time.sleep(0.005)
        return to_pixels(picture, spec)

    monkeypatch.setattr(data, "_CHUNK", 1)
    monkeypatch.setattr(data, "to_pixels", slow)
    write_shard(tmp_path / "train-0.parquet", [encoded(image(1))] * 300, [0] * 300)
    with pytest.raises(KeyboardInterrupt):
        open_split(tmp_path, "train").decode_all(SPEC)
    assert num_decoded < 150

    num_decoded, interrupt_at = 0, 0
    write_shard(tmp_path / "train-0.parquet", [b"broken"] + [encoded(image(1))] * 300, [0] * 301)
    with pytest.raises(ValueError, match="row 0"):
        open_split(tmp_path, "train").decode_all(SPEC)
    assert num_decoded < 150


def test_a_resident_set_gives_the_chosen_images() -> None:
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 2, 2, 3)
    resident = ImageSet(pixels, torch.zeros(5, dtype=torch.int64)).to(CPU)
    batches = resident.batches((torch.tensor(chosen) for chosen in ([4, 0], [1, 1, 3])), CPU)
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == [[4, 0], [1, 1, 3]]


# The first test with workers takes seconds: the process that workers are forked from imports torch.
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_pixels_are_those_of_the_resident_set(shards: EncodedSet, tree: EncodedSet, workers: int) -> None:
    order = [torch.tensor(chosen) for chosen in ([3, 0], [1], [4, 2, 2], [0])]
    for images in (shards, tree):
        streamed = images.stream(SPEC, workers)
        before = torch.get_rng_state()
        batches: list[Tensor] = list(streamed.batches(iter(order), CPU))
        assert torch.equal(torch.get_rng_state(), before)  # a resumed run must draw the same numbers
        expected = list(images.decode_all(SPEC).batches(iter(order), CPU))
        assert all(map(torch.equal, batches, expected))
        assert len(batches) == len(order)
        assert torch.equal(streamed.labels, images.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_when_its_turn_comes(tmp_path: Path, tree: EncodedSet, workers: int) -> None:
    (tmp_path / "tree/train/a/2.png").write_bytes(b"no image")
    batches = tree.stream(SPEC, workers).batches([torch.tensor([0]), torch.tensor([1, 2])], CPU)
    next(batches)
    with pytest.raises(ValueError, match="its format is not known") as caught:
        next(batches)
    path = tmp_path / "tree/train/a/2.png"
    assert (
        str(caught.value) == f"{path} is not an image that can be read (its format is not known): repair or remove it"
    )
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("by_hand", [True, False])
def test_workers_end_with_the_iterator(shards: EncodedSet, by_hand: bool) -> None:
    endless = (torch.tensor([i % 5]) for i in itertools.count())
    batches = shards.stream(SPEC, 2).batches(endless, CPU)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    if by_hand:
        batches.close()  # type: ignore[attr-defined]  # a generator's
    else:
        del batches
    assert not multiprocessing.active_children()


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is no signal there")
def test_workers_leave_an_interrupt_to_their_parent(shards: EncodedSet) -> None:
    batches = shards.stream(SPEC, 1).batches((torch.tensor([i % 5]) for i in range(50)), CPU)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 49


@pytest.mark.slow
def test_a_killed_worker_is_said(shards: EncodedSet) -> None:
    batches = shards.stream(SPEC, 1).batches((torch.tensor([i % 5]) for i in itertools.count()), CPU)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(ValueError, match=r"(?s)a decoding process failed \(.*\): use fewer workers or give them more"):
        for _ in batches:
            pass


def test_a_negative_number_of_workers(shards: EncodedSet) -> None:
    with pytest.raises(ValueError, match="-1 workers cannot decode: give a number of processes, or 0"):
        shards.stream(SPEC, -1)


def test_sets_can_be_sent_to_a_process_however_it_starts(shards: EncodedSet, tree: EncodedSet) -> None:
    for images in (shards, tree):
        copy: EncodedSet = pickle.loads(pickle.dumps(images))
        assert torch.equal(copy.decode_all(SPEC).pixels, images.decode_all(SPEC).pixels)


def test_images_fit_in_half_of_the_memory() -> None:
    assert fits(100, 8, 2 * 100 * 8 * 8 * 3)
    assert not fits(100, 8, 2 * 100 * 8 * 8 * 3 - 1)


def test_free_memory_is_bounded_by_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(data, "_MEMORY_LIMITS", (limit, tmp_path / "missing"))
    free = available_bytes(CPU)
    assert 0 < free <= psutil.virtual_memory().total
    used = psutil.Process().memory_info().rss
    limit.write_text(f"{used + free // 2}\n", encoding="ascii")
    assert available_bytes(CPU) == pytest.approx(free // 2, rel=0.1)
    limit.write_text("1000\n", encoding="ascii")
    assert available_bytes(CPU) == 0
    limit.write_text("max\n", encoding="ascii")
    assert available_bytes(CPU) == pytest.approx(free, rel=0.2)


def test_tiny_imagenet(shared_data: Path) -> None:
    val = open_split(shared_data / "tiny-imagenet", "val")
    assert torch.bincount(val.labels).tolist() == [50] * 200
    assert val.classes[0] == {"class_id": 0, "id": "n01443537", "label": "goldfish"}
    row = pq.read_table(shared_data / "tiny-imagenet/val-00000-of-00001.parquet").slice(7777, 1).to_pylist()[0]
    (batch,) = val.stream(Preprocessing(64), 0).batches([torch.tensor([0, 7777])], CPU)
    # Images of this size are only decoded, neither resized nor cropped.
    assert np.array_equal(batch[1].numpy(), np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")))
    assert val.labels[7777] == row["label"]


def test_classes_are_the_rows_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "classes.tsv").write_text(
        "n01443537\tgoldfish, Carassius auratus\nn01629819\tżaba\nplain\n\n", encoding="utf-8"
    )
    write_shard(tmp_path / "train-0.parquet", [encoded(image(1))], [0])
    assert open_split(tmp_path, "train").classes == [
        {"class_id": 0, "id": "n01443537", "label": "goldfish"},
        {"class_id": 1, "id": "n01629819", "label": "żaba"},
        {"class_id": 2, "id": "plain", "label": "plain"},
    ]


def test_a_table_of_classes_in_another_encoding(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.parquet", [encoded(image(1))], [0])
    (tmp_path / "classes.tsv").write_bytes("a\tétang\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.tsv is not UTF-8 \(.*\): save it as such"):
        open_split(tmp_path, "train")
