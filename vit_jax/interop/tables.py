"""Rename tables: data for both directions, and the two functions that apply them."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.interop.transforms import TRANSFORMS
from vit_jax.spelling import nearest

Params = dict[str, np.ndarray]  # our names, blocks unstacked: 'backbone/blocks/0/norm1/scale'


class Row(NamedTuple):
    """One line of a table.

    Attributes:
      ours: our name, or several with spaces between; {i} is the block.
      theirs: theirs, likewise.
      kind: one of TRANSFORMS.
    """

    ours: str
    theirs: str
    kind: str = "same"


def linear(ours: str, theirs: str) -> tuple[Row, Row]:
    """Rows of a torch Linear, or of several that are one here, or of one that is several here."""
    return _pair(ours, theirs, ("kernel", "weight", "linear"), ("bias", "bias", "same"))


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
    """Rows of a torch LayerNorm."""
    return _pair(ours, theirs, ("scale", "weight", "same"), ("bias", "bias", "same"))


def _pair(ours: str, theirs: str, *leaves: tuple[str, str, str]) -> tuple[Row, Row]:
    return tuple(
        Row(
            " ".join(f"{name}/{mine}" for name in ours.split()),
            " ".join(f"{name}.{other}" for name in theirs.split()),
            kind,
        )
        for mine, other, kind in leaves
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a framework names a Vision Transformer's arrays.

    Attributes:
      name: for messages.
      rows: where several have the same name of ours, all are read and the first is written.
      prefixes: what may stand before every name; the last resort is ''.
      aliases: (pattern, replacement) applied to names first: other versions' names.
      ignored: (pattern, why) of arrays that are known and not carried.
    """

    name: str
    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ("",)
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()

    def known(self, names: Mapping[str, object] | list[str]) -> list[str]:
        """Those names that the table has, after prefixes and aliases."""
        patterns = "|".join(_pattern(name) for row in self.rows for name in row.theirs.split())
        return [name for name in names if re.fullmatch(patterns, name)]

    def strange(self, names: Mapping[str, object] | list[str]) -> list[str]:
        """Names within a block that no row has: the block computes something else."""
        stems = {
            name[: name.index("{i}") + 3]
            for row in self.rows
            for name in row.theirs.split()
            if "{i}" in name
        }
        known = set(self.known(names))
        inside = "|".join(_pattern(stem) for stem in sorted(stems))
        passed = "|".join(pattern for pattern, _ in self.ignored)
        return [
            name
            for name in names
            if re.match(rf"({inside})[./]", name)
            and name not in known
            and not re.fullmatch(passed, name)
        ]

    def normalise(self, arrays: Mapping[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
        """(prefix, arrays by the table's names): the prefix under which most names are known."""
        best = "", {}
        for prefix in self.prefixes:
            names = {}
            for name, array in arrays.items():
                short = name.removeprefix(prefix)
                for pattern, replacement in self.aliases:
                    short = re.sub(pattern, replacement, short)
                names[short] = array
            if len(self.known(names)) > len(self.known(best[1])):
                best = prefix, names
        return best


@dataclasses.dataclass
class Report:
    """What became of every array: nothing is dropped silently.

    Attributes:
      layout: name of the layout that was recognised.
      matched: how many of their arrays were taken.
      missing: names of ours that nothing was found for.
      unexpected: 'name: why' of theirs that were not taken.
      reshaped: 'name: what was done' of those that were resampled, resized or replaced.
      notes: what was assumed because no file says it.
      dtypes: our name -> the type that the source has it in.
    """

    layout: str = ""
    matched: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    reshaped: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"layout {self.layout}: {self.matched} arrays taken"]
        for word in ("missing", "unexpected", "reshaped", "notes"):
            lines += [f"  {word.removesuffix('s')}: {line}" for line in getattr(self, word)]
        return lines


def read(layout: Layout, arrays: Mapping[str, np.ndarray]) -> tuple[Params, Report]:
    """Their arrays, already by the table's names, under our names in float32.

    Raises:
      ValueError: an array has a shape that its transform cannot take, or a block has parts that
        the table does not know.
    """
    if strange := layout.strange(arrays):
        more = f" and {len(strange) - 1} more" if strange[1:] else ""
        raise ValueError(
            f"{layout.name} has no {strange[0]!r}{more} in its blocks: these compute something "
            "else, as EVA-02's and BEiT's do, and cannot be read."
        )
    params, used, partial, report = {}, set(), {}, Report(layout=layout.name)
    for row, index in _instances(layout, arrays):
        ours = [name.format(i=index) for name in row.ours.split()]
        theirs = [name.format(i=index) for name in row.theirs.split()]
        found = [name for name in theirs if name in arrays]
        if not found or set(ours) & params.keys():
            continue
        if len(found) < len(theirs):
            partial[ours[0]] = [name for name in theirs if name not in found]
            continue
        params |= _forward(row, ours, theirs, arrays)
        dtype = functools.reduce(np.promote_types, (arrays[name].dtype for name in theirs))
        report.dtypes |= dict.fromkeys(ours, str(dtype))
        used |= set(theirs)
    for name in arrays:
        if name not in used:
            why = next((w for p, w in layout.ignored if re.fullmatch(p, name)), None)
            report.unexpected.append(f"{name}: {why or 'no row of the table'}")
    for name, absent in partial.items():
        if name not in params:
            report.missing += [f"{other} (for {name})" for other in absent]
    report.matched = len(used)
    return params, report


def write(layout: Layout, params: Mapping[str, np.ndarray], *, num_heads: int) -> Params:
    """Our arrays under their names.

    Raises:
      ValueError: the layout has no name for one of them.
    """
    arrays, used = {}, set()
    for row, index in _instances(layout, {}, depth=depth_of(params)):
        ours = [name.format(i=index) for name in row.ours.split()]
        if used & set(ours) or not all(name in params for name in ours):
            continue
        theirs = [name.format(i=index) for name in row.theirs.split()]
        parts = [np.asarray(params[name]) for name in ours]
        made = TRANSFORMS[row.kind].backward(parts, len(theirs), num_heads)
        arrays |= zip(theirs, map(np.ascontiguousarray, made), strict=True)
        used |= set(ours)
    if left := sorted(params.keys() - used):
        raise ValueError(
            f"{layout.name} has no name for {left[0]}"
            + (f" and {len(left) - 1} more" if left[1:] else "")
            + "; use --format=safetensors, which keeps our own."
        )
    return arrays


def recognise(names: list[str], layouts: tuple[Layout, ...]) -> Layout:
    """The layout most of whose names these are.

    Raises:
      ValueError: none fits; the nearest is named, and a name that it does not know.
    """
    empty = dict.fromkeys(names)
    scores = []
    for layout in layouts:
        _, short = layout.normalise(empty)
        scores.append((len(layout.known(short)), layout))
    best, layout = max(scores, key=lambda score: score[0])
    if best >= max(3, len(names) // 3):
        return layout
    if not best:
        near = [
            nearest(name, [n for row in x.rows for n in row.theirs.split()])
            for x in layouts
            for name in names[:1]
        ]
        hint = next(filter(None, near), "")
        known = ", ".join(layout.name for layout in layouts)
        raise ValueError(
            f"no known layout: {len(names)} arrays such as {names[0]!r}{hint}; known are {known}."
            if names
            else "the file holds no arrays."
        )
    _, short = layout.normalise(empty)
    strange = next(name for name in short if name not in layout.known(short))
    raise ValueError(
        f"no known layout; nearest is {layout.name}, which knows {best} of {len(names)} names but "
        f"not {strange!r}: no Vision Transformer, or one that needs a row in vit_jax/interop."
    )


def depth_of(params: Mapping[str, object]) -> int:
    """How many blocks there are in names of ours."""
    found = [int(m[1]) for name in params if (m := re.match(r"backbone/blocks/(\d+)/", name))]
    return max(found, default=-1) + 1


def _forward(row: Row, ours: list[str], theirs: list[str], arrays: Mapping) -> Params:
    for name in theirs:
        if arrays[name].dtype.kind not in "fiub" and arrays[name].dtype != ml_dtypes.bfloat16:
            raise ValueError(
                f"{name} is {arrays[name].dtype}, no real numbers; save it as float32."
            )
    parts = [np.asarray(arrays[name], np.float32) for name in theirs]
    try:
        made = TRANSFORMS[row.kind].forward(parts, len(ours))
    except ValueError as error:
        shapes = ", ".join(f"{name} {arrays[name].shape}" for name in theirs)
        raise ValueError(f"{shapes} does not fit {ours[0]} ({error}).") from error
    return dict(zip(ours, map(np.ascontiguousarray, made), strict=True))


def _instances(layout: Layout, names: Mapping[str, object], depth: int = 0):
    """(row, block) of every row, once for rows without {i}."""
    blocks = set(range(depth))
    for pattern in {_pattern(n) for row in layout.rows for n in row.theirs.split() if "{i}" in n}:
        blocks |= {int(match[1]) for name in names if (match := re.fullmatch(pattern, name))}
    for row in layout.rows:
        for block in sorted(blocks) if "{i}" in row.ours else [0]:
            yield row, block


def _pattern(name: str) -> str:
    return re.escape(name).replace(re.escape("{i}"), r"(\d+)")
