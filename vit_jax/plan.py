"""Compiles the training step for chips that are not here, and says what it will cost there.

The TPU compiler (libtpu, extra `tpu`) needs no TPU: it takes a topology's name. What it answers is
its memory, which is exact, and its cycles, which are its own static estimate: no step is run.
"""

import collections
import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from vit_jax import bundles, hlo
from vit_jax.chips import CHIPS, Chip, devices_per_chip
from vit_jax.sharding import FSDP_AXES, batch_sharding, num_batch_parts, num_slices
from vit_jax.train import Parts, TrainState, make_step

# What stands in front of the colon of a topology, with a form that libtpu takes.
TOPOLOGIES = {
    "v2": "v2:4x4",
    "v3": "v3:4x4",
    "v4": "v4:4x4x4",
    "v5e": "v5e:16x16",
    "v5p": "v5p:16x16x16",
    "v6e": "v6e:16x16",
    "tpu7x": "tpu7x:4x4x4",
}

# Of attention's kernels, whose first operand is [batch, tokens, 3 * dim]: how many products of
# batch · tokens² · dim multiply-adds attention's formula wants of it, and how many it does again.
KERNEL_PRODUCTS = {"attention_forward": (2, 0), "attention_backward": (4, 1)}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that are planned for.

    Attributes:
      name: as `--topology` takes it, or like 'cpu:8' for the machine's own devices.
      devices: JAX's, of all slices.
      per_chip: how many of them are one chip.
    """

    name: str
    devices: Sequence[Any]
    per_chip: int

    @property
    def num_chips(self) -> int:
        """Of all slices."""
        return len(self.devices) // self.per_chip

    @property
    def chip(self) -> Chip | None:
        """What is known of them."""
        return CHIPS.get(self.devices[0].device_kind)

    @property
    def capacity(self) -> int | None:
        """Bytes of memory a chip; None if nobody knows. A CPU's devices share the machine's."""
        device = self.devices[0]
        if device.platform == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(self.devices)
        if self.chip is not None:
            return int(self.chip.hbm_bytes)
        return None

    @property
    def slices(self) -> list[int]:
        """The slice of each device."""
        return [getattr(device, "slice_index", None) or 0 for device in self.devices]


def own_devices() -> Target:
    """This machine's."""
    devices = jax.devices()
    name = f"{devices[0].platform}:{len(devices)}"
    return Target(name, devices, devices_per_chip(devices))


def num_chips(name: str, *, num_slices: int = 1) -> int:
    """How many chips a topology such as 'v5e:4x4' has, all slices together.

    Raises:
      ValueError: no such topology; the known forms are listed.
    """
    generation, _, sides = name.partition(":")
    forms = ", ".join(TOPOLOGIES.values())
    more = TOPOLOGIES.get(generation, "").count("x")  # libtpu takes a v5e of three sides: none is
    if not more or not re.fullmatch(rf"\d+(x\d+){{{more}}}", sides):
        raise ValueError(f"topology={name!r} is unknown; the forms are {forms} (other sides too).")
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1.")
    return num_slices * math.prod(map(int, sides.split("x")))


def topology(name: str, *, num_slices: int = 1, chips_per_host: str = "") -> Target:
    """Devices of TPUs that need not exist, such as 'v5e:4x4'.

    Args:
      name: generation and sides in chips.
      num_slices: how many such slices, connected by the data centre's network.
      chips_per_host: sides of the part that one host drives, such as '2x2'; '' for the usual.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: no such topology; the known forms are listed.
    """
    num_chips(name, num_slices=num_slices)
    generation = name.partition(":")[0]
    if not re.fullmatch(r"(\d+(x\d+){0,2})?", chips_per_host):
        raise ValueError(f"chips_per_host={chips_per_host!r} must be sides in chips, like 2x2.")
    try:
        import libtpu  # noqa: F401 (jax looks for it only when it is asked for devices)
    except ImportError as error:
        raise ImportError("planning for TPUs needs: pip install 'vit-jax[tpu]'") from error
    # No metadata server is asked, and other processes may compile beside this one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as JAX has it on real ones
    if chips_per_host:
        options["chips_per_host_bounds"] = (*map(int, chips_per_host.split("x")), 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).removeprefix("INVALID_ARGUMENT: ").strip()
        raise ValueError(
            f"topology={name!r} is refused by the TPU compiler ({reason}); "
            f"the forms are {', '.join(TOPOLOGIES.values())}."
        ) from error
    devices = list(found.devices)
    return Target(name, devices, devices_per_chip(devices))


def abstract_batch(
    batch_size: int, image_size: tuple[int, int], mesh: jax.sharding.Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and places of what the loader gives a step."""
    shapes = {
        "image": ((batch_size, *image_size, 3), np.uint8),
        "label": ((batch_size,), np.int32),
        "mask": ((batch_size,), np.bool_),
    }
    place = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for name, (shape, dtype) in shapes.items()
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step, or what the compiler said of its memory.

    Attributes:
      program: None if it does not fit.
      module: its text, parsed.
      seconds: that compiling took, tracing included.
      needed: bytes a device, where the compiler refused.
    """

    program: Any
    module: hlo.Module | None
    seconds: float
    needed: int | None = None


def compile_step(
    parts: Parts,
    state: TrainState,
    batch: Mapping,
    mesh: Any,
    *,
    dumps: bundles.Dumps | None = None,
) -> Compiled:
    """The training step for the mesh's devices, from shapes alone.

    Args:
      parts: see `train.make_parts`.
      state: as `train.abstract_state` answers it.
      batch: see `abstract_batch`.
      mesh: of the target's devices.
      dumps: where given, the step's kernels are compiled for it at the same time.
    """
    start = time.time()
    if parts.options.spmd == "pmap":
        batch = {name: _in_parts(array, mesh.size) for name, array in batch.items()}
    lowered = make_step(parts, state, mesh).lower(state, batch)
    if dumps is not None:
        dumps.want(bundles.keys_of(lowered))
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:  # of something else, such as a chip's own memory
            raise
        return Compiled(None, None, time.time() - start, needed)
    module = hlo.parse(program.as_text())
    return Compiled(program, module, time.time() - start)


def _in_parts(array: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """As `feeding.put_parts` gives it to pmap: [parts, batch / parts, …]."""
    size, *rest = array.shape
    return jax.ShapeDtypeStruct((count, size // count, *rest), array.dtype)


def needed_bytes(message: str) -> int | None:
    """What the TPU compiler's error says that a device's HBM would have to hold; else None."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    found = found or re.search(r"required[^(]*\(([\d.]+)([KMGT])\) exceeds", message)
    return round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def report(
    compiled: Compiled,
    target: Target,
    parts: Parts,
    state: TrainState,
    mesh: Any,
    *,
    batch_size: int,
    total_steps: int,
    price_per_chip_hour: float | None = None,
    dumps: bundles.Dumps | None = None,
) -> dict[str, Any]:
    """Everything that the compiled step says, in plain numbers; None where it is not known.

    Keys (see docs/planning.md): fits, params, bytes_per_chip, flops_per_step, cycles_per_step,
    seconds_per_step_estimate, mfu_estimate, collective_bytes, ring_bound_bytes, images_per_second,
    hours, cost, compile_seconds; then exposed_seconds, slowest_collectives, unknown_loops and
    kernels. Bytes and FLOPs are of a chip, and of the whole step on all of them.
    """
    flops = parts.flops_per_image * batch_size
    result = {
        "fits": compiled.program is not None,
        "params": parts.num_params,
        "bytes_per_chip": memory(compiled, target, state, batch_size, parts, mesh),
        "flops_per_step": {"formula": flops, "compiler": None, "recomputed": None},
        **dict.fromkeys(("cycles_per_step", "seconds_per_step_estimate", "mfu_estimate")),
        "collective_bytes": None,
        "ring_bound_bytes": None,
        **dict.fromkeys(("images_per_second", "hours", "cost")),
        "compile_seconds": round(compiled.seconds, 1),
    }
    capacity = result["bytes_per_chip"]["capacity"]
    if compiled.program is None:
        return result
    total = result["bytes_per_chip"]["total"]
    result["fits"] = capacity is None or total <= capacity or target.devices[0].platform == "tpu"
    module = compiled.module
    found = hlo.collectives(module, len(target.devices))
    for key, value in matmul_flops(module).items():
        result["flops_per_step"][key] = value * len(target.devices)
    result["collective_bytes"] = hlo.by_kind(found)
    result["ring_bound_bytes"] = ring_bound(state, mesh, wire_items(found))
    kernels = _kernels(module, target, dumps)
    cycles = hlo.total_cycles(module) + sum(row["cycles"] * row["times"] for row in kernels)
    result |= _time(cycles, found, target, flops, batch_size, total_steps, price_per_chip_hour)
    result["unknown_loops"] = module.unknown_loops()
    result["kernels"] = kernels
    return result


def memory(
    compiled: Compiled,
    target: Target,
    state: TrainState,
    batch_size: int,
    parts: Parts,
    mesh: Any,
) -> dict[str, int | None]:
    """Bytes a chip by what they are for.

    Of parameters, optimiser, averages and other variables they follow from shapes and places, and
    are exact. Gradients and activations are what of the backward and the forward pass lives when
    most does, by the compiler's own schedule (`hlo.live_at_peak`); temporaries are the rest of what
    the compiler reserves: workspace, padding and gaps. `total` is the compiler's.
    """
    batch = abstract_batch(batch_size, parts.image_size, mesh)
    kinds = {
        **{"params": state.params, "optimizer": state.opt_state, "ema": state.ema},
        "other": (state.step, state.non_trainable, batch),
    }
    sizes: dict[str, int | None] = {key: shard_bytes(tree) for key, tree in kinds.items()}
    rest = dict.fromkeys(("gradients", "activations", "temporaries", "program"))
    sizes |= rest | {"total": compiled.needed}
    if compiled.program is not None:
        live = hlo.live_at_peak(compiled.module, pass_of)
        room = max(peak_bytes(compiled.program, target) - sum(sizes[key] for key in kinds), 0)
        stats = compiled.program.memory_analysis()
        sizes["program"] = stats.generated_code_size_in_bytes
        sizes["gradients"] = min(live.get("backward", 0), room)
        sizes["activations"] = min(live.get("forward", 0), room - sizes["gradients"])
        sizes["temporaries"] = room - sizes["gradients"] - sizes["activations"]
        sizes["total"] = sum(value for key, value in sizes.items() if key != "total")
    sizes = {key: None if size is None else size * target.per_chip for key, size in sizes.items()}
    return sizes | {"capacity": target.capacity}


def peak_bytes(program: Any, target: Target) -> int:
    """Bytes of a device that arguments, results and all between take when they take most.

    The TPU compiler tells two numbers, each too large at times: of loops it sums up more temporary
    memory than lives at once (a step of scanned blocks at its limit: 4%), and its peak counts what
    lies in the chip's own memory, too. The CPU's peak leaves temporaries out.
    """
    stats = program.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    summed = stats.argument_size_in_bytes + results + stats.temp_size_in_bytes
    if target.devices[0].platform != "tpu":
        return summed
    return min(summed, stats.peak_memory_in_bytes)


def shard_bytes(tree: Any) -> int:
    """Bytes on one device of arrays, or of shapes with places; what its host keeps is left out."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != "pinned_host"
    )


def matmul_flops(module: hlo.Module) -> dict[str, int]:
    """FLOPs of a device's matrix products in one run, those of attention's kernels by formula.

    Returns:
      'compiler': all of them, and 'recomputed': those that rematerialisation, or a kernel's
      backward pass, does again. Without these it is the formula's 3 × forward, less the gradient of
      the images, which nobody wants.
    """
    again = hlo.matmul_flops(module, is_recomputed)
    found = {"compiler": hlo.matmul_flops(module), "recomputed": again}
    for computation, call, times, _ in module.visits():
        name = re.sub(r"[.\d]+$", "", call.name)
        if call.opcode != "custom-call" or name not in KERNEL_PRODUCTS:
            continue
        needed, repeated = KERNEL_PRODUCTS[name]
        qkv = module.defined[computation][call.operands[0]].arrays[0]
        batch, tokens, width = qkv.sides
        one = round(times * 2 * batch * tokens**2 * width // 3)
        found["compiler"] += (needed + repeated) * one
        found["recomputed"] += (needed * is_recomputed(call) + repeated) * one
    return found


def is_recomputed(instruction: hlo.Instruction) -> bool:
    """Whether it does again what the forward pass did, by the name that `jax.checkpoint` gives."""
    return "rematted_computation" in instruction.op_name


def pass_of(instruction: hlo.Instruction) -> str:
    """'forward', 'backward' or '', by the names that JAX's derivatives give to operations."""
    if "transpose(" in instruction.op_name:
        return "backward"
    return "forward" if "jvp(" in instruction.op_name else ""


def wire_items(found: Sequence[hlo.Collective]) -> dict[str, float]:
    """Bytes of a number on the wire, by kind of collective: the mean of the numbers that it sends.

    The compiler sends what products take in their type: a head in float32, blocks in bfloat16.
    """
    sizes: dict[str, float] = collections.defaultdict(float)
    numbers: dict[str, float] = collections.defaultdict(float)
    for collective in (each for each in found if each.dtype):
        sizes[collective.kind] += collective.total_bytes
        item = hlo.ITEM_BITS[collective.dtype] / 8
        numbers[collective.kind] += collective.total_bytes / item
    items = {kind: sizes[kind] / numbers[kind] for kind in sizes if numbers[kind]}
    common = max(items.values(), default=4.0)
    return {kind: items.get(kind, common) for kind in (*hlo.COLLECTIVES, *hlo.ACROSS.values())}


def ring_bound(state: TrainState, mesh: Any, items: Mapping[str, float]) -> dict[str, int]:
    """The least that a device must send in a step for its parameters, by kind of collective.

    A parameter that is split over `fsdp` (n parts) is gathered twice, in the forward and in the
    backward pass, and its gradient scattered: (n-1)/n of its bytes each; between the m groups that
    hold the same part the gradient's sum is 2(m-1)/m of a part. Of one that is not split, the
    gradient's sum over all N parts of the batch is 2(N-1)/N of its bytes (Rajbhandari et al. 2020,
    section 7). Between slices each chip gives its host its part of the sum, once; the rest stays
    within the slice. What `tensor` sends between its devices are activations, and has no part here.

    Args:
      state: shapes and places.
      mesh: its axes.
      items: bytes of a number on the wire, by kind.
    """
    sums: dict[str, float] = collections.defaultdict(float)
    slices = num_slices(mesh)
    parts = num_batch_parts(mesh) // slices
    for leaf in jax.tree.leaves(state.params):
        numbers = math.prod(leaf.shape)
        axes = [axis for dim in leaf.sharding.spec for axis in np.ravel(dim or ())]
        numbers //= mesh.shape["tensor"] if "tensor" in axes else 1
        if slices > 1:
            sums[hlo.ACROSS["ALL_REDUCE"]] += numbers / parts
        fsdp = math.prod(mesh.shape[axis] for axis in FSDP_AXES if axis in axes)
        if fsdp == 1:
            sums["all-reduce"] += hlo.wire_bytes("all-reduce", numbers, parts)
            continue
        sums["all-gather"] += 2 * hlo.wire_bytes("all-gather", numbers, fsdp)
        sums["reduce-scatter"] += hlo.wire_bytes("reduce-scatter", numbers, fsdp)
        sums["all-reduce"] += hlo.wire_bytes("all-reduce", numbers / fsdp, parts // fsdp)
    return {kind: round(size * items[kind]) for kind, size in sums.items() if size}


def _time(cycles, found, target, flops, batch_size, total_steps, price) -> dict[str, Any]:
    """Cycles, and what follows from them; the waiting for collectives by the links' bandwidth."""
    chip = target.chip
    if not cycles or chip is None:
        return {}
    exposed = exposed_communication(found, target)
    seconds = cycles / chip.clock + sum(row["exposed_seconds"] for row in exposed)
    hours = seconds * total_steps / 3600
    chip_hours = hours * target.num_chips
    return {
        "cycles_per_step": round(cycles),
        "seconds_per_step_estimate": seconds,
        "mfu_estimate": flops / (seconds * chip.peak_flops * target.num_chips),
        "images_per_second": batch_size / seconds,
        "hours": hours,
        "cost": None if price is None else chip_hours * price,
        "exposed_seconds": sum(row["exposed_seconds"] for row in exposed),
        "slowest_collectives": exposed[:10],
    }


def exposed_communication(found: Sequence[hlo.Collective], target: Target) -> list[dict[str, Any]]:
    """Each collective's transfer time, and what of it no computing hides; the longest first.

    Transfers run at the full bandwidth of a chip's links, one after another; between slices at the
    chip's share of the network. Latency is left out.
    """
    rows = []
    for collective in found:
        across = hlo.crosses(collective, target.slices)
        bandwidth = target.chip.dcn_bandwidth if across else target.chip.link_bandwidth
        transfer = collective.wire_bytes * target.per_chip / bandwidth if bandwidth else 0.0
        hidden = collective.hidden_cycles / target.chip.clock
        rows.append(
            {
                "name": collective.name,
                "kind": collective.kind,
                "crosses_slices": across,
                "times": collective.times,
                "bytes": round(collective.total_bytes),
                "transfer_seconds": transfer * collective.times,
                "exposed_seconds": max(transfer - hidden, 0.0) * collective.times,
                "op_name": collective.op_name,
            }
        )
    return sorted(rows, key=lambda row: -row["exposed_seconds"])


def dumps_for(target: Target) -> bundles.Dumps | None:
    """What compiles kernels for a topology; None for the machine's own devices."""
    named = target.name.partition(":")[0] in TOPOLOGIES
    return bundles.Dumps(target.name) if named else None


def _kernels(
    module: hlo.Module, target: Target, dumps: bundles.Dumps | None
) -> list[dict[str, Any]]:
    """Pallas kernels, whose cycles the compiler does not count: by their own bundles."""
    if dumps is None or target.chip is None:
        return []
    found = bundles.kernels(module, target.chip, dumps)
    return [{"name": each.name, "times": each.times, "cycles": each.cycles} for each in found]
