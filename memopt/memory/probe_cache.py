"""What `memopt probe` measured, kept from run to run: one small JSON file per thing measured.

A file's name is a hash of its key, everything that the figures depend on; the whole key stands inside and is compared,
so that a collision or an edited file is a miss, not a wrong rate. When something in the key changes (another GPU, a new
driver, more CPUs, the directory on another disk), the name changes and the old file is simply not looked at again.

Files are written beside their place, synced, and renamed over it: a reader sees the old file or the new one, never half
of one, and of two writers the last wins with a whole file. One file per thing means that two writers of different
things cannot lose each other's. Whatever cannot be read or written is a note, never an error: without a cache a session
measures for itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = "memopt-probe-1"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Figures out of the cache.

    Args:
        rates: what was measured, by name; finite and not negative.
        measured_at: when, ISO 8601 in UTC.
        path: the file.
    """

    rates: Mapping[str, float]
    measured_at: str
    path: str

    @property
    def provenance(self) -> str:
        """Where the figures come from, for people."""
        return f"kept by memopt probe on {self.measured_at[:10]}"


@dataclass(kw_only=True)
class ProbeCache:
    """The cache in one directory.

    Args:
        directory: where the files are; None: the cache is off.
        notes: what could not be read or written, and why.
        is_refused: whether figures could not be written.
    """

    directory: Path | None
    notes: list[str] = field(default_factory=list)
    is_refused: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ProbeCache:
        """Return the cache that MEMOPT_CACHE names ("off" for none), or else the user's own."""
        env = os.environ if environment is None else environment
        named = env.get("MEMOPT_CACHE", "")
        if named.strip().lower() == "off":
            return cls(directory=None)
        if named:
            return cls(directory=Path(named).expanduser())
        base = env.get("XDG_CACHE_HOME", "")
        if not base or not Path(base).is_absolute():  # the XDG specification: ignore relative paths
            home = env.get("HOME", "")
            if not home:
                return cls(directory=None, notes=["no probe cache: HOME is not set"])
            base = str(Path(home) / ".cache")
        return cls(directory=Path(base) / "memopt")

    def path(self, kind: str, key: Mapping[str, Any]) -> Path | None:
        """Return the file of `key`; None where the cache is off."""
        if self.directory is None:
            return None
        text = json.dumps([kind, key], sort_keys=True)
        return self.directory / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def load(self, kind: str, key: Mapping[str, Any], names: tuple[str, ...]) -> Kept | None:
        """Return the figures kept for `key`; None where there are none, or none that can be used.

        Args:
            kind: what was measured, "link" or "ssd"; begins the file's name.
            key: everything that the figures depend on, of JSON types.
            names: the rates that must be there.
        """
        path = self.path(kind, key)
        if path is None:
            return None
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.notes.append(f"probe cache {path} is ignored: {error}")
            return None
        try:
            return _checked(json.loads(text), kind, key, names, path)
        except KeyError as error:
            self.notes.append(f"probe cache {path} is ignored: it has no {error}")
        except (ValueError, TypeError) as error:
            self.notes.append(f"probe cache {path} is ignored: {error}")
        return None

    def store(self, kind: str, key: Mapping[str, Any], rates: Mapping[str, float]) -> Path | None:
        """Keep figures; return the file, or None (with a note) where that is not possible."""
        path = self.path(kind, key)
        if path is None:
            return None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        document = {
            "format": FORMAT,
            "kind": kind,
            "key": dict(key),
            "measured_at": now,
            "rates": dict(rates),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, json.dumps(document, indent=1) + "\n")
        except OSError as error:
            self.notes.append(f"the figures are not kept: {error}")
            self.is_refused = True
            return None
        return path


def _checked(
    document: Any, kind: str, key: Mapping[str, Any], names: tuple[str, ...], path: Path
) -> Kept:
    """Return the document as figures.

    Raises:
        ValueError: another version, another key, or rates that are no rates.
    """
    if not isinstance(document, dict):
        raise ValueError(f"it holds a {type(document).__name__}")  # noqa: TRY004 - damaged, not misused
    if document.get("format") != FORMAT:
        raise ValueError(f"its format is {document.get('format')!r}, this memopt's is {FORMAT!r}")
    if document["kind"] != kind or document["key"] != json.loads(json.dumps(key)):
        raise ValueError("its key is not the one its name stands for")
    rates = {name: float(document["rates"][name]) for name in names}
    wrong = {name: rate for name, rate in rates.items() if not math.isfinite(rate) or rate < 0}
    if wrong:
        raise ValueError(f"these are no rates: {wrong}")
    return Kept(rates=rates, measured_at=str(document["measured_at"]), path=str(path))


def _write_whole(path: Path, text: str) -> None:
    """Write `text` so that `path` is at every moment the old file or the whole new one, also after a crash."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
