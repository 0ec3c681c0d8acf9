"""Paths on disks and in buckets."""

import pathlib

import pytest
from etils import epath

from vit_jax import checkpoint
from vit_jax.paths import absolute, in_bucket


@pytest.mark.parametrize("path", ["gs://bucket/run", epath.Path("gs://bucket/run")])
def test_a_bucket_stays_where_it_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_bucket(path)
    assert str(absolute(epath.Path(path))) == "gs://bucket/run"


@pytest.mark.parametrize("path", ["runs/a", "/runs/a", pathlib.Path("gs:/bucket")])
def test_a_folder_is_told_from_the_root(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not in_bucket(path)
    assert absolute(epath.Path(path)) == epath.Path(tmp_path) / path


def test_checkpoints_of_a_bucket_are_written_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(checkpoint, "_Manager", lambda folder, **_: written.append(str(folder)))
    checkpoint.Checkpoints("gs://bucket/run/checkpoints")
    assert written == ["gs://bucket/run/checkpoints"]
