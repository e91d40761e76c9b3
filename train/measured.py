"""What an evaluation has found, as numbers, a line of evaluations.jsonl, tables and pictures."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ringspan.train import picture
from ringspan.train.needle import NEEDLES

Key = TypeVar("Key")
TITLE, X, Y = "loss by position in the document", "position", "nats a token"
LENGTH_TITLE = "perplexity of the same text, by the tokens that are seen at once"
NEEDLE_TITLE = "needles found, by tokens of the document (down) and depth of the needle (across)"


@dataclass
class Measured:
    loss: float | None = None  # nats a label token of held-out text
    bits_per_byte: float | None = None  # of its text, were all documents' ends and first tokens as costly as others
    by_position: list[tuple[int, float]] = field(default_factory=list)  # (first position of a range, loss)
    by_length: dict[int, float] = field(
        default_factory=dict
    )  # the same text's loss, if so many tokens are seen at once
    # By length: share found, at each depth from the front
    needles: dict[int, list[float]] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        found = {"eval/loss": self.loss, "eval/bits_per_byte": self.bits_per_byte}
        for length, shares in self.needles.items():
            found[f"eval/needles_{length}"] = sum(shares) / len(shares)
        return {name: value for name, value in found.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """An object of evaluations.jsonl, without its step, and without what JSON has not: NaN and infinity."""
        numbers, by_length = _finite(self.numbers().items()), _finite(self.by_length.items())
        return {
            **dict(numbers),
            **({"loss_by_length": dict(by_length)} if by_length else {}),
            "loss_by_position": _finite(self.by_position),
            "needles_by_depth": self.needles,
        }

    def drawings(self) -> dict[str, str]:
        """SVG pictures, by the names of their files."""
        drawn = {}
        points = _finite((length, _perplexity(loss)) for length, loss in self.by_length.items())
        if len(points) > 1:
            drawn["perplexity_by_length.svg"] = picture.curve(points, LENGTH_TITLE, "tokens", "perplexity")
        points = _finite((start + 1, loss) for start, loss in self.by_position)  # a logarithm has no 0
        if len(points) > 1:
            drawn["loss_by_position.svg"] = picture.curve(points, TITLE, X, Y)
        if self.needles:
            lengths = [f"{length:,}" for length in self.needles]
            drawn["needles.svg"] = picture.heat(list(self.needles.values()), lengths, depths(), NEEDLE_TITLE)
        return drawn

    def plots(self) -> dict[str, Any]:
        """What W&B draws."""
        import wandb  # noqa: PLC0415 - takes a second, and rank 0 alone needs it

        drawn: dict[str, Any] = {}
        if len(points := _finite(self.by_position)) > 1:
            table = wandb.Table([X, Y], [list(point) for point in points])
            drawn["eval/loss_by_position"] = wandb.plot.line(table, X, Y, title=TITLE)
        if self.needles:
            drawn["eval/needles_by_depth"] = wandb.Html(self.drawings()["needles.svg"])
        return drawn

    def in_words(self) -> str:
        return ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in self.numbers().items())

    def tables(self) -> str:
        """To be printed."""
        names = ("loss", "perplexity")
        lengths = [[f"{length:,}", *_both(loss)] for length, loss in self.by_length.items()]
        positions = [[f"{start:,}", *_both(loss)] for start, loss in self.by_position]
        needles = [
            [f"{length:,}", *(f"{share:.0%}" for share in [*shares, sum(shares) / len(shares)])]
            for length, shares in self.needles.items()
        ]
        parts = [_table(["tokens seen", *names], lengths), _table(["position from", *names], positions)]
        parts += [_table(["needles at", *depths(), "all"], needles)] if needles else []
        return "\n\n".join(parts)


def depths() -> list[str]:
    return [f"{(depth + 0.5) / NEEDLES:.0%}" for depth in range(NEEDLES)]


def _finite(pairs: Iterable[tuple[Key, float]]) -> list[tuple[Key, float]]:
    return [(key, value) for key, value in pairs if math.isfinite(value)]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf  # where math.exp raises OverflowError


def _both(loss: float) -> list[str]:
    return [f"{loss:.4f}", f"{_perplexity(loss):.4g}"]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in (names, *rows))
