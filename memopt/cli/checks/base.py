"""What every check of `memopt doctor` takes and gives.

A check asks one question of the machine and answers with a `Check`. It may read files below `Context.root`, which tests
replace. What it cannot find out it says, and whatever it raises becomes its answer, so that none takes another down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "weak", "broken", "absent", "unknown"]
"""ok; works, but slowly or with a limit; does not work at all; not on this machine; could not be found out."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One answer.

    Args:
        name: what was asked.
        status: see `Status`.
        found: the answer in one line.
        todo: what to do where something is weak or broken.
        figures: the facts behind it, of JSON types; bytes, seconds, bytes per second.
    """

    name: str
    status: Status
    found: str
    todo: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dictionary."""
        return {**asdict(self), "figures": dict(self.figures)}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One CUDA device as torch sees it; `pci` is its address ("0000:1b:00.0"), empty where torch does not tell."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: str
    pci: str


def _silent(label: str, share: float) -> None:
    del label, share


@dataclass(kw_only=True)
class Context:
    """What the checks look at.

    Args:
        root: where /proc and /sys are found.
        quick: do not measure rates.
        ssd: requests DIR or DIR:SIZE of the command line.
        gpus: CUDA devices that work.
        gpu_problem: why CUDA does not work although it should; empty otherwise.
        measured: rates that a check measured, for the checks after it.
        progress: told what is being measured and how much of it is done.
    """

    root: Path = Path("/")
    quick: bool = False
    ssd: Sequence[str] = ()
    gpus: Sequence[Gpu] = ()
    gpu_problem: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    progress: Callable[[str, float], None] = _silent

    def read(self, path: str) -> str | None:
        """Return the stripped text of a file below `root`; None where there is none that can be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None


Question = Callable[[Context], Sequence[Check]]


def ask(name: str, question: Question, context: Context) -> list[Check]:
    """Ask one question; a question that fails is answered by its own failure."""
    try:
        return list(question(context))
    except Exception as error:  # noqa: BLE001 - a doctor who faints at one symptom helps nobody
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        return [Check(name=name, status="unknown", found=f"could not be found out: {reason}")]
