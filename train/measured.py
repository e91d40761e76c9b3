"""What an evaluation has found, as numbers, a line of evaluations.jsonl, and a picture."""

from dataclasses import dataclass, field
from typing import Any

from ringspan.train import picture
from ringspan.train.needle import NEEDLES

TITLE, X, Y = "loss by position in the document", "position", "nats a token"
NEEDLE_TITLE = "needles found, by tokens of the document (down) and depth of the needle (across)"


@dataclass
class Measured:
    loss: float | None = None  # nats a label token of held-out text
    bits_per_byte: float | None = None  # of its text, were all documents' ends and first tokens as costly as others
    by_position: list[tuple[int, float]] = field(default_factory=list)  # (first position of a range, loss)
    # By length: share found, at each depth from the front
    needles: dict[int, list[float]] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        found = {"eval/loss": self.loss, "eval/bits_per_byte": self.bits_per_byte}
        for length, shares in self.needles.items():
            found[f"eval/needles_{length}"] = sum(shares) / len(shares)
        return {name: value for name, value in found.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """An object of evaluations.jsonl, without its step."""
        return {**self.numbers(), "loss_by_position": self.by_position, "needles_by_depth": self.needles}

    def drawings(self) -> dict[str, str]:
        """SVG pictures, by the names of their files."""
        drawn = {}
        if len(self.by_position) > 1:
            points = [(start + 1, loss) for start, loss in self.by_position]  # a logarithm has no 0
            drawn["loss_by_position.svg"] = picture.curve(points, TITLE, X, Y)
        if self.needles:
            lengths = [f"{length:,}" for length in self.needles]
            depths = [f"{(depth + 0.5) / NEEDLES:.0%}" for depth in range(NEEDLES)]
            drawn["needles.svg"] = picture.heat(list(self.needles.values()), lengths, depths, NEEDLE_TITLE)
        return drawn

    def plots(self) -> dict[str, Any]:
        """What W&B draws."""
        import wandb  # noqa: PLC0415 - takes a second, and rank 0 alone needs it

        if len(self.by_position) < 2:
            return {}
        table = wandb.Table([X, Y], [list(point) for point in self.by_position])
        return {"eval/loss_by_position": wandb.plot.line(table, X, Y, TITLE)}

    def in_words(self) -> str:
        return ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in self.numbers().items())
