"""Hugging Face's models on our attention: like eager, on one process and sharded over ranks. Tiny, drawn at random."""

import pytest
import torch
import torch.distributed as dist
from test_spans import matrix
from torch import Tensor

from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

from ringspan.train.transformers_attention import NAME, CausalMask, register, shard_batch  # noqa: E402

SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
GEMMA = {**SIZES, "head_dim": 256, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": ("LlamaConfig", SIZES),
    "qwen3": ("Qwen3Config", SIZES),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 7}),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    # All experts for every token: else a rounding may send a token elsewhere
    "gpt_oss": ("GptOssConfig", {**SIZES, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 2}),
}
WITHOUT_SDPA = ("gemma2", "gpt_oss")  # softcap, sinks


def model_of(name: str, dtype: torch.dtype = torch.float32) -> "transformers.PreTrainedModel":
    register()
    config_class, fields = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for parameter in model.parameters():  # sinks are 1-D too: norms of another size do no harm
        torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.7)
    return model.train()


def tokens(rows: int = 2, n: int = 45) -> Tensor:
    return torch.randint(1, 101, (rows, n), generator=torch.Generator().manual_seed(1))


def run(model, implementation: str, ids: Tensor, **given) -> tuple[Tensor, list[Tensor]]:
    """Logits and gradients of a function of those that are no padding."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(ids, **given).logits.float()
    kept = logits[given["attention_mask"].bool()] if "attention_mask" in given else logits
    kept.square().sum().backward()
    return kept.detach(), [p.grad.float() for p in model.parameters() if p.grad is not None]


def farthest(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Of logits, and of each gradient over its largest."""
    grads = ((x - y).abs().max() / y.abs().max() for x, y in zip(found[1], expected[1], strict=True))
    return (found[0] - expected[0]).abs().max().item(), max(grads).item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name):
    """Rows padded on the left and on the right. Twice what SDPA is off by, in maxima over 5,000 logits, is no more
    than chance; where there is no SDPA, 32 eps, which all the others stay below as well."""
    ids = tokens()
    padded = torch.ones_like(ids)
    padded[0, :5], padded[1, -6:] = 0, 0
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(name, dtype)
        eager = run(model, "eager", ids, attention_mask=padded)
        ours = farthest(run(model, NAME, ids, attention_mask=padded), eager)
        eps = torch.finfo(dtype).eps
        assert ours[0] <= 32 * eps * eager[0].abs().max()
        assert ours[1] <= 32 * eps
        if name not in WITHOUT_SDPA:
            theirs = farthest(run(model, "sdpa", ids, attention_mask=padded), eager)
            assert ours[0] <= 2 * theirs[0]
        print(dtype, name, ours, theirs if name not in WITHOUT_SDPA else "")


def test_documents_end_to_end_are_told_by_their_positions():
    model, ids = model_of("mistral"), tokens(1, 40)
    positions = torch.cat([torch.arange(n) for n in (17, 3, 20)])[None]
    eager, ours = (run(model, name, ids, position_ids=positions) for name in ("eager", NAME))
    assert farthest(ours, eager)[0] <= 32 * torch.finfo(torch.float32).eps * eager[0].abs().max()
    plain = run(model, NAME, ids)
    assert (plain[0] - ours[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
def test_generation_with_a_cache_gives_the_tokens_of_eager(name):
    model, ids = model_of(name).eval(), tokens(2, 21)
    padded = torch.ones_like(ids)
    padded[0, :6] = 0
    found = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        found.append(model.generate(ids, attention_mask=padded, max_new_tokens=12, do_sample=False))
    assert torch.equal(*found)
    assert found[0].shape == (2, 33)


def padding(keys: int) -> Tensor:
    padded = torch.ones(2, keys, dtype=torch.bool)
    padded[0, :4], padded[1, -3:] = False, False
    return padded


CASES = {
    "causal": {},
    "padding": {"attention_mask": padding(19)},
    "padding of another length": {"attention_mask": padding(25)},
    "less than the cache": {"attention_mask": torch.ones(2, 12, dtype=torch.bool), "q_length": 4, "q_offset": 9},
    "after a cache": {"q_length": 3, "q_offset": 16},
    "one query": {"q_length": 1, "q_offset": 18, "attention_mask": padding(19)},
    "a cache with room": {"q_length": 3, "q_offset": 5},
    "a cache that has dropped keys": {"q_length": 2, "q_offset": 21, "kv_offset": 4, "kv_length": 19},
    "window": {"mask_function": masking_utils.sliding_window_causal_mask_function(5), "local_size": 5},
    "long window": {"mask_function": masking_utils.sliding_window_causal_mask_function(50), "local_size": 50},
    "chunks": {
        "mask_function": masking_utils.chunked_causal_mask_function(7, torch.zeros(2, dtype=torch.int64)),
        "local_size": 7,
    },
    "all": {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_causal_skip": False},
    "blocks": {
        "mask_function": masking_utils.or_masks(
            masking_utils.causal_mask_function,
            lambda b, h, q, k: (q >= 4) & (q < 9) & (k >= 4) & (k < 9),
        ),
        "allow_is_causal_skip": False,
    },
}


@pytest.mark.parametrize("block", [2**26, 40])
@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_transformers(name, block, monkeypatch):
    monkeypatch.setattr("ringspan.train.transformers_attention.PAIRS_OF_A_BLOCK", block)
    given = {"batch_size": 2, "q_length": 19, "kv_length": 19, "device": "cpu", **CASES[name]}
    expected = masking_utils.sdpa_mask(**{**given, "allow_is_causal_skip": False})[:, 0]
    plan = CausalMask(**given).plan
    assert torch.equal(matrix(Spans(plan.lo, plan.hi), given["kv_length"]).expand(2, -1, -1), expected)


def test_a_causal_mask_is_never_looked_at(monkeypatch):
    """It would be 2**40 pairs."""
    n = 2**20
    plan = CausalMask(batch_size=1, q_length=n, kv_length=n, device="cpu", attention_mask=torch.ones(1, n).bool()).plan
    assert plan.hi[0, -1] == n


def test_what_is_no_span_or_not_there_is_refused():
    model, ids = model_of("llama"), tokens()
    model.set_attn_implementation(NAME)
    ends = torch.ones(1, 1, 45, 45, dtype=torch.bool).tril()
    ends[..., 30:, 5:10] = False
    with pytest.raises(ValueError, match="row 0 is no span: query 30 sees 26 keys between 0 and 30"):
        model(ids, attention_mask=ends)
    with pytest.raises(ValueError, match="adds to the scores"):
        model(ids, attention_mask=torch.randn(1, 1, 45, 45))
    heads = torch.stack([torch.ones(45, 45, dtype=torch.bool).tril(), torch.ones(45, 45, dtype=torch.bool)])
    with pytest.raises(ValueError, match="differs between heads"):
        model(ids, attention_mask=heads.repeat(2, 1, 1)[None])
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout_p=0\.1"):
        model(ids)


def whole_rows() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Ids, labels of which some are missing, and the documents of each row."""
    ids = tokens(2, 61)
    labels = ids.clone()
    labels[0, 3:20] = -100
    return ids, labels, [[30, 31], [7, 50, 4]]


def whole_model(name: str) -> tuple[float, list[Tensor]]:
    """Loss and gradients on one process, from the definition: documents by themselves, eager attention."""
    model, (ids, labels, lengths) = model_of(name), whole_rows()
    sums, count = torch.zeros(()), 0
    for row, documents in enumerate(lengths):
        at = 0
        for n in documents:
            logits = model(ids[row : row + 1, at : at + n]).logits[0]
            wanted = labels[row, at + 1 : at + n]
            sums = sums + torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="sum")
            count, at = count + int((wanted != -100).sum()), at + n
    (sums / count).backward()
    return (sums / count).item(), [p.grad for p in model.parameters()]


def sharded_model(name: str, ring: int, ulysses: int, layout: str) -> tuple[float, list[Tensor]]:
    """The same from shards; the ranks' losses and gradients summed."""
    attend = SequenceAttention(Mesh.create(1, ring, ulysses), layout)
    model, (ids, labels, lengths) = model_of(name), whole_rows()
    model.set_attn_implementation(NAME)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**shard_batch(attend, ids, labels=labels, lengths=lengths)).loss
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    for x in found:
        dist.all_reduce(x)
    return found[0].item(), found[1:]


@pytest.mark.parametrize(
    "name, ring, ulysses, layout",
    [("mistral", 2, 1, "zigzag"), ("gemma3", 2, 1, "balanced"), ("gpt_oss", 1, 2, "contiguous")],
)
def test_models_on_shards_have_the_loss_and_gradients_of_one_process(name, ring, ulysses, layout, ranks):
    loss, grads = whole_model(name)
    for found_loss, found in ranks(2)(sharded_model, name, ring, ulysses, layout, timeout=200):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        for x, y in zip(found, grads, strict=True):
            assert (x - y).abs().max() <= 32 * torch.finfo(torch.float32).eps * y.abs().max()


def refusals() -> list[str]:
    attend = SequenceAttention(Mesh.create(1, 1, 1), "contiguous")
    said = []
    model = model_of("llama")
    model.set_attn_implementation(NAME)
    for change, given in (({}, {"lengths": [10, 20]}), ({"rope_type": "dynamic"}, {})):
        model.config.rope_parameters.update(change)
        try:
            model(**shard_batch(attend, tokens(), **given))
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_ranks_cannot_share_is_refused(ranks):
    said = ranks(1)(refusals)[0]
    assert said[0] == "lengths sum to 30, and the rows have 45 tokens"
    assert "follows the length of the input, of which each rank sees a part" in said[1]
