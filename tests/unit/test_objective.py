"""Scale Coordination: which widths a step trains, who teaches whom, and where the gradients go."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scala_model import ScalaConfig, ScalaViT, Width
from scala_model.config import variant
from scala_model.train.objective import backward, sample_widths
from scala_model.train.recipe import Objective, us_net, without
from scala_model.train.recipes.scala_s_tiny_imagenet import RECIPE

SCALA = Objective()
US_NET = us_net(RECIPE).objective


def config(granularity: float, smallest: float = 0.25, largest: float = 1.0) -> ScalaConfig:
    return variant(
        "deit-s",
        image_size=64,
        patch_size=8,
        num_classes=10,
        smallest=smallest,
        largest=largest,
        granularity=granularity,
    )


# -- Stable Sampling: upper half >= 0.625, lower half < 0.625, for s = 0.25 and l = 1


@pytest.mark.parametrize(
    ("granularity", "upper", "lower"),
    [
        (0.25, [0.75], [0.5]),
        (0.125, [0.625, 0.75, 0.875], [0.375, 0.5]),
        (0.0625, [0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375], [0.3125, 0.375, 0.4375, 0.5, 0.5625]),
        (
            0.03125,
            [0.625, 0.65625, 0.6875, 0.71875, 0.75, 0.78125, 0.8125, 0.84375, 0.875, 0.90625, 0.9375, 0.96875],
            [0.28125, 0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875, 0.5, 0.53125, 0.5625, 0.59375],
        ),
    ],
)
def test_four_networks_one_of_each_half(granularity: float, upper: list[float], lower: list[float]) -> None:
    rng = random.Random(0)
    draws = [tuple(map(float, sample_widths(config(granularity), SCALA, rng))) for _ in range(2000)]
    assert all(len(draw) == 4 and draw[0] == 1.0 and draw[3] == 0.25 for draw in draws)
    for place, half in ((1, upper), (2, lower)):
        counts = {ratio: sum(draw[place] == ratio for draw in draws) for ratio in half}
        assert sum(counts.values()) == 2000  # never anything else
        assert min(counts.values()) > 0.7 * 2000 / len(half)  # uniformly


def test_the_halves_part_at_the_middle_of_the_range() -> None:
    rng = random.Random(0)
    draws = {tuple(map(float, sample_widths(config(0.125, 0.5), SCALA, rng))) for _ in range(100)}
    assert draws == {(1.0, 0.75, 0.625, 0.5), (1.0, 0.875, 0.625, 0.5)}
    draws = {tuple(map(float, sample_widths(config(0.125, 0.25, 0.75), SCALA, rng))) for _ in range(100)}
    assert draws == {(0.75, 0.5, 0.375, 0.25), (0.75, 0.625, 0.375, 0.25)}


def test_an_empty_half_skips_its_pass() -> None:
    rng = random.Random(0)
    assert [float(width) for width in sample_widths(config(0.375), SCALA, rng)] == [1.0, 0.625, 0.25]
    assert [float(width) for width in sample_widths(config(0.75), SCALA, rng)] == [1.0, 0.25]
    assert [float(width) for width in sample_widths(config(0.25, 1.0), SCALA, rng)] == [1.0]


# -- the loss


class Spy:
    """A forward function with known logits, which the gradients reach."""

    def __init__(self, logits: dict[float, list[list[float]]]) -> None:
        self.logits = {Width(ratio): torch.tensor(rows, requires_grad=True) for ratio, rows in logits.items()}
        self.calls: list[Width] = []

    def __call__(self, images: Tensor, width: Width) -> tuple[Tensor, ...]:
        self.calls.append(width)
        return (self.logits[width],)

    def gradient(self, ratio: float) -> list[list[float]]:
        gradient = self.logits[Width(ratio)].grad
        assert gradient is not None
        rows: list[list[float]] = gradient.tolist()
        return rows


def widths(ratios: Iterable[float]) -> tuple[Width, ...]:
    return tuple(map(Width, ratios))


LN3 = math.log(3.0)
IMAGE = torch.zeros(1, 3, 8, 8)


def test_each_network_is_taught_by_the_next_larger_one_and_by_the_labels() -> None:
    # softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2), of (ln 3, 0) is (3/4, 1/4)
    spy = Spy({1.0: [[0.0, LN3]], 0.75: [[0.0, 0.0]], 0.5: [[LN3, 0.0]], 0.25: [[0.0, LN3]]})
    losses = backward(spy, IMAGE, torch.tensor([[0.0, 1.0]]), widths((1.0, 0.75, 0.5, 0.25)), SCALA)

    assert spy.calls == list(widths((1.0, 0.75, 0.5, 0.25)))
    ln = math.log
    assert losses.tolist() == pytest.approx(
        [
            -ln(3 / 4),
            -ln(1 / 2) + (1 / 4) * ln((1 / 4) / (1 / 2)) + (3 / 4) * ln((3 / 4) / (1 / 2)),
            -ln(1 / 4) + (1 / 2) * ln((1 / 2) / (3 / 4)) + (1 / 2) * ln((1 / 2) / (1 / 4)),
            -ln(3 / 4) + (3 / 4) * ln((3 / 4) / (1 / 4)) + (1 / 4) * ln((1 / 4) / (3 / 4)),
        ]
    )
    # d/dlogits of both terms: (own - label) + (own - teacher). Students do not move their teachers.
    assert spy.gradient(1.0) == [pytest.approx([0.25, -0.25])]
    assert spy.gradient(0.75) == [pytest.approx([0.5 + 0.25, -0.5 - 0.25])]
    assert spy.gradient(0.5) == [pytest.approx([0.75 + 0.25, -0.75 - 0.25])]
    assert spy.gradient(0.25) == [pytest.approx([0.25 - 0.5, -0.25 + 0.5])]


def test_labels_may_be_mixed_and_the_loss_is_the_mean_over_images() -> None:
    spy = Spy({1.0: [[0.0, LN3], [0.0, 0.0]], 0.25: [[0.0, 0.0], [0.0, 0.0]]})
    targets = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    losses = backward(spy, IMAGE.expand(2, -1, -1, -1), targets, widths((1.0, 0.25)), SCALA)

    ln = math.log
    largest = [-0.5 * ln(1 / 4) - 0.5 * ln(3 / 4), ln(2)]
    smallest = [ln(2) + 0.25 * ln(1 / 2) + 0.75 * ln(3 / 2), ln(2)]
    assert losses.tolist() == pytest.approx([sum(largest) / 2, sum(smallest) / 2])
    assert spy.gradient(1.0) == [pytest.approx([(0.25 - 0.5) / 2, (0.75 - 0.5) / 2]), pytest.approx([-0.2, 0.2])]


def test_the_largest_alone_is_plain_cross_entropy() -> None:
    spy = Spy({1.0: [[0.0, LN3]]})
    losses = backward(spy, IMAGE, torch.tensor([[0.0, 1.0]]), widths((1.0,)), SCALA)
    assert losses.tolist() == pytest.approx([-math.log(0.75)])


# -- the parts switched off, one by one. Own - teacher is the gradient of the transfer, own - label that of the labels.


def four() -> Spy:
    """softmax: (1/4, 3/4), (1/2, 1/2), (3/4, 1/4), (1/4, 3/4) from the largest down."""
    return Spy({1.0: [[0.0, LN3]], 0.75: [[0.0, 0.0]], 0.5: [[LN3, 0.0]], 0.25: [[0.0, LN3]]})


def first_gradients(objective: Objective, ratios: Iterable[float] = (1.0, 0.75, 0.5, 0.25)) -> list[float]:
    """Of the first logit of each network in ``four``, the label being the second class."""
    spy = four()
    backward(spy, IMAGE, torch.tensor([[0.0, 1.0]]), widths(ratios), objective)
    return [spy.gradient(ratio)[0][0] for ratio in (1.0, 0.75, 0.5, 0.25)]


def test_without_progressive_transfer_the_largest_teaches_all() -> None:
    objective = without(RECIPE, "progressive-transfer").objective
    expected = [0.25, 0.5 + (0.5 - 0.25), 0.75 + (0.75 - 0.25), 0.25 + (0.25 - 0.25)]
    assert first_gradients(objective) == pytest.approx(expected)


def test_without_noise_calibration_only_the_largest_sees_labels() -> None:
    objective = without(RECIPE, "noise-calibration").objective
    assert first_gradients(objective) == pytest.approx([0.25, 0.5 - 0.25, 0.75 - 0.5, 0.25 - 0.75])


def test_us_net_has_one_teacher_and_no_labels_for_the_taught() -> None:
    assert first_gradients(US_NET) == pytest.approx([0.25, 0.5 - 0.25, 0.75 - 0.25, 0.25 - 0.25])


def test_a_second_largest_network_is_taught_by_the_first() -> None:
    """US-Net may draw an end once more: its own output teaches it, and the first output goes on teaching the others."""
    once, twice = (first_gradients(US_NET, ratios) for ratios in ((1.0, 0.75, 0.5, 0.25), (1.0, 1.0, 0.75, 0.5, 0.25)))
    assert twice == pytest.approx(once)


def test_equal_draws_are_taught_by_the_next_larger_width_both_times() -> None:
    once, twice = (first_gradients(SCALA, ratios) for ratios in ((1.0, 0.75, 0.5, 0.25), (1.0, 0.75, 0.5, 0.5, 0.25)))
    assert twice == pytest.approx([once[0], once[1], 2 * once[2], once[3]])


def test_without_stable_sampling_both_middles_come_from_the_whole_range() -> None:
    middles = (0.375, 0.5, 0.625, 0.75, 0.875)
    for objective, population in (
        (without(RECIPE, "stable-sampling").objective, middles),
        (US_NET, (0.25, *middles, 1.0)),  # all trained widths
    ):
        rng = random.Random(0)
        draws = [tuple(map(float, sample_widths(config(0.125), objective, rng))) for _ in range(4000)]
        assert all(draw[0] == 1.0 and draw[3] == 0.25 and draw[1] >= draw[2] for draw in draws)
        pairs = {draw[1:3] for draw in draws}
        assert pairs == {(a, b) for a in population for b in population if a >= b}  # of one half, and equal ones, too
        for ratio in population:
            share = sum(draw[1:3].count(ratio) for draw in draws) / 8000
            assert share == pytest.approx(1 / len(population), abs=0.02)
    rng = random.Random(0)
    without_middles = without(RECIPE, "stable-sampling").objective
    assert [float(width) for width in sample_widths(config(0.75), without_middles, rng)] == [1.0, 0.25]
    assert [float(width) for width in sample_widths(config(0.25, 1.0), US_NET, rng)] == [1.0]


def test_without_isolated_activation_every_gradient_is_a_prefix() -> None:
    ablated = without(replace(RECIPE, config=toy().config), "isolated-activation")
    assert ablated.objective == SCALA
    found = gradients(0.5, config=ablated.config)
    assert nonzero(found["cls_token"], 2) == list(range(0, 8))
    assert nonzero(found["blocks.1.attn.qkv.weight"], 0) == list(range(0, 24))
    assert nonzero(found["blocks.1.mlp.fc2.weight"], 1) == list(range(0, 32))


# -- the distilled variant: labels on the class token's output, teachers on the distillation token's


class TwoHeads:
    """Known logits of both heads."""

    def __init__(self, logits: dict[float, tuple[list[float], list[float]]]) -> None:
        self.heads = {
            Width(ratio): tuple(torch.tensor([row], requires_grad=True) for row in rows)
            for ratio, rows in logits.items()
        }

    def __call__(self, images: Tensor, width: Width) -> tuple[Tensor, ...]:
        return self.heads[width]

    def first_gradients(self, ratio: float) -> list[float]:
        return [float(head.grad[0, 0]) for head in self.heads[Width(ratio)] if head.grad is not None]


def test_an_external_teacher_has_half_of_the_largest_loss() -> None:
    heads = TwoHeads({1.0: ([0.0, LN3], [0.0, 0.0]), 0.25: ([0.0, 0.0], [LN3, 0.0])})
    labels, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([0])
    losses = backward(heads, IMAGE, labels, widths((1.0, 0.25)), SCALA, teacher)

    ln = math.log
    transfer = (1 / 2) * ln((1 / 2) / (3 / 4)) + (1 / 2) * ln((1 / 2) / (1 / 4))
    assert losses.tolist() == pytest.approx([(ln(4 / 3) + ln(2)) / 2, transfer + ln(2)])
    assert heads.first_gradients(1.0) == pytest.approx([0.25 / 2, (0.5 - 1.0) / 2])  # label: second, teacher: first
    assert heads.first_gradients(0.25) == pytest.approx([0.5, 0.75 - 0.5])


def test_without_an_external_teacher_both_heads_of_the_largest_learn_from_the_labels() -> None:
    heads = TwoHeads({1.0: ([0.0, LN3], [0.0, 0.0])})
    losses = backward(heads, IMAGE, torch.tensor([[0.0, 1.0]]), widths((1.0,)), SCALA)
    assert losses.tolist() == pytest.approx([(math.log(4 / 3) + math.log(2)) / 2])
    assert heads.first_gradients(1.0) == pytest.approx([0.25 / 2, 0.5 / 2])


# -- where gradients go: D = 16, so 48 rows of qkv and 64 hidden channels


def toy() -> ScalaViT:
    torch.manual_seed(2)
    return ScalaViT(
        ScalaConfig(
            image_size=8,
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=2,
            mlp_ratio=4.0,
            num_classes=5,
            smallest=0.25,
            largest=1.0,
            granularity=0.25,
        )
    )


def gradients(*ratios: float, config: ScalaConfig | None = None) -> dict[str, Tensor]:
    model = toy() if config is None else ScalaViT(config)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    backward(model.heads, images, torch.eye(5)[:4], widths(ratios), SCALA)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def nonzero(gradient: Tensor, dim: int) -> list[int]:
    """The positions along one dimension that have any gradient."""
    rows = gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)
    positions: list[int] = rows.any(1).nonzero().flatten().tolist()
    return positions


@pytest.mark.parametrize(
    ("ratio", "embed", "qkv", "hidden"),
    [
        (0.25, range(0, 4), range(0, 12), range(0, 16)),  # nothing beyond the first channels
        (0.5, range(8, 16), range(24, 48), range(32, 64)),  # nothing in the first D - C, nor in 3 (D - C) rows of qkv
        (0.75, range(4, 16), range(12, 48), range(16, 64)),
        (1.0, range(0, 16), range(0, 48), range(0, 64)),
    ],
)
def test_only_active_channels_get_gradients(ratio: float, embed: range, qkv: range, hidden: range) -> None:
    found = gradients(ratio)
    assert found.keys() == dict(toy().named_parameters()).keys()
    assert nonzero(found["cls_token"], 2) == list(embed)
    assert nonzero(found["pos_embed"], 2) == list(embed)
    assert nonzero(found["patch_embed.proj.weight"], 0) == list(embed)
    for i in range(2):
        assert nonzero(found[f"blocks.{i}.attn.qkv.weight"], 0) == list(qkv)
        assert nonzero(found[f"blocks.{i}.attn.qkv.weight"], 1) == list(embed)
        assert nonzero(found[f"blocks.{i}.attn.proj.weight"], 0) == list(embed)
        assert nonzero(found[f"blocks.{i}.attn.proj.weight"], 1) == list(embed)
        assert nonzero(found[f"blocks.{i}.mlp.fc1.weight"], 0) == list(hidden)
        assert nonzero(found[f"blocks.{i}.mlp.fc1.weight"], 1) == list(embed)
        assert nonzero(found[f"blocks.{i}.mlp.fc2.weight"], 0) == list(embed)
        assert nonzero(found[f"blocks.{i}.mlp.fc2.weight"], 1) == list(hidden)
        for norm in ("norm1", "norm2"):
            assert nonzero(found[f"blocks.{i}.{norm}.weight"], 0) == list(embed)
    assert nonzero(found["norm.weight"], 0) == list(embed)
    assert nonzero(found["head.weight"], 1) == list(embed)
    assert nonzero(found["head.bias"], 0) == list(range(5))


def test_the_gradients_of_a_step_add_up() -> None:
    largest, pair, step = gradients(1.0), gradients(1.0, 0.25), gradients(1.0, 0.75, 0.5, 0.25)
    name = "norm.weight"
    assert torch.equal(pair[name][4:], largest[name][4:])  # the smallest has the first 4 channels
    assert not torch.allclose(pair[name][:4], largest[name][:4])
    assert not torch.allclose(step[name][4:8], largest[name][4:8])  # 0.75 has the last 12
