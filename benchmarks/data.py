"""The data pipeline's rates in one run: a table, docs/benchmarks/data.json, data.md and data.png.

python benchmarks/data.py                       # text: Python's own library and what is installed beside it
python benchmarks/data.py --text books/ --gigabytes 2 --vocabulary 32768

The text is that of --text, again and again up to --gigabytes, in files of at most 8 MB. Rates are in tokens a second
over all that a contender does, from opening its files to the last row: starting processes and writing shards too.

tokenizer    encode() of the text in memory, in lists of 4 MB, with all of the library's threads
prepare      text files to shards, as launch/prepare.py does
prepared     one process reads every row of an epoch out of shards
raw          prepare, then prepared: what a run pays whose text has never been seen
datasets     load_dataset("text"), streaming; map tokenises, a second map packs rows: the usual recipe
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from report import cells, head, pyplot

from ringspan.train.corpus import Corpus
from ringspan.train.data import DataConfig, write_corpus
from ringspan.train.documents import find_source
from ringspan.train.packing import PackedRows
from ringspan.train.tokenizer import load_tokenizer, train_bpe

BATCH = 1 << 22  # characters


class Rate(NamedTuple):
    """Tokens a second, and a second of a core: the second is the one to look at where others use the machine too."""

    wall: float
    cpu: float


# (what, beside what, how many times as fast it has to be)
BARS = [
    ("prepare", "tokenizer", 0.8),
    ("raw", "tokenizer", 0.8),
    ("raw", "datasets", 3.0),
    ("prepared", "datasets", 3.0),
]
PREPARED = 20e6  # tokens a second


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        texts = list(collected(Path(args.text), args.gigabytes, folder / "text"))
        train_bpe((text[: 1 << 16] for text in texts[:400]), args.vocabulary, folder / "tokenizer.json")
        contenders: dict[str, Callable[[], int]] = {
            "tokenizer": partial(encode, folder),
            "prepare": partial(prepare, folder),
            "prepared": partial(read, folder, args.seq_len),
            "raw": partial(raw, folder, args.seq_len),
            "datasets": partial(on_the_fly, folder, args.seq_len),
        }
        rounds: dict[str, list[Rate]] = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, run in contenders.items():
                rounds[name].append(rate(run))
                print(f"{name:>10}  {rounds[name][-1].wall / 1e6:8.2f} M tokens/s", flush=True)
    report(args, rounds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=sysconfig.get_path("stdlib"), help="folder; its .py, .txt and .md files")
    parser.add_argument("--gigabytes", type=float, default=0.1)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="folder for 10 times the text, which is deleted again")
    parser.add_argument("--out", default=str(Path(__file__).parents[1] / "docs" / "benchmarks" / "data"))
    return parser.parse_args()


def collected(root: Path, gigabytes: float, folder: Path) -> Iterator[str]:
    """Text of the files below root, again and again; each is written to a file of its own, too."""
    folder.mkdir()
    files = [path for path in sorted(root.rglob("*")) if path.suffix in {".py", ".txt", ".md"} and path.is_file()]
    left, number = gigabytes * 1e9, 0
    while left > 0:
        for path in files:
            text = path.read_bytes()[: 8 << 20].decode("utf-8", errors="ignore").replace("\0", "")
            if text and left > 0:
                (folder / f"{number:07}.txt").write_text(text, encoding="utf-8")
                left, number = left - len(text.encode()), number + 1
                if number <= len(files):
                    yield text


def rate(run: Callable[[], int]) -> Rate:
    wall, cpu = time.perf_counter(), cpu_seconds()
    tokens = run()
    return Rate(tokens / (time.perf_counter() - wall), tokens / (cpu_seconds() - cpu))


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def encode(folder: Path) -> int:
    tokenizer, tokens, batch, size = load_tokenizer(str(folder / "tokenizer.json")), 0, [], 0
    for path in sorted((folder / "text").iterdir()):
        batch.append(path.read_text(encoding="utf-8"))
        size += len(batch[-1])
        if size >= BATCH:
            tokens += sum(map(len, tokenizer.encode(batch)))
            batch, size = [], 0
    return tokens + sum(map(len, tokenizer.encode(batch)))


def prepare(folder: Path) -> int:
    shutil.rmtree(folder / "shards", ignore_errors=True)
    config = DataConfig(path=str(folder / "text"), tokenizer=str(folder / "tokenizer.json"))
    write_corpus(folder / "shards", config, find_source(config.path))
    return len(Corpus(folder / "shards").tokens)


def read(folder: Path, seq_len: int) -> int:
    """Every row of an epoch, as a rank of a run without sequence parallelism takes it; two at least."""
    corpus = Corpus(folder / "shards")
    rows, positions, tokens = PackedRows(corpus, seq_len, seed=0), np.arange(seq_len), 0
    for row in rows.order(0, len(rows)):
        tokens += int(np.count_nonzero(rows.load(row, positions)[2] >= 0)) and sum(rows.lengths(row))
    return tokens


def raw(folder: Path, seq_len: int) -> int:
    prepare(folder)
    return read(folder, seq_len)


def on_the_fly(folder: Path, seq_len: int) -> int:
    """Documents end to end and cut: the recipe of language-model examples, with the tokenizer's batch method."""
    import datasets  # noqa: PLC0415 - the processes that tokenise import this file

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"])]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        flat = [token for ids in batch["ids"] for token in ids]
        return {"input_ids": [flat[at : at + seq_len] for at in range(0, len(flat), seq_len)]}

    files = sorted(map(str, (folder / "text").iterdir()))
    rows = datasets.load_dataset("text", data_files=files, sample_by="document", split="train", streaming=True)
    rows = rows.map(tokenise, batched=True, batch_size=100, remove_columns=["text"])
    rows = rows.map(pack, batched=True, batch_size=100, remove_columns=["ids"])
    return sum(len(row["input_ids"]) for row in rows.with_format("numpy"))


def report(args: argparse.Namespace, rounds: dict[str, list[Rate]]) -> None:
    rates, cpu = ({name: statistics.median(one[i] for one in found) for name, found in rounds.items()} for i in (0, 1))
    facts = {
        "text_gigabytes": args.gigabytes,
        "vocabulary": args.vocabulary,
        "seq_len": args.seq_len,
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("datasets", "tokenizers")},
        "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    ratios = {}  # of each round by itself, whose contenders see the same machine; then the median
    for name, beside, _ in BARS:
        each = [one.wall / other.wall for one, other in zip(rounds[name], rounds[beside], strict=True)]
        ratios[f"{name} / {beside}"] = statistics.median(each)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"facts": facts, "tokens_per_second": rates, "tokens_per_core_second": cpu}
    told |= {"rounds": rounds, "ratios": ratios}
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    lines = [head(["", "M tokens/s", "M tokens a core second"])]
    lines += [cells([name, f"{rates[name] / 1e6:.2f}", f"{cpu[name] / 1e6:.2f}"]) for name in rates]
    lines += ["", head(["", "", "bar", ""])]
    checks = [("prepared, M tokens/s", rates["prepared"] / 1e6, PREPARED / 1e6)]
    checks += [(f"{name} / {beside}", ratios[f"{name} / {beside}"], bar) for name, beside, bar in BARS]
    lines += [
        cells([name, f"{value:.2f}", str(bar), "met" if value >= bar else "missed"]) for name, value, bar in checks
    ]
    said = ", ".join(f"{name} {value}" for name, value in facts.items())
    how = f"Medians of {args.rounds} rounds, ratios those of a round; {said}."
    page = ["# The data pipeline", "", *lines, "", "![rates](data.png)", "", how, ""]
    page += ["What each is: [benchmarks/data.py](../../benchmarks/data.py).", ""]
    out.with_suffix(".md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(lines))
    plot(out.with_suffix(".png"), rates)


def plot(path: Path, rates: dict[str, float]) -> None:
    if (plt := pyplot()) is None:
        return
    figure, axis = plt.subplots(figsize=(8, 3))
    axis.barh(list(rates), [rate / 1e6 for rate in rates.values()])
    axis.bar_label(axis.containers[0], fmt="%.2f", padding=3)
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("M tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
