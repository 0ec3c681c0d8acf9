"""These read and write whole models in every format: minutes, so `make test-all` runs them."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.slow)
