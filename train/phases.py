"""A length curriculum: from some steps on, rows of another length."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(kw_only=True)
class Phase:
    """From the step after `step` updates on. A phase is a fresh pass over the text, cut into rows of its own length."""

    step: int = 0  # updates before the phase
    seq_len: int = 0  # tokens, whole sequence
    rope_base: float | None = None  # null: model.rope_base


def check_phases(phases: Sequence[Phase]) -> None:
    """Raises ValueError where a phase would never be, or has no length."""
    for number, phase in enumerate(phases):
        if phase.seq_len < 1:
            raise ValueError(f"phases[{number}].seq_len={phase.seq_len}: must be 1 or more")
        if phase.step < 1:
            raise ValueError(f"phases[{number}].step={phase.step}: must be 1 or more; before it seq_len holds")
        if phase.rope_base is not None and phase.rope_base <= 1:
            raise ValueError(f"phases[{number}].rope_base={phase.rope_base}: must be above 1")
    if bad := next((pair for pair in pairwise(phases) if pair[0].step >= pair[1].step), None):
        raise ValueError(f"phases: step={bad[1].step} after step={bad[0].step}; they must go up")


def phase_at(phases: Sequence[Phase], first: Phase, step: int) -> Phase:
    """The phase of the update after `step` updates; `first` is the one before all others."""
    return next((phase for phase in reversed(phases) if phase.step <= step), first)
