"""Which part of a run's state lies where: worked out again from its config, on no device."""

import math
import re
from collections.abc import Sequence

import jax
from etils import epath

from vit_jax.config import check_top_level, load_run_config
from vit_jax.data.sources import DatasetInfo
from vit_jax.preprocess import HALF
from vit_jax.report.markup import Cell, Html, broken, el, table
from vit_jax.report.page import note
from vit_jax.report.runs import Run
from vit_jax.sharding import Row, config_sizes, layout

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def layout_rows(run: Run) -> tuple[dict[str, int], list[Row]]:
    """The sizes of the run's mesh, and an array of its state a row.

    Raises:
      ValueError: the run did not get far enough, or its config is another version's.
    """
    from vit_jax.train import abstract_state, make_parts

    if not {"mesh", "dataset"} <= set(run.record):
        raise ValueError("run.json does not say on which mesh the run ran.")
    config = load_run_config(run.workdir)
    check_top_level(config)
    axes = run.record["mesh"]
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    dataset = run.record["dataset"]
    info = DatasetInfo(  # statistics change no shape
        name=dataset["name"],
        path=epath.Path(dataset["name"]),
        splits=dataset["splits"],
        class_names=tuple(dataset["class_names"]),
        fingerprint=dataset["fingerprint"],
        mean=HALF,
        std=HALF,
    )
    parts, init = make_parts(config, info)
    state = abstract_state(init, mesh, offload=parts.options.offload_opt_state)
    return config_sizes(mesh), layout(state)


def layout_table(sizes: dict[str, int], rows: Sequence[Row]) -> list[Html]:
    """A line for each kind of array: blocks are alike, and so is what is held of a parameter."""
    kinds: dict[tuple, list[tuple[str, Row]]] = {}
    for row in rows:
        held, name = _split(re.sub(r"(?<=/)\d+(?=/)", "*", row.name))
        key = name, row.shape, row.dtype, row.spec, row.note
        kinds.setdefault(key, []).append((held, row))
    cells = []
    for (name, shape, dtype, spec, remark), alike in kinds.items():
        size = sum(row.bytes_per_device for _, row in alike)
        held = ", ".join(dict.fromkeys(held for held, _ in alike))
        cells.append(
            [
                *(broken(name, "/_"), held, len(alike)),
                *(" × ".join(map(str, shape)) or "scalar", dtype, spec or "nothing"),
                *(Cell(say_bytes(size), size), remark),
            ]
        )
    mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    total = say_bytes(sum(row.bytes_per_device for row in rows))
    said = (
        f"Mesh: {mesh}. Each device holds {total} of parameters, optimiser state and averages. "
        "'Split over' names for each dimension the axes of the mesh; what is split over nothing is "
        "the same on every device."
    )
    heads = ["array", "of", "number", "shape", "type", "split over", "on a device", "note"]
    if not any(remark for *_, remark in cells):
        heads, cells = heads[:-1], [row[:-1] for row in cells]
    found = table(heads, cells, sortable=True, class_="dense words")
    return [note(said), el("div", found, class_="tall")]


def _split(name: str) -> tuple[str, str]:
    """'opt_state/*/mu/backbone/norm/bias' -> ('mu', 'backbone/norm/bias')."""
    found = re.match(r"(?:.*/)?([^/*]+)(?:/\*)*/((?:backbone|objective)/.*)", name)
    return (found[1], found[2]) if found else (name.split("/")[0], name)


def say_bytes(size: float) -> str:
    """1536 -> '1.5 KiB'."""
    power = min(int(math.log2(size) // 10), len(UNITS) - 1) if size >= 1 else 0
    return f"{size / 1024**power:.4g} {UNITS[power]}"
