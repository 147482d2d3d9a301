"""The number from which all chance of hostile inputs comes: always the same, unless ``CHAOS_SEED`` names another.

``CHAOS_SEED=random`` draws one. It is told in the last line of a run, so that whatever broke can be tried again.
"""

from __future__ import annotations

import os
from random import SystemRandom

if os.environ.get("CHAOS_SEED") == "random":
    os.environ["CHAOS_SEED"] = str(SystemRandom().randrange(1, 2**24))  # for processes of this run, too
SEED = int(os.environ.get("CHAOS_SEED", "1"))  # libFuzzer takes 0 for none
