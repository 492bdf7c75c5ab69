"""How many blocks to keep in the kernel at a time.

A drive is busy when enough *bytes* are asked of it: small blocks need a longer queue, large ones do not. Measured on
one directory (the table is in ``docs/io.md``), blocks of 256 KiB and more gain nothing beyond 32 in flight, which are
8 MiB, and blocks of 64 KiB gain up to 128, which are 8 MiB as well. So each directory is given 8 MiB, and never fewer
than 32 blocks. More than what can be on its way at all is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["BLOCK_BYTES", "DEFAULT_QUEUE_DEPTH", "LONGEST_QUEUE", "depth_for"]

BLOCK_BYTES = 1 << 20
"""Transfers are cut into blocks of this size."""
DEFAULT_QUEUE_DEPTH = 32
"""Of one directory."""
LONGEST_QUEUE = 256
"""What a session's engine is opened for; a block costs about 300 bytes of rings, which old kernels count as locked."""
_BUSY_BYTES = 8 << 20


def depth_for(
    sizes: Mapping[int, int], *, num_directories: int, in_flight_bytes: int | None = None
) -> int:
    """Return the queue depth for transfers of ``sizes[nbytes]`` tensors of each size.

    Args:
        sizes: what a plan puts on disk; empty where that is not known yet: large tensors are assumed.
        num_directories: extents are spread over so many.
        in_flight_bytes: at most this much is on its way at a time (None: no bound).
    """
    num_blocks = sum(-(-nbytes // BLOCK_BYTES) * count for nbytes, count in sizes.items())
    total_bytes = sum(nbytes * count for nbytes, count in sizes.items())
    mean_bytes = max(1, total_bytes // num_blocks) if num_blocks else BLOCK_BYTES
    depth = num_directories * max(DEFAULT_QUEUE_DEPTH, -(-_BUSY_BYTES // mean_bytes))
    if in_flight_bytes is not None:
        depth = min(depth, -(-in_flight_bytes // mean_bytes))
    return max(DEFAULT_QUEUE_DEPTH, min(depth, LONGEST_QUEUE))
