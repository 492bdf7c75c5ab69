"""The questions of `memopt doctor`, in the order they are asked and shown."""

from __future__ import annotations

from memopt.cli.checks import device, host, software, storage
from memopt.cli.checks.base import Check, Context, Question, ask

QUESTIONS: tuple[tuple[str, Question], ...] = (
    ("versions", software.versions),
    ("packages", software.packages),
    ("device", device.devices),
    ("link", device.links),
    ("cuDNN attention", device.attention),
    ("CUDA kernels", software.kernels),
    ("host memory", host.memory),
    ("page-locked memory", host.page_locking),
    ("NUMA", host.numa),
    ("malloc", software.malloc),
    ("I/O engine", storage.engines),
    ("SSD", storage.directories),
    ("probe cache", storage.cache),
)


def run_checks(
    context: Context, questions: tuple[tuple[str, Question], ...] = QUESTIONS
) -> list[Check]:
    """Ask every question; none can keep another from being asked."""
    return [check for name, question in questions for check in ask(name, question, context)]


__all__ = ["QUESTIONS", "Check", "Context", "run_checks"]
