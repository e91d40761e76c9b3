"""Seconds of a training step, by part: FLOPs and bytes over rates that were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringspan.train.activations import Activations, Offload
from ringspan.train.memory import kept_bytes
from ringspan.train.muon import ITERATIONS

if TYPE_CHECKING:
    from ringspan.train.budget import Job, Machine

BACKWARD = 2.5  # of attention's forward FLOPs
ORTHOGONAL = 0.7  # of the rate, Muon's chains of products, with all between them: 1B, an H100
UNFUSED = 10  # times the bytes without torch.compile, as each operation reads and writes fp32: 1B, 32K tokens, an H200


def step_seconds(job: Job, machine: Machine) -> dict[str, float]:
    """Of one update of the weights; parts that run beside others count with what sticks out."""
    layer = layer_seconds(job, machine)
    parts = {name: job.accumulation * seconds for name, seconds in layer.items()}
    parts["loss"] = job.accumulation * loss_seconds(job, machine)
    parts["offload"] = job.accumulation * offload_seconds(job, machine, sum(layer.values()))
    return {**parts, "gradients": gradient_seconds(job, machine), "update": update_seconds(job, machine)}


def layer_seconds(job: Job, machine: Machine) -> dict[str, float]:
    """Forward and backward of all layers, a micro-batch."""
    m, policy, t, n = job.sizes, job.policy, job.tokens, job.sizes.n_layers
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    recomputes, segments = policy.activations is not Activations.keep, policy.recompute_layers > 1
    again = recomputes or bool(policy.mlp_tile and policy.mlp_tile < t)
    twice = (q + 2 * m.mlp_dim) * m.dim * again + (q + 2 * kv) * m.dim * recomputes  # products computed again
    frozen = (job.model.frozen_parameters - job.head) / n if job.frozen else 0  # have no gradient of theirs
    products = 3 * job.layer_parameters - frozen + twice + job.layer_parameters * segments
    pairs = job.micro_batch * job.attended / (job.ring * job.ulysses)
    attending = 4 * q * pairs * n / (machine.attention_tflops * 1e12)
    backward = BACKWARD * 4 * q * pairs * n / (machine.attention_backward_tflops * 1e12)
    runs = 1 + (policy.activations is Activations.recompute)
    passes = 2 + recomputes + segments
    # Elements that norms, rotations, SwiGLU and residuals read and write: forward, and 1.5 times that in backward
    touched = (8 * m.dim + 2 * (q + 2 * kv) + 3 * m.mlp_dim) * (1 if policy.compiler else UNFUSED)
    # Gradients of weights are added up in fp32, tile by tile: each is written, read, and its sum read and written
    summed = -(-t // policy.mlp_tile) * (8 + 2 * job.element) if policy.mlp_tile else 0
    moved = job.element * touched * t * (passes + 0.5) + summed * (job.layer_parameters - frozen)
    return {
        "matrices": 2 * products * t * n / (machine.matrix_tflops * 1e12),
        "attention": attending * runs + backward,
        "elementwise": n * moved / (machine.memory_gb_s * 1e9),
        "ring": n * ring_seconds(job, machine, (attending / n, backward / n), runs),
        "between kernels": n * passes * machine.layer_seconds,
    }


def ring_seconds(job: Job, machine: Machine, attention: tuple[float, float], runs: int) -> float:
    """A layer's exchanges, as far as they stick out of its attention; benchmarks/scaling.py has the model."""
    wire = (machine.wire_gb_s if job.world <= machine.gpus else machine.network_gb_s) * 1e9
    m, e, lost = job.sizes, job.element, 0.0
    if job.ring > 1:
        sent = 2 * e * m.n_kv_heads * m.head_dim * job.tokens / wire
        for seconds, parcels, times in ((attention[0], 1, runs), (attention[1], 3, 1)):  # keys; again, and gradients
            exposed = max(0.0, parcels * sent - seconds / job.ring)
            lost += times * (job.ring - 1) * (machine.hop_seconds + exposed)
    if job.ulysses > 1:  # q, k, v there and out back, and their gradients
        kv_heads = max(m.n_kv_heads, job.ulysses)
        traded = e * (2 * m.n_heads + 2 * kv_heads) * m.head_dim * job.tokens * (job.ulysses - 1) / job.ulysses
        lost += (runs + 1) * (traded / (machine.wire_gb_s * 1e9) + 4 * machine.hop_seconds)
    return lost


def loss_seconds(job: Job, machine: Machine) -> float:
    """Three products, two if the head is frozen, and six passes over logits: each is written, read twice, written and
    read twice."""
    logits = job.tokens * job.vocab_size
    products = (4 if job.frozen else 6) * logits * job.sizes.dim / (machine.matrix_tflops * 1e12)
    return products + 6 * job.element * logits / (machine.memory_gb_s * 1e9)


def offload_seconds(job: Job, machine: Machine, layers: float) -> float:
    """What is kept goes to the host and comes back beside the layers; what takes longer sticks out."""
    if job.policy.offload is Offload.none:
        return 0.0
    one_way = kept_bytes(job) / (machine.copy_gb_s * 1e9)
    return max(0.0, one_way - layers / 3) + max(0.0, one_way - layers * 2 / 3)


def gradient_seconds(job: Job, machine: Machine) -> float:
    """Sums over the ranks in fp32, and gathering parameters: nothing of it runs beside the backward pass."""
    if job.world == 1:
        return 0.0
    wire = (machine.wire_gb_s if job.world <= machine.gpus else machine.network_gb_s) * 1e9
    share = (job.world - 1) / job.world
    reduced = (2 if job.zero < 2 else 1) * 4 * job.parameters * (job.accumulation if job.zero >= 2 else 1)
    gathered = job.element * (3 * job.accumulation * job.all_parameters if job.zero == 3 else job.parameters)
    return share * (reduced + gathered) / wire


def update_seconds(job: Job, machine: Machine) -> float:
    """AdamW reads and writes three fp32 numbers a parameter; beside them gradients are flattened, widened and read."""
    ranks = job.world if job.zero else 1
    share = job.parameters / ranks
    moved = share * 24 + job.by_muon / ranks * 16  # Muon goes over weights and momentum twice
    if job.offload_optimizer:  # gradients down, parameters up
        host = (moved + share * (8 + 2 * job.element)) / (machine.host_gb_s * 1e9)
        return host + 2 * job.element * share / (machine.copy_gb_s * 1e9) + muon_seconds(job, machine)
    return (moved + share * (12 + 5 * job.element)) / (machine.memory_gb_s * 1e9) + muon_seconds(job, machine)


def muon_seconds(job: Job, machine: Machine) -> float:
    """Products that make matrices orthogonal, which ranks share; parts go to the rank that does it, and come back."""
    if not job.muon:
        return 0.0
    ranks = job.world if job.zero else 1
    sides = [(min(shape), max(shape)) for shape in job.model.layer_matrices()]
    flops = 2 * ITERATIONS * job.sizes.n_layers * sum(2 * n * n * m + n**3 for n, m in sides)
    there_and_back = 2 * job.element * job.by_muon / ranks
    wire = (machine.wire_gb_s if job.world <= machine.gpus else machine.network_gb_s) * 1e9
    seconds = flops / ranks / (ORTHOGONAL * machine.matrix_tflops * 1e12)
    seconds += there_and_back / wire if job.zero == 3 and job.world > 1 else 0.0
    return seconds + (there_and_back / (machine.copy_gb_s * 1e9) if job.offload_optimizer else 0.0)
