"""What the wheel holds, what importing costs, and who may import whom."""

import ast
import pathlib
import subprocess
import sys
import zipfile

import pytest

import vit_jax
from tests.runs import save_recipe, short

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vit_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the package, and of what else that is heavy.
MAY_IMPORT = {
    "cli": {"commands", "exit_codes", "spelling"},
    "config": {"spelling", "data"},
    "spelling": set(),
    "paths": set(),
    "tree": {"jax"},
    "losses": {"jax", "optax"},
    "axes": {"jax"},
    "functional": {"flax"},
    "preprocess": {"jax", "axes"},
    "optim": {"jax", "optax", "tree", "spelling"},
    "sharding": {"jax", "tree"},
    "kernels": {"jax"},
    "models": {"jax", "flax", "kernels", "axes"},
    "objectives": {"jax", "flax", "models", "losses", "preprocess"},
    "data": {"grain", "tensorflow_datasets", "leftovers", "paths", "spelling"},
    "evals": {"jax", "data", "features", "functional", "losses"},
    "feeding": {"jax", "data", "sharding"},
    "features": {"jax", "data", "functional", "models"},
    "sweep": {
        *(
            "jax",
            "flax",
            "evals",
            "features",
            "functional",
            "data",
            "models",
            "sharding",
            "feeding",
        ),
        *("checkpoint", "config", "interop", "metrics", "paths", "spelling", "tensorboardX"),
    },
    "metrics": {"jax", "tensorboardX", "chips", "paths"},
    "chips": set(),
    "hlo": set(),
    "bundles": {"chips", "hlo"},
    "plan": {"jax", "bundles", "chips", "hlo", "sharding", "train"},
    "checkpoint": {"jax", "flax", "orbax", "paths", "tree"},
    "exit_codes": set(),
    "runtime": {"jax", "exit_codes"},
    "lease": {"paths"},
    "leftovers": set(),
    "launch": {"exit_codes"},
    "watchdog": {"exit_codes", "runtime"},
    "workdir": {"jax", "config", "data", "metrics"},
    "interop": {
        *("jax", "flax", "models", "preprocess"),
        *("checkpoint", "config", "data", "leftovers", "tree", "spelling"),
    },
    "inference": {"jax", "data", "functional", "models"},
    "report": {
        *("jax", "data", "evals", "functional", "preprocess", "sharding", "sweep"),
        *("config", "metrics", "paths"),
    },
    "zoo": {"flax", "models", "preprocess", "spelling"},
}
FROM_CONFIG = {"train", "trainer", "evaluation", "commands"}  # they build parts from a config
HEAVY = {
    *("jax", "flax", "optax", "orbax", "grain", "tensorboardX", "tensorflow_datasets"),
    *("tensorflow", "torch", "sklearn"),
}
LATE = {
    "bundles": {"jax", "plan"},
    "cli": {"runtime"},
    "data": {"sklearn", "tensorflow"},
    "config": {"data", "interop"},
    "interop": {"train", "sharding", "torch"},
    "report": {"train", "interop"},
}  # inside a function, when needed


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path):
    """(part or heavy library, whether it is imported with the module) of each import."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [node.module]
            if node.module == "vit_jax":
                names = [f"vit_jax.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "vit_jax" and rest.split(".")[0] in PARTS:
                yield rest.split(".")[0], id(node) in top
            elif first in HEAVY:
                yield first, id(node) in top


PARTS = {part_of(path) for path in MODULES} - {"__init__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_who_imports_whom(path):
    part = part_of(path)
    for name, early in imported(path):
        assert name not in ("tensorflow", "torch", "sklearn") or not early, (
            f"{name} is not always there"
        )
        if name == part or part in (*FROM_CONFIG, "__init__"):
            continue  # these may know everything
        allowed = MAY_IMPORT.get(part, set()) | (set() if early else LATE.get(part, set()))
        if part == "cli" and name == "commands":
            assert not early, "commands are imported when they are called"
        assert name in allowed, f"{part} must not import {name}"


def test_every_part_has_its_rule():
    assert MAY_IMPORT.keys() | FROM_CONFIG == PARTS


def test_only_train_and_the_commands_see_the_config():
    for path in MODULES:
        if part_of(path) not in (*FROM_CONFIG, "config", "workdir"):
            assert "ml_collections" not in path.read_text(), path


def test_there_is_no_utils_and_no_assert():
    for path in MODULES:
        assert path.stem not in ("utils", "util", "helpers", "common", "misc")
        assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]


def test_no_pickles_and_no_lookup_by_string():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not {"pickle", "importlib", "importlib.import_module"} & set(names), path


def modules_of(code: str, *argv) -> set[str]:
    """The top-level modules that a fresh process has imported after running `code`."""
    code += "\nimport sys\nprint('\\nmodules', *{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=240, check=True
    )
    return set(done.stdout.rsplit("modules", 1)[1].split())


@pytest.mark.parametrize("module", ["vit_jax", "vit_jax.cli", "vit_jax.config"])
def test_importing_is_light(module):
    assert not modules_of(f"import {module}") & {"jax", "numpy", "tensorflow", "torch", "absl.app"}


def test_models_by_name_are_at_hand_once_they_are_asked_for():
    code = "import vit_jax\nassert 'vit_s16' in vit_jax.list_models()\nvit_jax.create_model"
    assert "jax" in modules_of(code)
    with pytest.raises(AttributeError, match="module 'vit_jax' has no attribute 'creat_model'"):
        vit_jax.creat_model  # noqa: B018


def test_help_does_not_wait_for_jax():
    assert "jax" not in modules_of("import vit_jax.cli\nvit_jax.cli.main(['--help'])")


def test_a_training_run_needs_neither_tensorflow_nor_torch(data_dir, tmp_path):
    """Nor does it miss torch, which tensorboardX imports where it is installed."""
    config = short(data_dir)
    flags = f"--config={save_recipe(config, tmp_path / 'r.py')}", f"--workdir={tmp_path}/run"
    code = "import sys\nsys.modules['torch'] = None\n"  # as if it were not installed
    found = modules_of(f"{code}import vit_jax.cli\nassert vit_jax.cli.main() == 0", "train", *flags)
    assert "jax" in found
    assert not found & {"tensorflow", "torchvision", "tensorboard", "keras"}


def test_the_wheel_holds_the_package_and_the_recipes(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(tmp_path)]
    try:
        built = subprocess.run(build, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("hatchling cannot be fetched")
    if built.returncode:
        if "hatchling" in built.stderr and "No matching distribution" in built.stderr:
            pytest.skip("hatchling cannot be fetched")
        pytest.fail(built.stderr[-2000:])
    (wheel,) = tmp_path.glob("vit_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "vit-jax = vit_jax.cli:main" in archive.read(entry).decode()
    code = {str(path.relative_to(ROOT)) for path in MODULES}
    configs = {f"vit_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    page = {"vit_jax/report/page.css", "vit_jax/report/page.js"}
    launch = {f"vit_jax/launch_files/{path.name}" for path in (ROOT / "launch").iterdir()}
    assert names == code | configs | page | launch
