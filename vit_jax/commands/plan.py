"""`vit-jax plan`: compiles a recipe's step for chips that are not here."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from vit_jax.commands.config_flag import parse_with_config

USAGE = """vit-jax plan: compiles the training step for chips that are not here.

  vit-jax plan --config=configs/vit_l16_i21k.py --topology=v5p:16x16x16 [--num_slices=2]
      [--config.mesh.fsdp=-1 …] [--search] [--json] [--dump_hlo=DIR]

Without --topology it plans for this machine's own devices. Exit code 2: it does not fit."""

EXIT_DOES_NOT_FIT = 2

POLICIES = ("none", "dots", "full")
"""Of rematerialisation, the fastest first."""


def main(argv: list[str]) -> int:
    """Runs `vit-jax plan`; answers the exit code."""
    values, config = parse_with_config(argv, _define, usage=USAGE)
    planner = _Planner(values)
    try:
        return _run(planner, values, config)
    finally:
        planner.close()


def _run(planner: "_Planner", values: flags.FlagValues, config: ConfigDict) -> int:
    if values.search:
        return _search(planner, config, as_json=values.json)
    result = planner.plan(config)
    if not result["fits"] and values.remedies:
        result["would_fit"] = _what_fits(planner, config)
    print(json.dumps(result, indent=2) if values.json else _table(result))
    return 0 if result["fits"] else EXIT_DOES_NOT_FIT


def _define(values: flags.FlagValues) -> None:
    def text(name, what):
        flags.DEFINE_string(name, "", what, flag_values=values)

    def switch(name, what):
        flags.DEFINE_bool(name, False, what, flag_values=values)

    text("topology", "TPUs to plan for, like v5e:4x4 or v5p:16x16x16 (sides in chips).")
    flags.DEFINE_integer("num_slices", 1, "How many such slices.", flag_values=values)
    text("chips_per_host", "Sides of what one host drives, like 2x2, if not the usual.")
    flags.DEFINE_float(
        "price_per_chip_hour", None, "For the cost.", lower_bound=0.0, flag_values=values
    )
    text("dump_hlo", "Folder for the compiled program's text.")
    switch("json", "Print one JSON object.")
    switch("show_sharding", "Print what lies where, an array a line.")
    flags.DEFINE_bool(
        "remedies", True, "If it does not fit, compile what might.", flag_values=values
    )
    switch("search", "Try meshes, rematerialisation and accumulation; print them ranked.")


class _Planner:
    """Plans configs for the target that the flags name."""

    def __init__(self, values: flags.FlagValues):
        import jax

        if values.topology:  # shapes alone are traced here: no accelerator is touched
            jax.config.update("jax_platforms", "cpu")
        from vit_jax import plan, runtime

        unused = [flag for flag in ("num_slices", "chips_per_host") if values[flag].present]
        if unused and not values.topology:
            raise ValueError(f"--{unused[0]} is of a --topology, like v5e:4x4; give it, too.")
        self.values, self.target = values, None
        if values.topology:
            options = {"num_slices": values.num_slices, "chips_per_host": values.chips_per_host}
            try:
                self.target = plan.topology(values.topology, **options)
            except ImportError as error:
                print(f"{error}; planning for this machine's own devices", file=sys.stderr)
        if self.target is None:
            runtime.start_devices(None)  # says in a line where there are none
            self.target = plan.own_devices()
        self.dumps = plan.dumps_for(self.target)

    def close(self) -> None:
        """Ends what still compiles beside: kernels of a step that was refused."""
        if self.dumps is not None:
            self.dumps.close()

    def plan(self, config: ConfigDict) -> dict[str, Any]:
        """The report of one config, as --json prints it.

        Raises:
          ValueError: the config does not fit together, or not with the devices.
        """
        from vit_jax import config as config_lib
        from vit_jax import plan, sharding
        from vit_jax.train import abstract_state, check_batch, make_parts

        config_lib.check_top_level(config)
        devices = self.target.devices
        mesh = config_lib.call("mesh", sharding.make_mesh, config.mesh, devices=devices)
        parts, init = make_parts(config, _dataset(config))
        check_batch(config.batch_size, parts, mesh)
        state = abstract_state(init, mesh, offload=parts.options.offload_opt_state)
        if self.values.show_sharding:
            text = _layout(sharding.config_sizes(mesh), sharding.layout(state))
            print(text, file=sys.stderr if self.values.json else None)
        batch = plan.abstract_batch(config.batch_size, parts.image_size, mesh)
        compiled = plan.compile_step(parts, state, batch, mesh, dumps=self.dumps)
        if self.values.dump_hlo and compiled.program is not None:
            folder = epath.Path(self.values.dump_hlo)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "train_step.txt").write_text(compiled.program.as_text())
        price = self.values.price_per_chip_hour
        steps = {"batch_size": config.batch_size, "total_steps": config.total_steps}
        options = {"price_per_chip_hour": price, "dumps": self.dumps, **steps}
        result = plan.report(compiled, self.target, parts, state, mesh, **options)
        head = {
            "config": _name(self.values, config),
            "topology": self.target.name,
            "num_slices": len(set(self.target.slices)),
            "num_chips": self.target.num_chips,
        }
        return head | result | {"mesh": sharding.config_sizes(mesh), **steps}


def _dataset(config: ConfigDict) -> Any:
    """The training data, or what is published of it: a plan needs no files."""
    from vit_jax.data.published import published_info
    from vit_jax.data.sources import dataset_info

    try:
        return dataset_info(config.data.name, data_dir=config.data.data_dir)
    except FileNotFoundError:
        info = published_info(config.data.name)
        if info is None:
            raise
        return info


def _name(values: flags.FlagValues, config: ConfigDict) -> str:
    model = config.model
    return f"{model.get('variant', '')} on {config.data.name}".strip()


def _changed(config: ConfigDict, overrides: dict[str, Any]) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    for key, value in overrides.items():
        section, leaf = key.split(".")
        changed[section][leaf] = value
    return changed


def _remedies(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Overrides that need less and less memory, the cheapest in time first."""
    now = config.model.get("remat")  # None: a recipe without it takes no such flag
    later = POLICIES[POLICIES.index(now) + 1 :] if now in POLICIES else ()
    fsdp = {"mesh.fsdp": -1, "mesh.data": 1}
    for mesh in ({}, fsdp) if config.mesh.get("fsdp", 1) == 1 else ({},):
        if mesh:
            yield mesh
        for policy in later:
            yield mesh | {"model.remat": policy}
    last = fsdp if config.mesh.get("fsdp", 1) == 1 else {}
    last |= {"model.remat": "full"} if now else {}
    for count in (2, 4, 8):
        yield last | {"train.accumulate": count}


def _what_fits(planner: _Planner, config: ConfigDict) -> str | None:
    """The first remedy that compiles, as flags; None if none of them does."""
    for overrides in _remedies(config):
        try:
            result = planner.plan(_changed(config, overrides))
        except ValueError:  # a mesh that these devices or this batch do not make
            continue
        if result["fits"]:
            return _as_flags(overrides)
    return None


def _as_flags(overrides: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def _search(planner: _Planner, config: ConfigDict, *, as_json: bool) -> int:
    """Tries what could be faster or smaller; prints all of it, the fastest that fits first."""
    tried = []
    for mesh in _meshes(planner, config):
        for overrides in _recomputing(config):
            overrides = mesh | overrides
            try:
                result = planner.plan(_changed(config, overrides))
            except ValueError as error:
                tried.append({"overrides": _as_flags(overrides), "reason": str(error)})
                break
            reason = _reason(result)
            tried.append({"overrides": _as_flags(overrides), "reason": reason} | result)
            print(f"tried {_as_flags(overrides) or 'as given'}: {reason}", file=sys.stderr)
            if result["fits"]:
                break  # what recomputes more is slower on the same mesh
    tried.sort(key=lambda row: (not row.get("fits"), row.get("seconds_per_step_estimate") or 1e9))
    if as_json:
        print(json.dumps(tried, indent=2))
    else:
        for place, row in enumerate(tried, start=1):
            print(f"{place}. {row['overrides'] or '(as given)'}: {row['reason']}")
        if tried[0].get("fits"):
            print(f"the fastest that fits: {tried[0]['overrides'] or 'the config as given'}")
    return 0 if tried[0].get("fits") else EXIT_DOES_NOT_FIT


def _meshes(planner: _Planner, config: ConfigDict) -> list[dict[str, Any]]:
    """All data parallel, all FSDP, and FSDP over 16 chips with copies of that."""
    replica = {"mesh.replica": slices} if (slices := len(set(planner.target.slices))) > 1 else {}
    base = replica | {"mesh.tensor": 1}
    meshes = [{"mesh.data": -1, "mesh.fsdp": 1}, {"mesh.data": 1, "mesh.fsdp": -1}]
    if len(planner.target.devices) // max(slices, 1) > 16:
        meshes.append({"mesh.data": -1, "mesh.fsdp": 16})
    return [base | mesh for mesh in meshes]


def _recomputing(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Overrides that recompute more and more; as given alone where there is no such choice."""
    now = config.model.get("remat")
    if now not in POLICIES:
        yield {}
    policies = [{"model.remat": policy} for policy in POLICIES] if now else []
    yield from policies
    for count in (2, 4):
        yield (policies[-1] if policies else {}) | {"train.accumulate": count}


def _reason(result: dict[str, Any]) -> str:
    used = result["bytes_per_chip"]
    memory = f"{_gib(used['total'])} of {_gib(used['capacity'])}"
    if not result["fits"]:
        return f"does not fit, {memory}"
    if result["seconds_per_step_estimate"] is None:
        return f"fits, {memory}; this compiler estimates no time"
    return (
        f"{result['seconds_per_step_estimate'] * 1e3:.1f} ms a step, "
        f"{result['exposed_seconds'] * 1e3:.1f} ms of them waiting for collectives; {memory}"
    )


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f} GiB"


def _table(result: dict[str, Any]) -> str:
    """The report for people."""
    slices = f", {result['num_slices']} slices" if result["num_slices"] > 1 else ""
    rows = [
        ("config", f"{result['config']}, batch {result['batch_size']:,}"),
        (
            "chips",
            f"{result['num_chips']:,} ({result['topology']}{slices}); {_sizes(result['mesh'])}",
        ),
        ("parameters", f"{result['params']:,}"),
        ("", ""),
        ("memory a chip", ""),
    ]
    used = result["bytes_per_chip"]
    rows += [(f"  {key}", _gib(size)) for key, size in used.items() if size != 0]
    rows.append(("fits", "yes" if result["fits"] else "no"))
    if "would_fit" in result:
        rows.append(("would fit", result["would_fit"] or "nothing that was tried; use more chips"))
    rows += [("", ""), *_speed_rows(result), *_collective_rows(result)]
    rows.append(("compiled in", f"{result['compile_seconds']:.0f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in rows)


def _speed_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    flops = result["flops_per_step"]
    yield "FLOPs a step", f"{flops['formula']:.4g} by formula"
    if flops["compiler"]:
        again = f", {flops['recomputed']:.4g} of them done again" if flops["recomputed"] else ""
        yield "", f"{flops['compiler']:.4g} in the compiled program's matrix products{again}"
    if result["cycles_per_step"] is None:
        return
    seconds = result["seconds_per_step_estimate"]
    waiting = result["exposed_seconds"]
    kernels = sum(row["cycles"] * row["times"] for row in result["kernels"])
    among = f", {kernels:,.0f} of them in kernels" if kernels else ""
    yield "cycles a step", f"{result['cycles_per_step']:,} (the compiler's estimate{among})"
    yield "time a step", f"{seconds * 1e3:.2f} ms, an estimate; {waiting * 1e3:.2f} ms are waiting"
    yield "MFU", f"{result['mfu_estimate']:.1%}, an estimate"
    yield "images/s", f"{result['images_per_second']:,.0f}"
    cost = "" if result["cost"] is None else f", cost {result['cost']:,.0f}"
    yield "whole schedule", f"{result['hours']:,.2f} h for {result['total_steps']:,} steps{cost}"
    if result["unknown_loops"]:
        yield "counted once", f"{len(result['unknown_loops'])} loops of unknown length"


def _collective_rows(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    found, bound = result["collective_bytes"], result["ring_bound_bytes"]
    if found is None:
        return
    yield "", ""
    yield "collectives", "MB that a device sends in a step (the least, in a ring)"
    for kind in found | bound:
        yield f"  {kind}", f"{found.get(kind, 0) / 1e6:,.1f} ({bound.get(kind, 0) / 1e6:,.1f})"
    for row in result.get("slowest_collectives", [])[:3]:
        across = ", across slices" if row["crosses_slices"] else ""
        where = row["op_name"].rsplit("/", 2)[-2:]
        yield (
            "  waits",
            f"{row['exposed_seconds'] * 1e3:.2f} of {row['transfer_seconds'] * 1e3:.2f} ms for "
            f"{row['kind']} {row['name']}{across} ({'/'.join(where)})",
        )
    yield "", ""


def _sizes(mesh: dict[str, int]) -> str:
    return "mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.items())


def _layout(mesh: dict[str, int], rows: list[Any]) -> str:
    width = max(len(row.name) for row in rows)
    lines = (
        f"{row.name:<{width}}  {row.dtype}{list(row.shape)}  ({row.spec or 'everywhere'})  "
        f"{row.bytes_per_device:,} bytes  {row.note}".rstrip()
        for row in rows
    )
    return "\n".join([_sizes(mesh), *lines, ""])
