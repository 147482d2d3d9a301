"""The width of a sub-network: the share of every layer's channels that it uses."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import total_ordering


@total_ordering
@dataclass(frozen=True, slots=True, init=False)
class Width:
    """An exact ratio in (0, 1]; ``float(width)`` is the ratio, ``str(width)`` its shortest form (``0.3125``).

    Held as two integers, so that widths compare, hash and count channels without rounding.
    Whether a width was trained is for its network to say: see ``ScalaConfig.width``.

    Raises ValueError for anything outside (0, 1].
    """

    numerator: int
    denominator: int

    def __init__(self, ratio: Fraction | float | str) -> None:
        text = str(ratio)
        try:  # the range first: Fraction("1e-999999999") would work for minutes
            exact = Fraction(text) if "/" in text or 0 < float(text) <= 1 else Fraction(0)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"a width is a number in (0, 1], such as 0.5; got {ratio!r}") from None
        if not 0 < exact <= 1:
            raise ValueError(f"a width is a number in (0, 1], such as 0.5; got {ratio!r}")
        object.__setattr__(self, "numerator", exact.numerator)
        object.__setattr__(self, "denominator", exact.denominator)

    @property
    def ratio(self) -> Fraction:
        return Fraction(self.numerator, self.denominator)

    def channels(self, dim: int) -> int:
        """How many of ``dim`` channels this width uses: ``int(r * D)``, computed in integers."""
        return self.numerator * dim // self.denominator

    def __lt__(self, other: Width) -> bool:
        return self.numerator * other.denominator < other.numerator * self.denominator

    def __float__(self) -> float:
        return self.numerator / self.denominator

    def __str__(self) -> str:
        return f"{float(self):g}"

    def __repr__(self) -> str:
        return f"Width({self})"
