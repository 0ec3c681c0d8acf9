"""Names for what is being written beside its place, and the end of what killed processes left."""

import contextlib
import os
import re
import socket
import uuid

from etils import epath


def hidden(path: epath.PathLike) -> epath.Path:
    """A name beside `path` for what shall become it; it tells whose it is and is nobody else's."""
    path = epath.Path(path)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    return path.parent / f".{path.name}.incomplete-{owner}-{uuid.uuid4().hex[:8]}"


def remove_leftovers(folder: epath.PathLike, names: str = r"\w+") -> None:
    """Removes what killed processes of this machine left; of other machines' nothing is known.

    Args:
      folder: where `hidden` names were made.
      names: a pattern of what they were to become.
    """
    host = re.escape(socket.gethostname())
    for path in epath.Path(folder).iterdir():
        match = re.fullmatch(rf"\.{names}\.incomplete-{host}-(\d+)-\w+(\.\w+)?", path.name)
        if match and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):
                path.rmtree() if path.is_dir() else path.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
