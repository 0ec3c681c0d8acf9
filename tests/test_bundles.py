"""The accounting of kernels, on a real dump: 8 cells with 4 products of 16 × 128 × 128 (v5e)."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import pytest

from vit_jax import bundles, hlo
from vit_jax.chips import CHIPS
from vit_jax.kernels import attention_tpu

DUMPS = pathlib.Path(__file__).parent / "dumps"


def program():
    return bundles.parse((DUMPS / "products_final_bundles.txt").read_text())


def test_loops_and_their_trips_are_found():
    (grid,) = program().inside
    (images,) = grid.inside
    assert (grid.trips, grid.cells, grid.is_grid) == (10, 8, True)
    assert (images.trips, images.cells, images.is_grid) == (4, 4, False)
    assert images.inside == []
    # Addresses, the four bundles behind a jump included: 0x6 to 0x55, and 0x2e to 0x46.
    assert images.bundles == 0x46 - 0x2E + 1
    assert grid.bundles == 0x55 - 0x6 + 1 - images.bundles
    assert dict(images.rows) == {"mxu0": 16} and not grid.rows


def test_bundles_and_rows_are_multiplied_by_cells_and_trips():
    inner, outer = 0x46 - 0x2E + 1, 0x55 - 0x6 + 1
    outside = program().bundles
    assert program().total() == (outside + 8 * (outer - inner + 4 * inner), 8 * 4 * 16)


def test_units_of_256_take_in_two_rows_a_cycle():
    line = "  0x1   :  { %1 = vmatmul.mubr.bf16.gmra.mxu1 %v1 }\n"
    assert bundles.parse(line).total() == (1, 8)


def test_what_is_no_dump_is_refused():
    with pytest.raises(ValueError, match="no dump of bundles"):
        bundles.parse("HloModule nothing\n")


def test_a_kernel_lasts_as_long_as_its_slowest_part_and_starting_its_cells():
    options = {"name": "", "cells": 2, "overhead": 5, "times": 1, "op_name": ""}
    for sizes in ((30, 20, 10), (10, 30, 20), (20, 10, 30)):
        bundles_, rows, traffic = sizes
        kernel = bundles.Kernel(bundles=bundles_, rows=rows, traffic=traffic, **options)
        assert kernel.cycles == 35


class Dumped(bundles.Dumps):
    """Has the dump already."""

    def want(self, kernels):
        text = (DUMPS / "products_final_bundles.txt").read_text()
        self._texts |= dict.fromkeys(kernels, text)


def kernels(text):
    return bundles.kernels(hlo.parse(text), CHIPS["TPU v5e"], Dumped("v5e:4x4"))


def test_kernels_of_a_program():
    chip = CHIPS["TPU v5e"]
    (kernel,) = kernels((DUMPS / "products.hlo").read_text())
    assert (kernel.name, kernel.cells, kernel.times) == ("products", 8, 1)
    assert (kernel.bundles, kernel.rows) == program().total()
    size = 2 * 32 * 16 * 128 + 2 * 128 * 128 + 4 * 32 * 16 * 128
    traffic = size * chip.clock / chip.hbm_bandwidth
    assert kernel.traffic == pytest.approx(traffic, abs=1)
    start = 8 * 0.35e-6 * chip.clock + traffic / 8
    assert kernel.overhead == pytest.approx(start, abs=1)


def test_arrays_that_stay_on_the_chip_are_no_traffic():
    text = (DUMPS / "products.hlo").read_text()
    moved = text.replace(
        "%x.1 = bf16[32,16,128]{2,1,0:T(8,128)(2,1)}",
        "%x.1 = bf16[32,16,128]{2,1,0:T(8,128)(2,1)S(1)}",
    )
    both = [kernels(each)[0] for each in (text, moved)]
    chip = CHIPS["TPU v5e"]
    less = 2 * 32 * 16 * 128 * chip.clock / chip.hbm_bandwidth
    assert both[0].traffic - both[1].traffic == pytest.approx(less, abs=1)


def test_kernels_in_a_loop_are_counted_by_its_trips():
    call = (DUMPS / "products.hlo").read_text().split("ROOT %products.1 = ")[1].split("\n}")[0]
    text = f"""HloModule loop

%body (c: (s32[])) -> (s32[]) {{
  %x.1 = bf16[32,16,128]{{2,1,0}} parameter(0)
  %w.1 = bf16[128,128]{{1,0}} parameter(1)
  %products.1 = {call}
  ROOT %out = (s32[]) tuple(%x.1)
}}

%condition (c: (s32[])) -> pred[] {{
  ROOT %less = pred[] constant(true)
}}

ENTRY %main (a: s32[]) -> s32[] {{
  %a = s32[] parameter(0)
  ROOT %loop = (s32[]) while(%a), condition=%condition, body=%body, \\
backend_config={{"known_trip_count":{{"n":"6"}}}}
}}
"""
    (kernel,) = kernels(text.replace("\\\n", ""))
    assert kernel.times == 6


def test_kernels_are_known_before_the_program_is_compiled():
    """What JAX lowers and what the compiler prints of it make the same key."""

    def step(qkv):
        out = attention_tpu.forward(qkv, None, None, num_heads=2)[0]
        return attention_tpu.forward(jnp.tile(out, 3), None, None, num_heads=2)

    shape = jax.ShapeDtypeStruct((8, 32, 3 * 128), jnp.bfloat16)
    (key,) = bundles.keys_of(jax.jit(step).trace(shape).lower(lowering_platforms=("tpu",)))
    call = json.loads(key)
    assert call["operands"] == [["bf16", [8, 32, 384]]]
    assert call["results"] == [["bf16", [8, 32, 128]], ["f32", [8, 2, 32]]]
    compiled = {  # as libtpu writes the same
        "flag_configs": [],
        "scoped_memory_configs": [{"memory_space": "1", "offset": "0", "size": "67043328"}],
        "custom_call_config": {
            "body": call["config"]["custom_call_config"]["body"],
            "needs_layout_passes": True,
            "serialization_format": "1",
            "allow_input_fusion": [],
            "output_memory_colors": [0, 1],
        },
        "retry_config": {"retry_count": "0"},
    }
    assert bundles.kernel_key(compiled, call["operands"], call["results"]) == key


def test_kernels_that_nobody_asks_for_any_more_are_not_compiled_to_the_end(monkeypatch):
    started = []

    def start(keys, topology):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(["sleep", "60"], **pipes))
        return started[-1]

    monkeypatch.setattr(bundles, "_start", start)
    dumps = bundles.Dumps("v5e:4x4")
    dumps.want(["a", "b", "a"])
    dumps.want(["b"])
    assert len(started) == 1  # each kernel once, all of one call in one process
    dumps.close()
    assert started[0].returncode < 0


def test_a_kernel_that_is_refused_says_why(monkeypatch):
    def start(keys, topology):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(["sh", "-c", "echo more >&2; echo too large >&2; exit 1"], **pipes)

    monkeypatch.setattr(bundles, "_start", start)
    with pytest.raises(RuntimeError, match="a kernel does not compile alone: too large"):
        bundles.Dumps("v5e:4x4")["a"]


@pytest.mark.slow
def test_the_compiler_still_says_what_is_read():
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    module = hlo.parse((DUMPS / "products.hlo").read_text())
    (kernel,) = bundles.kernels(module, CHIPS["TPU v5e"], bundles.Dumps("v5e:4x4"))
    assert kernel.cells == 8 and kernel.rows == 8 * 4 * 16
    assert 0.5 < kernel.bundles / program().total()[0] < 2
