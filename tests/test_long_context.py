"""Long contexts measured: against the model run on each piece alone, on one rank and two, and from the command line."""

import json
import math
import re
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from commands import exit_code
from omegaconf import OmegaConf
from test_parity import job, write_texts

from ringspan.kernels.attention import attention
from ringspan.kernels.spans import Spans
from ringspan.parallel.attention import SequenceAttention
from ringspan.parallel.mesh import Mesh
from ringspan.train import long_context
from ringspan.train.corpus import Joined
from ringspan.train.data import DataConfig, prepare
from ringspan.train.evaluate import Once, found_by_depth
from ringspan.train.huggingface import SINGLE, config_json, parts
from ringspan.train.long_context import EvaluateConfig, Evaluated, Pieces, evaluate, trained_lengths
from ringspan.train.loop import train
from ringspan.train.metrics import plain
from ringspan.train.model import GPT, ModelConfig
from ringspan.train.needle import DEPTHS, NEEDLES, PLACES, SentenceRows, Sentences
from ringspan.train.packing import IGNORE
from ringspan.train.rows import Text
from ringspan.train.step import Batches
from ringspan.train.tensors import Entry, write
from ringspan.train.tokenizer import ByteTokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).parents[1]
ROWS, LENGTHS, VOCABULARY = 2, [640, 40, 97], 320
SHAPE = ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, mlp_dim=40, qk_norm=False, norm_eps=1e-6)


def drawn(dtype: torch.dtype) -> GPT:
    """The same numbers in any dtype; its logits are as large as a trained model's, so that context matters."""
    model = GPT(SHAPE, VOCABULARY, attention, seed=3, dtype=dtype)
    with torch.no_grad():
        model.head.weight.mul_(64)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """That model in Hugging Face's layout."""
    folder, weights, entries = tmp_path_factory.mktemp("llama"), dict(drawn(torch.float32).named_parameters()), {}
    for tensors in parts(SHAPE, VOCABULARY).values():
        entries |= {name: Entry(torch.float32, shape) for name, shape in tensors.items()}
    cut = [
        part
        for ours, tensors in parts(SHAPE, VOCABULARY).items()
        for part in weights[ours].detach().flatten().split([math.prod(shape) for shape in tensors.values()])
    ]
    write(folder / SINGLE, entries, cut)
    (folder / "config.json").write_text(json.dumps({**config_json(SHAPE, VOCABULARY), "max_position_embeddings": 64}))
    return str(folder)


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> str:
    return write_texts(tmp_path_factory.mktemp("books") / "text", 200, 900)


def asked(llama: str, books: str, **given) -> EvaluateConfig:
    fields = {"lengths": LENGTHS, "rows": ROWS, "tokenizer": "bytes", "cache": f"{books}-cache", "text": books}
    return EvaluateConfig(checkpoint=llama, **{**fields, **given})


def evaluated_on(ranks: int, config: EvaluateConfig) -> Evaluated:
    return evaluate(config, Mesh.create(1, ranks, 1), torch.device("cpu"))


def text_of(books: str) -> Text:
    config = DataConfig(path=books, cache=f"{books}-cache")
    return Text(prepare(config), config)


def by_hand(books: str) -> tuple[dict[int, float], list[list[float]]]:
    """Loss by length, and of the longest the losses by position, in fp64: each piece of a document by itself."""
    model, rows, by_length = drawn(torch.float64), text_of(books).rows(max(LENGTHS), seed=0), {}
    for length in sorted(LENGTHS):
        losses, at_position = [], [[] for _ in range(length)]
        for row in rows.order(0, ROWS):
            tokens, labels, _ = (torch.from_numpy(x)[None] for x in rows.load(row, np.arange(max(LENGTHS))))
            edges = np.cumsum([0, *rows.lengths(row)]).tolist()
            for begin, end in pairwise(edges):
                for start in range(begin, end, length):
                    piece = slice(start, min(start + length, end))
                    n = piece.stop - start
                    each, _ = model(
                        tokens[:, piece], labels[:, piece], torch.arange(n)[None], Spans.causal(n), each=True
                    )
                    for position in (labels[0, piece] != IGNORE).nonzero()[:, 0].tolist():
                        losses.append(each[0, position].item())
                        at_position[position].append(losses[-1])
        by_length[length] = sum(losses) / len(losses)
    return by_length, at_position


def test_perplexity_by_length_and_position_is_that_of_pieces_alone_on_one_rank_and_two(llama, books, ranks):
    by_length, at_position = by_hand(books)
    assert len({round(loss, 3) for loss in by_length.values()}) == 3, "context changes nothing?"
    for world in (1, 2):
        for facts, measured in ranks(world)(evaluated_on, world, asked(llama, books)):
            # fp32 sums in another order, of losses near 6
            assert list(measured.by_length) == sorted(LENGTHS)
            assert list(measured.by_length.values()) == pytest.approx(list(by_length.values()), rel=1e-6)
            assert measured.loss == measured.by_length[640]
            starts = [start for start, _ in measured.by_position]
            for (start, loss), stop in zip(measured.by_position, [*starts[1:], 640], strict=True):
                own = [x for found in at_position[start:stop] for x in found]
                assert loss == pytest.approx(np.mean(own), rel=1e-5)
            assert {length: len(shares) for length, shares in measured.needles.items()} == {640: NEEDLES}
            assert facts["rows"] == ROWS
            assert facts["needles_asked_for_in"] == "plain words"
            assert facts["ranks"] == world


@pytest.mark.parametrize("length", [1, 7, 300])
def test_pieces_have_all_tokens_and_labels_and_begin_where_positions_do(books, length):
    rows = text_of(books).rows(300, seed=0)
    pieces, everywhere = Pieces(rows, length), np.arange(300)
    for row in pieces.order(0, 4):
        whole, cut = rows.load(row, everywhere), pieces.load(row, everywhere)
        assert all(np.array_equal(a, b) for a, b in zip(whole[:2], cut[:2], strict=True))
        lengths = pieces.lengths(row)
        assert max(lengths) <= length
        assert np.array_equal(cut[2], np.concatenate([np.arange(n) for n in lengths]))
        assert set(np.cumsum(rows.lengths(row))) <= set(np.cumsum(lengths))
    assert len(pieces) == len(rows)


def sentences_of(tmp_path, kind: str, more: int = 0) -> SentenceRows:
    """Rows of as few tokens as there can be, and ``more``."""
    words = "a span of keys and a ring of ranks\nThe secret number of things is not known. "
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        train_bpe([words * 3 + "Oslo 417 "], 300, tmp_path / "tokenizer.json")
        tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = np.append(tokenizer.encode([words])[0], tokenizer.end_of_document).astype(np.int64)
    sentences = Sentences(tokenizer)
    return SentenceRows(Joined([np.tile(ids, 7)]), sentences, sentences.shortest_row + more)


@pytest.mark.parametrize("kind, more", [("bytes", 0), ("bytes", 501), ("bpe", 333)])
def test_sentences_are_hidden_one_in_each_eighth_and_asked_for_at_the_end(kind, more, tmp_path):
    rows = sentences_of(tmp_path, kind, more)
    tokenizer = ByteTokenizer() if kind == "bytes" else load_tokenizer(str(tmp_path / "tokenizer.json"))
    first, size = rows.questions
    assert first + NEEDLES * size == rows.seq_len
    for row in (0, 5):
        tokens, labels, positions = rows.load(row, np.arange(rows.seq_len))
        assert rows.lengths(row) == [rows.seq_len]
        assert np.array_equal(positions, np.arange(rows.seq_len))
        assert tokenizer.end_of_document not in tokens
        hidden = {}
        for depth in range(NEEDLES):
            begin, stop = (first * part // NEEDLES for part in (depth, depth + 1))
            ((place, number),) = re.findall(r"secret number of (\w+) is (\d+)\.", tokenizer.decode(tokens[begin:stop]))
            hidden[depth] = place, number
        assert {place for place, _ in hidden.values()} == set(PLACES)
        for question, depth in enumerate(DEPTHS):
            begin = first + question * size
            said = tokenizer.decode(tokens[begin : begin + size])
            place, number = hidden[depth]
            assert said.endswith(f"\nThe secret number of {place} is {number}.\n")
            asks = begin + np.flatnonzero(labels[begin : begin + size] != IGNORE)
            assert tokenizer.decode(labels[asks]) == f" {number}"
            assert np.array_equal(labels[asks], tokens[asks + 1])
        assert (labels[:first] == IGNORE).all()
        some = np.array([-1, rows.seq_len - 9, 4])
        assert [x.tolist() for x in rows.load(row, some)] == [
            [0, *tokens[some[1:]]],
            [IGNORE, *labels[some[1:]]],
            [0, *some[1:]],
        ]
    whole = np.arange(rows.seq_len)
    assert not np.array_equal(rows.load(0, whole), rows.load(1, whole))


def likeliest(tokens, labels, positions):
    """Most of them: an answer of several tokens is found only if each is."""
    return (labels * 7 + positions) % 5 != 0


def found_on(mesh: tuple[int, int, int], folder: Path) -> list[float]:
    rows, attend = sentences_of(folder, "bytes"), SequenceAttention(Mesh.create(*mesh), "striped")
    batches = Batches(Once(rows, 5), attend, 2, 1, torch.device("cpu"))
    return found_by_depth(rows, batches, lambda mb: (mb.labels, torch.as_tensor(likeliest(*mb[:3]))))


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 1), (1, 2, 1)])
def test_a_needle_is_found_if_all_tokens_of_its_answer_are_on_any_mesh(mesh, ranks, tmp_path):
    rows, counts = sentences_of(tmp_path, "bytes"), np.zeros(NEEDLES)
    first, size = rows.questions
    for row in range(5):
        tokens, labels, positions = rows.load(row, np.arange(rows.seq_len))
        right = likeliest(tokens, labels, positions) | (labels == IGNORE)
        for question, depth in enumerate(DEPTHS):
            counts[depth] += right[first + question * size : first + (question + 1) * size].all()
    assert 0 < counts.sum() < 5 * NEEDLES
    for shares in ranks(math.prod(mesh))(found_on, mesh, tmp_path):
        assert shares == pytest.approx(counts / 5)


def test_the_file_of_values_names_every_field_with_its_default():
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "evaluate.yaml"), resolve=False)
    for key in ("defaults", "hydra"):
        del values[key]
    assert values == {**plain(asdict(EvaluateConfig(checkpoint="x"))), "checkpoint": ""}


def test_lengths_are_by_default_those_of_training():
    assert trained_lengths(4096) == [256, 512, 1024, 2048, 4096]
    assert trained_lengths(3) == [1, 3]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, books, ranks) -> Path:
    """A run that has held out some text, and knows needles."""
    config = job(tmp_path_factory.mktemp("run"), "trained", books, zero=1, steps=2)
    config.data = replace(config.data, held_out=0.3, needles=0.5)
    ranks(1)(train_in, config, timeout=200)
    return Path(config.run_dir)


def train_in(config) -> None:
    train(config, config.run_dir)


def test_a_run_is_measured_on_what_it_has_held_out(run_dir, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    assert exit_code("evaluate.py", "rows=2", f"checkpoint={run_dir}") == 0
    out, err = capfd.readouterr()
    (folder,) = (tmp_path / "evaluations").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "evaluation.json",
        "loss_by_position.svg",
        "needles.svg",
        "perplexity_by_length.svg",
    }
    for name in ("loss_by_position.svg", "needles.svg", "perplexity_by_length.svg"):
        ElementTree.parse(folder / name)
    told = json.loads((folder / "evaluation.json").read_text())
    assert list(told["loss_by_length"]) == ["4", "8", "16", "32", "64"]
    assert list(told["needles_by_depth"]) == ["64"]
    assert told["needles_asked_for_in"] == "the ids of training"
    lengths, positions, needles = (part.splitlines() for part in out.strip().split("\n\n"))
    for line, (length, loss) in zip(lengths[1:], told["loss_by_length"].items(), strict=True):
        assert line.split() == [length, f"{loss:.4f}", f"{math.exp(loss):.4g}"]
    assert len(positions) == 1 + len(told["loss_by_position"])
    assert needles[1].split()[:2] == ["64", f"{told['needles_by_depth']['64'][0]:.0%}"]
    assert "evaluations/" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "checkpoint: give the folder of a run"),
        (["checkpoint={run}", "rows=0"], "rows=0: must be 1 or more"),
        (["checkpoint={run}", "lengths=[8,0]"], "lengths=0: each must be 1 or more"),
        (["checkpoint={run}", "lenghts=[8]"], "lenghts: there is no such key; did you mean lengths?"),
        (["checkpoint={run}/nothing"], "nothing: no such folder"),
        (["checkpoint={llama}"], "text: a model in Hugging Face's layout brings none"),
        (["checkpoint={llama}", "text={books}"], "tokenizer: there is no tokenizer.json in"),
        (["checkpoint={llama}", "text=nothing", "tokenizer=bytes"], "text='nothing'"),
        (["checkpoint={run}", "text={books}", "out={run}/run.json", "needles=false"], "out="),
    ],
)
def test_mistakes_are_one_line(arguments, message, run_dir, llama, books, monkeypatch, tmp_path, capfd):
    given = [argument.format(run=run_dir, llama=llama, books=books) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    code = exit_code("evaluate.py", "rows=2", *given)
    err = capfd.readouterr().err
    assert (code, len(err.splitlines())) == (1, 1), err
    assert message in err


def refused(run_dir: Path, books: str, changed: str) -> str:
    """What is said of a run that has held out nothing, or whose text is another by now."""
    manifest = next(Path(run_dir, "checkpoints").glob("*/manifest.json"))
    config = asked(str(manifest.parent), books, text=None)
    found = long_context.find_model(manifest.parent)
    change = {"held": {"data": replace(found.data, held_out=0.0)}, "digest": {"digest": "another"}}[changed]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_context, "find_model", lambda _: found._replace(**change))
        with pytest.raises(ValueError) as error:
            evaluated_on(1, config)
    return str(error.value)


def test_text_that_a_run_may_have_been_trained_on_is_refused(run_dir, books, ranks):
    assert "has held out none (data.held_out=0)" in ranks(1)(refused, run_dir, books, "held")[0]
    assert "has changed since a part of it was held out" in ranks(1)(refused, run_dir, books, "digest")[0]
