"""The contestants of benchmarks/ring.py: ours, our kernel on one GPU, and what others shard a sequence with.

A contestant is made for a case; it holds this rank's random q, k, v and dout, and gives a context to stay in, and a
forward and a backward pass. One that cannot run a case raises while it is made or at its first pass.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringspan.kernels.attention import attention
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans
from ringspan.parallel.balance import lockstep_imbalance
from ringspan.parallel.gather import gather_attention, plan_gather
from ringspan.parallel.layout import Layout
from ringspan.parallel.ring import ring_attention
from ringspan.parallel.ring_plan import plan_ring, read_steps
from ringspan.parallel.transport import pick_transport

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; batch is 1. `mask` is causal, packed-N (mean document N tokens) or window-N."""

    mask: str
    length: int  # tokens of the whole sequence
    heads: int
    kv_heads: int
    dim: int

    @property
    def documents(self) -> list[int]:
        """Lengths of the documents, log-normal with sigma 1 and about that mean: always the same ones."""
        if not self.mask.startswith("packed-"):
            return [self.length]
        generator = torch.Generator().manual_seed(0)
        mean, lengths = int(self.mask.partition("-")[2]), list[int]()
        while (left := self.length - sum(lengths)) > 0:
            draw = mean * (torch.randn(1, generator=generator) - 0.5).exp().item()
            lengths.append(min(left, max(1, round(draw))))
        return lengths

    def spans(self) -> Spans:
        if self.mask.startswith("window-"):
            return Spans.causal(self.length, window=int(self.mask.partition("-")[2]))
        return Spans.packed(self.documents)


@dataclass
class Contestant:
    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    facts: dict[str, Any] = field(default_factory=dict)  # for the report

    def backward(self, out: Tensor) -> None:
        torch.autograd.grad(out, self.leaves, self.dout)


Make = Callable[[Case, torch.device], Contestant]


def inputs(case: Case, rows: int, heads: int, kv_heads: int, device: torch.device, heads_first: bool = False) -> tuple[
    tuple[Tensor, Tensor, Tensor], Tensor
]:  # fmt: skip
    """(q, k, v) as leaves and dout, (1, rows, heads, dim) or (1, heads, rows, dim)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(n: int) -> Tensor:
        shape = (1, n, rows, case.dim) if heads_first else (1, rows, n, case.dim)
        return torch.randn(shape, device=device, dtype=dtype)

    return (
        normal(heads).requires_grad_(),
        normal(kv_heads).requires_grad_(),
        normal(kv_heads).requires_grad_(),
    ), normal(heads)


def ours(case: Case, device: torch.device, transport: str = "auto") -> Contestant:
    group, spans = dist.group.WORLD, case.spans()
    assert group is not None
    # Zigzag is balanced for one causal sequence; documents and windows get the layout that is searched for their work
    causal, ranks = case.mask == "causal", group.size()
    layout = Layout.zigzag(case.length, ranks) if causal else Layout.balanced(spans, ranks)
    ring_plan = plan_ring(spans, layout, group.rank()).to(device)
    leaves, dout = inputs(case, layout.rows, case.heads, case.kv_heads, device)
    steps = read_steps(ring_plan.table, ring_plan.data, leaves[0], group.rank(), group.size())
    facts = {
        "transport": pick_transport(transport, group, device),
        "imbalance": round(lockstep_imbalance(spans, layout), 4),
        "sent_tokens": sum(len(step.sent) for step in steps),
    }
    forward = partial(ring_attention, *leaves, ring_plan, group, transport=transport)
    return Contestant(forward, leaves, dout, facts=facts)


def gathered(case: Case, device: torch.device) -> Contestant:
    """Our other strategy: all keys first, and one kernel over them."""
    group = dist.group.WORLD
    assert group is not None
    layout = Layout.zigzag(case.length, group.size())
    causal_only(case, "all-gather attention")
    leaves, dout = inputs(case, layout.rows, case.heads, case.kv_heads, device)
    mask = plan_gather(case.spans(), layout, group.rank()).to(device)
    return Contestant(partial(gather_attention, *leaves, mask, group), leaves, dout)


def one_gpu(case: Case, device: torch.device) -> Contestant:
    """Our kernel with as many heads as there are GPUs to a sequence: the same work, and nothing sent."""
    ranks = dist.get_world_size()
    if case.heads % ranks or case.kv_heads % ranks:
        raise ValueError(f"{case.heads} and {case.kv_heads} heads do not divide by {ranks}")
    leaves, dout = inputs(case, case.length, case.heads // ranks, case.kv_heads // ranks, device)
    mask = plan(case.spans().to(device), case.length)
    return Contestant(partial(attention, *leaves, mask), leaves, dout)


def causal_only(case: Case, name: str) -> None:
    if case.mask != "causal":
        raise ValueError(f"{name} has no {case.mask} mask here")


def cudnn() -> AbstractContextManager[Any]:
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if torch.cuda.is_available() else [SDPBackend.MATH])


def context_parallel(case: Case, device: torch.device, rotate: str) -> Contestant:
    """PyTorch's own ring on cuDNN, with its head-tail balance. Forward and backward pass run inside its context."""
    causal_only(case, "context_parallel")
    experimental = importlib.import_module("torch.distributed.tensor.experimental._attention")
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("context",))
    leaves, dout = inputs(case, case.length // ranks, case.heads, case.kv_heads, device, heads_first=True)

    def context() -> AbstractContextManager[Any]:
        experimental.set_rotate_method(rotate)
        stack, positions = ExitStack(), torch.arange(case.length, device=device)  # it learns the length from a buffer
        stack.enter_context(cudnn())
        stack.enter_context(
            experimental.context_parallel(
                mesh, buffers=[positions], buffer_seq_dims=[0], no_restore_buffers={positions}
            )
        )
        return stack

    def forward() -> Tensor:  # by its name in F, which the context replaces
        return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=case.heads != case.kv_heads)

    return Contestant(forward, leaves, dout, context)


class _Trade(torch.autograd.Function):
    """Ulysses' all-to-all: (1, rows, heads, dim) of all heads and some rows to all rows and some heads, or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_heads: bool) -> Tensor:
        ctx.to_heads = to_heads
        return _trade(x, to_heads)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _trade(dout, not ctx.to_heads), None


def _trade(x: Tensor, to_heads: bool) -> Tensor:
    ranks = dist.get_world_size()
    _, rows, heads, dim = x.shape
    if to_heads:
        sent = x.view(rows, ranks, heads // ranks, dim).transpose(0, 1).contiguous()
    else:
        sent = x.contiguous().view(ranks, rows // ranks, heads, dim)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    if to_heads:
        return received.view(1, ranks * rows, heads // ranks, dim)
    return received.transpose(0, 1).reshape(1, rows // ranks, ranks * heads, dim)


def ulysses(case: Case, device: torch.device) -> Contestant:
    """Ulysses around cuDNN, with one copy each way and no other cost."""
    causal_only(case, "Ulysses on cuDNN")
    leaves, dout = inputs(case, case.length // dist.get_world_size(), case.heads, case.kv_heads, device)

    def forward() -> Tensor:
        q, k, v = (_Trade.apply(x, True).transpose(1, 2) for x in leaves)
        grouped = case.heads != case.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return _Trade.apply(out.transpose(1, 2), False)

    return Contestant(forward, leaves, dout, cudnn)


def ring_flash_attention(case: Case, device: torch.device, kind: str) -> Contestant:
    """zhuzilin's ring-flash-attn (pip install --no-deps ring-flash-attn==0.1.8): zigzag on cuDNN for causal masks,
    llama3, its way for documents of any length, on the FlashAttention-2 that PyTorch brings."""
    if device.type != "cuda":
        raise ValueError("ring-flash-attn runs on GPUs")
    package = _ring_flash_attn()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    leaves, dout = inputs(case, case.length // ranks, case.heads, case.kv_heads, device)
    if kind == "zigzag":
        causal_only(case, "its zigzag")
        forward = partial(package.zigzag_ring_flash_attn_func, *leaves, causal=True, group=dist.group.WORLD)
        return Contestant(forward, leaves, dout)
    if not case.mask.startswith("packed"):
        raise ValueError(f"its llama3 is for documents, not for a {case.mask} mask")
    ends = torch.tensor([0, *case.documents], device=device).cumsum(0).int()
    q_ends, k_ends, q_longest, k_longest, keys = package.llama3_flash_attn_prepare_cu_seqlens(ends, True, rank, ranks)

    def llama3() -> Tensor:
        out: Tensor = package.llama3_flash_attn_varlen_func(
            *(x[0] for x in leaves), q_ends, k_ends, q_longest, k_longest, heads_k_stride=min(8, case.kv_heads),
            local_k_slice=keys, causal=True, group=dist.group.WORLD,
        )  # fmt: skip
        return out[None]

    return Contestant(llama3, leaves, dout)


def _ring_flash_attn() -> ModuleType:
    """The package, on a stand-in for flash_attn made of PyTorch's own operators: cuDNN for dense blocks, and its
    FlashAttention-2 for packed ones. Its adapters for old versions of transformers are left out."""
    if "flash_attn" not in sys.modules:
        stand_in, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
        for module in (stand_in, interface):
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=module is stand_in)
            for function in (
                _flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward,
            ):  # fmt: skip
                setattr(module, function.__name__, function)
            module.__dict__["flash_attn_func"] = None
        stand_in.__dict__.update(__version__="2.8.3", __path__=[], flash_attn_interface=interface)
        adapters = ModuleType("ring_flash_attn.adapters")
        adapters.__dict__.update(substitute_hf_flash_attn=None, update_ring_flash_attn_params=None)
        sys.modules.update({
            "flash_attn": stand_in, "flash_attn.flash_attn_interface": interface, "ring_flash_attn.adapters": adapters,
        })  # fmt: skip
    return importlib.import_module("ring_flash_attn")


# flash_attn's own signatures, as ring_flash_attn reads them to know which arguments it may pass.
def _flash_attn_forward(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    alibi_slopes=None, return_softmax=False,
):  # type: ignore[no-untyped-def]  # fmt: skip
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, causal, False, scale=softmax_scale
    )
    return out.transpose(1, 2), lse.squeeze(-1), None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p=0.0, softmax_scale=None, causal=False, window_size_left=-1,
    window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *(x.transpose(1, 2) for x in (dout, q, k, v, out)), softmax_lse.contiguous().unsqueeze(-1), seed, seed,
        None, None, None, q.shape[1], k.shape[1], 0.0, causal, scale=softmax_scale,
    )  # fmt: skip
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad.transpose(1, 2))


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    ends = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
    out, lse, *_ = aten._flash_attention_forward(q, k, v, *ends, 0.0, causal, False, scale=softmax_scale)
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    deterministic=False, rng_state=None,
):  # type: ignore[no-untyped-def]  # fmt: skip
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k),
        0.0, causal, seed, q.new_empty(0), scale=softmax_scale,
    )  # fmt: skip
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad)


CONTESTANTS: dict[str, Make] = {
    "ours": ours,
    "one GPU": one_gpu,
    "context_parallel allgather": partial(context_parallel, rotate="allgather"),
    "context_parallel alltoall": partial(context_parallel, rotate="alltoall"),
    "ring-flash-attn zigzag": partial(ring_flash_attention, kind="zigzag"),
    "ring-flash-attn llama3": partial(ring_flash_attention, kind="llama3"),
    "Ulysses": ulysses,
    "ours over NCCL": partial(ours, transport="p2p"),
    "ours, all-gather": gathered,
}
