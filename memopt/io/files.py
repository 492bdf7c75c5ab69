"""Files that the engines read and write: two descriptors, the alignment, and where the bytes really go.

Direct I/O (O_DIRECT) is the fast path and the honest one: it bypasses the page cache, so it neither eats the host
memory that the user budgets nor hides a device's error until write-back. It needs aligned offsets, lengths and
addresses, which the file system is asked for (``statx`` with ``STATX_DIOALIGN``, Linux 6.1) and which a real write and
read of one block confirm. What cannot be aligned goes through a second, ordinary descriptor, synchronously
(``RWF_DSYNC``), so that its error still belongs to the transfer that met it.

A spill file never has a name that outlives a crash: it is created with ``O_TMPFILE``, or where the file system lacks
that, unlinked right after it was opened.

No descriptor here is 0, 1 or 2. In a process that was started without standard streams (a daemon, ``>&-``) the next
file opened would get one of these numbers, and what a C library prints would be written over the tensors in it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from memopt.types.errors import NO_ROOM_ERRNOS

__all__ = ["DirectAlignment", "IoFile", "create_unlinked", "direct_alignment", "open_file"]

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_MEM_ALIGN_AT = 0x98
_DEFAULT_ALIGN = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_O_TMPFILE = getattr(os, "O_TMPFILE", 0)
_FIRST_FD = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectAlignment:
    """What direct I/O needs: multiples of ``mem_bytes`` for addresses, of ``offset_bytes`` for offsets and lengths."""

    mem_bytes: int
    offset_bytes: int


@dataclass(kw_only=True, eq=False)
class IoFile:
    """An open file. ``direct_fd`` is -1 where direct I/O does not work, and ``direct_reason`` then says why.

    ``unit_bytes`` is the size at whose multiples transfers are cut into direct and buffered parts: the page size or
    the direct alignment, whichever is larger, so that no page is ever written both ways at once. ``is_long_lived``
    files are worth registering with the kernel.
    """

    path: str
    buffered_fd: int
    direct_fd: int = -1
    mem_align_bytes: int = 1
    unit_bytes: int = _DEFAULT_ALIGN
    direct_reason: str = ""
    is_long_lived: bool = True
    closed: bool = field(default=False, init=False)
    _owners: tuple[io.FileIO, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Give the descriptors to objects that close theirs once, in one step, and when they are dropped."""
        fds = (self.direct_fd, self.buffered_fd)
        self._owners = tuple(io.FileIO(fd, closefd=True) for fd in fds if fd >= 0)

    @property
    def is_direct(self) -> bool:
        """Whether aligned transfers bypass the page cache."""
        return self.direct_fd >= 0

    def close(self) -> None:
        """Close both descriptors; safe to call twice, and again after a KeyboardInterrupt in here."""
        self.closed = True
        self.direct_fd = self.buffered_fd = -1
        for owner in self._owners:
            owner.close()


def direct_alignment(fd: int) -> DirectAlignment | None:
    """Ask the file system for the alignment of direct I/O on ``fd``.

    Returns None when the file does not support direct I/O, and 4096 bytes for both when the kernel cannot say
    (before Linux 6.1, or a file system that does not fill in ``STATX_DIOALIGN``).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        statx = libc.statx
    except AttributeError:
        return DirectAlignment(mem_bytes=_DEFAULT_ALIGN, offset_bytes=_DEFAULT_ALIGN)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return DirectAlignment(mem_bytes=_DEFAULT_ALIGN, offset_bytes=_DEFAULT_ALIGN)
    (mask,) = struct.unpack_from("I", buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return DirectAlignment(mem_bytes=_DEFAULT_ALIGN, offset_bytes=_DEFAULT_ALIGN)
    mem_bytes, offset_bytes = struct.unpack_from("II", buffer, _STATX_MEM_ALIGN_AT)
    if mem_bytes == 0 or offset_bytes == 0:
        return None
    return DirectAlignment(mem_bytes=mem_bytes, offset_bytes=offset_bytes)


def create_unlinked(directory: str | os.PathLike[str], *, direct: bool = True) -> IoFile:
    """Create an empty file in ``directory`` that has no name and vanishes with its last descriptor.

    Raises:
        OSError: the directory is missing, not writable, or its file system is read-only (with errno and path).
    """
    where = os.fspath(directory)
    label = f"{where}/(unlinked spill file)"
    try:
        fd = _open(where, _O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        return _create_named_then_unlink(where, label, direct=direct)
    if not direct or not _O_DIRECT:
        return _with_direct(label, fd, -1, "not asked for")
    try:
        direct_fd = _open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | _O_DIRECT)
    except OSError as error:
        if error.errno == errno.ENOENT:  # no /proc: only a name can be opened twice
            os.close(fd)
            return _create_named_then_unlink(where, label, direct=direct)
        return _with_direct(label, fd, -1, f"O_DIRECT is refused: {error.strerror}")
    return _with_direct(label, fd, direct_fd, "", probe=True)


def _create_named_then_unlink(where: str, label: str, *, direct: bool) -> IoFile:
    fd, path = tempfile.mkstemp(prefix=f".memopt-{os.getpid()}-", suffix=".spill", dir=where)
    fd = _above_standard_streams(fd)
    direct_fd, reason = -1, "not asked for"
    try:
        if direct and _O_DIRECT:
            direct_fd, reason = _open(path, os.O_RDWR | os.O_CLOEXEC | _O_DIRECT), ""
    except OSError as error:
        reason = f"O_DIRECT is refused: {error.strerror}"
    finally:
        Path(path).unlink()
    return _with_direct(label, fd, direct_fd, reason, probe=True)


def open_file(
    path: str | os.PathLike[str], *, writable: bool, create: bool = False, direct: bool = True
) -> IoFile:
    """Open a file that has a name, for example one of another program's swap files.

    Raises:
        OSError: as ``open(2)``; with ``create`` a missing file is made.
    """
    name = os.fspath(path)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    fd = _open(name, flags, 0o644)
    if not direct or not _O_DIRECT:
        return _with_direct(name, fd, -1, "not asked for")
    try:
        direct_fd = _open(name, (flags & ~os.O_CREAT) | _O_DIRECT)
    except OSError as error:
        return _with_direct(name, fd, -1, f"O_DIRECT is refused: {error.strerror}")
    return _with_direct(name, fd, direct_fd, "")


def _open(path: str, flags: int, mode: int = 0) -> int:
    return _above_standard_streams(os.open(path, flags, mode))


def _above_standard_streams(fd: int) -> int:
    """Return a descriptor of the same file that is no standard stream's number."""
    if fd >= _FIRST_FD:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    finally:
        os.close(fd)


def _with_direct(path: str, fd: int, direct_fd: int, reason: str, *, probe: bool = False) -> IoFile:
    """Build the IoFile, dropping ``direct_fd`` where the file system or a real block says it does not work."""
    align = direct_alignment(fd) if direct_fd >= 0 else None
    if direct_fd >= 0:
        if align is None:
            reason = "the file system says it has no direct I/O here"
        elif probe:
            reason = _probe_direct(direct_fd, max(align.offset_bytes, mmap.PAGESIZE))
        if reason:
            os.close(direct_fd)
            direct_fd = -1
    if direct_fd < 0 or align is None:
        return IoFile(path=path, buffered_fd=fd, unit_bytes=mmap.PAGESIZE, direct_reason=reason)
    unit_bytes = max(align.offset_bytes, mmap.PAGESIZE)
    return IoFile(
        path=path,
        buffered_fd=fd,
        direct_fd=direct_fd,
        mem_align_bytes=align.mem_bytes,
        unit_bytes=unit_bytes,
    )


def _probe_direct(fd: int, nbytes: int) -> str:
    """Write, read back and remove one block of a new file; return why that failed, or an empty string.

    A full disk is not a reason to give up direct I/O: it is reported where space is reserved.
    """
    pattern = os.urandom(32) * (nbytes // 32)
    with mmap.mmap(-1, nbytes) as block, mmap.mmap(-1, nbytes) as back:
        block[:] = pattern
        try:
            written = os.pwritev(fd, [block], 0)
            read = os.preadv(fd, [back], 0)
        except OSError as error:
            return (
                "" if error.errno in NO_ROOM_ERRNOS else f"a direct write failed: {error.strerror}"
            )
        finally:
            os.ftruncate(fd, 0)
        if written != nbytes or read != nbytes or back[:] != pattern:
            return (
                f"a direct block of {nbytes} bytes did not come back (wrote {written}, read {read})"
            )
    return ""
