import math

import pytest
import torch
from torch.nn.functional import cross_entropy, silu

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.train.model import GPT, ModelConfig, padded_vocabulary
from ringspan.train.rotary import Rope

VOCABULARY = 61


def test_a_vocabulary_is_padded_to_the_next_multiple_of_64():
    assert [padded_vocabulary(n) for n in (1, 63, 64, 65, 50257)] == [64, 64, 64, 128, 50304]


def config(**changes):
    sizes = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 10, "mlp_dim": 18}
    return ModelConfig(**{**sizes, **changes})


def batch(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths[0])
    tokens, labels = torch.randint(VOCABULARY, (2, len(lengths), n), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = -100
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return tokens, labels, positions, Spans.packed(lengths)


def model(config, dtype=torch.float64, **kwargs):
    return GPT(config, VOCABULARY, attention, dtype=dtype, **kwargs)


def plain_gpt(c, p, tokens, labels, positions, documents):
    """The same GPT by its definition: whole score matrices, rotary positions as complex numbers, no modules."""
    turn = torch.polar(
        torch.ones(()).double(),
        positions[..., None] * c.rope_base ** (-torch.arange(c.head_dim // 2).double() * 2 / c.head_dim),
    )[:, :, None]

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def rotated(x):
        half = c.head_dim // 2
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((z.real, z.imag), -1)

    i = torch.arange(tokens.shape[1])
    seen = (documents[:, :, None] == documents[:, None]) & (i[:, None] >= i)
    x = p["embedding.weight"][tokens]
    for layer in range(c.n_layers):
        w = {name.split(".", 2)[2]: value for name, value in p.items() if name.startswith(f"layers.{layer}.")}
        y = norm(x, w["attention_norm.weight"])
        qkv = torch.einsum("bsd,ed->bse", y, w["attention.qkv.weight"])
        q, k, v = qkv.split([n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)], -1)
        q, k, v = (z.reshape(*z.shape[:2], -1, c.head_dim) for z in (q, k, v))
        if c.qk_norm:
            q, k = norm(q, w["attention.q_norm.weight"]), norm(k, w["attention.k_norm.weight"])
        q, k = rotated(q), rotated(k)
        k, v = (z.repeat_interleave(c.n_heads // c.n_kv_heads, 2) for z in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(c.head_dim)
        weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
        out = torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)
        x = x + out @ w["attention.out.weight"].T
        y = norm(x, w["mlp_norm.weight"]) @ w["mlp.gate_and_value.weight"].T
        x = x + (silu(y[..., : c.mlp_dim]) * y[..., c.mlp_dim :]) @ w["mlp.out.weight"].T
    logits = norm(x, p["norm.weight"]) @ p["head.weight"].T
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False, "rope_base": 100.0}, {"tie_embeddings": True, "n_kv_heads": 1}, {"norm_eps": 0.1}],
)
def test_loss_and_all_gradients_equal_a_plain_gpt(changes):
    c = config(**changes)
    lengths = [[5, 1, 17], [23]]
    gpt, (tokens, labels, positions, spans) = model(c), batch(lengths)
    loss = gpt(tokens, labels, positions, spans)
    loss.backward()
    documents = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths])
    p = {name: value.detach().clone().requires_grad_() for name, value in gpt.named_parameters()}
    expected = plain_gpt(c, {"head.weight": p["embedding.weight"], **p}, tokens, labels, positions, documents)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, value in gpt.named_parameters():
        torch.testing.assert_close(value.grad, p[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_weights_come_from_the_seed_alone():
    same, other = model(config(), seed=3), model(config(), seed=4)
    torch.rand(5)  # the global generator plays no part
    for a, b in zip(model(config(), seed=3).parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(same.embedding.weight, other.embedding.weight)


def test_weights_have_the_sizes_that_keep_variance():
    gpt = model(config(dim=256, mlp_dim=512, n_layers=8, n_heads=4, head_dim=64))
    layer = gpt.layers[0]
    for weight, std in (
        (layer.attention.qkv.weight, 1 / 16),
        (layer.mlp.out.weight, 512**-0.5 / 4),  # a residual branch: 1 / sqrt(2 * 8) of the rest
        (layer.attention.out.weight, 1 / 16 / 4),
        (gpt.head.weight, 0.02),
        (gpt.embedding.weight, 1.0),
        (model(config(tie_embeddings=True)).embedding.weight, 0.02),
    ):
        assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel())


def test_first_loss_is_near_that_of_guessing():
    gpt = model(config())
    tokens, labels, positions, spans = batch([[200]])
    with torch.no_grad():
        loss = gpt(tokens, labels, positions, spans) / (labels >= 0).sum()
    assert abs(loss.item() - math.log(VOCABULARY)) < 0.02


@pytest.mark.parametrize("tied", [False, True])
def test_matmul_parameters_count_every_matrix_but_the_look_up(tied):
    c = config(tie_embeddings=tied)
    gpt = model(c)
    matrices = sum(
        p.numel() for name, p in gpt.named_parameters() if p.dim() == 2 and (tied or "embedding" not in name)
    )
    assert c.matmul_parameters(VOCABULARY) == matrices


def test_bf16_model_is_near_the_fp64_one():
    inputs = batch([[33, 60]])
    exact = model(config())(*inputs)
    rounded = model(config(), dtype=torch.bfloat16)(*inputs)
    assert rounded.dtype == torch.float32
    n = (inputs[1] >= 0).sum()
    assert abs(rounded - exact) / n < 8 * torch.finfo(torch.bfloat16).eps  # logits are of size 0.1


def test_rotary_positions_are_exact_at_a_million_tokens():
    cos, sin = (x[0, 0, 0] for x in Rope(8, 10_000.0)(torch.tensor([[1_000_000]]), torch.float32))
    angles = [1e6 * 10_000.0 ** (-i / 8) for i in range(0, 8, 2)]
    torch.testing.assert_close(cos, torch.tensor([math.cos(x) for x in angles] * 2), rtol=0, atol=1e-7)
    signed = [sign * math.sin(x) for sign in (-1, 1) for x in angles]
    torch.testing.assert_close(sin, torch.tensor(signed), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, r"model\.dim=0: must be 1 or more"),
        ({"n_layers": -1}, r"model\.n_layers=-1"),
        ({"head_dim": 7}, r"model\.head_dim=7: .* 8$"),
        ({"head_dim": 1}, r"model\.head_dim=1: .* 2$"),
        ({"n_kv_heads": 3}, r"model\.n_kv_heads=3: must divide model\.n_heads=4; the nearest is 2"),
        ({"n_kv_heads": 9}, r"nearest is 4"),
        ({"rope_base": 1.0}, r"model\.rope_base=1\.0"),
        ({"norm_eps": 0.0}, r"model\.norm_eps=0\.0"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
