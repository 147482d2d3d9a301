"""Scale Coordination: one step trains four networks of one set of weights (Scala, section 3.2).

The largest width learns from the labels. Two middle widths, one from each half of the range (Stable Sampling), and the
smallest each learn from the NEXT LARGER network of the same step (Progressive Knowledge Transfer) and from the labels
(Noise Calibration). Teachers are detached training-mode outputs; the gradients of the four passes add up.

The distilled variant has two heads. On its second head the largest also learns the classes that an external teacher
names (hard distillation, Touvron et al. 2021); the smaller ones learn from their teacher there, from the labels on the
first.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scala_model.config import ScalaConfig
from scala_model.train.recipe import Objective
from scala_model.width import Width


def sample_widths(config: ScalaConfig, objective: Objective, rng: random.Random) -> tuple[Width, ...]:
    """The widths of one step, largest first: the largest, two by ``objective.sampling``, the smallest.

    With Stable Sampling the two are one trained width from (s + l) / 2 upwards and one below it, and an empty half is
    left out. Without, they are independent draws and may be equal. A network of one width trains just that.
    """
    smallest, between, largest = config.widths[0], config.widths[1:-1], config.widths[-1]
    if smallest == largest:
        return (largest,)
    if objective.sampling != "stable":
        population = config.widths if objective.sampling == "all" else between
        drawn = [rng.choice(population) for _ in range(2)] if population else []
        return (largest, *sorted(drawn, reverse=True), smallest)
    middle = (smallest.ratio + largest.ratio) / 2
    halves = [w for w in between if w.ratio >= middle], [w for w in between if w.ratio < middle]
    return (largest, *(rng.choice(half) for half in halves if half), smallest)


def backward(
    forward: Callable[[Tensor, Width], tuple[Tensor, ...]],
    images: Tensor,
    targets: Tensor,
    widths: tuple[Width, ...],
    objective: Objective,
    teacher_classes: Tensor | None = None,
) -> Tensor:
    """Add the gradients of one step's networks and return their losses, in the order of ``widths``.

    ``forward`` maps images (B, 3, S, S) and a width to the logits (B, classes) of each head; ``targets`` (B, classes)
    are soft labels, the same for every network; ``widths`` run from the largest down; ``teacher_classes`` (B) are what
    an external teacher sees, without which a second head learns from the labels as well. Each network's graph is freed
    before the next one's forward pass, so memory is that of the largest alone. Nothing here waits for the device.
    """
    losses: list[Tensor] = []
    taught: dict[Width, Tensor] = {}  # the softened output of each network so far
    for width in widths:
        heads = [logits.float() for logits in forward(images, width)]
        if not taught:
            loss = F.cross_entropy(heads[0], targets)
            if len(heads) == 2:
                loss = (loss + F.cross_entropy(heads[1], targets if teacher_classes is None else teacher_classes)) / 2
        else:
            larger = [w for w in taught if w > width]
            teacher = min(larger) if larger and objective.progressive_transfer else widths[0]
            loss = F.kl_div(heads[-1].log_softmax(-1), taught[teacher], reduction="batchmean")
            if objective.noise_calibration:
                loss = loss + F.cross_entropy(heads[0], targets)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        taught.setdefault(width, heads[-1].detach().softmax(-1))
    return torch.stack(losses)
