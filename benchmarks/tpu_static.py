"""Cycles of the real training step on TPUs that are not here, by the TPU compiler's own figures.

  python benchmarks/tpu_static.py [S B L H] [--json=FILE]

Needs the extra `tpu` and no TPU. Each case is `vit_jax`'s own step: AdamW, bfloat16 products, uint8
images, GAP, sin-cos positions. Counted are the compiler's estimates of everything that XLA made,
loops by their trips, and for each Pallas kernel what `vit_jax.bundles` makes of its machine code,
the start of its cells included. Waiting for other chips is in neither.

Estimates and bundles are two scales. How they compare is measured on operations of XLA, which have
both, and printed beside the result: where the estimate of an operation is higher than what its
bundles say, a kernel in its place looks better by that factor than it is.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile

CASES = {  # variant, topology, images a chip, model, mesh
    "S": ("S/16", "v5e:4x4", 128, {}, {}),
    "B": ("B/16", "v6e:16x16", 64, {}, {}),
    "L": ("L/16", "v5p:4x4x4", 32, {}, {}),
    "H": ("H/14", "v5p:4x4x4", 16, {"scan": True}, {"data": 1, "fsdp": -1}),
}
BIG_VISION = {"S": 112.8e6, "B": 54.6e6, "L": 93.9e6}
"""Estimated cycles of big_vision's step in the same cases (its commit of November 2026)."""

PARTS = ("attention", "MLP", "norms", "patch embedding", "optimiser", "head and loss", "copies")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", default="", help="file for the results")
    parser.add_argument("--agreement", default="", help=argparse.SUPPRESS)  # the inner process
    return parser.parse_args()


def compile_case(variant: str, topology: str, images: int, model: dict, mesh_sizes: dict):
    """(parsed program, target, FLOPs of a chip by the formula) of one case's step."""
    from ml_collections import ConfigDict

    from vit_jax import plan
    from vit_jax.data.sources import DatasetInfo
    from vit_jax.sharding import make_mesh
    from vit_jax.train import abstract_state, make_parts

    target = plan.topology(topology)
    mesh = make_mesh(**mesh_sizes, devices=target.devices)
    model = {"variant": variant, "pos_embed": "sincos2d", "dtype": "bfloat16", **model}
    config = ConfigDict(
        {
            "seed": 0,
            "total_steps": 1000,
            "model": model,
            "objective": {"name": "supervised", "pool": "gap"},
            "preprocess": {},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
            "train": {},
        }
    )
    names = tuple(map(str, range(1000)))
    info = DatasetInfo("imagenet", None, {"train": 1}, names, "", None, None)
    parts, init = make_parts(config, info)
    batch = plan.abstract_batch(images * target.num_chips, parts.image_size, mesh)
    compiled = plan.compile_step(parts, abstract_state(init, mesh), batch, mesh)
    return compiled.module, target, parts.flops_per_image * images


def part_of(instruction) -> str:
    """Which of PARTS an instruction belongs to, by the names that the model gives operations."""
    if instruction.opcode in ("copy", "copy-start", "copy-done", "transpose"):
        return "copies"
    scopes = re.split(r"[/()]", instruction.op_name)
    for scope, part in (("attn", 0), ("mlp", 1), ("patch_embed", 3)):
        if scope in scopes:
            return PARTS[part]
    if any(scope in ("norm", "norm1", "norm2") for scope in scopes):
        return "norms"
    return "head and loss" if "jvp" in scopes else "optimiser"


def shares(module, kernels) -> dict[str, float]:
    """Cycles by part; kernels count as the part that they are in."""
    cycles = dict.fromkeys(PARTS, 0.0)
    for _, instruction, times, fused in module.visits():
        if not fused:
            cycles[part_of(instruction)] += instruction.cycles * times
    for kernel in kernels:
        part = "MLP" if "mlp" in kernel.op_name else "attention"
        cycles[part] += kernel.cycles * kernel.times
    return cycles


def measure(name: str) -> dict:
    """All figures of one case, a chip and step."""
    from vit_jax import bundles, hlo

    variant, topology, images, model, mesh_sizes = CASES[name]
    module, target, flops = compile_case(variant, topology, images, model, mesh_sizes)
    chip = target.chip
    kernels = bundles.kernels(module, chip, bundles.Dumps(topology))
    xla = hlo.total_cycles(module)
    inside = round(sum(kernel.cycles * kernel.times for kernel in kernels))
    total = xla + inside
    wanted = BIG_VISION.get(name)
    return {
        "case": f"{variant} {topology} {images} a chip",
        "cycles": total,
        "cycles_an_image": round(total / images),
        "xla": xla,
        "kernels": inside,
        "matmul_floor": round(flops / chip.flops_per_cycle),
        "against_big_vision": total / wanted if wanted else None,
        "parts": {part: round(c) for part, c in shares(module, kernels).items()},
        "each_kernel": [vars(kernel) | {"cycles": kernel.cycles} for kernel in kernels],
        "loops_of_unknown_trips": module.unknown_loops(),
        "agreement": agreement(name),
    }


def agreement(name: str) -> dict[str, dict]:
    """Of plain operations of XLA at the case's shapes: the estimate over what bundles say."""
    with tempfile.TemporaryDirectory() as folder:
        from vit_jax import bundles

        flags = {"LIBTPU_INIT_ARGS": bundles.dump_flags(folder), "JAX_PLATFORMS": "cpu"}
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        command = [sys.executable, __file__, name, f"--agreement={folder}"]
        options = {"env": environment | flags, "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        if done.returncode:
            raise RuntimeError(f"the plain operations do not compile: {done.stderr[-500:]}")
        return json.loads(done.stdout.splitlines()[-1])


def agree(name: str, folder: str) -> dict[str, dict]:
    """What the inner process measures: a product, and an addition that only moves memory."""
    import jax
    import jax.numpy as jnp

    from vit_jax import bundles, hlo, plan
    from vit_jax.models.vit import VARIANTS

    variant, topology, images, _, _ = CASES[name]
    target = plan.topology(topology)
    dim, _, _, hidden = VARIANTS[variant.split("/")[0]]
    rows = images * (256 if variant.endswith("14") else 196)
    place = jax.sharding.SingleDeviceSharding(target.devices[0])

    def shape(*sides):
        return jax.ShapeDtypeStruct(sides, jnp.bfloat16, sharding=place)

    operations = {
        "product": (jnp.matmul, shape(rows, dim), shape(dim, hidden)),
        "addition": (jnp.add, shape(rows, hidden), shape(rows, hidden)),
    }
    found = {}
    for key, (function, *operands) in operations.items():
        module = hlo.parse(jax.jit(function).lower(*operands).compile().as_text())
        defined = module.defined[module.entry]
        each = max(defined.values(), key=lambda instruction: instruction.cycles)
        counted = bundles.cost(defined, each, bundles.take_dump(folder, each.name), target.chip)
        most = max(counted.bundles, counted.rows, counted.traffic)
        found[key] = {"estimate": each.cycles, "counted": most, "ratio": each.cycles / most}
    return found


def table(result: dict) -> str:
    """The result for people."""
    mega = {key: result[key] / 1e6 for key in ("cycles", "xla", "kernels", "matmul_floor")}
    lines = [
        f"{result['case']}: {mega['cycles']:.1f} M cycles a step "
        f"({mega['xla']:.1f} M XLA, {mega['kernels']:.1f} M kernels), "
        f"{result['cycles_an_image']:,} an image, matmul floor {mega['matmul_floor']:.1f} M"
    ]
    if ratio := result["against_big_vision"]:
        lines.append(f"  against big_vision's estimate: {ratio:.3f}")
    parts = collections.Counter(result["parts"]).most_common()
    lines += [f"  {p:16} {c / 1e6:7.2f} M {c / result['cycles']:6.1%}" for p, c in parts]
    for kernel in result["each_kernel"]:
        keys = ("bundles", "rows", "traffic", "overhead", "cycles", "cells")
        figures = ", ".join(f"{kernel[key]:,} {key}" for key in keys)
        lines.append(f"  {kernel['name']} × {kernel['times']:.0f}: {figures}")
    for key, each in result["agreement"].items():
        lines.append(
            f"  both ways, a plain {key}: estimate {each['estimate']:,}, counted as a kernel "
            f"{each['counted']:,}: {each['ratio']:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.agreement:
        print(json.dumps(agree(args.cases[0], args.agreement)))
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes alone are traced here
    results = []
    for name in args.cases:
        results.append(measure(name))
        print(table(results[-1]), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
