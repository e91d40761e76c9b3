"""What the loop is told, as train.*; the loop itself is in train/loop.py."""

from dataclasses import dataclass
from enum import Enum

from ringspan.train.activations import Activations, Offload, Policy


class Backend(str, Enum):
    auto = "auto"  # the fastest that can run: hopper, triton, torch
    torch = "torch"
    triton = "triton"
    hopper = "hopper"


@dataclass(kw_only=True)
class LoopConfig:
    micro_batch: int = 1  # rows of each data group in one forward
    accumulation: int = 1  # forwards of one update
    activations: Activations = Activations.keep  # what a layer keeps for backward
    recompute_layers: int = 1  # layers that share one kept input, where layers are recomputed
    offload: Offload = Offload.none  # where what is kept waits for backward
    mlp_tile: int = 0  # tokens of a row that all of a layer but its attention is computed for at once; 0: all
    compile: bool | None = None  # the layers, by torch.compile; null: on CUDA, if it is our GPT
    attention: Backend = Backend.auto  # the backend of attention; one that cannot run is refused, not replaced
    z_loss: float = 0.0  # adds this x logsumexp(logits)^2 to a token's loss, and to train/loss; 1e-4 is usual
    log_every: int = 1  # steps from one logged step to the next
    save_every: int = 0  # steps between checkpoints; 0: only at the end
    keep: int = 3  # newest checkpoints to keep; 0: all
    keep_every: int = 0  # checkpoints at multiples of so many steps stay for good; 0: none
    keep_best: bool = False  # the checkpoint of the lowest logged loss stays too
    skip_limit: int = 5  # steps in a row without a finite gradient, after which the run stops
    max_hours: float = 0.0  # of wall clock; then the run saves and leaves as at a SIGTERM; 0: no limit
    hang_seconds: float = 600.0  # without progress, after which the run ends and says who hangs; 0: never

    def __post_init__(self) -> None:
        at_least_one = ("micro_batch", "accumulation", "recompute_layers", "log_every", "skip_limit")
        not_negative = ("mlp_tile", "z_loss", "save_every", "keep", "keep_every", "max_hours", "hang_seconds")
        rules = [(name, 1) for name in at_least_one] + [(name, 0) for name in not_negative]
        for name, least in rules:
            if getattr(self, name) < least:
                raise ValueError(f"train.{name}={getattr(self, name)}: must be {least} or more")
        if self.recompute_layers > 1 and self.activations is Activations.keep:
            raise ValueError(
                f"train.recompute_layers={self.recompute_layers} with train.activations=keep: nothing is recomputed; "
                "use train.activations=recompute or recompute_keep_attention"
            )

    def policy(self, device_type: str) -> Policy:
        compiled = device_type == "cuda" if self.compile is None else self.compile
        return Policy(
            activations=self.activations,
            recompute_layers=self.recompute_layers,
            offload=self.offload,
            mlp_tile=self.mlp_tile,
            compiler="inductor" if compiled else None,
        )
