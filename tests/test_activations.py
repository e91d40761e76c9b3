import gc
import itertools
from types import SimpleNamespace

import pytest
import torch

from ringspan.kernels import torch_backend
from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train import layer
from ringspan.train.activations import Activations, Offload, Policy, in_tiles, tiles
from ringspan.train.engine import pinned_copy
from ringspan.train.host import HostMemory
from ringspan.train.loop_config import LoopConfig
from ringspan.train.model import GPT, ModelConfig

VOCABULARY, TOKENS = 61, 23
KEEP, KEEP_ATTENTION, RECOMPUTE = Activations.keep, Activations.recompute_keep_attention, Activations.recompute


def model(policy, attend=attention, dtype=torch.float64, n_layers=3, **changes):
    sizes = {"dim": 24, "n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "mlp_dim": 18}
    return GPT(ModelConfig(n_layers=n_layers, **{**sizes, **changes}), VOCABULARY, attend, policy, dtype=dtype)


def batch(rows=2):
    tokens, labels = torch.randint(VOCABULARY, (2, rows, TOKENS), generator=torch.Generator().manual_seed(0))
    return tokens, labels, torch.arange(TOKENS).expand(rows, -1)


def gradients(gpt, *inputs):
    gpt.zero_grad()
    loss = gpt(*inputs)
    loss.backward()
    return [loss.detach(), *(p.grad for p in gpt.parameters())]


def count(monkeypatch, name):
    calls = []
    real = getattr(torch_backend, name)
    monkeypatch.setattr(torch_backend, name, lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_policy_gives_the_gradients_of_keep(qk_norm, monkeypatch):
    """Whole: to the bit. In tiles weights' gradients are sums in another order."""
    inputs = (*batch(), Spans.causal(TOKENS))
    expected = gradients(model(Policy(), qk_norm=qk_norm), *inputs)
    forwards = count(monkeypatch, "forward")
    for activations, k, offload, tile in itertools.product(Activations, (1, 2), Offload, (0, 7)):
        if (k > 1 and activations is KEEP) or (not qk_norm and (k > 1 or offload is Offload.cpu)):
            continue
        policy = Policy(activations=activations, recompute_layers=k, offload=offload, mlp_tile=tile)
        forwards.clear()
        found = gradients(model(policy, qk_norm=qk_norm), *inputs)
        assert len(forwards) == 3 * (2 if activations is RECOMPUTE else 1), policy
        for ours, theirs in zip(found, expected, strict=True):
            if tile:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=str(policy))
            else:
                assert torch.equal(ours, theirs), policy


def on_a_mesh(ring, ulysses, policies):
    """Gradients of each policy on this rank, and how often attention's operators and their backwards ran."""
    torch.set_default_dtype(torch.float32)
    mesh = Mesh.create(1, ring, ulysses, "cpu")
    attend = SequenceAttention(mesh, "zigzag", "torch")
    spans = Spans.packed([[5, 1, TOKENS - 6]])
    layout = attend.layout(spans)
    mine = attend.local_positions(layout).clamp_min(0)  # padding sees nothing
    tokens, labels, positions = (x[:, mine] for x in batch(1))
    found = []
    for policy in policies:
        with Counted() as counted:
            gpt = model(policy, attend, torch.float32, n_layers=2)
            found.append((gradients(gpt, tokens, labels, positions, attend.plan(spans, "cpu", layout)), counted.calls))
    return found


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each of our operators runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ringspan":
            name = function.name().removeprefix("ringspan::")
            self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
def test_every_policy_gives_the_gradients_of_keep_on_two_ranks_and_no_ring_runs_twice(ring, ulysses, ranks):
    policies = [
        Policy(),
        Policy(mlp_tile=5, offload=Offload.cpu),
        Policy(activations=KEEP_ATTENTION),
        Policy(activations=KEEP_ATTENTION, recompute_layers=2, offload=Offload.cpu),
        Policy(activations=RECOMPUTE),
        Policy(activations=RECOMPUTE, recompute_layers=2),
    ]
    for (expected, of_keep), *others in ranks(2)(on_a_mesh, ring, ulysses, policies, timeout=120):
        assert of_keep["ring_attention"] == of_keep["ring_attention_backward"] == 2  # layers
        exchanged = of_keep.get("ulysses_exchange", 0)
        assert exchanged == (2 * 8 if ulysses > 1 else 0)  # q, k, v, out of each layer, and their gradients
        for policy, (found, calls) in zip(policies[1:], others, strict=True):
            assert calls["ring_attention"] == (4 if policy.activations is RECOMPUTE else 2), policy
            assert calls["ring_attention_backward"] == 2
            for ours, theirs in zip(found, expected, strict=True):
                # fp32 sums of at most 23 terms of size 1, in tiles in another order
                torch.testing.assert_close(ours, theirs, rtol=1e-5 if policy.mlp_tile else 0, atol=1e-6)


def kept_bytes(policy):
    """Of two layers, beyond those of one: of tensors that live between forward and backward, each counted once."""

    def of(n_layers):
        gpt, storages = model(policy, n_layers=n_layers), {}

        def pack(x):
            if not isinstance(x, torch.nn.Parameter):
                storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gpt(*batch(1), Spans.causal(TOKENS))
        return sum(x.untyped_storage().nbytes() for x in storages.values())

    return (of(6) - of(4)) // 2


def test_a_layer_keeps_what_its_policy_names():
    x, packed, out, lse, wide = 24, (4 + 2 * 2) * 10, 4 * 10, 4, 2 * 18
    for policy, numbers in (
        (Policy(), x + packed + out + lse + x + wide),
        (Policy(mlp_tile=8), x + packed + out + lse),
        (Policy(activations=KEEP_ATTENTION), x + out + lse),
        (Policy(activations=RECOMPUTE), x),
        (Policy(activations=RECOMPUTE, offload=Offload.cpu), 0),
    ):
        assert kept_bytes(policy) == 8 * TOKENS * numbers, policy


def largest_tensor(policy):
    """Elements of the largest tensor that any operator makes, but for weights' gradients."""
    gpt, largest = model(policy, mlp_dim=400), 0
    weights = {p.shape for p in gpt.parameters()}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor) and {x.shape, x.shape[::-1]}.isdisjoint(weights):
                    largest = max(largest, x.numel())
            return result

    with Watch():
        gradients(gpt, *batch(1), Spans.causal(TOKENS))
    return largest


def test_in_tiles_no_intermediate_is_whole():
    whole = max(8 * 10, 4 * TOKENS, VOCABULARY) * TOKENS  # packed, the torch backend's scores, the loss's logits
    assert largest_tensor(Policy()) == 2 * 400 * TOKENS
    for activations in Activations:
        assert largest_tensor(Policy(activations=activations, mlp_tile=2)) <= whole


@pytest.mark.parametrize("activations", [KEEP, KEEP_ATTENTION])
def test_compiled_layers_have_no_graph_break_and_the_same_gradients(activations):
    """By Dynamo alone, as fullgraph=True; what inductor makes of the graphs is compared on GPUs."""
    policy = Policy(activations=activations)
    inputs, clock = (*batch(), Spans.causal(TOKENS)), layer.CompileClock()
    expected = gradients(model(policy), *inputs)
    assert clock.news() is None
    compiled = Policy(**{**vars(policy), "compiler": "eager"})
    found = gradients(model(compiled), *inputs)
    assert 0 < clock.news() < 60
    assert clock.news() is None
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_without_gradients_nothing_is_kept():
    for offload in Offload:
        gpt = model(Policy(activations=RECOMPUTE, recompute_layers=2, offload=offload))
        with torch.no_grad():
            loss = gpt(*batch(), Spans.causal(TOKENS))
        assert not loss.requires_grad
        if offload is Offload.cpu:
            assert gpt.run_layers.memory.newest is None


def test_host_memory_holds_two_parcels_on_the_device_and_gives_back_what_was_put():
    memory, parcels, n = HostMemory(torch.device("cpu")), [], 6
    tensors = [[torch.randn(3, 5), None, torch.randn(7).bfloat16()] for _ in range(n)]
    for one in tensors:
        parcels.append(memory.put([None if x is None else x.clone() for x in one]))
        assert [parcel.device is not None for parcel in parcels] == [False] * (len(parcels) - 1) + [True]
    while parcels:
        number, parcel = len(parcels) - 1, parcels.pop()
        found = memory.take(parcel)
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(found, tensors[number], strict=True))
        assert [one.device is not None for one in parcels] == [False] * (len(parcels) - 1) + [True] * bool(parcels)
    del parcel
    assert len(memory.free) == n
    again = [memory.put([torch.randn(15)]) for _ in range(n)]
    assert not memory.free  # smaller ones take their places
    del again
    memory.put([torch.zeros(10_000)])
    assert [buffer.numel() for buffer in memory.free] == [40_448]  # 40,000 bytes, aligned; those too small are gone


def test_a_forward_whose_backward_never_comes_leaves_the_host_memory_usable():
    policy = Policy(activations=RECOMPUTE, offload=Offload.cpu)
    gpt, inputs = model(policy), (*batch(), Spans.causal(TOKENS))
    expected = gradients(model(Policy()), *inputs)
    gpt(*inputs)
    for ours, theirs in zip(gradients(gpt, *inputs), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(gpt.run_layers.memory.free) == 3  # layers: none is lost


def test_pinned_memory_is_as_large_as_asked_and_is_given_up_with_its_last_view(monkeypatch):
    known, device = {}, torch.device("cuda", 0)

    def register(address, size, flags):
        known[address] = size
        return 0 if size < 2**20 else 2

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=known.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    x = torch.arange(70_001, dtype=torch.bfloat16).view(1, -1)
    copy = pinned_copy(device, x)
    assert torch.equal(copy, x)
    assert list(known.values()) == [140_002]  # not 2^18
    part = copy[0, 5:7]
    del copy
    gc.collect()
    assert len(known) == 1
    del part
    gc.collect()
    assert not known
    assert pinned_copy(device, torch.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"offload_optimizer=true: 0\.0 GiB of host memory cannot be pinned \(CUDA er"):
        pinned_copy(device, torch.zeros(2**20))


def test_tiles_cover_all_tokens_in_runs_as_equal_as_can_be():
    for n, tile in ((10, 3), (12, 4), (7, 7), (1, 5), (100, 33)):
        parts = list(tiles(n, tile))
        assert [i for part in parts for i in range(n)[part]] == list(range(n))
        assert max(part.stop - part.start for part in parts) <= tile
    assert [part.stop - part.start for part in tiles(100, 33)] == [25] * 4
    x = torch.arange(24).view(2, 12)
    assert torch.equal(in_tiles(lambda a, b: (a + 1,), 5, x, None)[0], x + 1)


def test_layers_share_an_input_only_where_they_are_recomputed():
    with pytest.raises(ValueError, match=r"train\.recompute_layers=2 with train\.activations=keep: nothing"):
        LoopConfig(recompute_layers=2)
    with pytest.raises(ValueError, match=r"train\.mlp_tile=-1: must be 0 or more"):
        LoopConfig(mlp_tile=-1)
    chosen = LoopConfig(activations=RECOMPUTE, recompute_layers=2, offload=Offload.cpu, mlp_tile=64)
    assert chosen.policy("cpu") == Policy(activations=RECOMPUTE, recompute_layers=2, offload=Offload.cpu, mlp_tile=64)
    assert chosen.policy("cuda").compiler == "inductor"
    assert LoopConfig(compile=False).policy("cuda").compiler is None
    assert LoopConfig(compile=True).policy("cpu").compiler == "inductor"


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", [None, "inductor"])
def test_every_policy_on_a_gpu_in_bf16_is_as_near_the_exact_gradients_as_keep(compiler):
    sizes = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "mlp_dim": 384}
    n, vocabulary = 1000, 256
    tokens, labels = torch.randint(vocabulary, (2, 1, n), generator=torch.Generator().manual_seed(0)).cuda()
    inputs = tokens, labels, torch.arange(n, device="cuda")[None], Spans.causal(n).to("cuda")

    def found(policy, dtype):
        gpt = GPT(ModelConfig(n_layers=4, **sizes), vocabulary, attention, policy, device="cuda", dtype=dtype)
        return [x.double() for x in gradients(gpt, *inputs)[1:]]

    def off(ours, theirs):
        squares = [((a - b).square().sum() / b.square().sum()).item() for a, b in zip(ours, theirs, strict=True)]
        return (sum(squares) / len(squares)) ** 0.5

    exact = found(Policy(), torch.float32)
    rounding = off(found(Policy(), torch.bfloat16), exact)
    shared = [(how, k) for how in Activations for k in (1, 3) if k == 1 or how is not KEEP]
    for (activations, k), offload, tile in itertools.product(shared, Offload, (0, 300)):
        where = {"offload": offload, "mlp_tile": tile, "compiler": compiler}
        policy = Policy(activations=activations, recompute_layers=k, **where)
        # fusing rounds less often, tiles once more
        assert off(found(policy, torch.bfloat16), exact) < 1.25 * rounding, policy
