"""Reading a compiled program's text: cycles, collectives, and what lies in memory at the peak.

XLA prints the optimised program as HLO text (openxla.org/xla/operation_semantics). Of a scheduled
module the order of the lines is the order in which they run. Nothing here needs jax.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

ITEM_BITS = {
    **{"pred": 8, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "s16": 16, "u16": 16, "bf16": 16, "f16": 16},
    **{"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128},
    **{"f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8},
}

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "collective-broadcast"),
)

# What TPU slices do with each other stands in the program as a send to the hosts, which do it.
ACROSS = {
    "ALL_REDUCE": "all-reduce across slices",
    "ALL_GATHER": "all-gather across slices",
    "REDUCE_SCATTER": "reduce-scatter across slices",
    "ALL_TO_ALL": "all-to-all across slices",
    "ONE_TO_ONE": "collective-permute across slices",
}

# What only names another buffer, or is no work.
ALIASES = ("bitcast", "get-tuple-element", "tuple", "parameter", "opt-barrier", "after-all")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, sides and layout, like bf16[196,384]{1,0:T(8,128)(2,1)}."""

    dtype: str
    sides: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        """Of its numbers alone."""
        return -(-math.prod(self.sides) * ITEM_BITS[self.dtype] // 8)

    @property
    def padded_bytes(self) -> int:
        """In memory: the last sides, in the layout's order, are filled up to whole tiles."""
        found = re.match(r"\{([\d,]*):.*?T\(([\d,]+)\)", self.layout)
        if not found:
            return self.bytes
        sides = [self.sides[axis] for axis in reversed(_sides(found[1]))]
        tile = _sides(found[2])
        for at, side in zip(range(-1, -len(tile) - 1, -1), reversed(tile), strict=True):
            if -at <= len(sides):
                sides[at] = -(-sides[at] // side) * side
        return -(-math.prod(sides) * ITEM_BITS[self.dtype] // 8)

    @property
    def on_chip(self) -> bool:
        """Whether it lies in the chip's own memory (space 1) and not in HBM."""
        return "S(1)" in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple["Array", ...]:
        """Each array of the result."""
        return tuple(_arrays(self.shape))

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate, 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else 0

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it came from, '' if it says none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def computation(self, attribute: str) -> str | None:
        """The computation that `attribute` ('calls', 'body', 'condition') names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        names = map(self.computation, ("true_computation", "false_computation"))
        return [name for name in names if name]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, each a list of instructions in order."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def defined(self) -> dict[str, dict[str, Instruction]]:
        """Computation -> name -> instruction."""
        return {key: {i.name: i for i in body} for key, body in self.computations.items()}

    def visits(self) -> Iterator[tuple[str, Instruction, float, bool]]:
        """(computation, instruction, how often it runs, whether inside a fusion), each once a call.

        The bodies of `while` loops are counted by their trips, once where these are unknown, and
        each branch of a conditional as if it were taken. The functions of reductions are left out.
        """
        yield from self._visit(self.entry, 1.0, False)

    def _visit(self, name, times, fused):
        for instruction in self.computations[name]:
            yield name, instruction, times, fused
            if instruction.opcode == "while":
                trips = self.trips(instruction) or 1
                for part in ("condition", "body"):
                    yield from self._visit(instruction.computation(part), times * trips, fused)
            elif instruction.opcode == "conditional":
                for branch in instruction.branches:
                    yield from self._visit(branch, times, fused)
            elif called := self._called(instruction):
                inside = fused or instruction.opcode == "fusion"
                yield from self._visit(called, times, inside)

    def _called(self, instruction: Instruction) -> str | None:
        if instruction.opcode in ("fusion", "async-start"):
            return instruction.computation("calls")
        return instruction.computation("to_apply") if instruction.opcode == "call" else None

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs; None if only running it can tell.

        The compiler's own word where it gives one, else the constant that the condition compares
        the counter with: what `jax.lax.scan` makes, which counts up from 0.
        """
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if found:
            return int(found[1])
        return self._bound(loop.computation("condition"))

    def _bound(self, condition: str) -> int | None:
        body = self.defined[condition]
        root = next(i for i in body.values() if i.is_root)
        compare = root
        if root.opcode == "fusion":
            inside = self.computations[root.computation("calls")]
            compare = next(i for i in inside if i.is_root)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        limits = [body[name] for name in root.operands if name in body]
        values = [i.arguments for i in limits if i.opcode == "constant"]
        return int(values[0]) if len(values) == 1 and values[0].isdigit() else None

    def unknown_loops(self) -> list[str]:
        """Names of `while` loops whose trips nobody knows: what is in them was counted once."""
        loops = {i.name: i for _, i, _, _ in self.visits() if i.opcode == "while"}
        return [name for name, loop in loops.items() if self.trips(loop) is None]


def parse(text: str) -> Module:
    """A `Module` of HLO text, as `compiled.as_text()` gives it.

    Raises:
      ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
            if head:
                current = computations.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current.append(instruction)
    if entry is None:
        raise ValueError("this is no HLO text: it has no ENTRY computation.")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[found.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=found[2],
        shape=shape,
        opcode=rest[:opening],
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :],
        is_root=bool(found[1]),
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise ValueError(f"this is no HLO text: a parenthesis stays open in {text[:80]!r}.")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sides, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if dtype in ITEM_BITS:
            yield Array(dtype, tuple(_sides(sides)), layout)


# --- cycles --------------------------------------------------------------------------------------


def total_cycles(module: Module) -> int:
    """The TPU compiler's static estimate of one run; 0 where it gives none (CPU, GPU).

    Loops are multiplied by their trips. Waiting for collectives and custom calls (Pallas) count
    nothing.
    """
    return round(sum(i.cycles * times for _, i, times, fused in module.visits() if not fused))


# --- matrix products -----------------------------------------------------------------------------


def matmul_flops(
    module: Module, which: Callable[[Instruction], bool] = lambda instruction: True
) -> int:
    """FLOPs of matrix products and convolutions of one run, two a multiply-add.

    Loops are multiplied by their trips; `compiled.cost_analysis()` counts a loop's body once. What
    kernels multiply is in none of these instructions.

    Args:
      module: of one device.
      which: of the products; all by default.
    """
    total = 0.0
    for computation, instruction, times, _ in module.visits():
        if instruction.opcode in ("dot", "convolution") and which(instruction):
            names = module.defined[computation]
            operands = [names[name].arrays[0] for name in instruction.operands]
            count = _dot if instruction.opcode == "dot" else _convolution
            total += 2 * times * count(instruction, *operands)
    return round(total)


def _dot(instruction: Instruction, left: Array, right: Array) -> int:
    """Multiply-adds."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = math.prod(left.sides[axis] for axis in _sides(found[1] if found else ""))
    return math.prod(instruction.arrays[0].sides) * contracted


def _convolution(instruction: Instruction, left: Array, right: Array) -> int:
    """Multiply-adds, without those of padding: the TPU writes batched products as windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(field.split("=") for field in found[1].split()) if found else {}
    count, out = 1, instruction.arrays[0]
    for letter in labels[3]:  # batch, features, and the spatial axes 0, 1, …
        place = labels[3].index(letter)
        if not letter.isdigit():
            count *= out.sides[place]
            continue
        axis = int(letter)
        field = {key: value.split("x")[axis] for key, value in window.items()}
        low = int(field.get("pad", "0_0").split("_")[0])
        base, dilation = int(field.get("lhs_dilate", 1)), int(field.get("rhs_dilate", 1))
        length = (left.sides[labels[1].index(letter)] - 1) * base + 1
        stride, size = int(field.get("stride", 1)), int(field.get("size", 1))
        steps = [k * dilation - low for k in range(size)]
        count *= sum(
            0 <= at * stride + step < length and (at * stride + step) % base == 0
            for at in range(out.sides[place])
            for step in steps
        )
    return count * right.sides[labels[2].index("i")]


# --- collectives ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, with its bytes of one run of it on one device."""

    name: str
    kind: str
    """One of COLLECTIVES or ACROSS; a fused `all-reduce-scatter` is a reduce-scatter."""
    dtype: str
    """That most of its bytes have."""
    group_size: int
    groups: tuple[tuple[int, ...], ...]
    """Device numbers, in the order of the program's devices; () if it does not list any."""
    wire_bytes: float
    """What each device sends, in a ring: see `wire_bytes`."""
    times: float
    """How often it runs a step."""
    hidden_cycles: int
    """The compiler's cycles of what runs between its start and its end."""
    op_name: str

    @property
    def total_bytes(self) -> float:
        """That a device sends in a step."""
        return self.wire_bytes * self.times


def wire_bytes(kind: str, size: float, group_size: int) -> float:
    """What each of n devices sends in a ring (Patarasuk & Yuan 2009, section 3).

    Args:
      kind: of collective.
      size: bytes of the whole: an all-gather's result, else the operand.
      group_size: n.
    """
    if kind in ("collective-permute", "collective-broadcast", *ACROSS.values()):
        return float(size)  # across slices: what the device gives its host
    share = (group_size - 1) / group_size
    return (2 if kind == "all-reduce" else 1) * share * size


def collectives(module: Module, num_devices: int) -> list[Collective]:
    """All collectives between more than one device, loops multiplied by their trips.

    Args:
      module: of one of `num_devices` devices.
      num_devices: for collectives whose groups are not written: all of them.
    """
    found: list[Collective] = []
    around: dict[str, tuple[str, Instruction]] = {}  # fused computation -> its caller and fusion
    chains: dict[tuple[str, str], list[Instruction]] = {}  # fusions that carry one collective on
    for computation, instruction, times, fused in module.visits():
        if called := instruction.computation("calls"):
            around[called] = computation, instruction
        kind = _across_slices(instruction) or instruction.opcode.removesuffix("-start")
        groups = replica_groups(instruction.attributes)
        size = 2 if kind == "collective-permute" else len(groups[0]) if groups else num_devices
        if kind not in (*COLLECTIVES, *ACROSS.values()) or size < 2:
            continue
        outside, fusion = around[computation] if fused else (computation, None)
        chain = _channel(instruction), outside
        if fusion is not None and chain in chains:
            chains[chain].append(fusion)
            continue
        chains[chain] = [fusion or instruction]
        operands = [module.defined[computation].get(name) for name in instruction.operands]
        arrays = [array for operand in operands if operand for array in operand.arrays]
        whole = sum(array.bytes for array in arrays) * (size if kind == "all-gather" else 1)
        if kind == "all-reduce" and _scatters(fusion):
            kind = "reduce-scatter"
        hidden = functools.partial(_hidden, module, outside, chains[chain])
        found.append(
            Collective(
                name=instruction.name,
                kind=kind,
                dtype=max(arrays, key=lambda array: array.bytes).dtype if arrays else "",
                group_size=size,
                groups=groups,
                wire_bytes=wire_bytes(kind, whole, size),
                times=times,
                hidden_cycles=hidden,
                op_name=instruction.op_name or (fusion.op_name if fusion else ""),
            )
        )
    return [dataclasses.replace(each, hidden_cycles=each.hidden_cycles()) for each in found]


def _across_slices(instruction: Instruction) -> str | None:
    """The kind of a collective that the hosts do with what a device sends them."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    return ACROSS.get(found[1]) if found and instruction.opcode == "send" else None


def _channel(instruction: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else instruction.name


def _scatters(fusion: Instruction | None) -> bool:
    """Whether a fusion around an all-reduce keeps only a device's part: a reduce-scatter."""
    return fusion is not None and "all-reduce-scatter" in (fusion.computation("calls") or "")


def _hidden(module: Module, computation: str, chain: list[Instruction]) -> int:
    """Cycles of what runs while a collective is under way.

    Args:
      module: of it.
      computation: where it stands, or the fusions around it.
      chain: the collective alone, or one fusion after another that carry it on: those of the TPU's
        asynchronous collectives do a part of it beside computing of their own.
    """
    first, last = chain[0], chain[-1]
    if first is last and first.opcode == "fusion":
        return first.cycles
    body = module.computations[computation]
    start = body.index(first)
    if first is not last:
        return sum(_cycles(module, each) for each in body[start : body.index(last) + 1])
    if not first.opcode.endswith("-start") and first.opcode != "send":
        return 0
    cycles = 0
    for instruction in body[start + 1 :]:
        if first.name in instruction.operands and instruction.opcode.endswith("-done"):
            return cycles
        cycles += _cycles(module, instruction)
    return cycles


def _cycles(module: Module, instruction: Instruction) -> int:
    """Of an instruction, a loop with all its trips."""
    if instruction.opcode != "while":
        return instruction.cycles
    body = Module(module.computations, instruction.computation("body"))
    return (module.trips(instruction) or 1) * total_cycles(body)


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of devices of a collective, in each of XLA's three spellings; () if not listed.

    `{{0,1},{2,3}}`, `[2,2]<=[4]` with an optional `T(1,0)` (the numbers up to 4 as an array of
    that shape, transposed, then cut into rows), and `mesh['a'=2,'b'=2] {'b'}` (all that differ in
    the axes named behind).
    """
    found = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if found:
        rows = re.findall(r"\{([\d, ]+)\}", found[1])
        return tuple(tuple(map(int, row.split(","))) for row in rows)
    iota = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    found = re.search("replica_groups=" + iota, attributes)
    if found:
        ids = _iota(found[2], found[3])
        width = _sides(found[1])[-1]
        return tuple(tuple(ids[at : at + width]) for at in range(0, len(ids), width))
    found = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes)
    return _mesh_groups(found[1], found[2], found[3]) if found else ()


def _mesh_groups(axes: str, order: str, used: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    # A part of an axis reads 'a':(before)size; it is cut into three axes of their own.
    for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", used):
        before, size, parts = int(before), int(size), {}
        for key, value in sizes.items():
            if key == name:
                parts[f"{key}:0"], parts[f"{key}:({before}){size}"] = before, size
                parts[f"{key}:2"] = value // before // size
            else:
                parts[key] = value
        sizes = parts
    wanted = set(re.findall(r"'([^']+)'(?!:)", used))
    wanted |= {f"{name}:({b}){s}" for name, b, s in re.findall(r"'([^']+)':\((\d+)\)(\d+)", used)}
    iota = re.search(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    listed = re.search(r"device_ids=\(([\d,]+)\)", order)
    if listed:
        ids = _sides(listed[1])
    else:
        ids = _iota(iota[1], iota[2]) if iota else list(range(math.prod(sizes.values())))
    groups = collections.defaultdict(list)
    for place, device in enumerate(ids):
        key = []
        for name, size in reversed(sizes.items()):
            place, coordinate = divmod(place, size)
            if name not in wanted:
                key.append(coordinate)
        groups[tuple(key)].append(device)
    return tuple(map(tuple, groups.values()))


def _sides(text: str) -> list[int]:
    return [int(side) for side in text.split(",") if side]


def _iota(shape: str, order: str | None) -> list[int]:
    """The numbers from 0 as an array of `shape`, its axes in `order`, read row by row."""
    sides = _sides(shape)
    order = _sides(order) if order else range(len(sides))
    strides = [math.prod(sides[axis + 1 :]) for axis in range(len(sides))]
    ids = [0]
    for axis in order:
        ids = [start + step * strides[axis] for start in ids for step in range(sides[axis])]
    return ids


def by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Bytes that a device sends in a step, by kind of collective, the largest first."""
    totals: dict[str, float] = collections.defaultdict(float)
    for collective in found:
        totals[collective.kind] += collective.total_bytes
    return {kind: round(totals[kind]) for kind in sorted(totals, key=lambda key: -totals[key])}


def crosses(collective: Collective, place: Sequence[int]) -> bool:
    """Whether devices of different places (slices, hosts) are in one of its groups.

    Args:
      collective: its groups.
      place: of each device, in the order of the program's devices.
    """
    if collective.kind in ACROSS.values():
        return True
    groups = collective.groups or (tuple(range(len(place))),)
    return any(len({place[device] for device in group}) > 1 for group in groups)


# --- memory --------------------------------------------------------------------------------------


def live_at_peak(module: Module, classify: Callable[[Instruction], str]) -> dict[str, int]:
    """Bytes of the buffers that live when most do, by class; arguments are left out.

    A buffer lives from its definition to its last use, in the order of a scheduled module, and the
    buffers of a loop's body come on top of what lives around the loop. What the compiler keeps on
    the chip (memory space 1) is left out. It is a picture of what the temporary memory is for;
    `compiled.memory_analysis()` knows its size.

    Args:
      module: scheduled.
      classify: an instruction -> the name of its class, or '' for that of its first user that has
        one.
    """
    peak, at_peak = _live(module, module.entry, classify)
    return dict(at_peak) if peak else {}


def _live(module, name, classify):
    body = module.computations[name]
    kinds = _kinds(body, classify)
    source: dict[str, tuple[str, ...]] = {}  # value -> the buffers that it is made of
    sizes: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for index, instruction in enumerate(body):
        parts = tuple(b for operand in instruction.operands for b in source.get(operand, ()))
        if instruction.opcode in (*ALIASES, "while") or _in_place(instruction):
            source[instruction.name] = parts
        else:
            source[instruction.name] = (instruction.name,)
            sizes[instruction.name] = (kinds[instruction.name], _hbm_bytes(instruction))
        for buffer in parts:
            last[buffer] = index
        if instruction.is_root:  # outputs take the donated arguments' places
            last.update(dict.fromkeys(source[instruction.name], -1))
    ends = collections.defaultdict(list)
    for buffer, index in last.items():
        ends[index].append(buffer)
    live: collections.Counter = collections.Counter()
    peak, at_peak = 0, collections.Counter()
    for index, instruction in enumerate(body):
        if instruction.name in sizes and last.get(instruction.name, -1) >= 0:
            kind, size = sizes[instruction.name]
            live[kind] += size
        now = live.copy()
        if instruction.opcode == "while":
            now += _live(module, instruction.computation("body"), classify)[1]
        if now.total() > peak:
            peak, at_peak = now.total(), now
        for buffer in ends[index]:
            if buffer in sizes:
                kind, size = sizes[buffer]
                live[kind] -= size
    return peak, at_peak


def _kinds(body: list[Instruction], classify: Callable[[Instruction], str]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    used: dict[str, str] = {}  # value -> class of its first user that has one
    for instruction in reversed(body):
        kind = classify(instruction) or used.get(instruction.name, "")
        kinds[instruction.name] = kind
        if kind:
            used.update(dict.fromkeys(instruction.operands, kind))
    return kinds


def _in_place(instruction: Instruction) -> bool:
    """Whether the result overwrites an operand: an update of a slice, or a done of a start."""
    return "dynamic-update-slice" in instruction.name or instruction.opcode.endswith("-done")


def _hbm_bytes(instruction: Instruction) -> int:
    if instruction.opcode in ("constant", "iota", "copy-start"):
        return 0
    return sum(array.padded_bytes for array in instruction.arrays if not array.on_chip)
