"""The largest batch that `vit-jax plan` calls fitting: a batch more, and the TPU compiler refuses.

  python benchmarks/plan_memory.py LOW HIGH [--multiple=4] -- <flags of vit-jax plan>
  python benchmarks/plan_memory.py 456 472 --multiple=4 -- --config=vit_l16_i21k \\
      --topology=v5e:2x2 --config.mesh.fsdp=1 --config.mesh.data=-1

LOW fits and HIGH does not; batches between them that the multiple (the number of devices) divides
are planned until two neighbours are left. Needs the extra `tpu` and no TPU; a batch takes as long
as its plan if it fits, and some ten seconds if not.
"""

import argparse
import json
import subprocess
import sys


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("low", type=int)
    parser.add_argument("high", type=int)
    parser.add_argument("--multiple", type=int, default=1)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]


def fits(batch_size: int, flags: list[str]) -> bool:
    command = [sys.executable, "-m", "vit_jax.cli", "plan", *flags, "--json", "--noremedies"]
    command.append(f"--config.batch_size={batch_size}")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 2):
        raise SystemExit(done.returncode)
    plan = json.loads(done.stdout)
    size = plan["bytes_per_chip"]
    total = f"{size['total'] / 1e9:.2f} of {size['capacity'] / 1e9:.2f} GB"
    print(f"{batch_size}: {'fits' if plan['fits'] else 'does not fit'}, {total}", flush=True)
    return plan["fits"]


def main() -> None:
    args, flags = arguments()
    low, high = args.low // args.multiple, args.high // args.multiple
    if not fits(low * args.multiple, flags) or fits(high * args.multiple, flags):
        raise SystemExit("LOW must fit, and HIGH must not")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * args.multiple, flags) else (low, middle)
    print(f"the largest: {low * args.multiple}")


if __name__ == "__main__":
    main()
