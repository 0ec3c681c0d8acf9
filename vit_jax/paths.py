"""Paths that may lie in a bucket."""

from etils import epath


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root on; one like 'gs://bucket/run' is whole as it is.

    (etils puts the current folder in front of it.)
    """
    return path if "://" in str(path) else path.absolute()
