"""Eight simulated devices, one compilation cache, and a small prepared dataset for all tests."""

import os
import pathlib
import shutil
from importlib.metadata import version

# Before jax starts. Processes that a test starts inherit this.
os.environ["JAX_PLATFORMS"] = os.environ.get("VIT_JAX_TEST_PLATFORM", "cpu")
# Unoptimised programs compile in two thirds of the time; in one piece, and without MLIR where XLA
# still can, in half of that.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""),
)
os.environ.setdefault(  # `make clean` removes it
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)

import jax
import pytest

from vit_jax.data.prepare import prepare_digits

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# Files that take a minute or more: begun last, one would be left to a single process.
LONGEST = (
    "test_processes.py",
    "test_meshes.py",
    "test_resume.py",
    "test_kernels.py",
    "test_launch.py",
    "test_train.py",
    "test_cifar10.py",
    "test_vit.py",
    "test_configs.py",
    "test_checkpoint.py",
)


def pytest_collection_modifyitems(items) -> None:
    """Hands out the longest files first."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A data folder with the digits, made once for all test processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = str(root / "data")
    prepare_digits(data_dir=folder, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A run of `short` at its end, made once for each test process: its workdir, its results."""
    from tests.runs import run, short

    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run(short(data_dir), workdir)[1]


@pytest.fixture
def finished_copy(finished, tmp_path) -> tuple[pathlib.Path, dict]:
    """The same for a test that changes it, as `tmp_path / "run"`."""
    return shutil.copytree(finished[0], tmp_path / "run"), finished[1]
