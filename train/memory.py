"""Bytes of a training step on a GPU and in the host's memory, by part: counted from what the code holds, not fitted.

The peak is the most of five moments: the loss, the backward pass of the last layer (all is still kept) and of the first
one (all gradients are there), the reduction of the gradients, and the update.

t tokens of a rank in a micro-batch, E = dim, Q = heads x head dim, K = kv heads x head dim, M = mlp_dim, e bytes an
element. Names of a layer's tensors are those of train/layer.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringspan.train.activations import Activations, Offload
from ringspan.train.loss import rows_of_chunk

if TYPE_CHECKING:
    from ringspan.train.budget import Job

Parts = dict[str, float]
BUCKET = 10**8  # parameters whose gradients DeepSpeed reduces at once; train/engine.py sets it
PREFETCH = 5 * 10**7  # parameters that ZeRO-3 gathers ahead


def gpu_bytes(job: Job) -> Parts:
    """Of the moment at which they are the most together."""
    return max(moments(job).values(), key=lambda parts: sum(parts.values()))


def moments(job: Job) -> dict[str, Parts]:
    states, layers = state_bytes(job), job.sizes.n_layers
    kept = on_gpu = kept_bytes(job)
    if job.policy.offload is Offload.cpu:  # a layer's in use, and another's on the wire
        on_gpu = kept * min(2, layers) / layers
    head = float(job.element * job.head)
    gradients, reducing, updating = gradient_bytes(job)
    always = {**states, "ring": ring_bytes(job), "inputs": input_bytes(job)}
    layer, segment = layer_bytes(job), segment_bytes(job)
    return {
        "loss": {**always, "activations": on_gpu, "loss": loss_bytes(job)},
        "last layer": {**always, "activations": on_gpu + segment, **layer, "gradients": min(gradients, head)},
        "first layer": {**always, "activations": min(on_gpu, kept / layers), **layer, "gradients": gradients},
        "reduction": {**always, "gradients": gradients + reducing},
        "update": {**always, "gradients": updating, "muon": muon_bytes(job)},
    }


def state_bytes(job: Job) -> Parts:
    """Parameters and optimizer: what there is between steps."""
    n, share = job.parameters, job.parameters / job.world
    parameters = float(job.element * job.all_parameters)
    if job.zero == 3:  # gathered for a layer at a time, and some ahead
        gathered = min(job.all_parameters, PREFETCH + job.gathered_at_once)
        parameters = job.element * gathered + (0 if job.offload_parameters else parameters / job.world)
    # Two moments, of Muon one, and an fp32 copy; in fp32 without ZeRO the parameters are that copy
    optimizer = 12 * share if job.zero else (8 if job.element == 4 else 12) * n
    optimizer -= 4 * job.by_muon / (job.world if job.zero else 1)
    return {"parameters": parameters, "optimizer": 0.0 if job.offload_optimizer else optimizer}


def gradient_bytes(job: Job) -> tuple[float, float, float]:
    """(all gradients at the end of a backward pass, on top of them while they are reduced, all at the update)."""
    n, share = job.parameters, job.parameters / job.world
    if job.zero == 0:
        return 4.0 * n, 0.0, 4.0 * n
    held = n if job.zero == 1 else share
    gradients = float(job.element * held)
    if job.accumulation > 1:
        gradients += 4 * held  # sums of micro-batches
    bucket = job.element * BUCKET + 4 * min(BUCKET, n)  # and what is in it once more, in fp32 on its way
    updating = gradients + (job.element + 4) * share
    if job.offload_optimizer:  # they leave for the host as they are reduced
        gradients = updating = float(job.element * min(n, job.gathered_at_once))
    return (gradients, bucket, updating) if job.zero == 1 else (gradients + bucket, 0.0, updating)


def muon_bytes(job: Job) -> float:
    """What the largest matrix of a layer takes while it is made orthogonal, with parts of others on their way."""
    if not job.muon:
        return 0.0
    rows, columns = max(job.model.layer_matrices(), key=lambda shape: shape[0] * shape[1])
    copies = 3 + (job.zero == 3 and job.world > 1)
    return float(job.element * (copies * rows * columns + 2 * min(rows, columns) ** 2))


def kept_bytes(job: Job) -> float:
    """What all layers keep from forward for backward."""
    m, policy = job.sizes, job.policy
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    exchanged = 2 * q + 2 * kv if job.ulysses > 1 else 0  # queries, keys and values, and out
    if seen := job.model.footprint(policy, job.element):
        again = 1 if policy.activations is Activations.recompute else m.n_layers  # layers that hold them at once
        return job.tokens * (seen.kept + job.element * again * exchanged)
    inputs = m.dim * -(-m.n_layers // policy.recompute_layers)
    elements, statistics = 0, 0
    if policy.activations is not Activations.recompute:
        elements, statistics = q, 4 * m.n_heads
    if policy.activations is Activations.keep:
        elements += q + 2 * kv + (0 if policy.mlp_tile else m.dim + 2 * m.mlp_dim) + exchanged
    return float(job.tokens * (job.element * (inputs + m.n_layers * elements) + m.n_layers * statistics))


def segment_bytes(job: Job) -> float:
    """What layers that share one kept input keep once they have run again; the last of them is the first to go."""
    m, policy = job.sizes, job.policy
    more = min(policy.recompute_layers, m.n_layers) - 1
    attended = policy.activations is Activations.recompute
    a_layer = job.element * (m.dim + attended * m.n_heads * m.head_dim) + attended * 4 * m.n_heads
    return float(job.tokens * more * a_layer)


def layer_bytes(job: Job) -> Parts:
    """What a layer's backward pass holds at its worst moment, besides what it has kept."""
    m, policy, e = job.sizes, job.policy, job.element
    if seen := job.model.footprint(policy, e):
        return {"layer": job.tokens * seen.layer, "attention": 0.0}  # which is in it
    t, tile = job.tokens, job.tokens
    if policy.mlp_tile:
        tile = min(tile, job.micro_batch * policy.mlp_tile)
    q, kv, width = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim, m.mlp_dim
    keeps, tiled = policy.activations is Activations.keep, tile < t
    queries = q + kv + (0 if keeps else kv if tiled else q + 2 * kv)  # v is a part of packed, but of tiles
    again = q if policy.activations is Activations.recompute else 0  # out
    weights = (4 if tiled else e) * 3 * m.dim * width
    whole = e * t * (2 * m.dim + queries + again + q)  # dy, dmiddle, queries, out, dout
    # wide, hidden, dhidden, dwide, and middle and normed before the products with them
    finishing = e * tile * (width * (4 if keeps and not tiled else 6) + 2 * m.dim) + weights
    if policy.compiler is None:  # sigmoid, silu and what is made of them, in fp32; a compiler makes one kernel of it
        finishing += 4 * tile * width * (3 if e == 4 else 6)
    # dq, dk, dv whole, and turned back, packed, dpacked, normed and through_norm
    projecting = e * t * (q + 2 * kv) + e * tile * (3 * (q + 2 * kv) + 2 * m.dim) + weights
    moments = (finishing, 0.0), (0.0, float(t * attention_bytes(job))), (projecting, 0.0)
    more, attending = max(moments, key=sum)
    return {"layer": float(whole + more), "attention": attending}


def attention_bytes(job: Job) -> float:
    """Gradients of attention, a token: sums in fp32, the results beside them, delta and statistics."""
    m, e = job.sizes, job.element
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    sums, rounded = 4 * q if e < 4 else 0, e * (q + 2 * kv)
    if job.ring > 1:
        sums += 4 * 2 * kv + 4 * kv  # of the rank's own keys, and of half the heads of another's
    exchanged = e * (2 * q + 2 * kv) if job.ulysses > 1 else 0
    return sums + rounded + exchanged + 4 * 3 * m.n_heads


def loss_bytes(job: Job) -> float:
    """hidden and its gradient, the weight's in fp32, and a chunk of logits, in whose place that in e bytes comes."""
    m, e = job.sizes, job.element
    chunk = e * job.vocab_size * min(job.tokens, rows_of_chunk(job.tokens, job.vocab_size, e))
    weight = 0 if job.frozen else job.head
    return float(2 * e * job.tokens * m.dim + 4 * weight + max(chunk, e * weight))


def ring_bytes(job: Job) -> float:
    """The transport's boxes, which all layers share: keys and values, and the gradients of half the heads in fp32."""
    if job.ring == 1:
        return 0.0
    kv = job.sizes.n_kv_heads * job.sizes.head_dim * job.tokens
    return float(2 * kv * job.element * min(2, job.ring - 1) + 4 * kv)


def input_bytes(job: Job) -> float:
    """Tokens, labels and positions of this step and the next, cos and sin, and two spans a token and its transpose."""
    return float(job.tokens * (2 * 3 * 8 + 2 * 4 * job.sizes.head_dim + 2 * 4 * 4))


def host_bytes(job: Job) -> Parts:
    """Pinned memory of a rank."""
    share = job.parameters / job.world
    kept = kept_bytes(job) if job.policy.offload is Offload.cpu else 0.0
    # fp32 parameters, two moments, of Muon one, gradients, and a copy in e bytes to send back
    optimizer = (16 + job.element) * share - 4 * job.by_muon / job.world if job.offload_optimizer else 0.0
    parameters = job.element * job.all_parameters / job.world if job.offload_parameters else 0.0
    return {"activations": kept, "optimizer": optimizer, "parameters": parameters}
