"""benchmarks/gpu_step.py waits for a GPU; that it runs is seen without one."""

import json
import pathlib
import runpy

import pytest

main = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "benchmarks" / "gpu_step.py"))["main"]


@pytest.mark.slow
def test_a_tiny_case_runs_through(capsys):
    main(["S", "--tiny", "--images=2", "--steps=1", "--rounds=1"])
    result = json.loads(capsys.readouterr().out)
    assert result["case"] == "S/16" and result["images_per_second"]["vit_jax"] > 0
    assert result["attention_ms"]["197"]["xla"] > 0


def test_an_unknown_case_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["XL"])
    assert "XL is unknown; choose from S, B, L" in capsys.readouterr().err
