"""A heavier checkpoint costs more and answers as before: logits against the original's at every width."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.heavier import enlarged, heavier, main
from scala_model.checkpoint import build_model, default_checkpoint, load_checkpoint, read_checkpoint
from scala_model.config import ScalaConfig
from scala_model.correctness import Correctness, read_correctness, write_correctness
from scala_model.vit import ScalaViT
from tests.unit.toy import ACCURACIES, CONFIG, SIZE, write_toy

SHAPES = {
    "isolated": CONFIG,
    "nested": replace(CONFIG, isolated_activation=False),
    "distilled": replace(CONFIG, distilled=True),
    "pooled": replace(CONFIG, global_pool="avg"),
    "without width 1": replace(CONFIG, largest=0.75),
    "deep": replace(CONFIG, depth=3, smallest=0.5, granularity=0.5),
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "toy")


def random_model(config: ScalaConfig) -> ScalaViT:
    """Every parameter, the biases too, is far from zero: whatever is misplaced shows."""
    model, random = ScalaViT(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=random)
    return model


def images(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_same_answers(ours: ScalaViT, original: ScalaViT, pixels: Tensor) -> None:
    for width in original.config.widths:
        torch.testing.assert_close(ours(pixels, width), original(pixels, width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mlp_factor", "extra_depth"), [(1, 0), (1, 2), (3, 0), (4, 1)])
def test_every_width_answers_as_before(shape: str, mlp_factor: int, extra_depth: int) -> None:
    original = random_model(SHAPES[shape])
    bigger = enlarged(original, mlp_factor, extra_depth)
    assert bigger.config.hidden_dim == mlp_factor * 16
    assert bigger.config.depth == SHAPES[shape].depth + extra_depth
    assert_same_answers(bigger, original, images())


@torch.inference_mode()
def test_the_comparison_sees_a_trained_channel_that_is_out_of_place() -> None:
    original = random_model(CONFIG)
    bigger = enlarged(original, 2, 0)
    weights = bigger.state_dict()
    for name in ("fc1.weight", "fc1.bias"):  # the first that width 0.25 must not see goes where it does
        weights[f"blocks.0.mlp.{name}"][[7, 8]] = weights[f"blocks.0.mlp.{name}"][[8, 7]]
    weights["blocks.0.mlp.fc2.weight"][:, [7, 8]] = weights["blocks.0.mlp.fc2.weight"][:, [8, 7]]
    torch.testing.assert_close(bigger(images(), 1.0), original(images(), 1.0), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_answers(bigger, original, images())


def test_new_channels_take_something_in_and_give_nothing_out() -> None:
    original = random_model(CONFIG)
    weights = enlarged(original, 2, 0).state_dict()
    fc1, fc2 = weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc2.weight"]
    trained = torch.arange(32) % 2 == 0  # by hand: 16 of 32; width 0.25 has the first 8 and in them four, as before
    assert torch.equal(fc1[trained], original.state_dict()["blocks.0.mlp.fc1.weight"])
    assert fc1[~trained].abs().amin() > 0
    assert fc1[~trained].abs().amax() < 0.2
    assert not fc2[:, ~trained].any()


def test_a_new_block_computes_something_and_adds_nothing() -> None:
    weights = enlarged(random_model(CONFIG), 1, 1).state_dict()
    for name in ("attn.qkv", "mlp.fc1"):
        assert weights[f"blocks.1.{name}.weight"].all()
    for name in ("attn.proj", "mlp.fc2"):
        assert not weights[f"blocks.1.{name}.weight"].any()
        assert not weights[f"blocks.1.{name}.bias"].any()


def test_the_default_checkpoint_answers_as_before(tmp_path: Path) -> None:
    heavier(default_checkpoint(), tmp_path / "out", mlp_factor=2, extra_depth=1)
    ours, original = load_checkpoint(tmp_path / "out"), load_checkpoint(default_checkpoint())
    assert_same_answers(ours, original, images(original.config.image_size))


def test_the_card_takes_over_what_was_measured_and_tells_what_was_done(toy: Path, tmp_path: Path) -> None:
    heavier(toy, tmp_path / "heavy", mlp_factor=2, extra_depth=3)
    card, before = read_checkpoint(tmp_path / "heavy").card, read_checkpoint(toy).card
    assert card["name"] == "heavy"
    assert card["architecture"] == asdict(CONFIG) | {"mlp_ratio": 4.0, "depth": 4}
    assert {entry["width"]: entry["accuracy"] for entry in card["widths"]} == ACCURACIES
    assert card["classes"] == before["classes"]
    # One block at width 1.0: 5 tokens x (4 x 8 x 8 + 2 x 8 x 32) + 2 x 25 x 8; also 4 patches of 48 x 8 and 8 x 200.
    assert card["widths"][-1]["macs"] == 4 * (5 * 768 + 400) + 4 * 384 + 1600
    assert card["training"] == {
        "made heavier": "2 x the hidden channels and 3 more blocks, which add nothing, after training: "
        "the answers, and what was measured of them, are those of toy"
    }


def test_the_correctness_matrix_comes_along(toy: Path, tmp_path: Path) -> None:
    correct = np.random.default_rng(0).random((11, 4)) < 0.5
    matrix = Correctness(CONFIG.widths, correct, "toys val", "0" * 64)
    write_correctness(toy, matrix)
    heavier(toy, tmp_path / "heavy", mlp_factor=2, extra_depth=1)
    copy = read_correctness(tmp_path / "heavy")
    assert copy is not None
    assert (copy.widths, copy.dataset, copy.labels_sha256) == (matrix.widths, "toys val", "0" * 64)
    np.testing.assert_array_equal(copy.correct, correct)


def test_without_a_correctness_matrix_none_is_written(toy: Path, tmp_path: Path) -> None:
    heavier(toy, tmp_path / "heavy", mlp_factor=2, extra_depth=1)
    assert read_correctness(tmp_path / "heavy") is None


@pytest.mark.parametrize(("stored", "expected"), [("toy", np.float32), ("default", np.float16)])
def test_the_weights_keep_their_precision(stored: str, expected: type, toy: Path, tmp_path: Path) -> None:
    heavier(toy if stored == "toy" else default_checkpoint(), tmp_path / "out", mlp_factor=1, extra_depth=1)
    assert {array.dtype for array in read_checkpoint(tmp_path / "out").weights.values()} == {np.dtype(expected)}


def test_the_same_input_gives_the_same_bytes_and_leaves_the_global_generator_alone(toy: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        state = torch.random.get_rng_state()
        heavier(toy, tmp_path / name, mlp_factor=2, extra_depth=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.rand(1)
    one, other = (json.loads((tmp_path / name / "config.json").read_text())["weights_sha256"] for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize(
    ("config", "mlp_factor", "extra_depth", "message"),
    [
        (CONFIG, 0, 0, "mlp_factor is 0: give a whole number from 1"),
        (CONFIG, 1, -1, "extra_depth is -1: give a whole number from 0"),
        # 9 hidden channels of 8 x 1.125: half of 18 is 9, and not twice the 4 that half of 9 is
        (replace(CONFIG, mlp_ratio=1.125), 2, 0, "mlp_factor 2 leaves width 0.5 with 9 hidden channels, not 2 x 4: "),
        (
            replace(CONFIG, mlp_ratio=1.0625, smallest=1.0),
            2,
            0,
            "mlp_factor 2 leaves width 1 with 17 hidden channels, not 2 x 8: ",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(config: ScalaConfig, mlp_factor: int, extra_depth: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enlarged(random_model(config), mlp_factor, extra_depth)


def test_hidden_channels_that_cannot_be_shared_evenly_allow_more_blocks() -> None:
    original = random_model(replace(CONFIG, mlp_ratio=1.125))
    assert_same_answers(enlarged(original, 1, 2), original, images())


def test_a_checkpoint_is_not_replaced_by_its_heavier_self(toy: Path) -> None:
    with pytest.raises(ValueError, match="holds the checkpoint to start from: write the heavier one to another folder"):
        heavier(toy, toy / ".." / "toy", mlp_factor=2, extra_depth=1)
    assert read_checkpoint(toy).config == CONFIG


def test_the_command_writes_one_and_tells_the_cost(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heavy"
    main([str(out), "--checkpoint", str(toy), "--mlp-factor", "2", "--extra-depth", "0"])
    assert build_model(read_checkpoint(out)).config == replace(CONFIG, mlp_ratio=4.0)
    # By hand: 5 x 512 + 400 in the block, 1,536 before it, 1,600 in the head; the new hidden channels add 5 x 256.
    assert "  width 1: 6,096 -> 7,376\n" in capsys.readouterr().out


def test_the_command_refuses_in_one_sentence(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "heavy"), "--checkpoint", str(toy), "--extra-depth", "-1"])
    assert "extra_depth is -1" in capsys.readouterr().err
    assert not (tmp_path / "heavy").exists()
