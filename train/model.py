"""The GPT: pre-norm blocks of grouped-query attention with rotary positions and SwiGLU.

Attention itself is a callable the model is given: it sees local shards of queries, keys and values, and a plan that
says what they may attend to. So the same model runs on one device and on any mesh.

Shapes: B rows, S tokens of this rank, H query heads, K key-value heads, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringspan.parallel.attention import SequenceAttention
from ringspan.train.activations import Attend as LocalAttend
from ringspan.train.activations import Layers, Policy
from ringspan.train.footprint import Footprint
from ringspan.train.layer import LayerWeights, Sizes
from ringspan.train.loss import cross_entropy_sum, token_losses
from ringspan.train.rotary import Rope, Scaling

if TYPE_CHECKING:
    from ringspan.train.config import TrainConfig  # which needs the classes here

HEAD_STD = 0.02  # first logits are near 0, so the first loss is near ln(vocabulary); a tied embedding has it too
# Of what the first norm makes of it anyway: 80 steps of the tiny model end 0.2 nats lower than with 0.02
EMBEDDING_STD = 1.0

# (q (B,S,H,D), k (B,S,K,D), v, ring_plan) -> (B,S,H,D)
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
Make = Callable[[torch.device, torch.dtype], nn.Module]


class ModelSizes(NamedTuple):
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_dim: int


@dataclass(kw_only=True)
class AnyModel(ABC):
    """What the loop asks of a model before there is one: `ModelConfig`, or `HuggingFaceConfig`.

    The model itself is called as `GPT.forward` is, and told of its rows by ``expect``.
    """

    @property
    @abstractmethod
    def sizes(self) -> ModelSizes: ...

    @abstractmethod
    def vocabulary(self, n_tokens: int) -> int:
        """Rows of the head, for a tokenizer of so many tokens. ValueError: there are fewer."""

    @abstractmethod
    def parameters(self, vocab_size: int) -> int:
        """Those that are trained, which a checkpoint has."""

    @abstractmethod
    def matmul_parameters(self, vocab_size: int) -> int:
        """Those that a token is multiplied by."""

    @property
    def frozen_parameters(self) -> int:
        """Of those, the ones that are not trained: the head's among them, or there are none."""
        return 0

    def all_parameters(self, vocab_size: int) -> int:
        """Trained or not."""
        return self.parameters(vocab_size)

    def largest_parameter(self, vocab_size: int) -> int:
        return vocab_size * self.sizes.dim

    def layer_matrices(self) -> list[tuple[int, int]]:
        """(n_out, n_in) of a layer's matrix products, where Muon can move them."""
        return []

    def footprint(self, policy: Policy, element: int) -> Footprint | None:
        """Of its activations, of so many bytes an element; None: train/memory.py counts them."""
        return None

    def takes(self, policy: Policy) -> bool:
        """Whether its layers can keep what the policy says, and where."""
        return True

    @abstractmethod
    def attention(self, *args: Any, **kwargs: Any) -> SequenceAttention:
        """Of its layers; arguments are those of `SequenceAttention`."""

    @abstractmethod
    def maker(self, config: "TrainConfig", vocab_size: int, attend: SequenceAttention) -> Make:
        """What makes it on a device, under ZeRO-3 already sharded; all ranks together. ValueError: no such weights."""

    @abstractmethod
    def check(self, config: "TrainConfig") -> None:
        """ValueError: there is no such model, or the run asks for what it cannot do."""


@dataclass(kw_only=True)
class ModelConfig(AnyModel):
    dim: int = 256  # width of the stream that layers read and add to
    n_layers: int = 4  # each is attention and SwiGLU
    n_heads: int = 4  # query heads
    n_kv_heads: int = 2  # key-value heads, each shared by n_heads / n_kv_heads query heads
    head_dim: int = 64  # of queries, keys and values; even
    mlp_dim: int = 704  # width of SwiGLU's gate and of its value
    rope_base: float = 500_000.0  # wavelengths of the rotary positions go from 2 pi to 2 pi times this, in tokens
    rope_scaling: Scaling = Scaling.none  # of rows longer than rope_trained
    rope_trained: int = 0  # tokens; rows up to this length have plain positions, longer ones are scaled by how much
    qk_norm: bool = True  # RMSNorm of every query and key before they are rotated
    tie_embeddings: bool = False  # the head's matrix is the embedding
    norm_eps: float = 1e-5  # added to the mean square in every RMSNorm

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be 1 or more")
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim}: rotary positions turn pairs, so it must be even; "
                f"the nearest is {self.head_dim + 1}"
            )
        if self.n_heads % self.n_kv_heads:
            divisors = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.n_kv_heads))
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads}: must divide model.n_heads={self.n_heads}; "
                f"the nearest is {nearest}"
            )
        if self.rope_base <= 1:
            raise ValueError(f"model.rope_base={self.rope_base}: must be above 1; 10000 to 500000 are usual")
        if (self.rope_scaling is Scaling.none) != (self.rope_trained == 0) or self.rope_trained < 0:
            raise ValueError(
                f"model.rope_trained={self.rope_trained} with model.rope_scaling={self.rope_scaling.value}: a scaling "
                "needs the length that it starts from, in tokens, and without one it must be 0"
            )
        if self.rope_scaling is Scaling.ntk and self.head_dim == 2:
            raise ValueError("model.rope_scaling=ntk: needs model.head_dim of 4 or more, and it is 2")
        if self.norm_eps <= 0:
            raise ValueError(f"model.norm_eps={self.norm_eps}: must be above 0; 1e-5 is usual")

    def rope(self, seq_len: int, base: float | None = None) -> Rope:
        """Rotary positions for rows of seq_len tokens; ``base`` takes rope_base's place."""
        factor = max(1.0, seq_len / self.rope_trained) if self.rope_trained else 1.0
        return Rope(self.head_dim, base or self.rope_base, self.rope_scaling, factor, self.rope_trained)

    def layer_matrices(self) -> list[tuple[int, int]]:
        """(n_out, n_in) of a layer's matrix products: queries, keys, values, out; gate, value, out."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = [(q, self.dim), (kv, self.dim), (kv, self.dim), (self.dim, q)]
        return [*attention, (self.mlp_dim, self.dim), (self.mlp_dim, self.dim), (self.dim, self.mlp_dim)]

    def matmul_parameters(self, vocab_size: int) -> int:
        """Parameters in matrix products, the head's included; looking up an embedding multiplies nothing."""
        return self.n_layers * sum(n * m for n, m in self.layer_matrices()) + vocab_size * self.dim

    def parameters(self, vocab_size: int) -> int:
        """All but the norms', which are a thousandth of them."""
        return self.matmul_parameters(vocab_size) + (0 if self.tie_embeddings else vocab_size * self.dim)

    @property
    def sizes(self) -> ModelSizes:
        return ModelSizes(self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim, self.mlp_dim)

    def vocabulary(self, n_tokens: int) -> int:
        return padded_vocabulary(n_tokens)

    def attention(self, *args: Any, **kwargs: Any) -> SequenceAttention:
        return SequenceAttention(*args, **kwargs)

    def maker(self, config: "TrainConfig", vocab_size: int, attend: SequenceAttention) -> Make:
        def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
            drawn: dict[str, Any] = {"seed": config.seed, "device": device, "dtype": dtype}
            policy = config.train.policy(device.type)
            return GPT(self, vocab_size, attend, policy, z_loss=config.train.z_loss, **drawn)

        return make

    def check(self, config: "TrainConfig") -> None:
        """Its own rules are all there are."""


def padded_vocabulary(n_tokens: int) -> int:
    """Rows of the embedding and of the head: matrix products are quickest at multiples of 64."""
    return -(-n_tokens // 64) * 64


class Weights:
    """Draws a model's matrices: from a seed alone, so every rank of every mesh starts from the same numbers.

    Values are drawn in fp32 on ``device`` (they depend on its type, as torch's generators do) and rounded once.
    """

    def __init__(self, seed: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, rows: int, columns: int, std: float) -> nn.Parameter:
        drawn = torch.normal(0.0, std, (rows, columns), generator=self.generator, device=self.device)
        return nn.Parameter(drawn.to(self.dtype))

    def ones(self, n: int) -> nn.Parameter:
        return nn.Parameter(torch.ones(n, device=self.device, dtype=self.dtype))


class Matrix(nn.Module):
    """The weight of a matrix product, (n_out, n_in), or of several of the same input: ``n_out`` has each one's."""

    def __init__(self, n_in: int, n_out: Sequence[int], weights: Weights, scale: float = 1.0) -> None:
        super().__init__()
        self.shapes = [(n, n_in) for n in n_out]
        self.weight = weights.normal(sum(n_out), n_in, scale * n_in**-0.5)


class Norm(nn.Module):
    """RMSNorm, computed in fp32; within a layer its weight alone counts."""

    def __init__(self, n: int, eps: float, weights: Weights) -> None:
        super().__init__()
        self.weight, self.eps = weights.ones(n), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.qkv = Matrix(config.dim, (q, kv, kv), weights)
        self.out = Matrix(q, (config.dim,), weights, scale=residual_scale(config))
        self.q_norm = Norm(config.head_dim, config.norm_eps, weights) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.norm_eps, weights) if config.qk_norm else None


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.gate_and_value = Matrix(config.dim, (config.mlp_dim, config.mlp_dim), weights)
        self.out = Matrix(config.mlp_dim, (config.dim,), weights, scale=residual_scale(config))


class Layer(nn.Module):
    """The parameters of a layer. What is computed with them stands in train/layer.py; ``run`` does it."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        super().__init__()
        self.attention_norm = Norm(config.dim, config.norm_eps, weights)
        self.attention = Attention(config, weights)
        self.mlp_norm = Norm(config.dim, config.norm_eps, weights)
        self.mlp = SwiGLU(config, weights)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, run: Callable[..., Tensor]) -> Tensor:
        attention, mlp = self.attention, self.mlp
        weights = LayerWeights(
            self.attention_norm.weight,
            attention.qkv.weight,
            None if attention.q_norm is None else attention.q_norm.weight,
            None if attention.k_norm is None else attention.k_norm.weight,
            attention.out.weight,
            self.mlp_norm.weight,
            mlp.gate_and_value.weight,
            mlp.out.weight,
        )
        return run(weights, x, cos, sin)


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, dim: int, weights: Weights, std: float) -> None:
        super().__init__()
        self.weight = weights.normal(vocab_size, dim, std)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Head(nn.Module):
    """Vocabulary projection and loss in one. It owns its weight, or shares the embedding's."""

    def __init__(self, weight: nn.Parameter, z_loss: float) -> None:
        super().__init__()
        self.weight, self.z_loss = weight, z_loss

    def forward(self, hidden: Tensor, labels: Tensor, each: bool) -> Any:
        if each:
            return token_losses(hidden, self.weight, labels)
        return cross_entropy_sum(hidden, self.weight, labels, z_loss=self.z_loss)


class GPT(nn.Module):
    """A GPT that returns its loss.

    ``attend`` is attention over local shards; ``policy`` says what layers keep for backward. Parameters are made on
    ``device`` in ``dtype``, the same for the same ``seed`` on every rank; under ``deepspeed.zero.Init`` each is sharded
    as soon as it is drawn, so that no device ever holds the whole model.
    """

    gathered_at_once: ClassVar = [f"{Layer.__module__}.{Layer.__qualname__}"]  # by ZeRO-3

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        attend: Attend,
        policy: Policy | None = None,
        *,
        z_loss: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weights = Weights(seed, device, dtype)
        self.config, self.attend = config, attend
        self.expect(0)
        sizes = Sizes(config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps)
        self.run_layers = Layers(policy or Policy(), sizes, torch.device(device))
        tied = config.tie_embeddings
        self.embedding = Embedding(vocab_size, config.dim, weights, HEAD_STD if tied else EMBEDDING_STD)
        self.layers = nn.ModuleList(Layer(config, weights) for _ in range(config.n_layers))
        self.norm = Norm(config.dim, config.norm_eps, weights)
        head = self.embedding.weight if tied else weights.normal(vocab_size, config.dim, HEAD_STD)
        self.head = Head(head, z_loss)

    def matrices(self) -> dict[str, list[tuple[int, int]]]:
        """(n_out, n_in) of each matrix product that a parameter holds, by its name: those of the layers."""
        return {f"{name}.weight": one.shapes for name, one in self.named_modules() if isinstance(one, Matrix)}

    def expect(self, seq_len: int, rope_base: float | None = None) -> None:
        """From here on rows have so many tokens."""
        self.rope = self.config.rope(seq_len, rope_base)

    def forward(self, tokens: Tensor, labels: Tensor, positions: Tensor, ring_plan: Any, each: bool = False) -> Any:
        """Sum of this rank's token losses, an fp32 scalar (fp64 for fp64); with ``each``, what `token_losses` gives.

        tokens, labels and positions are int64 (B, S): this rank's shard. Labels are already shifted, -100 where a
        token carries no loss; positions restart with each document. ``ring_plan`` is what ``attend`` needs.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attend(q, k, v, ring_plan)

        return self.head(self.hidden(tokens, positions, attend), labels, each)

    def hidden(self, tokens: Tensor, positions: Tensor, attend: LocalAttend) -> Tensor:
        """(B, S, dim): what the head multiplies. ``attend(q, k, v)`` is called by each layer in turn."""
        x = self.embedding(tokens)
        cos, sin = self.rope(positions, x.dtype)
        return self.norm(self.run_layers(self.layers, x, cos, sin, attend))

    def logits(self, tokens: Tensor, positions: Tensor, attend: LocalAttend, at: int) -> Tensor:
        """(B, vocabulary): of what follows token ``at`` of each row."""
        return self.hidden(tokens, positions, attend)[:, at] @ self.head.weight.T


def residual_scale(config: ModelConfig) -> float:
    """So that the sum of all branches starts with the variance of one, whatever the depth (GPT-2)."""
    return (2 * config.n_layers) ** -0.5
