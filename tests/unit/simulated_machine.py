"""A machine of which everything can be worked out by hand: the device of ``simulated.py``, eight images."""

from __future__ import annotations

import numpy as np

from scala_model.width import Width
from server.simulation.device import Machine
from server.simulation.simulator import Frontend
from tests.unit.simulated import IDEAL, TICK_S, TICKS

WIDTHS = (Width(0.25), Width(0.5), Width(1))
CORRECT = np.arange(8)[:, None] < np.array([4, 5, 6])  # image 7 is right nowhere, image 5 at the widest only


def make_machine(front: Frontend = IDEAL) -> Machine:
    cells = {
        (width, batch): (ticks[batch] * TICK_S,)
        for width, ticks in zip(WIDTHS, TICKS, strict=True)
        for batch in (1, 2, 4)
    }
    return Machine("toy", "By hand.", WIDTHS, cells, CORRECT, front)
