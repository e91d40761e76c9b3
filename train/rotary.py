"""Rotary positions (Su et al., arXiv 2104.09864), and how they are squeezed for rows longer than those trained on."""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# YaRN's: pairs that turn less than once over the trained length are squeezed, those that turn 32 times are not
YARN_SLOW, YARN_FAST = 1.0, 32.0


class Scaling(str, Enum):
    """What longer rows do to the frequencies; `factor` is how many times longer they are."""

    none = "none"
    linear = "linear"  # all divided by factor (Chen et al., arXiv 2306.15595)
    ntk = "ntk"  # the base is raised so that the slowest is divided by factor, and the fastest stays as it is
    yarn = (
        "yarn"  # slow ones divided by factor, fast ones as they are, and larger scores (Peng et al., arXiv 2309.00071)
    )


@dataclass(frozen=True)
class Rope:
    head_dim: int
    base: float
    scaling: Scaling = Scaling.none
    factor: float = 1.0  # 1 or more
    trained: int = 0  # tokens, of the rows that unscaled positions are for; needed by YaRN

    def frequencies(self, device: torch.device | str = "cpu") -> Tensor:
        """Radians a token of each pair, fastest first: fp64 (head_dim / 2,)."""
        exponents = -torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float64) / self.head_dim
        if self.scaling is Scaling.ntk:
            return (self.base * self.factor ** (self.head_dim / (self.head_dim - 2))) ** exponents
        plain = self.base**exponents
        if self.scaling is Scaling.linear:
            return plain / self.factor
        if self.scaling is Scaling.yarn:
            turns = self.trained * plain / (2 * math.pi)
            kept = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0, 1)
            return plain * (kept + (1 - kept) / self.factor)
        return plain

    def magnitude(self) -> float:
        """Of queries and of keys: YaRN raises all scores by its square, so that softmax stays as sharp."""
        return 0.1 * math.log(self.factor) + 1 if self.scaling is Scaling.yarn else 1.0

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, S, 1, head_dim) in fp32, or fp64 for an fp64 model; shared by all layers, as what they
        multiply: (cos, cos) and (-sin, sin) of the pairs' angles.

        positions: int64 (B, S)
        """
        # Angles in fp64: at a million tokens an angle in fp32 is off by up to 0.06 rad.
        angles = (positions[..., None].double() * self.frequencies(positions.device))[:, :, None]
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = ((x * self.magnitude()).to(wide) for x in (angles.cos(), angles.sin()))
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
