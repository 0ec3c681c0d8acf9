"""Whether `vit-jax plan` knows what fits: its largest batch against the TPU compiler's own.

  python benchmarks/plan_memory.py [Ti S B]

Needs the extra `tpu` and no TPU. Models of one block, so that it takes minutes. For each case the
largest batch that `plan` calls fitting is found by bisection. Then the step is compiled once more
for that batch and for the next one, by plain JAX: the first must compile and the second must end in
the compiler's out-of-memory error. Printed beside it are the bytes that `plan` reports for both,
which the capacity must lie between.
"""

import argparse

import jax
from ml_collections import ConfigDict

from vit_jax import plan
from vit_jax.data.sources import DatasetInfo
from vit_jax.sharding import make_mesh
from vit_jax.train import abstract_state, make_parts, make_step

CASES = {  # variant, topology, mesh, a batch that fits
    "Ti": ("Ti/16", "v5e:2x2", {}, 4096),
    "S": ("S/16", "v4:2x2x1", {"data": 1, "fsdp": -1}, 4096),
    "B": ("B/16", "v6e:2x2", {"data": 2, "fsdp": 2}, 2048),
}


class Case:
    """A recipe for a topology, at any batch size."""

    def __init__(self, variant: str, topology: str, mesh_sizes: dict, start: int):
        self.target = plan.topology(topology)
        self.mesh = make_mesh(**mesh_sizes, devices=self.target.devices)
        model = {"variant": variant, "pos_embed": "sincos2d", "dtype": "bfloat16", "depth": 1}
        config = ConfigDict(
            {
                "seed": 0,
                "total_steps": 1000,
                "model": model,
                "objective": {"name": "supervised"},
                "preprocess": {},
                "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
                "train": {},
            }
        )
        names = tuple(map(str, range(1000)))
        info = DatasetInfo("imagenet", None, {"train": 1}, names, "", None, None)
        self.parts, init = make_parts(config, info)
        self.state = abstract_state(init, self.mesh)
        self.name, self.start, self.step = f"{variant} {topology}", start, self.mesh.size

    def batch(self, size: int) -> dict:
        return plan.abstract_batch(size, self.parts.image_size, self.mesh)

    def planned(self, size: int) -> tuple[bool, int]:
        """What `plan` says: whether a batch fits, and bytes a chip."""
        compiled = plan.compile_step(self.parts, self.state, self.batch(size), self.mesh)
        options = {"batch_size": size, "total_steps": 1000}
        result = plan.report(compiled, self.target, self.parts, self.state, self.mesh, **options)
        total = result["bytes_per_chip"]["total"]
        print(f"  {size}: {'fits' if result['fits'] else 'does not'}, {total:,} bytes", flush=True)
        return result["fits"], total

    def accepted(self, size: int) -> bool:
        """What the compiler says, nothing of `plan` between."""
        lowered = make_step(self.parts, self.state, self.mesh).lower(self.state, self.batch(size))
        try:
            lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return False
        return True


def largest(case: Case) -> tuple[int, int, int]:
    """The largest batch that fits, and `plan`'s bytes for it and for the next one."""
    low, high = case.start, None
    totals = {low: case.planned(low)[1]}
    while high is None or high - low > case.step:
        if high is None:  # bytes grow with the batch, and a little faster than it does
            size = max(round(low * case.target.capacity / totals[low] * 1.02), low + case.step)
        else:
            size = (low + high) // 2
        size -= size % case.step
        fits, totals[size] = case.planned(size)
        low, high = (size, high) if fits else (low, size)
    return low, totals[low], totals[high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=list(CASES))
    jax.config.update("jax_platforms", "cpu")  # shapes alone are traced here
    for name in parser.parse_args().cases:
        case = Case(*CASES[name])
        size, used, needed = largest(case)
        both = case.accepted(size), case.accepted(size + case.step)
        print(
            f"{case.name}: plan's largest batch {size:,}; the compiler takes {size:,}: {both[0]}, "
            f"{size + case.step:,}: {both[1]}; plan's bytes {used:,} and {needed:,} around "
            f"{case.target.capacity:,}: {used <= case.target.capacity < needed}",
            flush=True,
        )


if __name__ == "__main__":
    main()
