"""The width of a sub-network: the share of every layer's channels that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, order=True, slots=True)
class Width:
    """An exact ratio in (0, 1]; ``float(width)`` is the ratio, ``str(width)`` its shortest form (``0.3125``).

    Held as a fraction of two integers, so that widths compare, hash and count channels without rounding.
    Whether a width was trained is for its network to say: see ``ScalaConfig.width``.

    Raises ValueError for anything outside (0, 1].
    """

    ratio: Fraction

    def __init__(self, ratio: Fraction | float | str) -> None:
        try:
            exact = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"a width is a number in (0, 1], such as 0.5; got {ratio!r}") from None
        if not 0 < exact <= 1:
            raise ValueError(f"a width is a number in (0, 1], such as 0.5; got {ratio!r}")
        object.__setattr__(self, "ratio", exact)

    def channels(self, dim: int) -> int:
        """How many of ``dim`` channels this width uses: ``int(r * D)``, computed in integers."""
        return self.ratio.numerator * dim // self.ratio.denominator

    def __float__(self) -> float:
        return float(self.ratio)

    def __str__(self) -> str:
        return f"{float(self.ratio):g}"

    def __repr__(self) -> str:
        return f"Width({self})"
