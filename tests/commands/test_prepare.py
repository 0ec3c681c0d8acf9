import pytest

from tests.data.images import class_tree, encode, noise, write_tree
from vit_jax.commands import prepare
from vit_jax.data import sources


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command with a data_dir of its own; answers what it printed."""

    def run(*argv):
        assert prepare.main([*map(str, argv), f"--data_dir={tmp_path / 'data'}"]) == 0
        return capsys.readouterr().out

    return run


def test_digits(run, tmp_path):
    printed = run("digits")
    assert "train: 1,437 examples, 139 to 149 in a class" in printed
    assert "test: 360 examples" in printed
    assert "classes: 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in printed
    assert f"written to {tmp_path}/data/digits/1.0.0" in printed
    where = f"data_dir={tmp_path}/data"
    assert f"next: vit-jax train --config=digits:{where} --workdir=runs/digits\n" in printed


def test_the_summary_of_a_folder_tells_everything(run, tmp_path):
    root = class_tree(tmp_path / "images", per_class=10)
    files = {
        "cat/bad1.jpg": b"no image",
        "dog/bad2.jpg": b"",
        "cat/turned.png": encode(noise(), "PNG", orientation=6),
        "cat/new.webp": encode(noise(), "WEBP"),
        "cat/notes.txt": b"x",
    }
    printed = run("folder", write_tree(root, files), "--name=mine", "--holdout=0.1")
    assert "train: 20 examples" in printed and "test: 2 examples" in printed
    assert "classes: 2 (cat, dog)" in printed
    assert "mean: 0." in printed and "20 train images" in printed
    assert "unreadable: 2\n  cat/bad1.jpg: " in printed
    assert "  dog/bad2.jpg: the file is empty\n" in printed
    assert "transposed: 1 (cat/turned.png: EXIF orientation 6, as PNG)" in printed
    assert "converted: 1 (cat/new.webp: WEBP to PNG)" in printed
    assert "ignored: 1 other files (cat/notes.txt)" in printed
    assert "note: test is a hold-out of 0.1 of the images (seed 0)" in printed
    assert (
        f"next: vit-jax train --config=image_folder:name=mine,data_dir={tmp_path}/data "
        "--workdir=runs/mine\n" in printed
    )


def test_the_default_data_dir_is_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    class_tree(tmp_path / "images")
    assert prepare.main(["folder", "images", "--name=mine"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith(":name=mine --workdir=runs/mine\n")
    assert "8/8" in printed.err, "no progress bar"
    assert sources.dataset_info("mine", data_dir="data").splits == {"train": 8}


def test_flags_reach_the_function(run, tmp_path):
    root = class_tree(tmp_path / "images", per_class=10)
    first = run("folder", root, "--name=mine", "--holdout=0.2", "--seed=3", "--shuffle_labels")
    assert "seed 3" in first and "SHUFFLED" in first
    assert "1.0.1" in run("folder", root, "--name=mine", "--overwrite")


def test_strict_lists_every_file_before_it_fails(tmp_path, capsys):
    root = class_tree(tmp_path / "images")
    write_tree(root, {f"cat/bad{number}.jpg": b"no image" for number in range(3)})
    argv = ["folder", str(root), "--name=mine", f"--data_dir={tmp_path}/data", "--strict"]
    with pytest.raises(ValueError, match="3 of 11 images are unreadable"):
        prepare.main(argv)
    printed = capsys.readouterr().err
    assert all(f"cat/bad{number}.jpg: " in printed for number in range(3))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "It is one of digits, folder, tfds, convert"),
        (["folders"], "prepare folders.* It is one of digits, folder, tfds, convert"),
        (["--name=mine", "folder"], "It is one of"),
        (["folder", "--name=mine"], "`vit-jax prepare folder PATH` was given nothing"),
        (["folder", "a", "b", "--name=mine"], "`vit-jax prepare folder PATH` was given"),
        (["digits", "images"], "`vit-jax prepare digits` was given"),
        (["folder", "images"], "--name=NAME is missing"),
        (["folder", "images", "--name=my-set"], "letters, digits and underscores"),
        (["folder", "images", "--name=mine", "--holdout=1.5"], "holdout=1.5 must lie between"),
        (["folder", "images", "--name=mine", "--holdout=-0.1"], "holdout=-0.1 must lie between"),
        (["folder", "images", "--name=mine", "--holdout=lots"], "holdout"),
        (
            ["folder", "images", "--name=mine", "--holdot=0.1"],
            "unknown flag --holdot; did you mean --holdout",
        ),
        (["folder", "nowhere", "--name=mine"], "nowhere does not exist"),
        (["folder", "empty", "--name=mine"], "no images or class folders"),
        (["folder", "images/cat", "--name=mine"], "no classes"),
        (["convert", "images"], "holds no TFDS dataset"),
        (["digits", "--strict"], "unknown flag --strict; .* --data_dir, --name, --overwrite"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    class_tree(tmp_path / "images")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare.main(argv)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_help(capsys):
    assert prepare.main(["--help"]) == 0
    assert "vit-jax prepare convert PATH" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        prepare.main(["folder", "--help"])
    assert "--holdout" in capsys.readouterr().out
