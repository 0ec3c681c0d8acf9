"""Fine-tuning weights on any prepared dataset, or training a linear probe on them.

  vit-jax prepare folder PATH --name=mine --holdout=0.1
  vit-jax train --config=configs/transfer.py:name=mine,init_from=PATH,mode=full --workdir=runs/full

`init_from` is whatever `vit_jax.load` reads: a run of ours, an export, a Hugging Face or timm
folder, a .safetensors, a .npz. The model, its pooling and its normalisation are those of the
weights; `size` asks for another resolution. Modes:

- full: all parameters, one small learning rate (Dosovitskiy et al. 2021, section 4.1, with AdamW).
- layerwise: each layer's learning rate is 0.75 of the next one's (He et al. 2022, MAE, table 9).
- probe: the head alone on frozen features (`train.trainable`), its learning rate larger.

The modes' learning rates are for published weights of S to L; models of a few blocks want ten times
as much and more, as in `benchmarks/transfer.py`, which has figures on half of the digits' classes
and CIFAR-10's (README). On ImageNet's size not yet run.

To compare with: `pretrained=false` trains the same model as it is drawn, without the weights, in
any mode; without `init_from` the recipe trains `variant` from scratch.
"""

from ml_collections import ConfigDict

from vit_jax.config import parse_arg, train_and_eval_splits, weights_config

# Learning rate for 256 images, share of the next layer's, weight decay, drop path, what is trained.
MODES = {
    "full": (1e-4, 1.0, 0.05, 0.1, ""),
    "layerwise": (5e-4, 0.75, 0.05, 0.1, ""),
    "probe": (1e-3, 1.0, 0.0, 0.0, "objective/head/.*"),
}


def get_config(arg: str = "") -> ConfigDict:
    """Argument: what `parse_arg` lists below; steps replace epochs, 0 means as it comes."""
    arg = parse_arg(
        arg,
        name="mine",
        data_dir="data",
        eval_split="",
        init_from="",
        pretrained=True,
        mode="full",
        variant="S/16",
        size=0,
        augment="inception_crop_flip",
        epochs=20,
        steps=0,
        batch_size=256,
        learning_rate=0.0,
        debug=False,
    )
    if arg.mode not in MODES:
        raise ValueError(f"mode={arg.mode!r} is unknown; choose one of {', '.join(MODES)}.")
    if arg.mode != "full" and not arg.init_from:
        raise ValueError(f"mode={arg.mode} needs weights: init_from=PATH.")
    if arg.debug:
        arg.update({"batch_size": 8, "steps": 4, "variant": "Ti/8"})
        arg.size = arg.size or (0 if arg.init_from else 16)
    size = (arg.size, arg.size) if arg.size else None
    weights = {"model": {"variant": arg.variant, "pos_embed": "sincos2d"}, "pool": "gap"}
    if arg.init_from:
        weights = weights_config(arg.init_from, image_size=size)
    elif arg.debug:
        weights["model"] |= {"dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 64}
    size = size or weights["model"].get("image_size", (224, 224))
    train_split, arg.eval_split, num_examples = train_and_eval_splits(
        arg.name, data_dir=arg.data_dir, eval_split=arg.eval_split
    )
    steps = arg.steps or max(round(num_examples / arg.batch_size * arg.epochs), 1)
    learning_rate, layer_decay, weight_decay, drop_path, trainable = MODES[arg.mode]
    cropped = arg.augment != "none"
    config = ConfigDict()
    config.seed = 0
    config.init_from = arg.init_from if arg.pretrained else ""
    config.total_steps = steps
    config.batch_size = arg.batch_size
    config.log_every = 1 if arg.debug else min(50, steps)
    config.eval_every = max(steps // 4, 1)
    config.save_every = max(steps // 4, 1)
    config.model = weights["model"] | {"image_size": size, "drop_path": drop_path}
    config.objective = {"name": "supervised", "pool": weights["pool"], "label_smoothing": 0.0}
    config.preprocess = {"normalize": "half", "mixup": 0.0}
    if "mean" in weights:
        config.preprocess = {"normalize": "given", "mean": weights["mean"], "std": weights["std"]}
    config.augment = {"name": arg.augment, "size": size}
    config.data = {"name": arg.name, "split": train_split, "data_dir": arg.data_dir}
    config.data.update({"num_workers": 0, "strict": False})
    config.optimizer = {
        "learning_rate": arg.learning_rate or learning_rate * arg.batch_size / 256,
        "warmup_steps": steps // 10,
        "weight_decay": weight_decay,
        "clip_norm": 1.0,
        "layer_decay": layer_decay,
    }
    config.mesh = {"data": -1}
    config.train = {"keep": 2, "keep_best": 1, "best_metric": "test/top1", "ema_decay": 0.0}
    config.train.update({"max_skips": 0, "trainable": trainable, "wandb": ""})
    config.evals = {
        "test": {
            "name": "classification",
            "dataset": arg.name,
            "split": arg.eval_split,
            "data_dir": arg.data_dir,
            "augment": {"name": "resize_center_crop" if cropped else "none", "size": size},
            "batch_size": arg.batch_size,
        }
    }
    return config
