"""Text from a model: prompts of any length over a ring of ranks, then a token at a time from the cache they share.

generator = Generator(model, mesh)
for tokens in generator(prompts, n=64, sampling=Sampling(temperature=0.8, top_p=0.95)):    # all ranks together
    ...                                                                # one token of each prompt, the same on all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.decode import Cache
from ringspan.parallel.mesh import Mesh
from ringspan.parallel.windows import Windowed
from ringspan.train.agree import from_rank_zero
from ringspan.train.engine import Dtype
from ringspan.train.model import GPT
from ringspan.train.pretrained import NO_CHECKPOINT, find_model, load_model, pick_tokenizer
from ringspan.train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from ringspan.train.huggingface_model import CausalModel  # which needs transformers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from its logits; the same seed draws the same tokens, on any number of ranks."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # of the likeliest so many tokens; 0: all
    top_p: float = 1.0  # of the likeliest ones that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0, and at most 1 (all tokens)")


class Generator:
    """Made and called by all ranks of a mesh together, which is one ring: every rank has the whole model."""

    def __init__(self, model: GPT | CausalModel, mesh: Mesh, backend: str = "auto") -> None:
        assert mesh.ring == mesh.world, "a batch is not shared out here, and heads stay together"
        self.model, self.group = model, mesh.ring_group
        self.attend = SequenceAttention(mesh, "balanced", backend)
        self.device = model.head.weight.device
        self.ahead = self.device.type == "cuda"  # it works on the next token while the host is told of this one

    @torch.inference_mode()
    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, vocabulary: int | None = None
    ) -> Iterator[Tensor]:
        """``n`` times one token of each prompt, int64 (prompts,) on the host; of the first ``vocabulary`` tokens, where
        a model has more than its tokenizer. ValueError: a prompt without tokens."""
        if not prompts or not all(prompts):
            raise ValueError("prompt: each needs at least one token")
        cache, logits = self._prefill(prompts, room=max(0, n - 1))
        yield from self.decode(cache, logits, n, sampling, vocabulary)

    @torch.inference_mode()
    def decode(
        self, cache: Cache, logits: Tensor, n: int, sampling: Sampling, vocabulary: int | None = None
    ) -> Iterator[Tensor]:
        """The same behind a cache that is filled, where ``logits`` are of what follows; it has room for n - 1."""
        draws = torch.Generator().manual_seed(sampling.seed)
        for number in range(n):
            tokens = pick(logits[:, :vocabulary], sampling, draws)
            dist.broadcast(tokens, group=self.group, group_src=0)  # the ranks' logits may differ in their last bits
            arrived, more = sent(tokens), number + 1 < n
            if more and self.ahead:
                logits = self._step(cache, tokens)
            yield arrived()
            if more and not self.ahead:
                logits = self._step(cache, tokens)

    def _prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Cache, Tensor]:
        """The prompts through the ring, shorter ones padded on the left; logits of what follows each."""
        length = max(map(len, prompts))
        starts = [length - len(prompt) for prompt in prompts]
        rows = torch.zeros(len(prompts), length, dtype=torch.int64)
        for row, start, prompt in zip(rows, starts, prompts, strict=True):
            row[start:] = torch.tensor(prompt)
        spans = Spans.causal(length).padded(starts, length)
        layout = self.attend.layout(spans)
        cache = Cache(layout, self.group, starts=starts, room=room, backend=self.attend.backend)
        mine = self.attend.local_positions(layout)
        ring = Windowed(self.attend, spans, self.device, layout)

        def attend(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
            cache.keep(k, v)
            return ring(q, k, v, **given)

        last = (mine == length - 1).nonzero().flatten().tolist()
        logits = self._logits(rows[:, mine.clamp(min=0)], mine - cache.starts[:, None], attend, *last)
        if not last:  # another rank has it
            logits.zero_()
        dist.all_reduce(logits, group=self.group)
        return cache, logits

    def _step(self, cache: Cache, tokens: Tensor) -> Tensor:
        """Logits of what follows one more token of each row."""
        position = cache.length - cache.starts[:, None]
        cache.begin()
        return self._logits(tokens[:, None], position, cache.attend)

    def _logits(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor], at: int = 0) -> Tensor:
        """(rows, vocabulary) of what follows token ``at``, for int64 (rows, tokens)."""
        ids, places = (x.to(self.device, non_blocking=True) for x in (tokens, positions.clamp(min=0)))
        logits = self.model.logits(ids, places, attend, at)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sent(tokens: Tensor) -> Callable[[], Tensor]:
    """Sends tokens to the host. What it returns gives them, and waits for them, but for nothing launched later."""
    host = tokens.to("cpu", non_blocking=True)  # into pinned memory
    event = torch.cuda.Event() if tokens.is_cuda else None
    if event is not None:
        event.record()

    def arrived() -> Tensor:
        if event is not None:
            event.synchronize()
        return host

    return arrived


def pick(logits: Tensor, sampling: Sampling, draws: torch.Generator) -> Tensor:
    """A token of each row of logits (rows, vocabulary): int64 (rows,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    shares, order = (logits / sampling.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        shares[:, sampling.top_k :] = 0
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= sampling.top_p * shares.sum(dim=-1, keepdim=True), 0)
    edges = shares.cumsum(dim=-1)
    drawn = torch.rand(len(logits), 1, generator=draws, dtype=torch.float64).to(logits.device, non_blocking=True)
    at = torch.searchsorted(edges, (drawn * edges[:, -1:]).to(edges.dtype), right=True)
    # A draw that rounds to the sum itself would come after the last of them
    return order.gather(1, at.minimum((shares > 0).sum(dim=-1, keepdim=True) - 1))[:, 0]


@dataclass(kw_only=True)
class GenerateConfig:
    checkpoint: str = ""  # the folder of a run, a checkpoint, a model or adapters of it, or a name on the hub
    prompt: list[str] = field(default_factory=list)  # what each text begins with
    prompt_file: str | None = None  # or a file that has it, of any length
    tokens: int = 128  # to write, at most
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # draw from the likeliest so many tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    seed: int = 0  # of the draws
    tokenizer: str | None = None  # bytes, or a tokenizer's file; null: the model's own
    dtype: Dtype = Dtype.auto  # of weights and cache
    compile: bool = False  # the layers of our GPT, by torch.compile: slow at first, then a token is fewer kernels
    nproc: int = 1  # processes to share prompts and cache; 0: one on each GPU here, 2 where there is none

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError(NO_CHECKPOINT)
        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError("prompt: give it or prompt_file, and not both")
        for name, least in (("tokens", 1), ("nproc", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)

    def texts(self) -> list[str]:
        """ValueError: the file cannot be read."""
        if self.prompt_file is None:
            return self.prompt
        try:
            return [Path(self.prompt_file).read_text(encoding="utf-8")]
        except (OSError, UnicodeError) as error:
            raise ValueError(f"prompt_file={self.prompt_file}: cannot be read as text ({error})") from error


class Written(NamedTuple):
    texts: list[str]  # behind each prompt
    prompt_tokens: int  # of the longest
    first_seconds: float  # until the first token
    tokens_per_second: float  # of all prompts together, behind the first


class Streamed:
    """The text of tokens that come one at a time; what the next may still change is held back: half of a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> None:
        self.decode, self.ids, self.text = decode, list(before), ""
        self.start, self.told = 0, len(before)  # tokenizers of words put no space before a first one: never begin there

    def add(self, token: int) -> str:
        """What is new."""
        self.ids.append(token)
        return self._new(whole=False)

    def end(self) -> str:
        return self._new(whole=True)

    def _new(self, whole: bool) -> str:
        known, now = self.decode(self.ids[self.start : self.told]), self.decode(self.ids[self.start :])
        if not whole and now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.start, self.told = self.told, len(self.ids)
        self.text += now[len(known) :]
        return now[len(known) :]


def generate(
    config: GenerateConfig, mesh: Mesh, device: torch.device, tell: Callable[[int, str], None] = lambda *_: None
) -> Written:
    """Write on from the prompts, all ranks together; rank 0 calls ``tell(prompt's number, new text)`` as it comes.

    ValueError: no such model, tokenizer or prompt.
    """
    found = from_rank_zero(lambda: find_model(Path(config.checkpoint)))
    name, texts = from_rank_zero(lambda: (pick_tokenizer(found, config.tokenizer), config.texts()))
    tokenizer = load_tokenizer(name)
    prompts = [ids.tolist() for ids in tokenizer.encode(texts)]
    attend = SequenceAttention(mesh, "balanced")
    length = max(map(len, prompts)) + config.tokens
    dtype = config.dtype.on(device.type)
    compiler = "inductor" if config.compile else None
    size = tokenizer.vocab_size
    model = load_model(found, attend, device, dtype, length, size, losses=False, compiler=compiler)
    streams = [Streamed(tokenizer.decode, prompt[-4:]) for prompt in prompts]
    going, first, written = set(range(len(prompts))), 0.0, 0
    tell = tell if mesh.ring_rank == 0 else lambda *_: None
    begun = time.perf_counter()
    for number, tokens in enumerate(Generator(model, mesh)(prompts, config.tokens, config.sampling(), size)):
        first = first or time.perf_counter() - begun
        going -= {row for row in going if tokens[row] == tokenizer.end_of_document}
        for row in sorted(going):
            tell(row, streams[row].add(int(tokens[row])))
        written = number
        if not going:
            break
    rest = time.perf_counter() - begun - first
    for row, stream in enumerate(streams):
        tell(row, stream.end())
    rate = written * len(prompts) / rest if written else 0.0
    return Written([stream.text for stream in streams], length - config.tokens, first, rate)
