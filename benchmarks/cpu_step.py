"""Images/s of the real training step on this machine: ViT-Ti/16, batch 32, float32, AdamW.

  python benchmarks/cpu_step.py [--steps=10] [--flags="--xla_…"] [--vs_torch]

Beside it, in the same run, the bound: the rate at which this machine's plain matrix products would
do the step's FLOPs. With --vs_torch also PyTorch's own encoder layers (eager), if torch is there.
"""

import argparse
import functools
import json
import os
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--flags", default="", help="XLA_FLAGS to try")
    parser.add_argument("--vs_torch", action="store_true")
    return parser.parse_args()


def best_rate(step, num_images, steps):
    """Images/s of the fastest of `steps` calls, after a first that compiles."""
    step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return num_images / min(seconds), num_images / sorted(seconds)[len(seconds) // 2]


def jax_step(args):
    import jax
    import numpy as np
    from flax import nnx

    from vit_jax.models.vit import flops_per_image, make_vit
    from vit_jax.objectives import OBJECTIVES
    from vit_jax.optim import make_optimizer
    from vit_jax.preprocess import make_preprocess
    from vit_jax.train import Parts, TrainState, train_step

    optimizer, schedule = make_optimizer(learning_rate=1e-3, total_steps=1000, weight_decay=0.1)
    preprocess = make_preprocess()

    def modules():
        rngs = nnx.Rngs(0)
        backbone = make_vit(variant=args.variant, pos_embed="sincos2d", rngs=rngs)
        options = {"num_classes": 1000, "preprocess": preprocess, "rngs": rngs}
        return backbone, OBJECTIVES["supervised"](backbone=backbone, **options)

    backbone, objective = nnx.eval_shape(modules)
    flops = flops_per_image(backbone, num_classes=1000)
    parts = Parts(
        graphdefs={"backbone": nnx.graphdef(backbone), "objective": nnx.graphdef(objective)},
        trainable={"backbone": nnx.Param, "objective": nnx.Param},
        optimizer=optimizer,
        schedule=schedule,
        seed=0,
        ema_decay=0.0,
        preprocess=preprocess,
        flops_per_image=flops,
        image_size=(224, 224),
    )

    def init():
        params, rest = parts.split(*modules())
        return TrainState(jax.numpy.int32(0), params, rest, optimizer.init(params), ())

    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (args.batch_size, 224, 224, 3), np.uint8),
        "label": rng.integers(0, 1000, args.batch_size).astype(np.int32),
        "mask": np.ones(args.batch_size, bool),
    }
    compiled = jax.jit(functools.partial(train_step, parts), donate_argnums=0)
    state = jax.jit(init)()

    def step():
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return step, flops


def matmul_rate(flops):
    """Images/s if the step were nothing but one large matrix product's rate."""
    import jax

    size = 1536
    x = jax.numpy.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / flops


def torch_step(args):
    """The same sizes from PyTorch's own encoder layers, eager, AdamW."""
    import torch

    dim, depth, heads, mlp = 192, 12, 3, 768
    layer = torch.nn.TransformerEncoderLayer(
        dim, heads, mlp, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    patch = torch.nn.Conv2d(3, dim, 16, 16)
    encoder = torch.nn.TransformerEncoder(layer, depth, torch.nn.LayerNorm(dim))
    head = torch.nn.Linear(dim, 1000)
    modules = torch.nn.ModuleList([patch, encoder, head])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=0.1)
    images, labels = torch.randn(args.batch_size, 3, 224, 224), torch.zeros(args.batch_size).long()

    def step():
        optimizer.zero_grad()
        tokens = patch(images).flatten(2).transpose(1, 2)
        logits = head(encoder(tokens).mean(1))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def main():
    args = arguments()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {args.flags}".strip()
    step, flops = jax_step(args)
    best, median = best_rate(step, args.batch_size, args.steps)
    row = {"variant": args.variant, "images_per_second": median, "best": best}
    row |= {"bound": matmul_rate(flops), "flags": args.flags}
    row["of_bound"] = best / row["bound"]
    if args.vs_torch:
        row["torch"], _ = best_rate(torch_step(args), args.batch_size, args.steps)
        row["vs_torch"] = best / row["torch"]
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
