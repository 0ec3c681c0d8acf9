"""Who owns a workdir: one job at a time, whichever hosts its processes are on."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from typing import Any

from etils import epath

from vit_jax.paths import in_bucket

HEARTBEAT = 10.0  # seconds between two signs of life
PATIENCE = 45.0  # seconds without one after which an owner on another host is taken for dead
SIGHT = 30.0  # seconds after which the other processes must see the lease
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what a file system without them says


class WorkdirLease:
    """Makes this process, for its job, the owner of a workdir until `release` or its end.

    On one host the kernel's lock on `.lock` says at once whether an owner lives. Across hosts it is
    `.lease`, which the owner writes anew every few seconds; no clock is compared, only whether the
    file changes. (A network's file system may keep the lock of a host that died, or have no locks.)
    An owner that finds another's lease, or none, ends at once.

    Args:
      workdir: an existing folder, perhaps remote (then only the lease works).
      heartbeat, patience: see above.

    Attributes:
      job: a name that no other owner has.

    Raises:
      ValueError: a living job owns it; says which, and how to take over.
    """

    def __init__(
        self, workdir: epath.Path, *, heartbeat: float = HEARTBEAT, patience: float = PATIENCE
    ):
        self._path, self._lock, taken = workdir / ".lease", None, False
        self.job = uuid.uuid4().hex
        self._me = {"host": _host(), "process": os.getpid(), "job": self.job, "beat": 0}
        self._heartbeat, self._done = heartbeat, threading.Event()
        if not in_bucket(workdir):
            self._lock, taken = _lock(pathlib.Path(workdir) / ".lock")
        owner = _read(self._path)
        try:
            if taken and (owner is None or owner["host"] == self._me["host"]):
                raise ValueError(self._refusal(workdir, owner))
            self._replace(workdir, owner, patience)
        except ValueError:
            self._unlock()
            raise
        self._write()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="vit_jax-lease")
        self._thread.start()

    def _replace(self, workdir: epath.Path, owner: dict[str, Any] | None, patience: float) -> None:
        """Returns when `owner` is known to be dead, which on another host takes a while."""
        if owner is None:
            return
        name = f"process {owner['process']} on {owner['host'].split('/')[0]}"
        here = self._lock is not None and owner["host"] == self._me["host"]
        if not here:  # on this host the lock would have told
            print(
                f"workdir {workdir} was in use by {name}; waiting {patience:.0f} s for a sign of "
                "life …",
                flush=True,
            )
            end = time.monotonic() + patience
            while time.monotonic() < end:
                time.sleep(min(1.0, patience / 10))
                now = _read(self._path)
                if now is None:
                    return
                if now != owner:
                    raise ValueError(self._refusal(workdir, now))
        print(f"{name}, which owned workdir {workdir}, is gone: taking over", flush=True)

    def _refusal(self, workdir: epath.Path, owner: dict[str, Any] | None) -> str:
        name = "another process"
        if owner is not None:
            name = f"process {owner['process']} on {owner['host'].split('/')[0]}"
        return (
            f"workdir {workdir} is in use by {name}; stop it or use another --workdir (to take "
            f"over, delete {self._path}: the other one ends within {self._heartbeat:.0f} s, and "
            "this command works again)."
        )

    def _beat(self) -> None:
        while not self._done.wait(self._heartbeat):
            try:
                owner = _read(self._path)
                if owner is not None and owner["job"] == self.job:
                    self._write()
                    continue
            except OSError:  # a storage that fails for a moment takes nothing away
                continue
            if self._done.is_set():
                return
            print(
                f"vit-jax: {self._path} was deleted or taken over by another job; this one ends.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _write(self) -> None:
        self._me["beat"] += 1
        temporary = self._path.parent / f".lease.{self._me['job'][:8]}.tmp"
        temporary.write_text(json.dumps(self._me))
        temporary.replace(self._path)

    def release(self) -> None:
        """Lets others in."""
        self._done.set()
        self._thread.join()
        owner = _read(self._path)
        if owner is not None and owner["job"] == self.job:
            self._path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()


def check_shared(workdir: epath.Path, job: str, *, sight: float = SIGHT) -> None:
    """Raises ValueError unless this process sees the lease of `job`: its share would be lost.

    Args:
      workdir: as this process has it.
      job: of the process that owns it.
      sight: seconds that a network's file system may take to show it.
    """
    end = time.monotonic() + sight
    while (owner := _read(workdir / ".lease")) is None or owner["job"] != job:
        if time.monotonic() > end:
            raise ValueError(
                f"workdir {workdir} is not the folder that process 0 writes to; give all of them "
                "one that they share, on a network's disk or in a bucket."
            )
        time.sleep(0.2)


def _lock(path: pathlib.Path) -> tuple[Any, bool]:
    """The open file with the kernel's lock on it, or None; and whether another process has it."""
    file = open(path, "a+")  # noqa: SIM115 (held for long)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in NO_LOCKS:
            return None, False
        if isinstance(error, BlockingIOError):
            return None, True
        raise
    return file, False


def _read(path: epath.Path) -> dict[str, Any] | None:
    """What stands there; None where there is nothing, or nothing that an owner wrote."""
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        found = json.loads(path.read_text())
        named = isinstance(found, dict) and isinstance(found.get("host"), str)
        if named and {"process", "job"} <= found.keys():
            return found
    return None


def _host() -> str:
    """Name and boot: two machines, or two lives of one, never share it."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    life = boot.read_text().strip() if boot.exists() else str(uuid.getnode())
    return f"{socket.gethostname()}/{life}"
