"""A small ViT on CIFAR-10 (Krizhevsky 2009), from scratch.

  vit-jax prepare folder PATH/TO/cifar10 --name=cifar10
  vit-jax train --config=configs/cifar10.py --workdir=runs/cifar10

PATH/TO/cifar10 holds train/<class>/ and test/<class>/ with 32 × 32 images; the TFDS dataset of the
same name (`vit-jax prepare tfds cifar10`) does as well. The whole recipe was not yet run.

`cifar10.py:small` is a smaller model with larger patches for two epochs, to see it learn on a CPU
in minutes; the README's results table has its figures.
"""

from ml_collections import ConfigDict

from vit_jax.config import dataset_splits, parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Argument: name, data_dir, epochs, steps (instead of epochs), batch_size, small, debug."""
    arg = parse_arg(
        arg,
        name="cifar10",
        data_dir="data",
        epochs=200,
        steps=0,
        batch_size=512,
        small=False,
        debug=False,
    )
    size = (32, 32)
    dim, depth, num_heads, mlp_dim, padding = 192, 9, 3, 384, 4
    if arg.small:
        dim, depth, num_heads, mlp_dim, padding = 128, 4, 4, 256, 1
        arg.update({"batch_size": 128, "steps": arg.steps or 800})
    if arg.debug:
        dim, depth, num_heads, mlp_dim = 32, 2, 2, 64
        arg.update({"batch_size": 8, "steps": 4})
    if not arg.steps:
        num_examples = dataset_splits(arg.name, data_dir=arg.data_dir)["train"]
        arg.steps = round(num_examples / arg.batch_size * arg.epochs)
    config = ConfigDict()
    config.seed = 0
    config.total_steps = arg.steps
    config.batch_size = arg.batch_size
    config.log_every = 1 if arg.debug else 50
    config.eval_every = max(arg.steps // 4, 1)
    config.save_every = max(arg.steps // 8, 1)
    config.model = {
        "variant": "Ti/8" if arg.small else "Ti/4",
        "image_size": size,
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_dim": mlp_dim,
        "pos_embed": "learned",
        "drop_path": 0.0 if arg.small else 0.1,
    }
    config.objective = {
        "name": "supervised",
        "label_smoothing": 0.0 if arg.small else 0.1,
    }
    config.preprocess = {"normalize": "dataset", "mixup": 0.0 if arg.small else 0.2}
    config.augment = {"name": "pad_crop_flip", "size": size, "padding": padding, "flip": True}
    config.data = {
        "name": arg.name,
        "split": "train",
        "data_dir": arg.data_dir,
        "num_workers": 0,
        "strict": False,
    }
    config.optimizer = {
        "learning_rate": 2e-3 if arg.small else 1e-3,
        "warmup_steps": arg.steps // 10,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
    }
    config.mesh = {"data": -1}
    config.train = {
        "keep": 2,
        "keep_best": 1,
        "best_metric": "test/top1",
        "ema_decay": 0.0,
        "max_skips": 0,
        "wandb": "",
    }
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
