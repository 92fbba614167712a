"""The private directory of an attempt, which serves the next one if it is as empty as when it was made.

That is told by one lstat, a quarter of what listing it takes: by the time of the directory's last change (ctime), which
a task cannot set, as it can the one of its content's (mtime).
"""

from __future__ import annotations

import os
import stat
import time

TICK_NS_MAX = 50_000_000  # File systems take the time from a clock that moves every 1 to 10 ms.


class PrivateDirectory:
    """A directory for one attempt at a time, made now."""

    __slots__ = ("_changed_ns", "_is_old", "_uid", "path")

    def __init__(self, path: str, uid: int = -1, gid: int = -1) -> None:
        """For this user; -1: for our own. Raises OSError."""
        os.mkdir(path, 0o700)
        if uid != -1:
            os.chown(path, uid, gid)
        status = os.lstat(path)
        self.path = path
        self._uid = status.st_uid
        self._changed_ns = status.st_ctime_ns
        self._is_old = False  # What changes it from now on changes its time too.

    def is_untouched(self) -> bool:
        """Whether nothing was done in it. After all processes of the attempt have ended."""
        try:
            status = os.lstat(self.path)
            if (status.st_mode, status.st_uid, status.st_ctime_ns) != (
                stat.S_IFDIR | 0o700, self._uid, self._changed_ns,
            ):  # fmt: skip
                return False
            if not self._is_old:
                self._is_old = time.time_ns() - self._changed_ns > TICK_NS_MAX
                return not os.listdir(self.path)
        except OSError:
            return False
        return True
