"""DeepSpeed's engine: parameters, optimizer state, gradients and ZeRO over all ranks together.

DeepSpeed is told nothing of sequence parallelism: every documented way of telling it scales gradients wrongly at some
ZeRO stage, or lets ranks drift apart. To it all ranks are data-parallel ranks whose gradients it averages, and a sum of
token losses times world / label tokens of the step makes that average the exact gradient at every stage.
"""

import functools
import importlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringspan.parallel.parts import within
from ringspan.train.host import pinned
from ringspan.train.muon import Muon
from ringspan.train.optim import OptimConfig, optimizer_of
from ringspan.train.state import State


class Dtype(str, Enum):
    auto = "auto"  # bf16 on CUDA, fp32 on a CPU
    bf16 = "bf16"
    fp32 = "fp32"

    def on(self, device_type: str) -> torch.dtype:
        bf16 = self is Dtype.bf16 or (self is Dtype.auto and device_type == "cuda")
        return torch.bfloat16 if bf16 else torch.float32


@dataclass(kw_only=True)
class EngineConfig:
    zero: int = 1  # DeepSpeed's stage: 1 shards the optimizer's state, 2 the gradients too, 3 the parameters too
    dtype: Dtype = Dtype.auto  # of parameters and activations; the optimizer's copy is always fp32
    clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    offload_optimizer: bool = False  # fp32 weights and moments are the host's, and it computes the update
    offload_parameters: bool = False  # ZeRO-3's shards of the parameters too: a layer is on the device while it runs

    def __post_init__(self) -> None:
        if self.zero not in range(4):
            raise ValueError(f"engine.zero={self.zero}: must be 0, 1, 2 or 3")
        if self.clip < 0:
            raise ValueError(f"engine.clip={self.clip}: must be 0 (no clipping) or more")
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("engine.offload_optimizer=true: needs engine.zero=1, 2 or 3, and it is 0")
        if self.offload_parameters and self.zero != 3:
            raise ValueError(f"engine.offload_parameters=true: needs engine.zero=3, and it is {self.zero}")
        self.resolve("cpu")

    def resolve(self, device_type: str) -> torch.dtype:
        """The dtype of this run. ValueError: ZeRO 0 in bf16, whose first update DeepSpeed 0.19 gets wrong."""
        dtype = self.dtype.on(device_type)
        if dtype is torch.bfloat16 and self.zero == 0:
            # Its optimizer steps once on zero gradients, so Adam's bias correction is one step ahead ever after.
            raise ValueError("engine.zero=0 with bf16 is wrong in DeepSpeed: use engine.zero=1, or engine.dtype=fp32")
        return dtype


class Engine:
    """A model in training. ``build`` makes the model: ``build(device, dtype)``, under ZeRO-3 already sharded."""

    def __init__(
        self,
        build: Callable[[torch.device, torch.dtype], nn.Module],
        config: EngineConfig,
        optim: OptimConfig,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.world, self.zero, self.clip = dist.get_world_size(), config.zero, config.clip
        self.dtype = config.resolve(device.type)
        settings = deepspeed_settings(config, self.dtype, accumulation)
        deepspeed = import_deepspeed(device)
        if config.offload_optimizer and device.type == "cuda":
            # The update is the host's work, and torchrun gives a process one thread: all cores, shared by its GPUs
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
        # No dtype here: given one, DeepSpeed makes every parameter bf16 on a device without fp16, whatever it says.
        with deepspeed.zero.Init(config_dict_or_path=settings, tensor_overrides=(), enabled=config.zero == 3):
            model = build(device, self.dtype)
        shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]  # ZeRO-3 hides the real one there
        self.parameters = sum(shape.numel() for shape in shapes)
        # ZeRO-3 keeps parameters up to this size whole: the norms, which it would not pay to gather.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = max(
            (shape.numel() for shape in shapes if len(shape) < 2), default=0
        )
        if leaves := getattr(model, "gathered_at_once", []):
            settings["zero_optimization"]["leaf_module"] = {"classes": leaves}
        optimizer = optimizer_of(model, optim, device)
        with redirect_stdout(io.StringIO()):  # one of its optimizers prints how much memory there is, eight times
            self.deepspeed: Any = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )[0]
        muon = optimizer if isinstance(optimizer, Muon) else None
        self.state = State(self.deepspeed, config.zero, muon.matrices if muon else ())
        if muon:
            muon.place(self.state.runs, self.state.flats())

    @property
    def model(self) -> nn.Module:
        return self.deepspeed.module

    def loss_sum(self, *inputs: Any) -> Tensor:
        """Forward: this rank's sum of token losses."""
        return self.deepspeed(*inputs)

    def token_losses(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Forward alone: (loss, whether the likeliest token is the label) of each of this rank's tokens."""
        self.deepspeed.eval()
        with torch.no_grad():
            found = self.deepspeed(*inputs, each=True)
        self.deepspeed.train()
        return found

    @within("gradients")
    def backward(self, loss_sum: Tensor, step_tokens: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss_sum / step_tokens`` over all ranks; ``last`` is the step's last micro-batch.

        ``step_tokens`` is the label tokens of all ranks and micro-batches of the step, a scalar on the device.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides the sum over ranks by world: times world, and it is the sum again. A loss that is not finite
        # may have a gradient that is: 0 x infinity = NaN, and the step is skipped.
        scale = self.world / step_tokens + 0 * loss_sum.detach()
        self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)

    @within("optimizer")
    def step(self, lr: float) -> float:
        """Clip and update; the norm of the whole gradient before clipping. Where it is not finite, nothing changes."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if self.zero == 0:  # DeepSpeed knows no norm here, and would apply one that is not finite
            norm = float(self._norm())
            if math.isfinite(norm):
                self.deepspeed.step()
            else:
                self.model.zero_grad()
            return norm
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm()) if self.deepspeed.was_step_applied() else math.nan

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.state.parameters.values()])


HOST = {"device": "cpu", "pin_memory": True}


def deepspeed_settings(config: EngineConfig, dtype: torch.dtype, accumulation: int) -> dict[str, Any]:
    offloaded = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    return {
        # Rows of a micro-batch are ours to count: to DeepSpeed, sequence shards would be samples.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,  # its own default is 1
        "communication_data_type": "fp32",  # sums of bf16 gradients over many ranks lose digits
        "bf16": {"enabled": dtype is torch.bfloat16},
        # Micro-batches are summed in fp32: eight in bf16 lose 0.4 % of the gradient. One needs no sum, and no memory.
        "data_types": {"grad_accum_dtype": "fp32" if accumulation > 1 else None},
        "zero_optimization": {
            "stage": config.zero,
            "reduce_bucket_size": 10**8,  # elements; by default 1 GB in bf16, and twice that again to sum them in fp32
            "memory_efficient_linear": False,  # would replace torch's linear for the whole process; ours needs no help
            **{name: HOST for name, wanted in offloaded.items() if wanted},
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own are compiled on first use
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def pinned_copy(device: torch.device, x: Tensor, align_bytes: int = 1) -> Tensor:
    """What DeepSpeed offloads to. torch's pinned memory comes in powers of two: of an 8B model's 28 GB, 34."""
    buffer = pinned(x.nbytes, device, "engine.offload_optimizer=true")
    return buffer[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes algorithms that give the same bits each time; attention's backends ask it for that."""
    if not wanted:
        yield
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when its first handle is made
    fills: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # what we allocate is all written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fills.fill_uninitialized_memory = before[1]


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed for this device, compiling nothing.

    It picks its accelerator once, when it is imported, and would take CUDA wherever there is a GPU: where the process
    group is gloo's, the one way to tell it is this variable.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # torch 2.13 renames these two, once a call, hundreds of times; the new names are not there in 2.11.
    message = r".*(reduce_scatter_tensor|all_gather_into_tensor).*deprecated"
    warnings.filterwarnings("ignore", message, category=FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    # Its Muon, which is not used here, asks for torch.compile when it is imported: Inductor then loads, for 2 s a rank.
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compiler.compile = lambda: lambda function: function
    # To it an optimizer of a class that it does not know is worth a warning in every run
    deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(Muon)
    if device.type == "cuda":
        deepspeed.accelerator.get_accelerator().pin_memory = functools.partial(pinned_copy, device)
    # On a CPU DeepSpeed would build a C++ all-reduce for inference with g++, for a minute, and never use it here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
