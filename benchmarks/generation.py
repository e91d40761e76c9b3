"""Inference and the drop-in on one GPU, beside Hugging Face's: docs/benchmarks/generation.json and .md.

python benchmarks/generation.py                                 # every part: minutes on an H200
python benchmarks/generation.py --only 'decode 131072 8'        # cases that the expression matches
python benchmarks/generation.py --small --out small.json        # the same at tiny sizes, on any machine
python benchmarks/generation.py --render                        # the table anew from --out, on any machine

decode   tokens/s of conf/model/1b.yaml's shape behind a cache of so many tokens a row. The cache is filled with random
         keys and values, as a prefill of a million tokens would take most of the time; then --tokens tokens come, by
         train/generate.py's Generator and by Transformers' generate() with a Llama of the same sizes (SDPA, both of
         its caches, uncompiled). Step: from one token on the host to the next.
query    GB/s of keys and values that one query attends to, beside a copy of them (read and written bytes).
parity   how far logits and gradients of Transformers' models on our attention are from eager attention, in bf16.
prefill  TFLOP/s of attention in the Generator's prefill of 2 layers of conf/model/llama8b.yaml's shape, and of its
         kernel alone.

Contestants of a case run in turn, in another order each of the `--rounds`, and medians count. A case is written down as
soon as it is done.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from generation_parity import USUAL, parity
from generation_parts import (
    DECODERS,
    LEFT_OUT,
    QUERIES,
    UNMEASURED,
    Place,
    Shape,
    Sizes,
    decoding,
    device_for,
    emptied,
    one_query,
    prefill,
)
from omegaconf import OmegaConf
from report import begin, cells, head, left_out, machine, put, versions, write

from ringspan.parallel.mesh import Mesh
from ringspan.parallel.workers import process_group
from ringspan.train.model import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 32768
TINY = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "mlp_dim": 96}


class Case(NamedTuple):
    part: str
    sizes: str

    def __str__(self) -> str:
        return f"{self.part} {self.sizes}"


def cases(small: bool) -> Iterator[Case]:
    """In the order of their worth: a run may be cut short."""
    if small:
        yield from (
            Case("decode", "96 2"),
            Case("query", "64 2"),
            *(Case("parity", name) for name in USUAL),
            Case("prefill", "300"),
        )
        return
    yield from (Case("decode", "131072 8"), Case("query", "131072 1"), Case("query", "131072 16"))
    yield from (Case("parity", name) for name in USUAL)
    yield from (Case("decode", "131072 1"), Case("decode", "16384 8"), Case("prefill", "262144"))
    yield from (Case("decode", "131072 4"), Case("prefill", "524288"))  # 4 rows: where 8 do not fit


def shape_of(name: str, length: int, batch: int, arguments: argparse.Namespace) -> Shape:
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml"))
    del values["defaults"]
    model = ModelConfig(**(values | TINY | {"n_layers": 2} if arguments.small else values))
    return Shape(model, 320 if arguments.small else VOCABULARY, batch, length, arguments.tokens)


def measure(case: Case, arguments: argparse.Namespace, place: Place) -> dict[str, dict[str, Any]]:
    """By contestant."""
    rounds, device = arguments.rounds, place.device
    if case.part == "parity":
        return parity(case.sizes, 64 if arguments.small else 2048, device, small=arguments.small)
    length, batch = map(int, [*case.sizes.split(), 1][:2])
    if case.part == "query":
        return one_query(Sizes(batch, length, 32, 8, 128), ["ours", *wanted(QUERIES, arguments)], rounds, device)
    if case.part == "decode":
        return decoding(shape_of("1b", length, batch, arguments), ["ours", *wanted(DECODERS, arguments)], rounds, place)
    shape = shape_of("llama8b", length, batch, arguments)
    return prefill(shape._replace(model=replace(shape.model, n_layers=2)), rounds, place)


def wanted(known: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    return [name for name in known if name not in ("ours", "copy") and re.search(arguments.peers, name)]


def render(path: Path) -> None:
    """The tables beside a report, from the report alone."""
    report = json.loads(path.read_text())
    lines = [
        "# Inference and drop-in on one GPU",
        "",
        f"{report['machine']}, {report['dtype']}, {versions(report['versions'])}. What is measured how is said in",
        "benchmarks/generation.py; medians of interleaved rounds; in brackets ours over the peer. Written by",
        *(f"`python {command}`" for command in report["commands"]),
    ]
    for part, table in TABLES.items():
        rows = [row for row in report["cases"] if row["part"] == part]
        lines += ["", *table(rows)] if rows else []
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def decode_table(rows: list[dict[str, Any]]) -> list[str]:
    names = peers_of(rows)
    lines = ["## Tokens/s behind a cache, and ms a token of all rows", ""]
    lines.append(head(["tokens", "rows", "cache by count, GiB", "measured", "GB/s of it", "ours", *names]))
    for row in rows:
        length, batch = row["sizes"].split()
        mine, count = row["ours"], row["cache_bytes"]
        taken = mine.get("cache_bytes")
        memory = [f"{count / 2**30:.2f}", "-" if taken is None else f"{taken / 2**30:.2f}"]
        rate = f"{1e-9 * count / mine['step_seconds']:,.0f}" if "step_seconds" in mine else "-"
        beside = [compared(row, name, shown_step) for name in names]
        lines.append(cells([f"{int(length):,}", batch, *memory, rate, shown_step(mine), *beside]))
    return lines


def query_table(rows: list[dict[str, Any]]) -> list[str]:
    names = [name for name in peers_of(rows) if name != "copy"]
    lines = ["## One query, 32 heads and 8 kv heads of 128: GB/s of keys and values, and share of a copy's", ""]
    lines.append(head(["keys", "rows", "copy", "ours", *names]))
    for row in rows:
        length, batch = row["sizes"].split()
        beside = [f"{row['peers']['copy']['value']:,.0f}", shown_rate(row["ours"])]
        lines.append(cells([f"{int(length):,}", batch, *beside, *(compared(row, x, shown_rate) for x in names)]))
    return lines


def parity_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Two layers of Transformers' models: largest difference of logits / norm of that of gradients", ""]
    lines.append(
        "From eager in bf16, and from eager in fp32; the mean of so many draws of weights and tokens. There is no"
    )
    lines += ["SDPA where scores have softcaps or sinks.", ""]
    columns = ["ours from eager", "sdpa from eager", "ours from fp32", "sdpa from fp32", "eager from fp32"]
    lines.append(head(["model", "draws", *columns]))
    for row in rows:
        found = {"ours": row["ours"], **row["peers"]}
        pairs = [("ours", ""), ("sdpa", ""), ("ours", "wide_"), ("sdpa", "wide_"), ("eager", "wide_")]
        draws = str(found["ours"].get("draws", 1))
        lines.append(cells([row["sizes"], draws, *(shown_difference(found.get(name), kind) for name, kind in pairs)]))
    return lines


def prefill_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Prefill of 2 layers of an 8B model: TFLOP/s of attention", ""]
    lines.append(head(["tokens", "in the prefill", "kernel alone", "share", "seconds of all"]))
    for row in rows:
        mine, alone = row["ours"], row["peers"]["kernel alone"]
        share = f"{mine['value'] / alone['value']:.3f}"
        cell = [f"{mine['value']:.0f}", f"{alone['value']:.0f}", share, f"{mine['seconds']:.2f}"]
        lines.append(cells([f"{int(row['sizes']):,}", *cell]))
    return lines


TABLES: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "decode": decode_table,
    "query": query_table,
    "parity": parity_table,
    "prefill": prefill_table,
}


def peers_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def compared(row: dict[str, Any], name: str, shown: Callable[[dict[str, Any] | None], str]) -> str:
    found, mine = row["peers"].get(name), row["ours"]
    known = found and "value" in found and "value" in mine
    return shown(found) + (f" ({mine['value'] / found['value']:.2f})" if known else "")


def shown_step(found: dict[str, Any] | None) -> str:
    if not found or "failed" in found:
        return found["failed"] if found else "-"
    return f"{found['value']:,.1f}, {1e3 * found['step_seconds']:.2f} ms"


def shown_rate(found: dict[str, Any] | None) -> str:
    return f"{found['value']:,.0f}, {found['of_copy']:.1%}" if found else "-"


def shown_difference(found: dict[str, Any] | None, kind: str) -> str:
    return f"{found[f'{kind}logits']:.2e} / {found[f'{kind}gradients']:.2e}" if found else "-"


def row_of(case: Case, found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    row = {"part": case.part, "sizes": case.sizes, "ours": found.pop("ours", {}), "peers": found}
    if case.part == "decode":
        length, batch = map(int, case.sizes.split())
        row["cache_bytes"] = shape_of("1b", length, batch, arguments).cache_bytes
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression over 'PART SIZES'")
    parser.add_argument("--peers", default="", help="regular expression over contestants beside ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help=f"to generate; the first {UNMEASURED} do not count")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "generation.json")
    parser.add_argument("--render", action="store_true")
    arguments = parser.parse_args()
    if arguments.render:
        return render(arguments.out)
    if arguments.tokens < UNMEASURED + 2:
        parser.error(f"--tokens={arguments.tokens}: must be {UNMEASURED + 2} or more, as the first do not count")
    device = device_for(arguments.small)
    report = begin(arguments.out, machine(device, ("torch", "triton", "transformers")))
    with process_group():
        place = Place(device, Mesh.create(1, 1, 1, device.type))
        for case in cases(arguments.small):
            if not re.search(arguments.only, str(case)):
                continue
            try:
                row = row_of(case, measure(case, arguments, place), arguments)
            except LEFT_OUT as reason:
                left_out(str(case), reason)
                continue
            print(f"{case}: {json.dumps(row)}", flush=True)
            put(report, row, Case._fields)
            write(arguments.out, report)
            emptied(device)
    render(arguments.out)


if __name__ == "__main__":
    main()
