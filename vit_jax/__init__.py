"""vit_jax: pretraining Vision Transformers with JAX, from a laptop to a TPU pod."""

import time

__version__ = "0.1.0"

PROCESS_START = time.time()  # seconds since the epoch: where a run's account of time begins


def load(path, *, image_size=None, patch_size=None, num_classes=None, num_heads=None, step=None):
    """The model at `path`, ready to call: see `vit_jax.interop.load.load`."""
    from vit_jax.interop import load as module  # jax starts here, not when importing vit_jax

    sizes = {"image_size": image_size, "patch_size": patch_size}
    choices = {"num_classes": num_classes, "num_heads": num_heads, "step": step}
    return module.load(path, **sizes, **choices)
