"""Whatever goes wrong, a person gets one line that says what to change, and exit code 1."""

import json
import re

import pytest

from tests.data.images import bad_files, bomb_png, class_tree, write_tree
from tests.recipes import tiny
from tests.runs import call, damage, deterministic_rows, run, save_recipe, short
from vit_jax import cli
from vit_jax.trainer import Trainer


@pytest.fixture
def fails(capfd):
    """Runs a command that must fail; answers its one line."""

    def fails(*argv):
        assert cli.main(list(map(str, argv))) == 1
        printed = capfd.readouterr()
        assert "Traceback" not in printed.out + printed.err
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("vit-jax: ")
        return lines[0]

    return fails


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """(config, workdir) of a finished run; leave it as it is."""
    config = short(data_dir, save_every=3, eval_every=3, train__keep=2)
    workdir = tmp_path_factory.mktemp("cli") / "run"
    run(config, workdir)
    return config, workdir


@pytest.fixture
def train(data_dir, tmp_path):
    """The arguments of a short training run, and what is added."""

    def train(*flags, recipe="digits:debug", workdir=tmp_path / "run"):
        where = [f"--config.{section}.data_dir={data_dir}" for section in ("data", "evals.test")]
        return ["train", f"--config={recipe}", f"--workdir={workdir}", *where, *flags]

    return train


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--config.optimizer.learning_rat=1"],
            "learning_rat: .*did you mean 'optimizer.learning_rate'",
        ),
        (["--config.optimiser.learning_rate=1"], "did you mean 'optimizer.learning_rate'"),
        (["--config.total_step=1"], "did you mean 'total_steps'"),
        (["--workdri=x"], "unknown flag --workdri; did you mean --workdir"),
        (["--config.total_steps=many"], "total_steps"),
        (["--config.batch_size=1.5"], "batch_size"),
        (["steps"], "argument 'steps' is unknown; flags start with --"),
        (
            ["--config.objective.name=supervize"],
            "'supervize' is unknown .*did you mean 'supervised'",
        ),
        (["--config.augment.name=flip"], "flip.*pad_crop_flip"),
        (["--config.evals.test.name=knn2"], "'knn2' is unknown.*choose one of .*classification"),
        (["--config.model.variant=Q/2"], "variant='Q/2' is unknown.*Ti"),
        (["--config.batch_size=100"], "batch_size=100 must be a multiple of the 8 devices; try 96"),
        (["--config.evals.test.batch_size=0"], "batch_size=0"),
        (["--config.evals.test.split=tset"], "no split 'tset'; it has"),
        (["--config.evals.test.dataset=nothing"], "no dataset 'nothing'.*vit-jax prepare"),
        (
            ["--config.data.name=nothing"],
            "no dataset 'nothing'.*vit-jax prepare folder PATH --name=n",
        ),
        (["--config.data.split=training"], "no split 'training'; it has .*train"),
        (["--config.model.image_size=(9, 8)"], r"image_size=\(9, 8\).*multiple|must be.*\(8, 8\)"),
        (
            ["--config.augment.size=(16, 16)"],
            r"augment.size=\(16, 16\) and model.image_size=\(8, 8\)",
        ),
        (
            ["--config.evals.test.augment.size=(6, 6)"],
            r"evals.test.augment.size=\(6, 6\) and model",
        ),
        (["--config.mesh.data=3"], "does not multiply to the 8 devices; use -1"),
        (["--config.optimizer.warmup_steps=99"], "warmup_steps=99 .* must fit into total_steps=20"),
        (["--config.train.best_metric=val/top1"], "best_metric='val/top1' .* evals: test"),
        (["--config.total_steps=0"], "total_steps=0 must be at least 1"),
        (["--config.objective.label_smoothing=1.5"], r"label_smoothing=1.5 must be in \[0, 1\)"),
        (["--config.model.drop_path=1.0"], r"drop_path=1.0 must be in \[0, 1\)"),
    ],
)
def test_a_run_that_cannot_be_started(fails, train, flags, words, monkeypatch):
    monkeypatch.setattr(Trainer, "_compile", lambda *_: pytest.fail("compiled"))
    assert re.search(words, fails(*train(*flags)))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["trian"], "command 'trian' is unknown .did you mean 'train'.*prepare, train, launch"),
        (["train"], "--config is missing: give a file or a recipe, like --config=digits"),
        (["train", "--config=digits"], "--workdir is missing"),
        (["train", "--config=configs/nonsense.py", "--workdir=x"], "does not exist.*digits"),
        (["train", "--config=digit", "--workdir=x"], "did you mean 'digits'"),
        (["train", "--config=digits:debugg", "--workdir=x"], "'debugg' is unknown .*'debug'"),
        (["train", "--config=digits:steps=few", "--workdir=x"], "steps='few' must be of int"),
        (
            ["train", "--config=image_folder:name=never_made", "--workdir=x"],
            "vit-jax prepare folder",
        ),
        (["evaluate"], "--workdir is missing"),
        (["evaluate", "--workdir=nowhere"], "no checkpoint in nowhere"),
        (["evaluate", "--workdir=nowhere", "twice"], "argument 'twice' is unknown"),
        (["prepare"], "one of digits, folder, tfds, convert"),
        (["prepare", "folder", "nowhere", "--name=mine"], "nowhere does not exist"),
    ],
)
def test_a_command_that_is_not_understood(fails, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert re.search(words, fails(*argv))
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_no_recipe(fails, tmp_path):
    recipe = tmp_path / "recipe.py"
    for text, words in {
        "def get_config(arg='')\n": r"recipe.py, line 1: expected ':'",
        "def get_config(arg=''):\n    return {}\n": "gives a dict, not a ConfigDict",
        "x = 1\n": "defines no get_config",
    }.items():
        recipe.write_text(text)
        assert re.search(words, fails("train", f"--config={recipe}", "--workdir=x"))


def test_a_file_where_the_workdir_should_be(fails, train, tmp_path):
    (tmp_path / "run").write_text("precious")
    assert "must be a folder; a file is in the way" in fails(*train())
    assert "must be a folder" in fails(*train(workdir=tmp_path / "run" / "below"))
    assert (tmp_path / "run").read_text() == "precious"


@pytest.mark.slow
def test_a_model_that_does_not_fit_into_memory(fails, train):
    line = fails(*train("--config.model.mlp_dim=1000000000000"))
    assert re.search("out of memory .*; lower batch_size, or set model.remat", line)


@pytest.mark.parametrize("name", ["train", "speed", "a/b"])
def test_an_evaluation_called_like_other_metrics(fails, data_dir, tmp_path, name):
    config = tiny(data_dir)
    config.evals[name] = config.evals.test
    recipe = save_recipe(config, tmp_path / "recipe.py")
    line = fails("train", f"--config={recipe}", f"--workdir={tmp_path}/run")
    assert f"evals.{name}: metrics of that name are taken" in line


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"vit-jax \d+\.\d+.*\n", capsys.readouterr().out)


def test_folders_without_classes_or_images(fails, tmp_path):
    flat = write_tree(tmp_path / "flat", {"1.jpg": b"x", "2.jpg": b"x"})
    bare = write_tree(tmp_path / "bare", {"cat/notes.txt": b"x", "dog/notes.txt": b"x"})
    holed = class_tree(tmp_path / "holed")
    (holed / "bird").mkdir()
    for root, words in ((flat, "class"), (bare, "no images"), (holed, "bird")):
        flags = "prepare", "folder", root, "--name=mine", f"--data_dir={tmp_path}/data"
        assert words in fails(*flags)
    assert not (tmp_path / "data" / "mine").exists()


def test_another_config_or_dataset_on_a_workdir(fails, trained, tmp_path, data_dir):
    config, workdir = trained
    recipe = save_recipe(config, tmp_path / "recipe.py")
    where = f"--config={recipe}", f"--workdir={workdir}"
    line = fails("train", *where, "--config.optimizer.learning_rate=0.5", "--config.seed=3")
    assert "optimizer.learning_rate: 0.002 -> 0.5; seed: 0 -> 3; use another --workdir" in line
    damage("digits_other", data_dir=data_dir, bad={})
    line = fails("train", *where, "--config.data.name=digits_other")
    assert "data.name: 'digits' -> 'digits_other'" in line
    record = workdir / "run.json"
    text = record.read_text()
    try:
        record.write_text(text.replace(json.loads(text)["dataset"]["fingerprint"], "0" * 64))
        assert re.search("fingerprint of data: 0{12} -> [0-9a-f]{12}", fails("train", *where))
    finally:
        record.write_text(text)


def test_cadences_and_places_may_change(trained, tmp_path, capfd):
    config, workdir = trained
    recipe = save_recipe(config, tmp_path / "recipe.py")
    flags = f"--config={recipe}", f"--workdir={workdir}", "--config.log_every=2"
    assert cli.main(["train", *flags, "--config.save_every=1"]) == 0
    assert "all 6 steps are done" in capfd.readouterr().out


def test_a_missing_checkpoint_lists_those_that_are_there(fails, trained):
    line = fails("evaluate", f"--workdir={trained[1]}", "--step=4")
    assert re.search(r"no checkpoint 4 in \S+; there are: 3, 6\.$", line)


def test_a_loss_that_is_not_finite(capfd, data_dir, tmp_path):
    config = short(data_dir, save_every=2, eval_every=0)
    config.optimizer.update({"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 0.0})
    recipe = save_recipe(config, tmp_path / "recipe.py")
    assert cli.main(["train", f"--config={recipe}", f"--workdir={tmp_path}/run"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(
        r"step \d is not finite \(loss .*\); .* last good state: lower the learning", line
    )


@pytest.fixture(scope="module")
def hostile(data_dir):
    """A dataset that went bad after it was made: some images truncated, one a bomb."""
    kinds = [*bad_files().values(), bomb_png()]
    damage(
        "digits_hostile",
        data_dir=data_dir,
        bad={"train": dict(enumerate(kinds)), "test": {0: b"", 9: bomb_png()}},
    )
    return len(kinds)


def hostile_config(data_dir, **leaves):
    leaves = {"data__split": "train[:32]", "eval_every": 0, "save_every": 0} | leaves
    config = short(data_dir, data__name="digits_hostile", **leaves)
    config.evals.test.dataset = "digits_hostile"
    return config


def test_unreadable_images_are_named_and_counted_and_the_run_goes_on(
    data_dir, tmp_path, hostile, capsys
):
    run(hostile_config(data_dir), tmp_path / "run")
    values = deterministic_rows(tmp_path / "run")
    named = [line for line in capsys.readouterr().out.splitlines() if "unreadable image" in line]
    # A GIF is unusual but can be read; the 32 images came three times.
    assert len(named) == hostile - 1
    assert values[6, "train/rejected"] == 3 * len(named)
    assert all(re.search(r"example \d+ \(\d/\d{4}\.png\) cannot be decoded: .", x) for x in named)
    assert any("pixels" in line for line in named)  # the bomb
    assert values[6, "test/count"] == 358 and values[6, "test/rejected"] == 2


def test_strict_stops_at_the_first_unreadable_image(data_dir, tmp_path, hostile, fails):
    config = hostile_config(data_dir, data__strict=True)
    recipe = save_recipe(config, tmp_path / "recipe.py")
    line = fails("train", f"--config={recipe}", f"--workdir={tmp_path}/run")
    assert re.search(r"example \d+ \(\d/\d{4}\.png\) cannot be decoded", line)


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare", "predict", "embed"])
def test_help(capsys, command):
    try:
        assert cli.main([command, "--help"]) == 0
    except SystemExit as end:
        assert end.code == 0
    printed = capsys.readouterr()
    assert f"vit-jax {command}" in printed.out and not printed.err


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["-h"], 0), (["help"], 0), ([], 1)])
def test_the_commands_are_listed(capsys, argv, code):
    assert cli.main(argv) == code
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in cli.COMMANDS)


def test_traceback_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["evaluate", f"--workdir={tmp_path / 'nowhere'}", "--traceback"])


def test_as_processes(data_dir, tmp_path, trained):
    """What main() answers is what a shell sees, and nothing else is on stderr."""
    for argv in (
        ["train", "--config=digits:debug", f"--workdir={tmp_path}/a", "--config.optimizer.lr=1"],
        ["evaluate", f"--workdir={trained[1]}", "--step=4"],
    ):
        failed = call(*argv)
        assert failed.returncode == 1
        assert not failed.stdout
        assert re.fullmatch("vit-jax: .+\n", failed.stderr), failed.stderr
    failed = call("evaluate", f"--workdir={tmp_path}/nowhere", "--traceback")
    assert failed.returncode == 1 and "Traceback" in failed.stderr
