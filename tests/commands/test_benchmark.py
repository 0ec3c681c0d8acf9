import json

import pytest

from vit_jax.cli import main
from vit_jax.commands.benchmark import _table, judge


def measured(capsys, data_dir, *arguments) -> dict:
    flags = [f"--config=digits:debug,data_dir={data_dir}", "--seconds=0.2", "--json", *arguments]
    assert main(["benchmark", "data", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_what_the_data_give_and_the_chips_want(capsys, data_dir):
    result = measured(capsys, data_dir, "--topology=v5e:4x4", "--mfu=0.5", "--cores=3")
    assert result["dataset"] == "digits"
    assert result["images_per_second_per_core"] > 100
    assert result["images_per_second_here"] > 100
    assert 0 <= result["waiting"] < 1
    wanted = 16 * 197e12 * 0.5 / result["flops_per_image"]
    assert result["images_per_second_wanted"] == pytest.approx(wanted)
    per_core = result["images_per_second_per_core"]
    assert result["cores_needed"] == pytest.approx(wanted / per_core)
    assert result["bottleneck"] == ("data" if wanted > 3 * per_core else "chips")


def test_chips_by_name_and_none_that_is_known(capsys, data_dir):
    result = measured(capsys, data_dir, "--chip=NVIDIA H200", "--num_chips=8")
    assert (result["chip"], result["num_chips"], result["mfu_assumed"]) == ("NVIDIA H200", 8, 0.4)
    here = measured(capsys, data_dir)
    assert (here["chip"], here["bottleneck"]) == (None, None)


def test_the_slower_one_is_the_bottleneck():
    result = {"images_per_second_per_core": 500.0, "flops_per_image": 197e9, "cores_here": 64}
    chip = {"chip": "TPU v5e", "num_chips": 2, "mfu": 0.5}  # want 1,000 images/s
    assert judge(result, **chip, cores=1)["bottleneck"] == "data"
    enough = judge(result, **chip, cores=2)
    assert enough["bottleneck"] == "chips"
    assert enough["images_per_second_wanted"] == pytest.approx(1000)
    assert enough["cores_needed"] == pytest.approx(2)


def test_a_disk_that_is_too_slow_for_these_cores_is_the_bottleneck():
    result = {"dataset": "slow", "mean_bytes": 110_000, "waiting": 0.8, "flops_per_image": 197e9}
    result |= {"images_per_second_per_core": 1000.0, "images_per_second_here": 400.0}
    result |= {"cores_here": 2}
    chip = {"chip": "TPU v5e", "num_chips": 2, "mfu": 0.5}  # want 1,000 images/s
    here = result | judge(result, **chip, cores=2)
    assert here["bottleneck"] == "data"
    assert "these cores would do: it is the disk" in _table(here)
    assert judge(result, **chip, cores=3)["bottleneck"] == "chips"  # of other machines
    quick = result | {"images_per_second_here": 1500.0}
    assert judge(quick, **chip, cores=2)["bottleneck"] == "chips"


def test_the_table_says_what_to_do(capsys, data_dir):
    flags = [f"--config=digits:debug,data_dir={data_dir}", "--seconds=1e-9", "--cores=1"]
    assert main(["benchmark", "data", *flags, "--topology=v5p:16x16x16"]) == 0  # a batch at least
    out = capsys.readouterr().out
    assert "bottleneck          the data; " in out
    assert "--store=tiled|resized|raw" in out
    assert "4,096 TPU v5p at an assumed 40% MFU" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels"], "benchmark kernels? There is `benchmark data`"),
        (["data"], "--config is missing"),
        (["data", "--config=digits", "--chip=H300"], "--chip='H300' is unknown; there are TPU v2,"),
        (["data", "--config=digits", "--topology=v9:1"], "topology='v9:1' is unknown"),
        (["data", "--config=digits", "--topology=v4:2x2x1", "--chip=TPU v4"], "exclude each other"),
        (["data", "--config=digits", "--num_chips=8"], "--num_chips counts those of --chip; give"),
        (["data", "--config=digits", "--num_slices=2"], "--num_slices counts those of --topology"),
        (["data", "--config=digits", "--mfu=40"], "--mfu=40.0 must be over 0 and at most 1"),
        (["data", "--config=digits", "--seconds=inf"], "--seconds must be over 0 and finite"),
        (["data", "--config=digits", "--config.data.name=nil"], "no dataset 'nil' in data_dir"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    assert main(["benchmark", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_help(capsys):
    assert main(["benchmark", "--help"]) == 0
    assert "--chip='NVIDIA H200'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["benchmark", "data", "--help"])
    assert "--num_slices" in capsys.readouterr().out
