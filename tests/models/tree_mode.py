"""One supervised gradient, to be run in both of NNX's modes: `python -m tests.models.tree_mode`."""

import jax
import numpy as np
from flax import nnx

from tests.models import reference
from vit_jax.models.vit import make_vit
from vit_jax.objectives.supervised import Supervised
from vit_jax.preprocess import Preprocess

# Each part of the family in one case or the other: looped, then scanned.
CASES = (
    {
        **{"cls_token": True, "dist_token": True, "num_reg_tokens": 2, "pos_embed": "rope2d"},
        **{"mlp": "swiglu", "patch_dropout": 0.5, "pool": "cls_dist"},
    },
    {
        **{"parallel": True, "qk_norm": True, "qkv_bias": False, "norm": "rmsnorm"},
        **{"pool": "map", "scan": True, "remat": "full"},
    },
)


class Both(nnx.Module):
    """A backbone and its objective."""

    def __init__(self, pool, **options):
        rngs = nnx.Rngs(0)
        shape = {"image_size": (6, 8), "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}
        self.vit = make_vit(variant="Ti/3x2", **shape, layer_scale=0.1, **options, rngs=rngs)
        options = {"backbone": self.vit, "num_classes": 5, "preprocess": Preprocess()}
        self.method = Supervised(**options, pool=pool, rngs=rngs)


def loss_and_norm(**options):
    """The loss and the squared norm of its gradients."""
    both = reference.made(lambda: Both(**options))
    graphdef, params = nnx.split(both)
    images = np.random.default_rng(1).integers(0, 256, (4, 6, 8, 3), np.uint8)
    batch = {"image": images, "label": np.arange(4), "mask": np.ones(4, bool)}
    key = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def run(params):
        def loss(params):
            both = nnx.merge(graphdef, params)
            return both.method(both.vit, batch, step=0, key=key, train=True)[0]

        value, grads = jax.value_and_grad(loss)(params)
        return value, sum((grad**2).sum() for grad in jax.tree.leaves(grads))

    return [float(value) for value in run(nnx.to_pure_dict(params))]


if __name__ == "__main__":
    from flax import config

    print(f"graph mode: {config.nnx_graph_mode}")
    for case in CASES:
        print(*loss_and_norm(**case))
