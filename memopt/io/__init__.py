"""Storage engines and extent files. Knows nothing of torch; see ``docs/io.md``."""

from __future__ import annotations

from memopt.io.areas import DiskFull
from memopt.io.buffers import Buffer, RawBuffer
from memopt.io.engine import Engine, EngineName, EngineStats, Ticket, open_engine
from memopt.io.extents import Extent, ExtentStats, ExtentStore, ExtentStoreFull
from memopt.io.files import IoFile, create_unlinked, open_file
from memopt.io.pieces import Transfer, TransferError

__all__ = [
    "Buffer",
    "DiskFull",
    "Engine",
    "EngineName",
    "EngineStats",
    "Extent",
    "ExtentStats",
    "ExtentStore",
    "ExtentStoreFull",
    "IoFile",
    "RawBuffer",
    "Ticket",
    "Transfer",
    "TransferError",
    "create_unlinked",
    "open_engine",
    "open_file",
]
