"""What a trained model makes of long contexts: perplexity by length and by position, and which needles it finds.

evaluated = evaluate(config, mesh, device)     # all ranks together: the numbers of one process
evaluated.measured.tables(), .drawings()

By length, the text is the same: whole rows of the longest length, of which a model sees pieces of a shorter one, each
blind to the one before. Tokens and labels are equal at all lengths, so that what differs is what the context is worth.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringspan.parallel.mesh import Mesh
from ringspan.train.agree import from_rank_zero
from ringspan.train.corpus import is_corpus, read_manifest
from ringspan.train.data import DataConfig, prepare
from ringspan.train.engine import Dtype
from ringspan.train.evaluate import LENGTHS, Once, found_by_depth, loss_by_position, range_starts
from ringspan.train.measured import Measured
from ringspan.train.needle import IDS, SHORTEST, Questions, SentenceRows, Sentences
from ringspan.train.packing import Rows
from ringspan.train.pretrained import NO_CHECKPOINT, Pretrained, find_model, load_model, pick_tokenizer
from ringspan.train.rows import Text
from ringspan.train.step import Batches, MicroBatch
from ringspan.train.tokenizer import load_tokenizer, tokenizer_fingerprint


@dataclass(kw_only=True)
class EvaluateConfig:
    checkpoint: str = ""  # the folder of a run, a checkpoint, a model or adapters of it, or a name on the hub
    text: str | None = None  # whatever data.path may be; null: what the run has held out
    lengths: list[int] = field(default_factory=list)  # tokens; none: what it was trained on, over 16, 8, 4, 2 and 1
    rows: int = 16  # of text, of the longest length, and of needles at each length
    shortest: int = 0  # tokens; shorter documents of the text are left out
    needles: bool = True  # hidden in the text, at each length that has room for them
    tokenizer: str | None = None  # bytes, or a tokenizer's file; null: the model's own
    dtype: Dtype = Dtype.auto  # of weights and activations
    cache: str | None = None  # folder of tokenised text; null: ringspan in the user's cache folder
    out: str = ""  # folder for evaluation.json and the pictures; "": one in evaluations/, named by the time
    nproc: int = 1  # processes to share each row; 0: one on each GPU here, 2 where there is none

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError(NO_CHECKPOINT)
        for name, least in (("rows", 1), ("shortest", 0), ("nproc", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be {least} or more")
        if bad := [length for length in self.lengths if length < 1]:
            raise ValueError(f"lengths={bad[0]}: each must be 1 or more, in tokens")


class Evaluated(NamedTuple):
    facts: dict[str, Any]  # of what, and on what
    measured: Measured


class Pieces:
    """Rows whose documents are seen in pieces of ``length`` tokens: the tokens and labels of ``rows``, and other masks
    and positions."""

    def __init__(self, rows: Rows, length: int) -> None:
        self.rows, self.length, self.seq_len = rows, length, rows.seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, rows_seen: int, n: int) -> list[int]:
        return self.rows.order(rows_seen, n)

    def lengths(self, row: int) -> list[int]:
        runs = (divmod(n, self.length) for n in self.rows.lengths(row))
        return [n for whole, rest in runs for n in [self.length] * whole + [rest] * (rest > 0)]

    def load(self, row: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, labels, within = self.rows.load(row, positions)
        return tokens, labels, within % self.length


def evaluate(config: EvaluateConfig, mesh: Mesh, device: torch.device) -> Evaluated:
    """All ranks together. ValueError: no such model, text or tokenizer, or text that is not what the run held out."""
    assert mesh.data == 1, "every rank has a share of every row"
    found = from_rank_zero(lambda: find_model(Path(config.checkpoint)))
    text = open_text(config, found)
    lengths = sorted(set(config.lengths)) or trained_lengths(found.trained.seq_len)
    rows = text.held_out(lengths[-1]) if config.text is None else text.rows(lengths[-1], seed=0)
    assert rows is not None, "`text_of` has seen to that"
    attend = found.model.attention(mesh, "balanced")
    needles = needle_rows(config, found, text, lengths)
    dtype = config.dtype.on(device.type)
    asked = IDS if asks_by_ids(found) else 0
    model = load_model(found, attend, device, dtype, lengths[-1], text.corpora[0].vocab_size + asked)

    def batches(rows: Rows) -> Batches:
        return Batches(Once(rows, config.rows), attend, 1, 1, device)

    measured = Measured()

    @torch.no_grad()
    def losses(mb: MicroBatch) -> tuple[Tensor, Tensor]:
        return model(mb.tokens, mb.labels, mb.positions, mb.ring_plan, each=True)

    for length in lengths:
        model.expect(max(length, found.trained.seq_len), found.trained.rope_base)
        measured.by_length[length], measured.by_position = loss_by_position(
            batches(Pieces(rows, length)), range_starts(length, device), losses
        )
        if length in needles:
            measured.needles[length] = found_by_depth(needles[length], batches(needles[length]), losses)
    measured.loss = measured.by_length[lengths[-1]]
    kind = ("the ids of training" if asks_by_ids(found) else "plain words") if needles else "none"
    facts = {
        "checkpoint": str(found.path),
        "text": text.name,
        "rows": min(config.rows, len(rows)),
        "tokens_of_a_row": lengths[-1],
        "needles_asked_for_in": kind,
        "dtype": str(dtype),
        "ranks": mesh.ring,
    }
    return Evaluated(facts, measured)


def open_text(config: EvaluateConfig, found: Pretrained) -> Text:
    """ValueError: there is none, or the run may have been trained on it."""
    data = from_rank_zero(lambda: text_of(config, found))
    try:
        text = Text(from_rank_zero(lambda: prepare(data)), data)
    except ValueError as error:
        raise ValueError(str(error).replace("data.path=", "text=", 1)) from error
    if config.text is None and text.digest != found.digest:
        raise ValueError(f"text: that of {found.path} has changed since a part of it was held out; give another")
    return text


def text_of(config: EvaluateConfig, found: Pretrained) -> DataConfig:
    """ValueError: there is no text, or it was prepared with another tokenizer than the model's."""
    if config.text is None:
        if found.data is None:
            raise ValueError("text: a model in Hugging Face's layout brings none; give a file or a folder")
        if not found.data.held_out:
            raise ValueError(
                f"text: the run of {found.path} has held out none (data.held_out=0); give a file or a folder"
            )
        return replace(
            found.data,
            shortest=config.shortest or found.data.shortest,
            cache=config.cache or found.data.cache,
        )
    name, folder = pick_tokenizer(found, config.tokenizer), Path(config.text).expanduser()
    if is_corpus(folder) and read_manifest(folder)["tokenizer"] != tokenizer_fingerprint(name):
        raise ValueError(f"text={config.text}: prepared with another tokenizer than {name}, which is the model's")
    return DataConfig(path=config.text, tokenizer=name, shortest=config.shortest, cache=config.cache)


def trained_lengths(seq_len: int) -> list[int]:
    return sorted({max(1, seq_len // part) for part in LENGTHS})


def asks_by_ids(found: Pretrained) -> bool:
    """Whether the model was trained on needles, and so has their ids."""
    return found.data is not None and found.data.needles > 0


def needle_rows(config: EvaluateConfig, found: Pretrained, text: Text, lengths: list[int]) -> dict[int, Questions]:
    """By length, where there is room. ValueError: nobody knows the tokenizer, which plain words need."""
    if not config.needles:
        return {}
    if asks_by_ids(found):
        return {length: text.needles(length, 0, length) for length in lengths if length >= SHORTEST}
    tokenizer = load_tokenizer(from_rank_zero(lambda: pick_tokenizer(found, config.tokenizer)))
    sentences, tokens = Sentences(tokenizer), text.corpora[0].tokens
    return {n: SentenceRows(tokens, sentences, n) for n in lengths if n >= sentences.shortest_row}
