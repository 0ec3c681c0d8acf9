"""What a program's Pallas kernels cost on a TPU, by the machine code that the compiler writes.

The compiler gives no estimate for a kernel, but it makes bundles of instructions of it, about one a
cycle, and dumps them as text. A kernel is taken to last as long as the slowest of three: its
bundles, the rows that its matrix units take in, and its traffic with the memory; what starting the
cells of its grid costs comes on top. Waiting for a result or for a bank is in none of them.

`plan` and benchmarks/tpu_static.py count with this module.
"""

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax import hlo
from vit_jax.chips import Chip

GRID_SECONDS = 0.35e-6
"""For each cell of a grid, beyond its bundles: assumed, as no TPU was asked."""

PIPELINE_TRIPS = 2
"""Of a grid's loop beyond its cells, which fetch the first operands and store the last results and
skip the work between."""

MIB = 2**20

DTYPES = {
    **{"bf16": "bfloat16", "f16": "float16", "f32": "float32", "pred": "bool"},
    **{"s8": "int8", "u8": "uint8", "s16": "int16", "s32": "int32", "u32": "uint32"},
}
"""HLO's names and NumPy's."""

Shape = tuple[str, Sequence[int]]
"""HLO's name of a type, and sides."""


def dump_flags(folder: str) -> str:
    """LIBTPU_INIT_ARGS, for before libtpu is loaded, with which the compiler dumps final bundles.

    It then compiles slowly, so that a whole step takes ten minutes.
    """
    flags = {
        "xla_jf_dump_to": folder,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_dump_llo_pass_label_regex": "final_bundles",
    }
    return " ".join(f"--{name}={value}" for name, value in flags.items())


def take_dump(folder: str, name: str) -> str:
    """The dump of the one instruction of that name (or pattern); its file is removed.

    Raises:
      FileNotFoundError: there is none.
    """
    paths = sorted(Path(folder).glob(f"*-{name}-[0-9]*-final_bundles.txt"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no dump of {name}: was it set by LIBTPU_INIT_ARGS?")
    text = paths[0].read_text()
    for path in paths:
        path.unlink()
    return text


@dataclasses.dataclass(eq=False)
class Loop:
    """A loop's body as the compiler wrote it, or the whole program around all loops.

    Attributes:
      trips: None where the program does not say.
      is_grid: whether it goes over the cells of a grid.
      bundles: of one trip, without those of loops inside.
      rows: cycles in which each matrix unit takes in rows on one trip, without loops inside: one
        row a cycle, and two where the units are 256 wide.
      inside: the loops inside.
    """

    trips: int | None = None
    is_grid: bool = False
    bundles: int = 0
    rows: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    inside: list["Loop"] = dataclasses.field(default_factory=list)

    @property
    def cells(self) -> int | None:
        """How often the body does its work."""
        return max(self.trips - PIPELINE_TRIPS, 1) if self.trips and self.is_grid else self.trips

    def total(self) -> tuple[int, int]:
        """(bundles, cycles in which the busiest matrix unit takes in rows) of all its work."""
        rows = max(self.rows.values(), default=0)
        inside = [loop.total() for loop in self.inside]
        bundles = self.bundles + sum(each[0] for each in inside)
        times = self.cells or 1
        return times * bundles, times * (rows + sum(each[1] for each in inside))


def parse(text: str) -> Loop:
    """A dump of final bundles as a `Loop`; what runs only if a predicate holds counts as if it did.

    Raises:
      ValueError: the text holds no bundles.
    """
    program = Loop()
    around = [program]  # the loops that the current line is in
    tests: dict[str, Loop] = {}  # what a loop's last jump looks at
    ended = None  # a loop behind that jump, with a few bundles more
    for line in text.splitlines():
        found = re.match(r"\s*(?:0x)?[\da-f]+\s*([A-Z ]*?):\s*(>*)\s*\{(\}?)", line)
        if not found:
            continue
        begins, depth = "LB" in found[1].split(), len(found[2])
        if ended in around and not found[3]:  # empty bundles do not say how deep they are
            at = around.index(ended)
            if depth < at or begins:
                del around[at:]
        if begins:
            around[-1].inside.append(Loop())
            around.append(around[-1].inside[-1])
        loop = around[-1]
        loop.bundles += 1
        loop.is_grid |= "/* iteration index, stage" in line
        for operation, unit in re.findall(r"\bvmatmul([\w.]*)\.(mxu\d)", line):
            rows = 16 if "bf16" in operation else 8  # that a register holds
            loop.rows[unit] += rows // 2 if "mubr" in operation else rows
        if test := re.search(r"(%p\w+) = scmp[^;]*, (\d+) /\* loop exit test", line):
            loop.trips, tests[test[1]] = int(test[2]), loop
        if jump := re.search(r"sbr\.rel \(!(%p\w+)\)", line):
            ended = tests.get(jump[1], ended)
    if not program.bundles and not program.inside:
        raise ValueError("this is no dump of bundles: it has none.")
    return program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program and what one run of it takes on a chip, in cycles.

    Attributes:
      name: of the instruction, without its number.
      cells: of its grid on one core; cores of one chip share a grid.
      bundles: of all cells.
      rows: cycles in which the busiest matrix unit takes in rows.
      traffic: of its operands and results that lie in memory, at the chip's full bandwidth.
      overhead: GRID_SECONDS for each cell, and the traffic of one cell, which nothing hides.
      times: how often a run of the program runs it.
      op_name: of the JAX operation.
    """

    name: str
    cells: int
    bundles: int
    rows: int
    traffic: int
    overhead: int
    times: float
    op_name: str

    @property
    def cycles(self) -> int:
        """Of one run."""
        return max(self.bundles, self.rows, self.traffic) + self.overhead


class Dumps:
    """Bundles of kernels, each compiled once, alone, in processes beside this one.

    libtpu reads its flags but once: hence the processes. They also use a second core while this
    process compiles the program that the kernels are of.

    Args:
      topology: as libtpu takes it, such as 'v5e:4x4'.
    """

    def __init__(self, topology: str):
        self._topology = topology
        self._texts: dict[str, str] = {}
        self._running: dict[str, subprocess.Popen] = {}  # kernel -> what compiles it

    def want(self, kernels: Iterable[str]) -> None:
        """Starts to compile kernels (see `kernel_key`) that are not known or under way."""
        keys = [k for k in dict.fromkeys(kernels) if k not in self._texts | self._running]
        if keys:
            self._running |= dict.fromkeys(keys, _start(keys, self._topology))

    def __getitem__(self, kernel: str) -> str:
        """The dump of a kernel, which is waited for.

        Raises:
          RuntimeError: the compiler refused a kernel alone; the message is its own.
        """
        self.want([kernel])
        if process := self._running.get(kernel):
            out, err = process.communicate()
            if process.returncode:
                reason = " ".join(err.strip().splitlines()[-1:])
                raise RuntimeError(f"a kernel does not compile alone: {reason}")
            self._texts |= json.loads(out.splitlines()[-1])
            self._running = {k: p for k, p in self._running.items() if p is not process}
        return self._texts[kernel]

    def close(self) -> None:
        """Ends what still compiles."""
        for process in set(self._running.values()):
            process.kill()
            process.communicate()
        self._running = {}


def kernels(module: hlo.Module, chip: Chip, dumps: Dumps) -> list[Kernel]:
    """The Pallas kernels of a compiled program.

    Args:
      module: of `compiled.as_text()`.
      chip: that it was compiled for.
      dumps: for the same topology.
    """
    different: dict[str, tuple[str, hlo.Instruction]] = {}  # what the compiler sees -> one of them
    times: collections.Counter = collections.Counter()
    for computation, instruction, runs, _ in module.visits():
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            key = _key_of(module.defined[computation], instruction)
            different.setdefault(key, (computation, instruction))
            times[key] += runs
    dumps.want(different)
    return [
        cost(module.defined[computation], instruction, dumps[key], chip, times=times[key])
        for key, (computation, instruction) in different.items()
    ]


def cost(
    defined: Mapping[str, hlo.Instruction],
    instruction: hlo.Instruction,
    text: str,
    chip: Chip,
    *,
    times: float = 1,
) -> Kernel:
    """What an instruction takes, a kernel or any other that is one program of its own.

    Args:
      defined: the instructions around it by name.
      instruction: of the compiled program.
      text: the dump of its bundles.
      chip: that it was compiled for.
      times: how often a run of the program runs it.
    """
    program = parse(text)
    cells = max((loop.cells or 1 for loop in program.inside if loop.is_grid), default=1)
    bundles, rows = program.total()
    traffic = _traffic(defined, instruction, chip)
    return Kernel(
        name=re.sub(r"[.\d]+$", "", instruction.name),
        cells=cells,
        bundles=bundles,
        rows=rows,
        traffic=round(traffic),
        overhead=round(cells * GRID_SECONDS * chip.clock + traffic / cells),
        times=times,
        op_name=instruction.op_name,
    )


def _traffic(defined: Mapping[str, hlo.Instruction], call: hlo.Instruction, chip: Chip) -> float:
    """Cycles that moving a call's arrays takes; what lies in the chip's own memory stays there."""
    operands = [defined[name] for name in call.operands if name in defined]
    arrays = [array for each in (call, *operands) for array in each.arrays]
    size = sum(array.padded_bytes for array in arrays if not array.on_chip)
    return size / (chip.hbm_bandwidth / chip.clock)


def _key_of(defined: dict[str, hlo.Instruction], call: hlo.Instruction) -> str:
    """The key of a compiled program's kernel."""
    config = json.JSONDecoder().raw_decode(call.attributes.split("backend_config=", 1)[1])[0]
    operands = [array for name in call.operands for array in defined[name].arrays]
    return kernel_key(config, _shapes(operands), _shapes(call.arrays))


def _shapes(arrays: Iterable[hlo.Array]) -> list[Shape]:
    return [(array.dtype, array.sides) for array in arrays]


NO_CODE = "_colors", "debug_locations"  # where the compiler put arrays, where the source has it


def kernel_key(config: Mapping, operands: Sequence[Shape], results: Sequence[Shape]) -> str:
    """All that makes a kernel's code, as JSON: configuration, types and sides of its arrays.

    The compiler adds to the configuration what is empty, and where it put the arrays; of the chip's
    own memory that a kernel asks for it may keep some tens of KiB back.
    """
    kept = {name: config.get(name) for name in ("custom_call_config", "scoped_memory_configs")}
    kept["scoped_memory_configs"] = [
        memory | {"size": -(-int(memory["size"]) // MIB) * MIB}
        for memory in kept["scoped_memory_configs"] or ()
    ]
    call = {"config": _told(kept), "operands": operands, "results": results}
    return json.dumps(call, sort_keys=True)


def _told(value: Any) -> Any:
    """Without what is empty, numbers as text: JAX and the compiler write the same differently."""
    if isinstance(value, dict):
        told = {k: _told(v) for k, v in value.items() if not k.endswith(NO_CODE)}
        return {k: v for k, v in told.items() if v or v == 0}
    if isinstance(value, list):
        return [_told(each) for each in value]
    return value if isinstance(value, bool) else str(value)


def keys_of(lowered: Any) -> list[str]:
    """The kernels of a program that is still to be compiled: of what `jax.jit(…).lower` answers."""
    return list(dict.fromkeys(_keys_in(lowered.compiler_ir("stablehlo").operation)))


def _keys_in(operation: Any) -> Iterator[str]:
    for block in (block for region in operation.regions for block in region.blocks):
        for each in block.operations:
            if "tpu_custom_call" in str(each.attributes.get("call_target_name")):
                config = json.loads(each.attributes["backend_config"].value)
                operands, results = (
                    [_shape(value.type) for value in values]
                    for values in (each.operands, each.results)
                )
                yield kernel_key(config, operands, results)
            yield from _keys_in(each.operation)


def _shape(kind: Any) -> Shape:
    """Of an array's type in MLIR, whose signed integers are i32 and so on."""
    name = str(kind.element_type)
    name = "pred" if name == "i1" else re.sub(r"^i", "s", re.sub(r"^ui", "u", name))
    return name, tuple(kind.shape)


def _start(keys: Sequence[str], topology: str) -> subprocess.Popen:
    """A process that compiles kernels and prints {key: dump}."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what comes from there leaves no dump
    pipe = subprocess.PIPE
    options = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "env": environment, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "vit_jax.bundles"], **options)
    process.stdin.write(json.dumps({"keys": keys, "topology": topology}))
    process.stdin.close()
    process.stdin = None  # `communicate` would write to it
    return process


def _compile_here() -> None:
    """What that process does: compiles one kernel after another, prints their dumps."""
    given = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = dump_flags(folder)
        texts = {key: _compile(json.loads(key), given["topology"], folder) for key in given["keys"]}
    print(json.dumps(texts))


def _compile(call: Mapping, topology: str, folder: str) -> str:
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    from vit_jax import plan

    place = jax.sharding.SingleDeviceSharding(plan.topology(topology).devices[0])

    def shape(dtype, sides):  # row by row, as kernels want it, so that nothing is copied
        form = Format(Layout(tuple(range(len(sides)))), place)
        return jax.ShapeDtypeStruct(sides, jnp.dtype(DTYPES.get(dtype, dtype)), sharding=form)

    results = [shape(*each) for each in call["results"]]
    kernel = jax.ffi.ffi_call(
        "tpu_custom_call",
        [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in results],
        custom_call_api_version=1,
        legacy_backend_config=json.dumps(call["config"]),
    )
    places = [each.sharding for each in results]
    operands = [shape(*each) for each in call["operands"]]
    jax.jit(kernel, out_shardings=places).lower(*operands).compile()
    return take_dump(folder, "ffi_call*")


if __name__ == "__main__":
    _compile_here()
