"""Every error memopt raises on purpose.

User mistakes are `ValueError`s (see `ConfigError`); everything that goes wrong while a step runs is
a `MemoptError`, so that one `except` catches what memopt says and nothing else.
"""

from __future__ import annotations

import errno

NO_ROOM_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a file cannot grow: a full disk, a quota, a limit on the size of files."""


class MemoptError(RuntimeError):
    """Base class of what can go wrong while memopt runs a step."""


class ConfigError(ValueError):
    """A setting is wrong; the message names the value, what is allowed and what to do."""


class BudgetError(MemoptError):
    """No placement fits the budget; the message names the smallest budget that would work."""


class RecomputeMismatchError(MemoptError):
    """The recomputation of a region did not repeat its forward."""


class RoundTripError(MemoptError):
    """A tensor came back from host memory or SSD with other bytes than it left with."""


class SavedOutputChangedError(MemoptError):
    """A tensor that memopt keeps for backward was modified after memopt took it."""


class IoEngineUnavailable(MemoptError):  # noqa: N818 - the name says what is missing
    """The I/O engine asked for by name cannot run here; the message says why."""


class NativeUnavailable(MemoptError):  # noqa: N818 - the name says what is missing
    """A native library asked for by name is missing or cannot be loaded; the message says why."""
