"""The integer format of codes."""

from dataclasses import dataclass

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class IntFormat:
    """Two's-complement integers of `bits` bits. All codes are signed and fit int8.

    The paper writes unsigned codes 0..2^k-1. Ours are the same grid with codes and zero point shifted down by
    2^(k-1): integer matrix units take signed operands, and x - z is unchanged.
    """

    bits: int

    @property
    def qmin(self) -> int:
        """Return the lowest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Return the highest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1
