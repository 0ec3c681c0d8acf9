"""Paths that may lie in a bucket."""

import os

from etils import epath


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether it is one like 'gs://bucket/run', which no disk of this machine holds."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root on; that of a bucket is whole as it is.

    (etils would put the current folder in front of it.)
    """
    return path if in_bucket(path) else path.absolute()
