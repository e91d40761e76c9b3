"""Generation: prompts through the ring, tokens from a sharded cache, against one model run over everything so far."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from commands import LAUNCH, exit_code
from reference import attention_reference
from test_parity import job, write_texts
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ringspan.kernels import torch_backend
from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.decode import Cache
from ringspan.parallel.layout import Layout
from ringspan.parallel.mesh import Mesh
from ringspan.train.activations import Activations, Policy
from ringspan.train.data import DataConfig
from ringspan.train.generate import Generator, Sampling, Streamed, pick
from ringspan.train.huggingface import export
from ringspan.train.huggingface_config import HuggingFaceConfig
from ringspan.train.loop import train
from ringspan.train.manifest import checkpoints_in, read_manifest
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.phases import Phase
from ringspan.train.prepare import PrepareConfig, prepare_folder
from ringspan.train.pretrained import Pretrained, find_model, load_model, newest, pick_tokenizer, tokenizer_of
from ringspan.train.tokenizer import ByteTokenizer, load_tokenizer, tokenizer_fingerprint, train_bpe

VOCABULARY = 61
PROMPTS = [[5, 9, 2] * 13, [7], list(range(30))]


def mesh_of(ranks: int) -> Mesh:
    return Mesh.create(1, ranks, 1)


def decoded(ranks: int, prompt: int, n: int) -> tuple[Tensor, int, int]:
    """Attention of n tokens, one after the other, behind a prompt of two rows; keys that this rank holds, of how many
    it has room for."""
    mesh = mesh_of(ranks)
    q, k, v = drawn(prompt + n)
    layout = Layout.zigzag(prompt, ranks)
    cache = Cache(layout, mesh.ring_group, starts=[0, prompt // 3], room=n)
    for _ in range(2):  # layers
        cache.keep(*(layout.shard(x[:, :prompt], mesh.ring_rank, 1) for x in (k, v)))
    outs = []
    for t in range(prompt, prompt + n):
        cache.begin()
        one = [x[:, t : t + 1] for x in (q, k, v)]
        outs.append(torch.stack([cache.attend(*one), cache.attend(-one[0], *one[1:], scale=0.1)]))
        assert not cache.plan(None).query_lo.numel()  # of as many as there are keys: a token needs none of it
    with pytest.raises(ValueError, match=f"room for {prompt + n} tokens a row, and all of it is used"):
        cache.begin()
    return torch.cat(outs, dim=2), cache.rows, cache.pairs[1][0].shape[1]


def drawn(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("prompt, n", [(37, 9), (1, 4), (2, 1)])
def test_decoding_attends_to_all_that_came_before(world, prompt, n, ranks):
    q, k, v = drawn(prompt + n)
    spans = Spans.causal(n, prompt + n).padded([0, prompt // 3], prompt + n)
    expected = [
        attention_reference(sign * q[:, prompt:], k, v, spans.lo, spans.hi, scale)[0]
        for sign, scale in ((1, 8**-0.5), (-1, 0.1))
    ]
    found = ranks(world)(decoded, world, prompt, n)
    for out, _, room in found:
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-12, atol=1e-12)
        assert torch.equal(out, found[0][0])
        assert room <= -(-prompt // world) + -(-n // world)
    assert sum(held for _, held, _ in found) == prompt + n  # each key once


def model_of(attend: SequenceAttention) -> GPT:
    """In fp64: nothing hangs on a rounding."""
    config = ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=40)
    return GPT(config, VOCABULARY, attend, dtype=torch.float64, seed=3)


def generated(ranks: int, n: int, sampling: Sampling, prompts: list[list[int]]) -> Tensor:
    """(prompts, n)"""
    mesh = mesh_of(ranks)
    generator = Generator(model_of(SequenceAttention(mesh, "zigzag")), mesh)
    tokens = list(generator(prompts, n, sampling))
    generator.ahead = True  # as on a GPU
    assert all(map(torch.equal, tokens, generator(prompts, n, sampling)))
    return torch.stack(tokens, dim=1)


def one_by_one(prompts: list[list[int]], n: int) -> Tensor:
    """The likeliest tokens by the model's own loss: of all, which has the smallest behind everything so far?"""
    attend = SequenceAttention(mesh_of(1), "contiguous")
    model = model_of(attend)
    rows = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(n):
            ids = torch.tensor(tokens).expand(VOCABULARY, -1)
            labels = torch.full_like(ids, -100)
            labels[:, -1] = torch.arange(VOCABULARY)
            spans = Spans.causal(len(tokens))
            losses, _ = model(ids, labels, torch.arange(len(tokens)).expand_as(ids), attend.plan(spans, "cpu"), True)
            tokens.append(int(losses[:, -1].argmin()))
        rows.append(tokens[len(prompt) :])
    return torch.tensor(rows)


def test_greedy_tokens_are_the_likeliest_by_the_models_loss_on_any_ring(ranks):
    expected = ranks(1)(one_by_one, PROMPTS, 7)[0]
    assert len(set(expected.flatten().tolist())) > 5
    for world in (1, 2, 3):
        for found in ranks(world)(generated, world, 7, Sampling(), PROMPTS):
            assert torch.equal(found, expected)


def test_sampled_tokens_are_those_of_one_process(ranks):
    sampling = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=5)
    expected = ranks(1)(generated, 1, 12, sampling, PROMPTS)[0]
    for found in ranks(2)(generated, 2, 12, sampling, PROMPTS):
        assert torch.equal(found, expected)
    assert not torch.equal(ranks(1)(generated, 1, 12, Sampling(temperature=1.5, seed=6), PROMPTS)[0], expected)


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"top_k": 3, "top_p": 0.85}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),  # 0.8 of 0.95 is less than 0.85
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(fields, kept):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    n = 20_000
    drawn = pick(logits.expand(n, -1), Sampling(**{"temperature": 1.0, **fields}), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=4)[torch.tensor([1, 3, 0, 2])] / n
    for share, wanted in zip(found.tolist(), kept, strict=True):
        # 5 standard deviations of a share of n draws
        assert abs(share - wanted) <= 5 * (wanted * (1 - wanted) / n) ** 0.5


def test_settings_out_of_range_are_refused():
    for fields in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Sampling(**fields)


class Counted(TorchFunctionMode):
    """How often torch is called, and the most elements that it makes: slices and attributes make none."""

    calls, largest = 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found, name = function(*args, **(kwargs or {})), function.__name__
        self.calls += name != "__get__"
        if isinstance(found, Tensor) and name not in ("__getitem__", "__get__"):
            self.largest = max(self.largest, found.numel())
        return found


def work_of_a_token(layers: int, length: int, window: int | None) -> tuple[int, int]:
    """What `Counted` counts for one behind a cache of so many tokens, where attention itself is for nothing."""

    def nothing(q: Tensor, *_: object, out_dtype: torch.dtype, **__: object) -> tuple[Tensor, Tensor]:
        return q.to(out_dtype), q

    mesh, policy = mesh_of(1), Policy(activations=Activations.recompute)
    config = ModelConfig(dim=8, n_layers=layers, n_heads=2, n_kv_heads=1, head_dim=4, mlp_dim=8)
    model = GPT(config, VOCABULARY, SequenceAttention(mesh, "zigzag"), policy, dtype=torch.bfloat16)
    cache = Cache(Layout.contiguous(length, 1), mesh.ring_group, starts=[0, length // 3], room=3)
    for _ in range(layers):
        cache.keep(*torch.zeros(2, 2, length, 1, 4, dtype=torch.bfloat16))
    cache.attend = partial(cache.attend, window=window)  # type: ignore[method-assign]
    tokens = Generator(model, mesh).decode(cache, torch.zeros(2, VOCABULARY), 4, Sampling())
    next(tokens)
    with mock.patch.object(torch_backend, "forward", nothing), Counted() as counted:
        next(tokens)
    return counted.calls, counted.largest


def test_the_hosts_work_for_a_token_is_little_and_does_not_grow_with_the_cache(ranks):
    """On a GPU's host an operation takes about 10 us: behind 4 rows of 128K tokens they took longer than attention."""
    for window in (None, 50):
        work = [ranks(1)(work_of_a_token, 1, length, window)[0] for length in (90, 9000)]
        assert work[0] == work[1]
        assert work[0][1] == 2 * VOCABULARY  # the logits are the largest
    (one, _), (three, _) = (ranks(1)(work_of_a_token, layers, 90, None)[0] for layers in (1, 3))
    assert (three - one) / 2 <= 40  # of a layer: 36, and attention's own


def refused() -> None:
    with pytest.raises(ValueError, match="prompt: each needs at least one token"):
        generated(1, 3, Sampling(), [[1], []])


def test_a_prompt_without_tokens_is_refused(ranks):
    ranks(1)(refused)


def test_text_comes_in_whole_characters_and_none_is_lost():
    tokenizer = ByteTokenizer()
    text = "a€b\N{GRINNING FACE}"
    stream = Streamed(tokenizer.decode, before=list(b"before "))
    parts = [stream.add(byte) for byte in text.encode()]
    assert parts == ["a", "", "", "€", "b", "", "", "", "\N{GRINNING FACE}"]
    assert stream.add(0xE2) == ""
    assert stream.end() == "\N{REPLACEMENT CHARACTER}"
    assert stream.text == text + "\N{REPLACEMENT CHARACTER}"


def test_tokenizers_give_text_back(tmp_path):
    text = "for  x in y:\n\treturn 'ä€'\n"
    train_bpe([text * 3], 300, tmp_path / "tokenizer.json")
    for name in ("bytes", str(tmp_path / "tokenizer.json")):
        tokenizer = load_tokenizer(name)
        ids = tokenizer.encode([text])[0].tolist()
        assert tokenizer.decode(ids) == text
        stream = Streamed(tokenizer.decode, [])
        assert "".join([*(stream.add(i) for i in ids), stream.end()]) == text


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, ranks) -> Path:
    """A run of a few steps, of bytes."""
    folder = tmp_path_factory.mktemp("run")
    text = write_texts(folder / "text", 5, 90)
    config = job(folder, "trained", text, zero=1, steps=6)
    ranks(1)(train_in, config, timeout=200)
    return Path(config.run_dir)


def train_in(config) -> None:
    train(config, config.run_dir)


def generate_py(*arguments: str) -> int:
    return exit_code("generate.py", "dtype=fp32", *arguments)


def test_launched_from_a_run_and_from_hugging_face_on_one_process_and_on_two(run_dir, tmp_path, capfd):
    assert generate_py(f"checkpoint={run_dir}", "prompt=[one two]", "tokens=20") == 0
    alone = capfd.readouterr()
    assert len(alone.out) > 10
    assert "7 tokens of prompt in" in alone.err
    assert generate_py(f"checkpoint={run_dir}", "prompt=[x, one two]", "tokens=20") == 0
    assert "--- one two\n" + alone.out in capfd.readouterr().out
    export(checkpoints_in(str(run_dir))[0], tmp_path / "model", torch.float32)
    (tmp_path / "prompt.txt").write_text("one two")
    given = (
        f"checkpoint={tmp_path}/model prompt_file={tmp_path}/prompt.txt tokens=20 nproc=2 tokenizer=bytes dtype=fp32"
    )
    command = [sys.executable, str(LAUNCH / "generate.py"), *given.split()]
    two = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert two.returncode == 0, two.stderr
    assert two.stdout == alone.out


def test_layers_are_compiled_where_that_is_asked_for(run_dir, monkeypatch, capfd):
    asked, given = [], (f"checkpoint={run_dir}", "prompt=[one two]", "tokens=5")
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how["backend"]) or function)
    assert generate_py(*given) == 0
    plainly = capfd.readouterr().out
    assert not asked
    assert generate_py(*given, "compile=true") == 0
    assert capfd.readouterr().out == plainly
    assert set(asked) == {"inductor"}
    theirs = Pretrained(Path("x"), HuggingFaceConfig(path="x"), 320, Phase(seq_len=8), None, None)
    with pytest.raises(ValueError, match="compile=true: x runs with Transformers' own layers; leave it out"):
        load_model(theirs, None, torch.device("cpu"), torch.float32, 8, 320, compiler="inductor")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "checkpoint: give the folder of a run"),
        (["checkpoint={run}"], "prompt: give it or prompt_file, and not both"),
        (["checkpoint={run}", "prompt=[a]", "top_p=2"], "top_p=2.0: must be above 0"),
        (["checkpoint={run}", "promt=[a]"], "promt: there is no such key; did you mean prompt?"),
        (["checkpoint={run}/checkpoints", "prompt=[a]"], "/checkpoints: no whole checkpoint here; give a run's folder"),
        (["checkpoint={run}/nothing", "prompt=[a]"], "/nothing: no such folder"),
        (["checkpoint={run}", "prompt=a"], "prompt: must be a list; write 'prompt=[...]'"),
        (["checkpoint={run}", "prompt=[a]", "temperature=nan"], "temperature=nan: must be a finite number"),
        (["checkpoint={run}", "prompt_file=${{seeds}}"], "prompt_file: Interpolation key 'seeds' not found"),
        (["checkpoint={run}", "prompt_file=nothing.txt"], "prompt_file=nothing.txt: cannot be read as text"),
    ],
)
def test_mistakes_are_one_line(arguments, message, run_dir, capfd):
    code = generate_py(*(argument.format(run=run_dir) for argument in arguments))
    err = capfd.readouterr().err
    assert (code, len(err.splitlines())) == (1, 1), err
    assert message in err


def test_a_text_ends_where_its_document_does(run_dir, monkeypatch, capfd):
    def drawn(*_):
        yield from (torch.tensor(row) for row in ([65, 66], [256, 67], [68, 256], [69, 70]))

    monkeypatch.setattr("ringspan.train.generate.Generator", lambda *_: drawn)
    assert generate_py(f"checkpoint={run_dir}", "prompt=[one, two]", "tokens=4") == 0
    assert capfd.readouterr().out.endswith("--- one\nA\n--- two\nBC\n")


def test_the_tokenizer_is_the_one_that_the_model_was_trained_with():
    found = Pretrained(Path("x"), ModelConfig(), 320, Phase(seq_len=8), tokenizer=None, fingerprint=None)
    assert pick_tokenizer(found, "bytes") == "bytes"
    with pytest.raises(ValueError, match=r"tokenizer: there is no tokenizer\.json in x"):
        pick_tokenizer(found, None)
    with pytest.raises(ValueError, match="tokenizer=bytes: not the one that the text of x was prepared with"):
        pick_tokenizer(found._replace(tokenizer="bytes", fingerprint="of another"), None)


def test_the_tokenizer_of_a_run_is_known_by_its_text(run_dir, tmp_path):
    assert find_model(run_dir)[4:6] == ("bytes", "bytes")
    saved, prepared = read_manifest(newest(run_dir)).saved, tmp_path / "prepared"
    train_bpe(["one two three " * 9], 300, tmp_path / "own.json")
    (tmp_path / "text").write_text("one two")
    asked = PrepareConfig(
        out=str(prepared), data=DataConfig(path=str(tmp_path / "text"), tokenizer=str(tmp_path / "own.json"))
    )
    prepare_folder(asked, lambda *_: lambda size: None)
    own = tokenizer_fingerprint(str(tmp_path / "own.json"))
    for data in (DataConfig(path=str(prepared)), DataConfig(mixture={str(prepared): 1.0})):
        assert tokenizer_of(saved, ModelConfig(), data) == ("bytes", own)
    gone = DataConfig(path=str(tmp_path / "moved"))
    assert tokenizer_of(replace(saved, vocab_size=448), ModelConfig(), gone) == (None, None)
    assert tokenizer_of(saved, ModelConfig(), DataConfig(tokenizer="gone.json")) == ("gone.json", None)
