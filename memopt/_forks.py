"""What a forked child finds of the sessions of its parent: nothing in the model's way.

Threads, rings and page-locked memory stay with the parent: a child that trained on with the patches
in place waited for I/O threads that it does not have, for ever. So the context is left at once in
the child: a worker of a DataLoader, or whoever else forks inside the loop, has the plain model.
What the session owns is let go of where the child leaves the context itself, or ends.
"""

from __future__ import annotations

import contextlib
import os
import weakref

_exits: weakref.WeakSet[contextlib.ExitStack] = weakref.WeakSet()


def leave_in_children(exits: contextlib.ExitStack) -> None:
    """Have `exits`, which takes patches and hooks off, run in every child forked from now on."""
    _exits.add(exits)


def _leave() -> None:
    for exits in list(_exits):
        exits.close()
    _exits.clear()


os.register_at_fork(after_in_child=_leave)
