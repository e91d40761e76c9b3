"""What an evaluation has found, as numbers, a line of evaluations.jsonl, and a picture."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringspan.train import picture

TITLE, X, Y = "loss by position in the document", "position", "nats a token"


@dataclass
class Measured:
    loss: float | None = None  # nats a label token of held-out text
    bits_per_byte: float | None = None  # of its text, were all documents' ends and first tokens as costly as others
    by_position: list[tuple[int, float]] = field(default_factory=list)  # (first position of a range, loss)
    needles: dict[int, list[float]] = field(
        default_factory=dict
    )  # by length: share found, at each depth from the front

    def numbers(self) -> dict[str, float]:
        found = {"eval/loss": self.loss, "eval/bits_per_byte": self.bits_per_byte}
        for length, shares in self.needles.items():
            found[f"eval/needles_{length}"] = sum(shares) / len(shares)
        return {name: value for name, value in found.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """An object of evaluations.jsonl, without its step."""
        return {**self.numbers(), "loss_by_position": self.by_position, "needles_by_depth": self.needles}

    def write(self, folder: Path, step: int, tokens: int) -> None:
        """Another line of folder/evaluations.jsonl, and folder/loss_by_position.svg."""
        with open(folder / "evaluations.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "tokens": tokens, **self.record()}) + "\n")
        if len(self.by_position) > 1:
            points = [(start + 1, loss) for start, loss in self.by_position]  # a logarithm has no 0
            (folder / "loss_by_position.svg").write_text(picture.curve(points, TITLE, X, Y), encoding="utf-8")

    def plots(self) -> dict[str, Any]:
        """What W&B draws."""
        import wandb  # noqa: PLC0415 - takes a second, and rank 0 alone needs it

        if len(self.by_position) < 2:
            return {}
        table = wandb.Table([X, Y], [list(point) for point in self.by_position])
        return {"eval/loss_by_position": wandb.plot.line(table, X, Y, TITLE)}

    def in_words(self) -> str:
        return ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in self.numbers().items())
