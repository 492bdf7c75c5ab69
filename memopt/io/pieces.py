"""How one transfer is cut into pieces that the kernel accepts, without copying the transfer.

A page is either direct or buffered for all of a transfer, never both: a buffered write of half a page reads the other
half first, and would put those stale bytes back over a direct write that runs beside it. So a transfer is cut at
multiples of the file's ``unit_bytes``::

    offset                                                        offset + nbytes
      |--head--|===================== body ====================|--tail--|
      buffered            direct (or buffered where the          buffered, or direct through one
                          address is not aligned)                bounce block

The tail may use a bounce block when a read can take more bytes than asked (they exist in the file) or when a write may
overwrite the rest of the unit (``padded``: it belongs to the same extent). At most one unit per transfer is copied.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from memopt.io.buffers import BounceBlock, BouncePool, Buffer, BufferView, view_of
from memopt.io.files import IoFile

__all__ = [
    "Kind",
    "Piece",
    "Transfer",
    "TransferError",
    "plan_batch",
    "plan_transfer",
    "release_bounces",
    "transfer_error",
]

Kind = Literal["read", "write"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """Move ``buffer`` to (``"write"``) or from (``"read"``) ``file`` at ``offset``.

    ``padded``: the bytes between the end of the buffer and the next multiple of ``file.unit_bytes`` belong to this
    transfer; a write may overwrite them and a read may fetch them. That lets an odd length use direct I/O.
    """

    kind: Kind
    file: IoFile
    offset: int
    buffer: Buffer
    padded: bool = False


class TransferError(OSError):
    """A failed transfer: ``errno``, ``filename``, ``offset`` and ``operation`` (``"read"`` or ``"write"``)."""

    offset: int
    operation: str


def transfer_error(
    code: int, kind: Kind, path: str, offset: int, detail: str = ""
) -> TransferError:
    """Build the error of a transfer that stopped at ``offset`` of ``path`` with errno ``code``."""
    text = f"{os.strerror(code)}: {kind} at offset {offset}{': ' if detail else ''}{detail}"
    error = TransferError(code, text, path)
    error.offset = offset
    error.operation = kind
    return error


@dataclass(eq=False, kw_only=True, slots=True)
class Piece:
    """A run of bytes that goes through one descriptor.

    ``view`` is what the kernel reads or fills. With a ``bounce`` block it is that block's view, whose first bytes stand
    for ``payload``: the engine copies them there after a read, and from there when a write begins (not before: a
    prepared write may be planned before its bytes exist).
    """

    kind: Kind
    file: IoFile
    direct: bool
    offset: int
    view: BufferView
    bounce: BounceBlock | None = None
    payload: BufferView | None = None
    padding_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """Bytes of the caller's buffer that this piece moves."""
        return self.view.nbytes - self.padding_bytes

    def error(self, code: int, done_bytes: int, detail: str = "") -> TransferError:
        """Return the error for this piece after ``done_bytes`` of it were transferred."""
        return transfer_error(code, self.kind, self.file.path, self.offset + done_bytes, detail)

    def end_of_file(self, done_bytes: int) -> TransferError:
        """Return the error for a transfer that the file ended: reads of missing bytes, writes that write nothing."""
        if self.kind == "write":
            return self.error(errno.EIO, done_bytes, "the kernel wrote no byte")
        missing = self.view.nbytes - done_bytes
        return self.error(
            errno.ENODATA, done_bytes, f"the file ends {missing} bytes before the end of the read"
        )


def plan_transfer(transfer: Transfer, pool: BouncePool) -> list[Piece]:
    """Cut ``transfer`` into pieces; takes a bounce block from ``pool`` where an odd tail goes direct.

    Raises:
        ValueError: negative offset, closed file, or a buffer that :func:`memopt.io.buffers.view_of` refuses.
    """
    file = transfer.file
    if transfer.offset < 0:
        raise ValueError(f"offset={transfer.offset} is negative; offsets of {file.path} start at 0")
    if file.closed:
        raise ValueError(f"{file.path} is closed")
    view = view_of(transfer.buffer, writable=transfer.kind == "read")
    if view.nbytes == 0:
        return []
    unit = file.unit_bytes
    begin, end = transfer.offset, transfer.offset + view.nbytes
    body_begin = -(-begin // unit) * unit
    body_end = end // unit * unit
    padded_tail = transfer.padded and body_end < end and body_end >= begin
    aligned = (view.address + body_begin - begin) % file.mem_align_bytes == 0
    if not file.is_direct or body_begin > end or not (aligned or padded_tail):
        return [_piece(transfer, begin, view, direct=False)]
    pieces = (
        [_piece(transfer, begin, view.part(0, body_begin - begin), direct=False)]
        if body_begin > begin
        else []
    )
    if body_end > body_begin:
        body = view.part(body_begin - begin, body_end - begin)
        pieces.append(_piece(transfer, body_begin, body, direct=aligned))
    if end > max(body_end, body_begin):
        tail_begin = max(body_end, body_begin)
        tail = view.part(tail_begin - begin, view.nbytes)
        if padded_tail and pool.block_bytes >= unit:
            pieces.append(_bounced(transfer, tail_begin, tail, pool))
        else:
            pieces.append(_piece(transfer, tail_begin, tail, direct=False))
    return pieces


def _piece(transfer: Transfer, offset: int, view: BufferView, *, direct: bool) -> Piece:
    return Piece(kind=transfer.kind, file=transfer.file, direct=direct, offset=offset, view=view)


def _bounced(transfer: Transfer, offset: int, tail: BufferView, pool: BouncePool) -> Piece:
    block = pool.take()
    unit = block.view.part(0, transfer.file.unit_bytes)
    if transfer.kind == "write":
        unit.view[tail.nbytes :] = bytes(unit.nbytes - tail.nbytes)
    return Piece(
        kind=transfer.kind,
        file=transfer.file,
        direct=True,
        offset=offset,
        view=unit,
        bounce=block,
        payload=tail,
        padding_bytes=unit.nbytes - tail.nbytes,
    )


def plan_batch(transfers: Sequence[Transfer], pool: BouncePool) -> list[Piece]:
    """Cut every transfer of a batch; gives the bounce blocks back when one of them is refused."""
    pieces: list[Piece] = []
    try:
        for transfer in transfers:
            pieces.extend(plan_transfer(transfer, pool))
    except BaseException:
        release_bounces(pieces, pool)
        raise
    return pieces


def release_bounces(pieces: Sequence[Piece], pool: BouncePool) -> None:
    """Give the bounce blocks of ``pieces`` back to ``pool``; call once, when no piece is in flight."""
    for piece in pieces:
        if piece.bounce is not None:
            pool.give(piece.bounce)
