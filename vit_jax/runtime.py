"""The process: compilation cache, signals, and who owns a workdir."""

import fcntl
import os
import pathlib
import signal
import threading
from types import FrameType

import jax
from etils import epath

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal after saving; start me again


class Preempted(Exception):
    """Raised inside an evaluation when the job was asked to stop."""


class StopSignal:
    """Notes SIGTERM and SIGINT, so that the loop can save and end; a second SIGINT ends at once."""

    def __init__(self):
        self.received: int | None = None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no say
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __bool__(self) -> bool:
        return self.received is not None

    def check(self) -> None:
        """Raises `Preempted` if a signal came."""
        if self:
            raise Preempted

    def restore(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class WorkdirLock:
    """Makes one process the owner of a local workdir until it ends, however it ends.

    Raises:
      ValueError: a living process owns it.
    """

    def __init__(self, workdir: epath.Path):
        self._file = None
        if "://" in str(workdir):  # a lock needs a file system
            return
        self._file = open(pathlib.Path(workdir) / ".lock", "a+")  # noqa: SIM115 (held for long)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise ValueError(
                f"workdir {workdir} is in use by process {owner}; stop it or use another --workdir."
            ) from error
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets others in."""
        if self._file is not None:
            self._file.close()


def enable_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR or ~/.cache/vit_jax/xla."""
    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "vit_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
