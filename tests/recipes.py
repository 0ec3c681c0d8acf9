"""A recipe for tests: small, with everything random turned on."""

from ml_collections import ConfigDict

from vit_jax.commands.config_flag import load_config


def tiny(data_dir: str, **leaves) -> ConfigDict:
    """`digits:debug` with random crops, dropout, drop path and mixup; leaves: `seed=1, a__b=2`."""
    config = load_config("digits:debug")
    config.batch_size = 16
    config.log_every = 1
    config.data.data_dir = config.evals.test.data_dir = data_dir
    config.evals.test.batch_size = 120
    config.augment = {"name": "pad_crop_flip", "size": (8, 8), "padding": 1, "flip": False}
    config.model.dropout = 0.1
    config.model.drop_path = 0.2
    config.preprocess.mixup = 0.5
    for key, value in leaves.items():
        *sections, leaf = key.split("__")
        target = config
        for section in sections:
            target = target[section]
        target[leaf] = value
    return config
