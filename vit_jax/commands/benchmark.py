"""`vit-jax benchmark data`: whether a dataset can be read as fast as a model wants it."""

import json
import math
import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from vit_jax.commands.config_flag import parse_with_config

USAGE = """vit-jax benchmark data: is it the data or the chips that a run will wait for?

  vit-jax benchmark data --config=configs/vit_s16_i1k.py --topology=v5e:16x16 [--cores=7168]
  vit-jax benchmark data --config=digits --chip='NVIDIA H200' --num_chips=8

It reads the config's training data for a few seconds as a run would (epochs, augmentation,
batches), without a model, and counts images a second and core. What the chips want is their peak
times --mfu over the FLOPs that the model's formula gives for an image."""


def main(argv: list[str]) -> int:
    """Runs `vit-jax benchmark` with the arguments behind it; answers the exit code.

    Raises ValueError and OSError, in one line, for bad input.
    """
    if argv[:1] in (["-h"], ["-help"], ["--help"]):
        print(USAGE)
        return 0
    if argv[:1] != ["data"]:
        raise ValueError(f"benchmark {argv[0] if argv else 'what'}? There is `benchmark data`")
    values, config = parse_with_config(argv[1:], _define, usage=USAGE)
    chip, num_chips = _chips(values)
    if not 0 < values.mfu <= 1:
        raise ValueError(f"--mfu={values.mfu} must be over 0 and at most 1, such as 0.4.")
    if not 0 < values.seconds < math.inf or values.cores < 0:
        raise ValueError("--seconds must be over 0 and finite, and --cores 1 or more.")
    result = measure(config, seconds=values.seconds)
    result |= judge(
        result,
        chip=chip,
        num_chips=num_chips,
        mfu=values.mfu,
        cores=values.cores or result["cores_here"],
    )
    print(json.dumps(result, indent=2) if values.json else _table(result))
    return 0


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", "", "TPUs to feed, like v5e:4x4.", flag_values=values)
    flags.DEFINE_integer("num_slices", 1, "How many such slices.", flag_values=values)
    flags.DEFINE_string("chip", "", "Or a chip as JAX calls it.", flag_values=values)
    flags.DEFINE_integer("num_chips", 1, "How many of those.", flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "The share of their peak that they reach.", flag_values=values)
    flags.DEFINE_integer(
        "cores", 0, "Cores of all hosts together; 0 for this machine's.", flag_values=values
    )
    flags.DEFINE_float("seconds", 5.0, "How long to read, twice.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)


def _chips(values: flags.FlagValues) -> tuple[str, int]:
    """The kind of the chips to feed ('' if this machine's are not known), and their number."""
    import jax

    from vit_jax.chips import CHIPS, devices_per_chip
    from vit_jax.plan import num_chips

    if values.topology and values.chip:
        raise ValueError("--topology and --chip exclude each other; give one of them.")
    if values["num_chips"].present and not values.chip:
        raise ValueError("--num_chips counts those of --chip; give it, too, or leave it out.")
    if values["num_slices"].present and not values.topology:
        raise ValueError("--num_slices counts those of --topology; give it, too, or leave it out.")
    if values.topology:
        generation = values.topology.partition(":")[0]
        count = num_chips(values.topology, num_slices=values.num_slices)
        return "TPU7x" if generation == "tpu7x" else f"TPU {generation}", count
    if values.chip:
        if values.chip not in CHIPS:
            raise ValueError(f"--chip={values.chip!r} is unknown; there are {', '.join(CHIPS)}.")
        if values.num_chips < 1:
            raise ValueError(f"--num_chips={values.num_chips} must be 1 or more.")
        return values.chip, values.num_chips
    kind = jax.devices()[0].device_kind
    known = kind if kind in CHIPS else ""
    return known, len(jax.devices()) // devices_per_chip(jax.devices())


def measure(config: ConfigDict, *, seconds: float) -> dict[str, Any]:
    """Reads training batches, first on one thread, then as the config says.

    Returns:
      What `--json` prints of the data and the model: images a second and core (of CPU time, so
      other load does not count), images a second of this machine (of the clock, with the loader's
      settings), the cores it has, the share of the first reading that waited for the disk (or for
      other processes), the mean bytes of an image, and training FLOPs an image.

    Raises:
      ValueError, FileNotFoundError: the config does not fit together, or its data are not there.
    """
    import numpy as np

    from vit_jax import config as config_lib
    from vit_jax.data.augment import make_augmentation
    from vit_jax.data.loader import make_loader, num_cores
    from vit_jax.data.sources import dataset_info, load_source
    from vit_jax.train import make_parts

    config_lib.check_top_level(config)
    info = dataset_info(config.data.name, data_dir=config.data.data_dir)
    parts, _ = make_parts(config, info)
    augment = make_augmentation(**config_lib.plain(config.augment))

    def loader(**settings):
        section = ConfigDict(config.data.to_dict() | settings)
        options = {"augment": augment, "batch_size": config.batch_size, "seed": config.seed}
        steps = {"num_steps": max(config.total_steps, 10**6)}
        return config_lib.call("data", make_loader, section, **options, **steps).check()

    with loader(num_workers=0, num_threads=1, prefetch=1) as one:
        alone = _rate(one, seconds)
    with loader() as configured:
        together = _rate(configured, seconds)
    source = load_source(config.data.name, split="train", data_dir=config.data.data_dir)
    sample = np.linspace(0, len(source) - 1, 16).astype(int)
    sizes = [memoryview(source[index]["image"]).nbytes for index in sample]
    return {
        "dataset": info.name,
        "images_per_second_per_core": alone["images"] / alone["cpu"],
        "waiting": max(0.0, 1 - alone["cpu"] / alone["clock"]),
        "images_per_second_here": together["images"] / together["clock"],
        "cores_here": num_cores(),
        "mean_bytes": round(sum(sizes) / len(sizes)),
        "flops_per_image": parts.flops_per_image,
    }


def _rate(loader: Any, seconds: float) -> dict[str, float]:
    """Images read, and seconds by the clock and of the CPU (of this process), after one batch."""
    next(loader)
    images, start, cpu = 0, time.perf_counter(), time.process_time()
    while not images or time.perf_counter() - start < seconds:
        images += len(next(loader)["label"])
    return {
        "images": images,
        "clock": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
    }


def judge(
    result: dict[str, Any], *, chip: str, num_chips: int, mfu: float, cores: int
) -> dict[str, Any]:
    """What the chips want beside what the cores give.

    Of as many cores as this machine has, what its disk and the config's loader let through counts,
    too.

    Args:
      result: of `measure`.
      chip: a row of `vit_jax.chips.CHIPS`; '' if unknown: then nothing is wanted.
      num_chips: how many.
      mfu: share of their peak that they reach.
      cores: of all hosts together.
    """
    from vit_jax.chips import CHIPS

    per_core = result["images_per_second_per_core"]
    given = {"cores": cores, "images_per_second_of_cores": cores * per_core}
    slowest = cores * per_core
    if cores == result["cores_here"]:
        slowest = min(slowest, result["images_per_second_here"])
    if not chip:
        return given | {"chip": None, "bottleneck": None}
    wanted = num_chips * CHIPS[chip].peak_flops * mfu / result["flops_per_image"]
    return given | {
        "chip": chip,
        "num_chips": num_chips,
        "mfu_assumed": mfu,
        "images_per_second_wanted": wanted,
        "cores_needed": wanted / per_core,
        "bottleneck": "data" if wanted > slowest else "chips",
    }


def _table(result: dict[str, Any]) -> str:
    """The result for people."""
    per_core, cores = result["images_per_second_per_core"], result["cores"]
    rows = [
        ("data", f"{result['dataset']}, {result['mean_bytes'] / 1000:,.1f} KB an image"),
        ("a core reads", f"{per_core:,.0f} images/s of CPU time"),
        ("waiting", f"{result['waiting']:.0%} of the time, for the disk or other processes"),
        (
            "this machine reads",
            f"{result['images_per_second_here']:,.0f} images/s with the config's loader, "
            f"on {result['cores_here']} cores",
        ),
        (f"{cores:,} cores read", f"{result['images_per_second_of_cores']:,.0f} images/s"),
    ]
    if result["chip"] is None:
        rows.append(("chips", "unknown here; give --topology or --chip"))
    else:
        rows += [
            (
                "chips want",
                f"{result['images_per_second_wanted']:,.0f} images/s: {result['num_chips']:,} "
                f"{result['chip']} at an assumed {result['mfu_assumed']:.0%} MFU, "
                f"{result['flops_per_image'] / 1e9:,.2f} GFLOP an image",
            ),
            (
                "bottleneck",
                f"{'the data' if result['bottleneck'] == 'data' else 'the chips'}; "
                f"{result['cores_needed']:,.1f} cores would do "
                f"({result['cores_needed'] / result['num_chips']:,.2f} a chip)",
            ),
        ]
        if result["bottleneck"] == "data" and result["cores_needed"] <= cores:
            rows.append(("", "these cores would do: it is the disk, or the loader's settings"))
        elif result["bottleneck"] == "data":
            rows.append(("", "`vit-jax prepare … --store=tiled|resized|raw` trades disk for cores"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)
