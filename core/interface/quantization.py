"""Quantized weights of linear layers: codes, scales and zeros, and what becomes of activations.

Extension `quantization`. N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """The weight [N, K] of a linear layer in 4 or 8 bits: (code - zero) * scale.

    Codes are unsigned, or 8-bit floats without a zero: see `encoding`. Output n and input k share
    the scale and the zero of group k // group_size.
    """

    bits: int
    """4 or 8."""
    group_size: int
    """Inputs that share a scale, a divisor of K; 0: all of a row, one scale for each output."""
    num_inputs: int
    """K."""
    codes: Tensor
    """uint8. 8 bits: [N, K]. 4 bits: [N, ceil(K / 2)], input 2j in the low half of byte j and input
    2j + 1 in the high half.
    """
    scales: Tensor
    """float32, bfloat16 or float16 [N, G]."""
    zeros: Tensor | None = None
    """uint8 [N, G]; None: 2^(bits - 1) everywhere, or 0 for floats."""
    activations: str = "none"
    """How a row x of activations is rounded before the product. `none`: not at all. `token`: to q
    * s with q = round(x / s), halves to even, s = max |x| / 127 over the row; `group`: the same
    over each group of `group_size` inputs. Divisions are in float32; where s is 0, so is q. Part of
    the arithmetic: every device gives the same numbers. With floats, q is x / s rounded to the
    nearest float8_e4m3fn, halves to even, and s = max |x| / 448.
    """
    scheme: str = ""
    """Where it comes from, shown by `quire plan`: `int8`, `int4`, `gptq`, `awq`."""
    encoding: str = "integer"
    """What codes are. `integer`: unsigned numbers; claimed as `int4` and `int8`. `float8_e4m3fn`:
    the bits of OCP's 8-bit floats, each a number (never 0x7F or 0xFF), with `bits` 8 and no zeros;
    claimed as `fp8`.
    """

    @property
    def format_name(self) -> str:
        """Of `Capabilities.quantizations`, what a device claims that takes this weight."""
        return f"int{self.bits}" if self.encoding == "integer" else "fp8"

    @property
    def num_outputs(self) -> int:
        """N."""
        return int(self.codes.shape[0])

    @property
    def num_groups(self) -> int:
        """G."""
        return self.num_inputs // self.group_size if self.group_size else 1
