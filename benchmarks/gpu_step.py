"""The training step on one GPU: images/s, share of the chip's peak, and timm beside it.

  python benchmarks/gpu_step.py [S B L] [--images=256] [--steps=20] [--rounds=3] [--vs=timm]

AdamW, bfloat16 products, uint8 images that lie on the device, GAP, 1000 classes. The share of the
peak (MFU) is the formula's FLOPs, three forward passes, over the data sheet's dense bfloat16 rate.
With --vs=timm (where torch and timm are installed) timm's model of the same sizes takes turns with
it in the same process: torch.compile, SDPA, autocast to bfloat16, fused AdamW. Then each way to
compute attention that the device has does it alone, forward and backward, without and with a class
token: milliseconds, or why it cannot. A JSON line a case, printed at once. `--tiny` runs all of it
with a small model, on any machine, to see that it runs.
"""

import argparse
import functools
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Sequence

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is on the same GPU

CASES = {"S": ("S/16", 512), "B": ("B/16", 256), "L": ("L/16", 128)}
TIMM = {"S": "vit_small_patch16_224", "B": "vit_base_patch16_224", "L": "vit_large_patch16_224"}
TINY = {"dim": 64, "depth": 2, "num_heads": 2, "mlp_dim": 128}
NUM_CLASSES = 1000


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="|".join(CASES), help="all by default")
    parser.add_argument("--images", type=int, default=0, help="a step; by default as in CASES")
    parser.add_argument("--steps", type=int, default=20, help="in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--vs", default="", choices=["", "timm"])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    args.cases = args.cases or list(CASES)
    if unknown := ", ".join(sorted(set(args.cases) - set(CASES))):
        parser.error(f"{unknown} is unknown; choose from {', '.join(CASES)}")
    return args


def our_turn(variant: str, images: int, attention: str, tiny: bool):
    """(a function of the number of steps that runs them, FLOPs of an image's step)."""
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from vit_jax.data.sources import DatasetInfo
    from vit_jax.feeding import put_batch
    from vit_jax.sharding import make_mesh
    from vit_jax.train import abstract_state, make_parts, make_step

    model = {"variant": variant, "pos_embed": "sincos2d", "dtype": "bfloat16"}
    config = ConfigDict(
        {
            "seed": 0,
            "total_steps": 1_000_000,
            "model": model | {"attention": attention} | (TINY if tiny else {}),
            "objective": {"name": "supervised", "pool": "gap"},
            "preprocess": {},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.1},
            "train": {},
        }
    )
    names = tuple(map(str, range(NUM_CLASSES)))
    info = DatasetInfo("random", None, {"train": 1}, names, "", None, None)
    mesh = make_mesh(devices=jax.devices()[:1])
    parts, init = make_parts(config, info)
    shapes = abstract_state(init, mesh)
    state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (images, 224, 224, 3), np.uint8),
        "label": rng.integers(0, NUM_CLASSES, images).astype(np.int32),
        "mask": np.ones(images, bool),
    }
    step, batch = make_step(parts, shapes, mesh), put_batch(batch, mesh)

    def run(num_steps: int) -> float:
        nonlocal state
        for _ in range(num_steps):
            state, metrics = step(state, batch)
        return float(metrics["loss"])  # waits for all of them

    return run, parts.flops_per_image


def attention_alone(variant: str, images: int, num_steps: int, tiny: bool) -> dict:
    """Milliseconds forward and backward by number of tokens and implementation, or its refusal."""
    import jax
    import jax.numpy as jnp

    from vit_jax.kernels.attention import AUTO, attention, choose
    from vit_jax.models.vit import VARIANTS

    dim, _, num_heads, _ = VARIANTS[variant.partition("/")[0]]
    if tiny:
        dim, num_heads = TINY["dim"], TINY["num_heads"]
    found = {}

    @functools.partial(jax.jit, static_argnames="implementation")
    def both(qkv, grad, implementation):
        attend = functools.partial(attention, num_heads=num_heads, implementation=implementation)
        out, vjp = jax.vjp(attend, qkv)
        return out, vjp(grad)

    for tokens in (196, 197):
        keys = jax.random.split(jax.random.key(0))
        qkv = jax.random.normal(keys[0], (images, tokens, 3 * dim), jnp.bfloat16)
        grad = jax.random.normal(keys[1], (images, tokens, dim), jnp.bfloat16)
        found[tokens] = {"auto": choose("auto", qkv, num_heads)}
        for name in AUTO.get(jax.default_backend(), ("xla",)):

            def run(num_steps: int, name=name, qkv=qkv, grad=grad) -> None:
                for _ in range(num_steps):
                    result = both(qkv, grad, name)
                jax.block_until_ready(result)

            try:
                run(2)
                found[tokens][name] = 1e3 * min(seconds(run, num_steps) for _ in range(3))
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
                found[tokens][name] = str(error).splitlines()[0]
    return found


def timm_turn(name: str, images: int, tiny: bool):
    """The same for timm's model."""
    import timm
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    sizes = {"embed_dim": TINY["dim"], "depth": TINY["depth"], "num_heads": TINY["num_heads"]}
    options = {"global_pool": "avg", "class_token": False, "num_classes": NUM_CLASSES}
    model = timm.create_model(name, **options, **(sizes if tiny else {})).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1, fused=True)
    pixels = torch.randint(0, 256, (images, 3, 224, 224), dtype=torch.uint8, device=device)
    labels = torch.randint(0, NUM_CLASSES, (images,), device=device)

    @torch.compile(disable=tiny)
    def loss_of(pixels, labels):
        logits = model((pixels.float() - 127.5) / 127.5)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(pixels, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def seconds(run, num_steps: int) -> float:
    """Of a step, over a turn."""
    start = time.perf_counter()
    run(num_steps)
    return (time.perf_counter() - start) / num_steps


def measure(case: str, args: argparse.Namespace) -> dict:
    """Medians of the rounds of one case, and their ratio in turns."""
    import jax

    from vit_jax.chips import CHIPS

    variant, images = CASES[case]
    images = args.images or images
    run, flops = our_turn(variant, images, args.attention, args.tiny)
    turns = {"vit_jax": run}
    if args.vs:
        turns[args.vs] = timm_turn(TIMM[case], images, args.tiny)
    for name, run in turns.items():
        if not math.isfinite(run(3)):  # compiles, and warms up
            raise SystemExit(f"{name}'s loss is not finite: its speed means nothing")
    times = {name: [] for name in turns}
    for _ in range(args.rounds):
        for name, run in turns.items():
            times[name].append(seconds(run, args.steps))
    kind = jax.devices()[0].device_kind
    rates = {name: images / statistics.median(each) for name, each in times.items()}
    result = {"case": variant, "images": images, "device": kind, "images_per_second": rates}
    if kind in CHIPS:
        peak = CHIPS[kind].peak_flops
        result["mfu"] = {name: rate * flops / peak for name, rate in rates.items()}
    if args.vs:
        pairs = zip(times[args.vs], times["vit_jax"], strict=True)
        result["against_" + args.vs] = statistics.median(a / b for a, b in pairs)
    result["attention_ms"] = attention_alone(variant, images, args.steps, args.tiny)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    for case in args.cases:
        print(json.dumps(measure(case, args)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
