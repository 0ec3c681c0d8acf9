"""Short runs of CIFAR-10's small recipe from three seeds, two checkpoints of each, four protocols.

  vit-jax prepare folder PATH/TO/cifar10 --name=cifar10
  vit-jax sweep --config=configs/sweeps/cifar10.py --workdir=sweeps/cifar10

`cifar10.py:other=NAME` scores a second dataset with the same classes beside it, such as one of
pictures that lost detail; `benchmarks/sweep.py` makes one and measures the whole.
"""

from ml_collections import ConfigDict

from vit_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Argument: name, other, steps (of each run), data_dir."""
    arg = parse_arg(arg, name="cifar10", other="", steps=300, data_dir="data")
    config = ConfigDict()
    config.training = {
        "config": f"cifar10:small,name={arg.name},steps={arg.steps},data_dir={arg.data_dir}",
        "leaves": {"seed": [0, 1, 2], "save_every": [max(arg.steps // 2, 1)]},
    }
    config.checkpoints = {"steps": "all"}
    config.datasets = {
        name: {
            "dataset": name,
            "split": "test",
            "data_dir": arg.data_dir,
            "augment": {"name": "none"},
            "batch_size": 500,
        }
        for name in (arg.name, arg.other)
        if name
    }
    config.evals = {
        "classification": {"name": "classification"},
        "knn": {"name": "knn"},
        "linear_probe": {"name": "linear_probe", "features": ("gap",)},
        "fewshot": {"name": "fewshot", "feature": "gap"},
    }
    return config
