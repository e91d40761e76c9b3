"""What benchmarks/generation.py measures of speed: tokens behind a cache, one query's attention, prefill.

Each function gives what it found by contestant. One that is not installed, or cannot run a case, is left out; one
that runs out of memory says so. All of it runs on a CPU as well, where its seconds mean nothing.
"""

import gc
import importlib
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import left_out
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from ringspan.kernels.attention import attention, attention_forward, pick_backend
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.decode import Cache
from ringspan.parallel.layout import Layout
from ringspan.parallel.mesh import Mesh
from ringspan.train.activations import Activations, Policy
from ringspan.train.generate import Generator, Sampling
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.pretrained import TILE

Found = dict[str, Any]
Decode = Callable[[], tuple[list[float], int | None]]  # when each token came; bytes that the cache took, on a GPU
UNMEASURED = 4  # first tokens of a run: allocations
LEFT_OUT = (ImportError, RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError)


class Shape(NamedTuple):
    """Of a model and a cache: ``length`` tokens a row, the last ``tokens`` of which are generated."""

    model: ModelConfig
    vocabulary: int
    batch: int
    length: int
    tokens: int

    @property
    def prompt(self) -> int:
        return self.length - self.tokens

    @property
    def cache_bytes(self) -> int:
        """By count: keys and values of all layers in bf16."""
        m = self.model
        return 2 * m.n_layers * self.batch * self.length * m.n_kv_heads * m.head_dim * 2


class Place(NamedTuple):
    device: torch.device
    mesh: Mesh  # of this process alone


def gpt(shape: Shape, place: Place, compiler: str | None = None) -> GPT:
    """As load_model makes it, of random weights."""
    policy = Policy(activations=Activations.recompute, mlp_tile=TILE, compiler=compiler)
    attend = SequenceAttention(place.mesh, "balanced")
    model = GPT(shape.model, shape.vocabulary, attend, policy, device=place.device, dtype=torch.bfloat16)
    model.expect(shape.length)
    return model.eval().requires_grad_(False)


# Tokens behind a cache


def decoding(shape: Shape, names: list[str], rounds: int, place: Place) -> dict[str, Found]:
    """Tokens/s by contestant, from the median over rounds of medians over tokens, and the memory its cache has taken.
    A round fills each one's cache anew: no two of 64 GiB fit a GPU."""
    running: dict[str, Decode] = {}
    for name in names:
        try:
            running[name] = DECODERS[name](shape, place)
        except LEFT_OUT as reason:
            left_out(name, reason)
    seconds: dict[str, list[float]] = {name: [] for name in running}
    found: dict[str, Found] = {}
    for _ in range(rounds):
        for name in random.sample(list(running), len(running)):
            try:
                times, cache_bytes = running[name]()
                each = [b - a for a, b in itertools.pairwise(times)]
                seconds[name].append(statistics.median(each[UNMEASURED:]))
                step = statistics.median(seconds[name])
                found[name] = {"value": shape.batch / step, "unit": "tokens/s", "step_seconds": step}
                found[name] |= {"cache_bytes": cache_bytes}
            except torch.OutOfMemoryError:
                found[name] = {"failed": "out of memory"}
                del running[name]
            except LEFT_OUT as reason:
                left_out(name, reason)
                del running[name]
            emptied(place.device)
    return found


def fill(keep: Callable[[Tensor, Tensor], Any], shape: Shape, device: torch.device, *, heads_first: bool) -> int | None:
    """Hands random keys and values of the prompts, (B, S, K, D) or heads first, to ``keep``, layer by layer. The bytes
    it took for them, on a GPU."""
    m, before = shape.model, allocated(device)
    sizes = (m.n_kv_heads, shape.prompt) if heads_first else (shape.prompt, m.n_kv_heads)
    for _ in range(m.n_layers):
        keep(*torch.randn(2, shape.batch, *sizes, m.head_dim, device=device, dtype=torch.bfloat16))
    return None if before is None else (allocated(device) or 0) - before


def ours(shape: Shape, place: Place, compiler: str | None = None) -> Decode:
    generator = Generator(gpt(shape, place, compiler), place.mesh)

    def run() -> tuple[list[float], int | None]:
        layout = Layout.contiguous(shape.prompt, 1)
        cache = Cache(layout, place.mesh.ring_group, starts=[0] * shape.batch, room=shape.tokens)
        cache_bytes = fill(cache.keep, shape, place.device, heads_first=False)
        logits = torch.randn(shape.batch, shape.vocabulary, device=place.device)
        tokens = generator.decode(cache, logits, shape.tokens, Sampling())
        return [time.perf_counter() for _ in tokens], cache_bytes

    return run


class Clock:
    """When each token came, to Transformers a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def huggingface(shape: Shape, place: Place, static: bool) -> Decode:
    """Its generate() with a Llama of the same sizes, which has no norms of queries and keys."""
    transformers = importlib.import_module("transformers")
    m, device = shape.model, place.device
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=m.dim,
        intermediate_size=m.mlp_dim,
        num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads,
        num_key_value_heads=m.n_kv_heads,
        head_dim=m.head_dim,
        max_position_embeddings=shape.length,
        eos_token_id=None,
        pad_token_id=0,
    )
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def run() -> tuple[list[float], int | None]:
        static_cache = partial(transformers.StaticCache, config=config, max_cache_len=shape.length)
        cache, layer = static_cache() if static else transformers.DynamicCache(), itertools.count()
        cache_bytes = fill(lambda k, v: cache.update(k, v, next(layer)), shape, device, heads_first=True)
        clock, ids = Clock(), torch.zeros(shape.batch, shape.prompt + 1, dtype=torch.int64, device=device)
        settings = {"max_new_tokens": shape.tokens, "do_sample": False, "disable_compile": True}
        # Of its prompt the last token has no keys yet
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock, **settings)
        return clock.times[1:], cache_bytes  # the first is the prompt

    return run


DECODERS: dict[str, Callable[[Shape, Place], Decode]] = {
    "ours": ours,
    "ours, compiled": partial(ours, compiler="inductor"),
    "hf dynamic": partial(huggingface, static=False),
    "hf static": partial(huggingface, static=True),
}


# One query against many keys


class Sizes(NamedTuple):
    batch: int
    keys: int
    heads: int
    kv_heads: int
    dim: int


def one_query(sizes: Sizes, names: list[str], rounds: int, device: torch.device) -> dict[str, Found]:
    """GB/s of keys and values by contestant; `copy`: of what a copy of them reads and writes."""
    q, k, v = (
        torch.randn(sizes.batch, n, h, sizes.dim, device=device, dtype=torch.bfloat16)
        for n, h in ((1, sizes.heads), (sizes.keys, sizes.kv_heads), (sizes.keys, sizes.kv_heads))
    )
    n_bytes = 2 * k.numel() * k.element_size()
    running: dict[str, Callable[[], Any]] = {}
    for name in ["copy", *names]:
        try:
            running[name] = QUERIES[name](q, k, v)
            out = running[name]()
            if name != "copy" and not agrees(out, running["ours"]()):
                print(f"  {name} differs from ours")
        except LEFT_OUT as reason:
            running.pop(name, None)
            left_out(name, reason)
    taken = seconds_in_turn(running, rounds, device)
    rates = {name: n_bytes * (2 if name == "copy" else 1) / seconds for name, seconds in taken.items()}
    return {
        name: {"value": rate * 1e-9, "unit": "GB/s", "of_copy": rate / rates["copy"]} for name, rate in rates.items()
    }


def agrees(out: Tensor, mine: Tensor) -> bool:
    return bool((out.float().reshape(mine.shape) - mine.float()).norm() < 0.01 * mine.float().norm())


def our_query(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    keys, scale, backend = k.shape[1], q.shape[3] ** -0.5, pick_backend("auto", q, k, v)
    mask = plan(Spans.full(1, keys), keys, q.device)
    return lambda: attention_forward(q, k, v, mask, scale=scale, backend=backend)[0]


def copied(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    into = torch.empty_like(k), torch.empty_like(v)
    return lambda: (into[0].copy_(k), into[1].copy_(v))


def sdpa_query(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend) -> Callable[[], Tensor]:
    """Its kernel where there is a GPU; on a CPU what there is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run() -> Tensor:
        with sdpa_kernel([kernel] if q.is_cuda else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def flex_query(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    flex_attention = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    compiled = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return lambda: compiled(q, k, v, enable_gqa=True)


def flash_query(q: Tensor, k: Tensor, v: Tensor, package: str) -> Callable[[], Tensor]:
    run = importlib.import_module(package).flash_attn_func

    def first() -> Tensor:
        out = run(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return first


QUERIES: dict[str, Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]] = {
    "copy": copied,
    "ours": our_query,
    "cudnn": partial(sdpa_query, kernel=SDPBackend.CUDNN_ATTENTION),
    "fa2": partial(sdpa_query, kernel=SDPBackend.FLASH_ATTENTION),
    "fa3": partial(flash_query, package="flash_attn_interface"),
    "fa4": partial(flash_query, package="flash_attn.cute"),
    "flex": flex_query,
}


# Prefill


class Timed(SequenceAttention):
    """Notes how long attention takes."""

    seconds = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, **given: Any) -> Tensor:
        started = now(q.device)
        out = super().__call__(q, k, v, plan, **given)
        self.seconds += now(q.device) - started
        return out


def prefill(shape: Shape, rounds: int, place: Place) -> dict[str, Found]:
    """TFLOP/s of attention in a prefill (ours), and of its kernel alone on such shapes; seconds of all of it."""
    m, n, device = shape.model, shape.length, place.device
    flops = 4.0 * m.head_dim * m.n_heads * shape.batch * n * (n + 1) / 2
    generator = Generator(gpt(shape, place), place.mesh)
    generator.attend = timed = Timed(place.mesh, "balanced")
    q, k, v = (
        torch.randn(shape.batch, n, heads, m.head_dim, device=device, dtype=torch.bfloat16)
        for heads in (m.n_heads, m.n_kv_heads, m.n_kv_heads)
    )
    mask = plan(Spans.causal(n), n, device)
    next(generator([[1] * 300], 1, Sampling()))  # compiles
    within, alone, whole = [], [], []
    prompts = torch.randint(shape.vocabulary, (shape.batch, n)).tolist()
    for _ in range(rounds):
        started = now(device)
        attention(q, k, v, mask)
        alone.append(now(device) - started)
        timed.seconds, started = 0.0, now(device)
        next(generator(prompts, 1, Sampling()))
        whole.append(now(device) - started)
        within.append(timed.seconds / m.n_layers)
        emptied(device)
    rates = [{"value": 1e-12 * flops / statistics.median(x), "unit": "TFLOP/s"} for x in (within, alone)]
    return {"ours": {**rates[0], "seconds": statistics.median(whole)}, "kernel alone": rates[1]}


# Helpers


def allocated(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def emptied(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """When all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_for(small: bool) -> torch.device:
    """The GPU; where there is none the CPU, for ``small`` cases alone."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not small:
        sys.exit("these cases are for a GPU, and there is none; --small runs anywhere")
    return torch.device("cpu")


def seconds_in_turn(running: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """By contestant: the median of the rounds, each of which has all of them in another order."""
    taken: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name in random.sample(list(running), len(running)):
            taken[name].append(seconds_of(running[name], device))
    return {name: statistics.median(each) for name, each in taken.items()}


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Median of a call, the L2 cache emptied before each."""
    if device.type == "cuda":
        return do_bench(run, warmup=10, rep=50, return_mode="median") * 1e-3
    started = now(device)
    run()
    return now(device) - started
