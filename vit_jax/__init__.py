"""vit_jax: pretraining Vision Transformers with JAX, from a laptop to a TPU pod."""

import time

__version__ = "0.1.0"

PROCESS_START = time.time()  # seconds since the epoch: where a run's account of time begins
