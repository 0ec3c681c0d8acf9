"""A small ViT on CIFAR-10 (Krizhevsky 2009), from scratch.

  vit-jax prepare folder PATH/TO/cifar10 --name=cifar10
  vit-jax train --config=configs/cifar10.py --workdir=runs/cifar10

PATH/TO/cifar10 holds train/<class>/ and test/<class>/ with 32 × 32 images; the TFDS dataset of the
same name (`vit-jax prepare tfds cifar10`) does as well.
"""

from ml_collections import ConfigDict

from vit_jax.config import dataset_size, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Argument: name, data_dir, epochs, steps (instead of epochs), batch_size, debug."""
    arg = parse_arg(
        arg, name="cifar10", data_dir="data", epochs=200, steps=0, batch_size=512, debug=False
    )
    size = (32, 32)
    if arg.debug:
        arg.update({"batch_size": 8, "steps": 4})
    if not arg.steps:
        num_examples = dataset_size(arg.name, split="train", data_dir=arg.data_dir)
        arg.steps = round(num_examples / arg.batch_size * arg.epochs)
    config = ConfigDict()
    config.seed = 0
    config.total_steps = arg.steps
    config.batch_size = arg.batch_size
    config.log_every = 1 if arg.debug else 50
    config.eval_every = max(arg.steps // 10, 1)
    config.save_every = max(arg.steps // 20, 1)
    config.model = {
        "variant": "Ti/4",
        "image_size": size,
        "dim": 32 if arg.debug else 192,
        "depth": 2 if arg.debug else 9,
        "num_heads": 2 if arg.debug else 3,
        "mlp_dim": 64 if arg.debug else 384,
        "pos_embed": "learned",
        "dtype": "float32",
        "drop_path": 0.1,
    }
    config.objective = {"name": "supervised", "label_smoothing": 0.1, "pool": "gap"}
    config.preprocess = {"normalize": "dataset", "mixup": 0.2}
    config.augment = {"name": "pad_crop_flip", "size": size, "padding": 4, "flip": True}
    config.data = {"name": arg.name, "split": "train", "data_dir": arg.data_dir, "num_workers": 0}
    config.optimizer = {
        "learning_rate": 1e-3,
        "warmup_steps": arg.steps // 10,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
    }
    config.mesh = {"data": -1}
    config.train = {"best_metric": "test/top1"}
    config.evals = {
        "test": {
            "name": "classification",
            "dataset": arg.name,
            "split": "test",
            "data_dir": arg.data_dir,
            "augment": {"name": "none", "size": size},
            "batch_size": 500,
        }
    }
    return config
