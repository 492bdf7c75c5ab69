"""Text to train on that every Linux machine with Python has: sources, headers and documentation.

Bytes are the tokens. Files are taken once each by content, in an order that depends on the content
only, and every 50th (by its digest) is kept for validation. The digest of the whole text is part of
every result, as machines differ in what is installed.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (
    ".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".c", ".cc", ".cpp", ".cu", ".cuh", ".hpp",
    ".inl", ".pl", ".pm", ".tcl", ".sh",
)  # fmt: skip
SMALLEST, LARGEST = 512, 2_000_000
LONGEST_LINE = 250  # on average; longer ones are data or minified programs
SMALLEST_TEXT, VALIDATION_BYTES = 100_000, 4_000_000


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation text as uint8 tensors, and what they were made of."""

    train: Tensor
    valid: Tensor
    digest: str
    num_files: int


def roots() -> list[Path]:
    """Return where text is looked for: Python's library and packages, documentation, headers."""
    paths = sysconfig.get_paths()
    named = (
        paths["stdlib"], paths["purelib"], "/usr/lib", "/usr/include", "/usr/share", "/usr/local",
        "/opt",
    )  # fmt: skip
    found = dict.fromkeys(Path(name).resolve() for name in named)
    return [path for path in found if path.is_dir()]


def text_files(places: list[Path]) -> Iterator[Path]:
    """Yield text files below `places`, sorted within each, no link followed, none twice."""
    seen: set[str] = set()
    for place in places:
        for folder, folders, files in os.walk(place):
            if folder in seen:
                folders.clear()
                continue
            seen.add(folder)
            folders.sort()
            for name in sorted(files):
                if name.endswith(SUFFIXES):
                    yield Path(folder, name)


def read_text(path: Path) -> tuple[bytes, bytes] | None:
    """Return (digest, content) of a file of prose or program, None of anything else."""
    try:
        if path.is_symlink() or not SMALLEST <= path.stat().st_size <= LARGEST:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    if b"\0" in data or len(data) > LONGEST_LINE * (1 + data.count(b"\n")):
        return None
    return hashlib.blake2b(data, digest_size=12).digest(), data


def load_corpus(num_bytes: int, places: list[Path] | None = None) -> Corpus:
    """Return up to `num_bytes` of training text, fewer where the machine has fewer.

    Raises:
        ValueError: if there are less than 100,000 bytes (or `num_bytes`).
    """
    train: dict[bytes, bytes] = {}
    valid: dict[bytes, bytes] = {}
    total, files = 0, text_files(roots() if places is None else places)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        while (total < num_bytes or not valid) and (batch := list(islice(files, 512))):
            for found in pool.map(read_text, batch):
                if found is None or found[0] in train or found[0] in valid:
                    continue
                key, data = found
                if int.from_bytes(key[:4], "little") % 50 == 0:
                    valid[key] = data
                elif total < num_bytes:
                    train[key] = data
                    total += len(data)
    if total < min(num_bytes, SMALLEST_TEXT) or not valid:
        raise ValueError(f"only {total} bytes of text were found: name other places")
    joined = b"".join(train[key] for key in sorted(train))[:num_bytes]
    digest = hashlib.blake2b(joined, digest_size=8).hexdigest()
    held_out = b"".join(valid[key] for key in sorted(valid))[:VALIDATION_BYTES]
    return Corpus(
        train=_tensor(joined), valid=_tensor(held_out), digest=digest,
        num_files=len(train) + len(valid),
    )  # fmt: skip


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
