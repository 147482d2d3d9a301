"""Scale Coordination: one step trains four networks of one set of weights (Scala, section 3.2).

The largest width learns from the labels. Two middle widths, one from each half of the range (Stable Sampling), and the
smallest each learn from the NEXT LARGER network of the same step (Progressive Knowledge Transfer) and from the labels
(Noise Calibration). Teachers are detached training-mode outputs; the gradients of the four passes add up.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scala_model.config import ScalaConfig
from scala_model.width import Width


def sample_widths(config: ScalaConfig, rng: random.Random) -> tuple[Width, ...]:
    """The widths of one step, largest first: largest, one of the upper half, one of the lower half, smallest.

    The halves are the trained widths strictly between smallest and largest, from (s + l) / 2 upwards and below it; an
    empty half is left out, and a network of one width trains just that.
    """
    smallest, largest = config.widths[0], config.widths[-1]
    if smallest == largest:
        return (largest,)
    middle = (smallest.ratio + largest.ratio) / 2
    upper = [w for w in config.widths[1:-1] if w.ratio >= middle]
    lower = [w for w in config.widths[1:-1] if w.ratio < middle]
    return (largest, *(rng.choice(half) for half in (upper, lower) if half), smallest)


def backward_scala(
    forward: Callable[[Tensor, Width], Tensor], images: Tensor, targets: Tensor, widths: tuple[Width, ...]
) -> dict[Width, float]:
    """Add the gradients of one step's networks and return each one's loss.

    ``forward`` maps images (B, 3, S, S) and a width to logits (B, classes); ``targets`` (B, classes) are soft labels,
    the same for every network; ``widths`` run from the largest down. Each network's graph is freed before the next
    one's forward pass, so memory is that of the largest alone.
    """
    losses: dict[Width, float] = {}
    teacher: Tensor | None = None
    for width in widths:
        logits = forward(images, width).float()
        loss = F.cross_entropy(logits, targets)
        if teacher is not None:
            loss = loss + F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
        torch.autograd.backward(loss)
        losses[width] = loss.item()
        teacher = logits.detach().softmax(-1)
    return losses
