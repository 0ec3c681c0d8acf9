"""Images/s of the real training step on this machine: ViT-Ti/16, batch 32, float32, AdamW.

  python benchmarks/cpu_step.py [--steps=6] [--flags="--xla_…"] [--vs_torch]

Beside it, in turns in the same run, a peer: the same sizes from Flax Linen's own layers and optax,
which is what big_vision's model is made of. And a bound: the rate at which this machine's plain
matrix products would do the step's FLOPs. With --vs_torch also PyTorch's own encoder layers
(eager), if torch is there.
"""

import argparse
import functools
import json
import operator
import os
import statistics
import time

NUM_CLASSES = 1000


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--flags", default="", help="XLA_FLAGS to try")
    parser.add_argument("--vs_torch", action="store_true")
    return parser.parse_args()


def our_step(batch_size):
    """A function that makes one training step of this package, and the FLOPs of an image."""
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from vit_jax.data.sources import DatasetInfo
    from vit_jax.train import make_parts, train_step

    config = ConfigDict(
        {
            "seed": 0,
            "total_steps": 1000,
            "model": {"variant": "Ti/16", "pos_embed": "sincos2d"},
            "objective": {"name": "supervised"},
            "preprocess": {},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
            "train": {},
        }
    )
    names = tuple(map(str, range(NUM_CLASSES)))
    parts, init = make_parts(config, DatasetInfo("", None, {"train": 1}, names, "", None, None))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, 224, 224, 3), np.uint8),
        "label": rng.integers(0, NUM_CLASSES, batch_size).astype(np.int32),
        "mask": np.ones(batch_size, bool),
    }
    compiled = jax.jit(functools.partial(train_step, parts), donate_argnums=0)
    state = jax.jit(init)()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return step, parts.flops_per_image


def linen_step(batch_size):
    """The peer: Linen's layers, float images, AdamW on everything."""
    import flax.linen as nn
    import jax
    import numpy as np
    import optax

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=3)(y, y)
            y = nn.gelu(nn.Dense(768)(nn.LayerNorm()(x)))
            return x + nn.Dense(192)(y)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(192, (16, 16), strides=(16, 16), padding="VALID")(images)
            x = x.reshape(len(x), -1, 192)
            x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
            for _ in range(12):
                x = Block()(x)
            return nn.Dense(NUM_CLASSES)(nn.LayerNorm()(x).mean(1))

    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch_size, 224, 224, 3), np.float32)
    labels = rng.integers(0, NUM_CLASSES, batch_size)
    model, optimizer = Classifier(), optax.adamw(1e-3, weight_decay=0.1)

    def loss_fn(params, images):
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, images):
        params, moments = state
        loss, grads = jax.value_and_grad(loss_fn)(params, images)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = jax.jit(model.init)(jax.random.key(0), images)
    state = params, optimizer.init(params)

    def step():
        nonlocal state
        state, loss = update(state, images)
        jax.block_until_ready((state, loss))

    return step


def torch_step(batch_size):
    """The same sizes from PyTorch's own encoder layers, eager, AdamW."""
    import torch

    dim, depth, heads, mlp = 192, 12, 3, 768
    layer = torch.nn.TransformerEncoderLayer(
        dim, heads, mlp, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    patch = torch.nn.Conv2d(3, dim, 16, 16)
    encoder = torch.nn.TransformerEncoder(layer, depth, torch.nn.LayerNorm(dim))
    head = torch.nn.Linear(dim, NUM_CLASSES)
    modules = torch.nn.ModuleList([patch, encoder, head])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.1)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.zeros(batch_size).long()

    def step():
        optimizer.zero_grad()
        tokens = patch(images).flatten(2).transpose(1, 2)
        logits = head(encoder(tokens).mean(1))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def matmul_step(batch_size, flops):
    """One large product, repeated until the FLOPs of a training step are done."""
    import jax

    size = 1536
    x = jax.numpy.ones((size, size))
    repeats = round(batch_size * flops / (2 * size**3))
    product = jax.jit(lambda x: x @ x)

    def step():
        for _ in range(repeats):
            product(x).block_until_ready()

    return step


def main():
    args = arguments()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {args.flags}".strip()
    ours, flops = our_step(args.batch_size)
    steps = {"vit_jax": ours, "linen": linen_step(args.batch_size)}
    steps["bound"] = matmul_step(args.batch_size, flops)
    if args.vs_torch:
        steps["torch"] = torch_step(args.batch_size)
    seconds = {name: [] for name in steps}
    for turn in range(args.steps + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - start)
    rates = {k: round(args.batch_size / statistics.median(v), 2) for k, v in seconds.items()}
    # Neighbours in time share the machine's noise, so ratios are taken turn by turn.
    ratios = {
        name: round(statistics.median(map(operator.truediv, peer, seconds["vit_jax"])), 3)
        for name, peer in seconds.items()
        if name != "vit_jax"
    }
    print(json.dumps({"images_per_second": rates, "ours_over": ratios, "flags": args.flags}))


if __name__ == "__main__":
    main()
