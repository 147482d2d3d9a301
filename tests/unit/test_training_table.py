"""Methods are compared from what their checkpoints tell, and only where that can be compared."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.training_table import main
from scala_model.card import complete_card
from scala_model.checkpoint import write_card
from scala_model.config import ScalaConfig
from scala_model.correctness import Correctness, paired_difference, wilson_interval, write_correctness
from scala_model.cost import cost_of
from scala_model.width import Width
from tests.unit.toy import CONFIG

N = 500
TWO = replace(CONFIG, smallest=0.5, granularity=0.5)  # 0.5 and 1.0


def checkpoint(
    folder: Path,
    config: ScalaConfig,
    hits: Sequence[range] | None,
    *,
    training: dict[str, Any] | None = None,
    dataset: str = "toys val",
    num_images: int = N,
    order: str = "by class",
) -> Path:
    """A checkpoint of which only the card is needed; each width was right on the images of its range."""
    folder.mkdir()
    write_card(folder, complete_card(config, folder.name, {"training": training, "weights_sha256": folder.name}))
    if hits is not None:
        correct = np.stack([right(found, num_images) for found in hits], axis=1)
        labels_sha256 = hashlib.sha256(order.encode()).hexdigest()
        write_correctness(folder, Correctness(config.widths, correct, dataset, labels_sha256))
    return folder


def right(found: range, num_images: int = N) -> NDArray[np.bool_]:
    return np.isin(np.arange(num_images), np.arange(found.start, found.stop))


@pytest.fixture
def scala(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "a", TWO, [range(200), range(300)])


@pytest.fixture
def us_net(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "b", TWO, [range(20, 160), range(2, 301)])


def table(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], dict[str, Any]]:
    main([str(argument) for argument in arguments])
    *text, last = capsys.readouterr().out.splitlines()
    return text, json.loads(last)


def cells(text: Sequence[str], name: str) -> list[list[str]]:
    """The rows of a method, one a table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("|")]
    return [row[1:] for row in rows if row[0] == name]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_methods_stand_beside_each_other(capsys: pytest.CaptureFixture[str], scala: Path, us_net: Path) -> None:
    text, last = table(capsys, f"scala={scala}", f"us-net={us_net}")
    assert "500 images (toys val)" in text[0]
    low, high = wilson_interval(200, N)
    (accuracies,) = cells(text, "scala")
    assert accuracies[0] == f"40.00 ({100 * low:.2f} to {100 * high:.2f})"
    assert accuracies[2] == "50.00"
    accuracies, differences = cells(text, "us-net")
    assert accuracies[0].startswith("28.00 (")
    assert accuracies[2] == "43.90"
    _, low, high = paired_difference(right(range(20, 160)), right(range(200)))
    # The mean by hand: 2 images of d = -1, 58 of -1/2, 1 of +1/2 and the added ones of -1 and +1, so -30.5 / 502 =
    # -0.06076, and ± 1.95996 sqrt((3 + 59 / 4 + 1) / 502 - 0.06076^2) / sqrt(502) = ± 0.01605
    assert differences == [
        f"**-12.00** ({100 * low:+.2f} to {100 * high:+.2f})",
        "-0.20 (-1.07 to +0.67)",
        "**-6.10** (-7.68 to -4.47)",
    ]
    assert text[-2] == "Dominated widths, no more accurate than a narrower one of the same method: none."

    assert {key: last[key] for key in ("dataset", "images", "against")} == {
        "dataset": "toys val",
        "images": N,
        "against": "scala",
    }
    assert [method["mean"] for method in last["methods"].values()] == [0.5, 0.439]
    assert [method["dominated"] for method in last["methods"].values()] == [[], []]
    assert {key: value for key, value in last["methods"]["us-net"].items() if key.startswith("mean_")} == {
        "mean_difference": -0.061,
        "mean_difference_ci95": [-0.0768, -0.0447],
        "mean_significant": True,
    }
    assert "mean_difference" not in last["methods"]["scala"]
    narrow, wide = last["methods"]["us-net"]["widths"]
    assert narrow["macs"] == cost_of(TWO, Width(0.5)).macs
    assert narrow["accuracy_ci95"] == [round(bound, 4) for bound in wilson_interval(140, N)]
    assert (narrow["difference"], narrow["significant"]) == (-0.12, True)
    assert (wide["difference"], wide["significant"]) == (-0.002, False)
    assert wide["difference_ci95"][0] < 0 < wide["difference_ci95"][1]
    assert "difference" not in last["methods"]["scala"]["widths"][0]


def test_any_method_may_be_the_reference(capsys: pytest.CaptureFixture[str], scala: Path, us_net: Path) -> None:
    text, last = table(capsys, f"scala={scala}", f"us-net={us_net}", "--against", "us-net")
    assert last["against"] == "us-net"
    assert last["methods"]["scala"]["widths"][0]["difference"] == 0.12
    assert cells(text, "scala")[1][0].startswith("**+12.00** (")
    assert len(cells(text, "us-net")) == 1


def test_separately_trained_networks_are_one_method(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scala: Path
) -> None:
    narrow = replace(TWO, embed_dim=4, smallest=1.0)
    folders = [
        checkpoint(tmp_path / "s1", replace(TWO, smallest=1.0), [range(290)]),
        checkpoint(tmp_path / "s0.5", narrow, [range(150)], training={"width": 0.5}),
    ]
    _, last = table(capsys, f"scala={scala}", f"separate={folders[0]},{folders[1]}")
    widths = last["methods"]["separate"]["widths"]
    assert [(entry["width"], entry["accuracy"]) for entry in widths] == [(0.5, 0.3), (1.0, 0.58)]
    assert [entry["difference"] for entry in widths] == [-0.1, -0.02]
    assert widths[0]["macs"] == cost_of(narrow, Width(1)).macs


def test_widths_that_only_some_methods_have(capsys: pytest.CaptureFixture[str], tmp_path: Path, scala: Path) -> None:
    four = checkpoint(tmp_path / "four", CONFIG, [range(100), range(200), range(250), range(310)])
    text, last = table(capsys, f"two={scala}", f"four={four}")
    assert "0.5, 1." in text[0]
    assert [cell.split(" ")[0] for cell in cells(text, "two")[0]] == ["–", "40.00", "–", "60.00", "50.00"]
    assert [cell.split(" ")[0] for cell in cells(text, "four")[1]] == ["–", "+0.00", "–", "**+2.00**", "**+1.00**"]
    assert last["methods"]["four"]["mean"] == 0.51
    assert last["methods"]["four"]["mean_difference"] == 0.01
    assert ["difference" in entry for entry in last["methods"]["four"]["widths"]] == [False, True, False, True]

    other = checkpoint(tmp_path / "other", replace(CONFIG, smallest=0.75, largest=0.75), [range(9)])
    text, last = table(capsys, f"two={scala}", f"other={other}")
    assert [method["mean"] for method in last["methods"].values()] == [None, None]
    assert cells(text, "other")[1] == ["–", "–", "–", "–"]
    assert "mean_difference" not in last["methods"]["other"]


def test_a_difference_in_the_mean_that_is_chance_is_not_significant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scala: Path
) -> None:
    near = checkpoint(tmp_path / "near", TWO, [range(1, 203), range(1, 303)])
    text, last = table(capsys, f"scala={scala}", f"near={near}")
    assert cells(text, "near")[1][2].startswith("+0.40 (-")
    assert (last["methods"]["near"]["mean_difference"], last["methods"]["near"]["mean_significant"]) == (0.004, False)


def test_widths_that_buy_nothing_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, scala: Path) -> None:
    flat = checkpoint(tmp_path / "flat", CONFIG, [range(200), range(9, 209), range(250), range(249)])
    text, last = table(capsys, f"scala={scala}", f"flat={flat}")
    assert text[-2] == "Dominated widths, no more accurate than a narrower one of the same method: flat 0.5, 1."
    assert [method["dominated"] for method in last["methods"].values()] == [[], [0.5, 1.0]]


def test_one_method_alone_has_no_differences(capsys: pytest.CaptureFixture[str], scala: Path) -> None:
    text, last = table(capsys, f"scala={scala}")
    assert not any("Difference" in line for line in text)
    assert list(last["methods"]) == ["scala"]


def test_table_and_plot_are_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scala: Path, us_net: Path
) -> None:
    out, plot = tmp_path / "table.md", tmp_path / "plot.png"
    text, _ = table(capsys, f"scala={scala}", f"us-net={us_net}", "--out", out, "--plot", plot)
    assert out.read_text(encoding="utf-8").splitlines() == text[:-1]
    assert text[-1] == ""
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_what_cannot_be_compared_is_refused_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scala: Path
) -> None:
    fewer = checkpoint(tmp_path / "fewer", TWO, [range(200), range(300)], num_images=400)
    other = checkpoint(tmp_path / "other", TWO, [range(200), range(300)], dataset="birds val")
    rows = checkpoint(tmp_path / "rows", TWO, [range(200), range(300)], order="by row")
    blank = checkpoint(tmp_path / "blank", TWO, None)
    strange = checkpoint(tmp_path / "strange", replace(TWO, smallest=1.0), [range(9)], training={"width": 3})
    assert f"400 images of toys val, {scala} on 500 of toys val: only" in refusal(capsys, f"a={scala}", f"b={fewer}")
    assert "500 images of birds val" in refusal(capsys, f"a={scala}", f"b={other}")
    assert re.search(
        rf"{rows} was evaluated on images with other labels, or in another order, than {scala} \(SHA-256 \w{{8}} and "
        r"\w{8}\): evaluate both with the same data folder$",
        refusal(capsys, f"a={scala}", f"b={rows}"),
    )
    assert f"{blank} has no record of which images were right: run" in refusal(capsys, f"a={scala}", f"b={blank}")
    assert "config.json does not exist" in refusal(capsys, f"a={tmp_path / 'nowhere'}")
    assert "a has width 0.5 twice, the second time from" in refusal(capsys, f"a={scala},{scala}")
    assert "the method 'a' is given twice" in refusal(capsys, f"a={scala}", f"a={scala}")
    assert "write METHOD=DIR" in refusal(capsys, scala)
    assert "there is no method 'c' to compare with; given: a" in refusal(capsys, f"a={scala}", "--against", "c")
    assert f"{strange / 'config.json'}: a width is a number in (0, 1]" in refusal(capsys, f"a={strange}")


def test_a_table_needs_neither_torch_nor_matplotlib(scala: Path) -> None:
    program = f"""
import sys
from benchmarks.training_table import main
main(["scala={scala}"])
assert not {{"torch", "matplotlib"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "typo"], "there is no method 'typo' to time; there are: scala; "),
        (["no-such-recipe"], "'no-such-recipe'"),
        (["--batch-size", "-1"], "batch_size must be a finite number, above 0; got -1"),
    ],
)
def test_the_table_of_steps_refuses_in_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    from benchmarks.training_step import main  # the other table; it needs torch

    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", *arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err.splitlines()[-1]
