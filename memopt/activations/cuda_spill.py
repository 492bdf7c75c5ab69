"""A CUDA tensor on SSD: device -> page-locked staging -> extent, and back the same way.

The copy out is asynchronous, so the write can only be submitted once its event has passed: one
thread of the spill area waits for it. Reads are started by `prefetch`; the copy in follows when
the tensor is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memopt.activations.tensors import flat_elements, nbytes_of, shared_alias
from memopt.io import RawBuffer
from memopt.io.engine import fresh
from memopt.memory.pinned import HostBuffer

if TYPE_CHECKING:
    from memopt.activations.cuda import CudaTransfers, Outgoing
    from memopt.activations.spill import SpillArea
    from memopt.activations.stored import Label, Stored


class CudaSpillStored:
    """One CUDA tensor in an extent."""

    def __init__(
        self, source: Tensor, transfers: CudaTransfers, extent: Any, outgoing: Outgoing, ticket: Any
    ) -> None:
        assert transfers.spill is not None
        self.nbytes = self.fetch_bytes = nbytes_of(source)
        self._area: SpillArea = transfers.spill
        self._transfers = transfers
        self._extent = extent
        self._outgoing: Outgoing | None = outgoing
        self._write = ticket
        self._shape = source.shape
        self._stride = source.stride()
        self._dtype = source.dtype
        self._reading: tuple[Any, HostBuffer] | None = None
        self._home: Tensor | None = None
        self._lost: OSError | None = None

    @classmethod
    def begin(
        cls, tensor: Tensor, transfers: CudaTransfers, label: Label, *, clone: bool
    ) -> Stored | None:
        """Start the way out; None when there is no area, extent or staging for it."""
        area = transfers.spill
        if area is None:
            return None
        nbytes = nbytes_of(tensor)
        claimed = area.claim(nbytes)
        if claimed is None:
            return None
        extent, buffer = claimed
        source = tensor.clone() if clone else shared_alias(tensor)
        outgoing = transfers.copy_out(source, buffer, label)
        ticket = area.write_after(outgoing.done, extent, buffer)
        transfers.moved.ssd_write_bytes += nbytes
        return cls(source, transfers, extent, outgoing, ticket)

    def prefetch(self) -> int:
        """Start the read when the write is over and a staging buffer is free."""
        if self._extent is None:
            return 0
        if self._reading is None:
            if not self._write.done():
                return 0
            buffer = self._area.stage(self.nbytes, wait=False)
            if buffer is None:
                return 0
            self._start(buffer)
        return self.nbytes

    def protect(self) -> None:
        """Order the program's write after the copy out."""
        if self._outgoing is not None:
            self._transfers.protect(self._outgoing)
            self._outgoing = None

    def settle(self) -> None:
        """Read the tensor into host memory and give its extent back; what cannot be read is raised by `take`."""
        if self._extent is None:
            return
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        memory = RawBuffer(address=flat.data_ptr(), nbytes=self.nbytes, owner=flat)
        try:
            self._write.wait()
            self._area.store.read(self._extent, memory).wait()
            self._home = flat.view(self._dtype)
        except OSError as error:
            self._lost = fresh(error)
        self._free()

    def take(self, *, keep: bool) -> Tensor:
        """Bring the tensor back to the device; the extent stays until the graph lets go."""
        if self._lost is not None:
            raise fresh(self._lost)
        if self._home is not None:
            tensor = torch.empty_strided(
                self._shape, self._stride, dtype=self._dtype, device=self._transfers.device
            )
            flat_elements(tensor).copy_(self._home)
            return tensor
        if self._reading is None:
            self._write.wait()
            buffer = self._area.stage(self.nbytes)
            if buffer is None:
                self.settle()
                return self.take(keep=keep)
            self._start(buffer)
        assert self._reading is not None
        ticket, buffer = self._reading
        self._reading = None
        try:
            ticket.wait()
        except BaseException:
            buffer.release()
            raise
        landing = self._transfers.copy_in(self._shape, self._stride, buffer, self._dtype)
        buffer.release(landing.event)
        self._transfers.wait_timed(landing.event, "fetch")
        return landing.take()

    def _start(self, buffer: HostBuffer) -> None:
        ticket = self._area.store.read(self._extent, buffer.memoryview)
        self._reading = (ticket, buffer)
        self._transfers.moved.ssd_read_bytes += self.nbytes

    def _free(self) -> None:
        if self._extent is not None:
            extent, self._extent = self._extent, None
            self._area.drop(self._write, extent=extent)

    def __del__(self) -> None:
        """Give buffer and extent back when the graph that needed them is gone."""
        if self._reading is not None:
            ticket, buffer = self._reading
            self._reading = None
            self._area.drop(ticket, buffer=buffer)
        self._free()
