"""vit_jax: pretraining Vision Transformers with JAX, from a laptop to a TPU pod."""

import time

__version__ = "0.1.0"

PROCESS_START = time.time()  # seconds since the epoch: where a run's account of time begins


def __getattr__(name: str):
    # Late, because `import vit_jax` must not wait for jax.
    if name == "load":
        from vit_jax.interop.load import load

        return load
    if name not in ("create_model", "list_models"):
        raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
    from vit_jax.zoo import create_model, list_models

    return {"create_model": create_model, "list_models": list_models}[name]
