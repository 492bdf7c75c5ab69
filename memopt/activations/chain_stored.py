"""A CUDA tensor in an extent that goes out and comes back over the native chain (chain.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.activations.cuda import Landing
from memopt.activations.tensors import flat_elements, nbytes_of, shared_alias
from memopt.io import RawBuffer
from memopt.io.engine import fresh
from memopt.memory.pinned import HostBuffer

if TYPE_CHECKING:
    from memopt.activations.chain import Chain
    from memopt.activations.cuda import CudaTransfers, Outgoing
    from memopt.activations.spill import StagedWrite
    from memopt.activations.stored import Label, Stored


class ChainStored:
    """One CUDA tensor in an extent; its pieces are under way in either direction without the host."""

    _allocate = staticmethod(torch.empty_strided)

    def __init__(self, source: Tensor, transfers: CudaTransfers, extent: Any) -> None:
        assert transfers.spill is not None
        assert transfers.chain is not None
        self.nbytes = self.fetch_bytes = nbytes_of(source)
        self._transfers = transfers
        self._area = transfers.spill
        self._chain: Chain = transfers.chain
        self._extent = extent
        self._outgoing: Outgoing | None = None
        self._pieces: list[tuple[StagedWrite, Any]] = []
        self._shape = source.shape
        self._stride = source.stride()
        self._dtype = source.dtype
        self._landing: Landing | None = None
        self._begun_bytes = 0
        self._is_waiting = False
        self._home: Tensor | None = None
        self._lost: OSError | None = None

    # - Out

    @classmethod
    def begin(
        cls, tensor: Tensor, transfers: CudaTransfers, label: Label, *, clone: bool
    ) -> Stored | None:
        """Start the way out; None when there is no extent or staging for it."""
        area, chain = transfers.spill, transfers.chain
        assert area is not None
        assert chain is not None
        nbytes = nbytes_of(tensor)
        extent = area.alloc(nbytes)
        if extent is None:
            return None
        try:
            buffer = area.stage(min(nbytes, chain.piece_bytes))
        except BaseException:
            area.store.free(extent)
            raise
        if buffer is None:
            area.store.free(extent)
            return None
        source = tensor.clone() if clone else shared_alias(tensor)
        stored = cls(source, transfers, extent)
        return stored if stored._send(source, buffer, label) else None

    def _send(self, source: Tensor, buffer: HostBuffer | None, label: Label) -> bool:
        """Queue every piece's copy and write; the source is held until the last copy has read it."""
        transfers, area, chain = self._transfers, self._area, self._chain
        stream = transfers.begin_out(self.nbytes)
        try:
            for offset in range(0, self.nbytes, chain.piece_bytes):
                size = min(chain.piece_bytes, self.nbytes - offset)
                buffer = buffer or area.stage(size)
                if buffer is None:
                    return False
                self._send_piece(source, stream, buffer, offset)
                buffer = None
        finally:
            self._outgoing = transfers.end_out(source, label)
        transfers.moved.ssd_write_bytes += self.nbytes
        return True

    def _send_piece(self, source: Tensor, stream: Any, buffer: HostBuffer, offset: int) -> None:
        try:
            self._chain.copy(stream, buffer.address, source.data_ptr() + offset, buffer.nbytes)
            copied = self._chain.record(stream)
            ticket = self._chain.write(copied, self._extent, buffer, offset)
        except BaseException:
            buffer.release()
            raise
        self._pieces.append((self._area.watch(ticket, buffer), copied))

    def protect(self) -> None:
        """Order the program's write after the copy out."""
        if self._outgoing is not None:
            self._transfers.protect(self._outgoing)
            self._outgoing = None

    # - In

    def prefetch(self) -> int:
        """Queue the way in, as far as there is staging; the rest follows as staging becomes free."""
        if self._extent is None:
            return 0
        if not self._is_waiting and self._begun_bytes < self.nbytes:
            self._is_waiting = True
            self._chain.later(self)
            self._chain.pump()
        return self.nbytes if self._landing is not None else 0

    def advance(self, *, wait: bool) -> bool:
        """Queue the pieces that there is staging for; return whether nothing (more) is asked for."""
        if self._extent is None or not (wait or self._is_waiting):
            return True
        while self._begun_bytes < self.nbytes:
            if not self._land(wait=wait):
                return False
        self._is_waiting = False
        return True

    def _land(self, *, wait: bool) -> bool:
        """Queue the next piece's way to its place in the landing tensor; return whether there was room for that."""
        chain, offset = self._chain, self._begun_bytes
        size = min(chain.piece_bytes, self.nbytes - offset)
        write, copied = self._pieces[offset // chain.piece_bytes]
        buffer = None
        if write.buffer is None and (wait or chain.can_queue):
            buffer = self._area.stage(size, wait=wait)
        if write.buffer is None and buffer is None:
            chain.is_dry = True
            return False
        landing = self._landing = self._landing or self._new_landing()
        assert landing.tensor is not None
        destination = landing.tensor.data_ptr() + offset
        moved = self._transfers.moved
        if buffer is None:
            landing.event = chain.fetch_staged(write, copied, destination)
        else:
            landing.event = chain.read(self._extent, buffer, offset, destination)
            moved.ssd_read_bytes += size
        moved.h2d_bytes += size
        self._begun_bytes += size
        return True

    def _new_landing(self) -> Landing:
        compute = torch.cuda.current_stream(self._transfers.device)
        tensor = self._new_tensor()
        return Landing(tensor, self._chain.begin_in(compute), compute)

    def take(self, *, keep: bool) -> Tensor:
        """Return the tensor; the current stream waits for its last piece. The extent stays until the graph lets go."""
        del keep
        if self._home is None and self._lost is None and not self.advance(wait=True):
            self.settle()
        if self._lost is not None:
            raise fresh(self._lost)
        if self._home is not None:
            tensor = self._new_tensor()
            flat_elements(tensor).copy_(self._home)
            return tensor
        landing, self._landing = self._landing, None
        assert landing is not None
        self._begun_bytes, self._is_waiting = 0, False
        self._chain.poll()
        self._chain.check_when_backward_ends()
        self._chain.pump()
        self._transfers.wait_timed(landing.event, "fetch")
        return landing.take()

    def check(self) -> None:
        """Raise the failure of a read whose bytes were handed out already."""
        self._chain.check()

    # - The end

    def settle(self) -> None:
        """Read the tensor into host memory and give its extent back; what cannot be read is raised by `take`."""
        if self._extent is None:
            return
        self._landing = None
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        memory = RawBuffer(address=flat.data_ptr(), nbytes=self.nbytes, owner=flat)
        try:
            self._area.store.read(self._extent, memory).wait()
            self._home = flat.view(self._dtype)
        except OSError as error:
            self._lost = fresh(error)
        self._free()

    def _new_tensor(self) -> Tensor:
        return self._allocate(
            self._shape, self._stride, dtype=self._dtype, device=self._transfers.device
        )

    def _free(self) -> None:
        if self._extent is not None:
            extent, self._extent = self._extent, None
            self._area.store.free(extent)

    def __del__(self) -> None:
        """Give the extent back when the graph that needed it is gone; what is under way ends by itself."""
        self._free()
