"""Plans for this machine's simulated devices, and, where libtpu is, for TPUs."""

import importlib.util
import json
import math
import re
import types
from unittest import mock

import jax
import numpy as np
import pytest

from tests.recipes import tiny
from vit_jax import bundles, hlo, plan
from vit_jax import train as train_lib
from vit_jax.cli import main
from vit_jax.commands import plan as command
from vit_jax.commands.config_flag import load_config, parse_with_config
from vit_jax.data.sources import dataset_info
from vit_jax.sharding import make_mesh

KEYS = (
    *("config", "topology", "num_chips", "fits", "params", "bytes_per_chip", "flops_per_step"),
    *("cycles_per_step", "seconds_per_step_estimate", "mfu_estimate", "collective_bytes"),
    *("ring_bound_bytes", "images_per_second", "hours", "cost", "compile_seconds"),
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra tpu) is not installed"
)


def planned(capsys, *arguments) -> dict:
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def job(data_dir):
    """Parts, state and mesh of `tiny` on 8 devices, parameters split over 4."""
    return made(tiny(data_dir), data_dir)


def made(config, data_dir):
    mesh = make_mesh(data=2, fsdp=4)
    parts, init = train_lib.make_parts(config, dataset_info("digits", data_dir=data_dir))
    return parts, train_lib.abstract_state(init, mesh), mesh, init


def test_a_plan_for_this_machine(capsys):
    """The published digits stand in for a dataset that is not there."""
    arguments = ("--config=digits:debug,data_dir=nowhere", "--config.mesh.fsdp=4")
    result = planned(capsys, *arguments, "--config.mesh.data=2", "--price_per_chip_hour=3")
    assert set(KEYS) <= set(result)
    assert (result["topology"], result["num_chips"], result["fits"]) == ("cpu:8", 8, True)
    used = result["bytes_per_chip"]
    assert used["total"] == sum(v for k, v in used.items() if k not in ("total", "capacity"))
    assert used["capacity"] > used["total"]
    assert result["cycles_per_step"] is None and result["hours"] is None  # no TPU compiler
    assert result["collective_bytes"]["all-reduce"] > 0


def test_bytes_of_parameters_and_optimiser_are_those_of_the_real_arrays(job):
    _, state, _, init = job
    places = jax.tree.map(lambda x: x.sharding, state)
    real = jax.jit(init, out_shardings=places)()
    device = jax.devices()[3]
    for name in ("params", "opt_state"):
        there = [
            shard.data.nbytes
            for leaf in jax.tree.leaves(getattr(real, name))
            for shard in leaf.addressable_shards
            if shard.device == device
        ]
        assert plan.shard_bytes(getattr(state, name)) == sum(there)


def test_the_ring_bound_by_hand(job):
    _, state, mesh, _ = job
    items = dict.fromkeys(hlo.COLLECTIVES, 2.0)
    bound = plan.ring_bound(state, mesh, items)
    split, whole = 0, 0
    for leaf in jax.tree.leaves(state.params):
        if "fsdp" in str(leaf.sharding.spec):
            split += np.prod(leaf.shape)
        else:
            whole += np.prod(leaf.shape)
    assert split > whole > 0
    assert bound["all-gather"] == round(2 * 3 / 4 * split * 2)
    assert bound["reduce-scatter"] == round(3 / 4 * split * 2)
    assert bound["all-reduce"] == round(2 * 2 * (1 / 2 * split / 4 + 7 / 8 * whole))


def test_what_no_computing_hides_of_a_collective_is_waited_for():
    device = types.SimpleNamespace(device_kind="TPU v5e", platform="tpu", slice_index=0)
    other = types.SimpleNamespace(device_kind="TPU v5e", platform="tpu", slice_index=1)
    target = plan.Target("v5e:1x1", [device, device, other, other], per_chip=1)
    chip, found = target.chip, []
    for name, groups, cycles in (("a", ((0, 1), (2, 3)), 0.4), ("b", ((0, 2), (1, 3)), 0.4)):
        hidden = round(cycles * 1e-3 * chip.clock)
        sizes = {"wire_bytes": 1e-3 * chip.link_bandwidth, "times": 12.0, "hidden_cycles": hidden}
        more = {"kind": "all-reduce", "dtype": "f32", "group_size": 2, "op_name": ""}
        found.append(hlo.Collective(name=name, groups=groups, **sizes, **more))
    slow, fast = plan.exposed_communication(found, target)
    across = 1e-3 * chip.link_bandwidth / chip.dcn_bandwidth
    assert (slow["name"], slow["crosses_slices"], fast["crosses_slices"]) == ("b", True, False)
    assert slow["exposed_seconds"] == pytest.approx(12 * (across - 0.4e-3))
    assert fast["transfer_seconds"] == pytest.approx(12e-3)
    assert fast["exposed_seconds"] == pytest.approx(12 * 0.6e-3)


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_flops_are_the_formulas_but_for_the_gradient_of_the_images(data_dir, remat):
    """Exactly, once what rematerialisation does again is told apart."""
    leaves = {"model__scan": remat == "full", "model__remat": remat}
    config = tiny(data_dir, **leaves)
    parts, state, mesh, _ = made(config, data_dir)
    batch = plan.abstract_batch(config.batch_size, parts.image_size, mesh)
    module = plan.compile_step(parts, state, batch, mesh).module
    found = plan.matmul_flops(module)
    assert (found["recomputed"] > 0) == (remat == "full")
    backbone, _ = parts.merge(state.params, state.non_trainable)
    patches, kernel = math.prod(backbone.grid), backbone.patch_embed.kernel
    images_grad = 2 * patches * math.prod(kernel.shape)
    wanted = (parts.flops_per_image - images_grad) * config.batch_size
    assert (found["compiler"] - found["recomputed"]) * mesh.size == wanted


def test_flops_of_attentions_kernels():
    """4·n²·d an image forward, 8·n²·d backward, where the scores are computed again."""
    text = """ENTRY %main (q: bf16[64,196,1152]) -> bf16[64,196,1152] {
  %q = bf16[64,196,1152]{2,1,0} parameter(0)
  %attention_forward.3 = bf16[64,196,384]{2,1,0} custom-call(%q), \
custom_call_target="tpu_custom_call", metadata={op_name="jvp()/attn"}
  %attention_forward = bf16[64,196,384]{2,1,0} custom-call(%q), \
custom_call_target="tpu_custom_call", metadata={op_name="checkpoint/rematted_computation/attn"}
  ROOT %attention_backward.1 = bf16[64,196,1152]{2,1,0} custom-call(%q, %attention_forward), \
custom_call_target="tpu_custom_call", metadata={op_name="transpose(jvp())/attn"}
}
"""
    square = 64 * 196 * 196 * 384
    found = plan.matmul_flops(hlo.parse(text))
    assert found == {"compiler": (4 + 4 + 10) * square, "recomputed": (4 + 2) * square}


@pytest.mark.parametrize(
    "message, size",
    [
        ("Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm.", 20.25 * 2**30),
        ("the total memory required for HLO temporaries (512.00G) exceeds available", 2**39),
        ("Ran out of memory in memory space vmem. Used 19.98M of 16.00M vmem.", None),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_that_it_needs(message, size):
    assert plan.needed_bytes(message) == size


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9:2x2"], r"topology='v9:2x2' is unknown; the forms are v2:4x4, .*v6e:16x16"),
        (["--topology=v5e:4x4x4"], "topology='v5e:4x4x4' is unknown; the forms are .* v5e:16x16"),
        (["--topology=v5p:8x8"], "topology='v5p:8x8' is unknown; the forms are"),
        (["--price_per_chip_hour=-1"], "flag --price_per_chip_hour=-1: -1.0 is not a non-neg"),
        (["--topology=v5e"], "topology='v5e' is unknown; the forms are"),
        (["--topology=v5e:4x4", "--num_slices=0"], "num_slices=0 must be at least 1"),
        (["--topology=v5e:4x4", "--chips_per_host=two"], "chips_per_host='two' must be sides"),
        (["--num_slices=2"], "--num_slices is of a --topology, like v5e:4x4; give it, too"),
        (["--chips_per_host=2x2"], "--chips_per_host is of a --topology"),
        (["--config.train.spmd=pmap", "--config.mesh.fsdp=2"], "spmd='pmap' splits the batch"),
        (["--config.mesh.data=3"], "mesh .*data=3.* does not multiply to the 8 devices"),
        (["--config.batch_size=20"], "batch_size=20 must be a multiple of the 8 devices; try 16"),
        (["--config.data.name=nothing"], "no dataset 'nothing'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["plan", "--config=digits:debug", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_without_libtpu_it_plans_for_this_machine(monkeypatch, capsys):
    def missing(*_, **__):
        raise ImportError("planning for TPUs needs: pip install 'vit-jax[tpu]'")

    monkeypatch.setattr(plan, "topology", missing)
    monkeypatch.setattr(plan, "compile_step", fake_compile)
    assert main(["plan", "--config=digits:debug", "--topology=v5e:4x4", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["topology"] == "cpu:8"
    assert "planning for this machine's own devices" in err


def test_devices_that_are_not_there_are_said(monkeypatch, capsys):
    """As JAX answers where it is asked for GPUs that are not there."""
    monkeypatch.setattr(jax, "local_devices", mock.Mock(side_effect=AssertionError))
    assert main(["plan", "--config=digits:debug"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cpu cannot be used on" in line


def test_the_classic_loop_is_planned_too(data_dir):
    config = tiny(data_dir, train__spmd="pmap", model__depth=1)
    mesh = make_mesh()
    parts, init = train_lib.make_parts(config, dataset_info("digits", data_dir=data_dir))
    state = train_lib.abstract_state(init, mesh)
    batch = plan.abstract_batch(config.batch_size, parts.image_size, mesh)
    module = plan.compile_step(parts, state, batch, mesh).module
    found = hlo.by_kind(hlo.collectives(module, mesh.size))
    assert found["all-reduce"] >= plan.ring_bound(state, mesh, plan.wire_items([]))["all-reduce"]


def fake_compile(*_, **__):
    """A compiler that always runs out of memory."""
    return plan.Compiled(None, None, 0.1, needed=2**60)


def test_a_plan_that_does_not_fit_ends_with_2_and_says_what_was_tried(monkeypatch, capsys):
    fits = []

    def compile_step(parts, state, batch, mesh, dumps):
        fits.append(mesh.shape["fsdp"])
        return fake_compile()

    monkeypatch.setattr(plan, "compile_step", compile_step)
    assert main(["plan", "--config=digits:debug"]) == 2
    out = capsys.readouterr().out
    assert "fits" in out and "nothing that was tried" in out
    assert set(fits) == {1, 8}  # data parallel, then split over all


def test_what_lies_where_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(plan, "compile_step", fake_compile)
    flags = ["--show_sharding", "--json", "--noremedies", "--config.mesh.fsdp=-1"]
    arguments = [*flags, "--config.mesh.data=1", "--config.train.offload_opt_state=True"]
    assert main(["plan", "--config=digits:debug", *arguments]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["fits"] is False
    assert "mesh replica 1, data 1, fsdp 8, tensor 1" in err
    (line,) = (x for x in err.splitlines() if x.startswith("params/backbone/patch_embed/kernel "))
    sides = map(int, re.search(r"float32\[([\d, ]+)\]", line)[1].split(", "))
    assert "'fsdp'" in line and f"{4 * math.prod(sides) // 8:,} bytes" in line
    assert re.search("^opt_state/.*kernel .* 0 bytes  in the host's memory", err, re.MULTILINE)


def test_the_search_ranks_what_fits_first(monkeypatch, capsys):
    def report(compiled, target, parts, state, mesh, **_):
        fsdp, fits = mesh.shape["fsdp"], mesh.shape["fsdp"] > 1
        return {
            "fits": fits,
            "bytes_per_chip": {"total": 2**30 // fsdp, "capacity": 2**29},
            "seconds_per_step_estimate": 0.1 if fits else None,
            "exposed_seconds": 0.01,
        }

    monkeypatch.setattr(plan, "compile_step", fake_compile)
    monkeypatch.setattr(plan, "report", report)
    assert main(["plan", "--config=digits:debug", "--search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "1. --config.mesh.tensor=1 --config.mesh.data=1 --config.mesh.fsdp=-1"
    )
    assert "100.0 ms a step, 10.0 ms of them waiting" in lines[0]
    assert "does not fit, 1.00 GiB of 0.50 GiB" in lines[1]
    assert lines[-1].startswith("the fastest that fits: --config.mesh.tensor=1")
    assert main(["plan", "--config=digits:debug", "--json"]) == 2
    wanted = "--config.mesh.fsdp=-1 --config.mesh.data=1"
    assert json.loads(capsys.readouterr().out)["would_fit"] == wanted


@pytest.mark.parametrize("recipe", ["vit_s16_i1k:debug", "vit_22b:debug", "cifar10:debug"])
def test_what_is_proposed_can_be_pasted(recipe):
    """As flags the overrides make the same config; recipes without `remat` take none."""
    config = load_config(recipe)
    own = types.SimpleNamespace(target=plan.own_devices())
    searched = [
        mesh | more
        for mesh in command._meshes(own, config)
        for more in command._recomputing(config)
    ]
    proposed = [*command._remedies(config), *searched]
    assert {"train.accumulate"} < {key for overrides in proposed for key in overrides}
    for overrides in proposed:
        flags = command._as_flags(overrides).split()
        _, pasted = parse_with_config([f"--config={recipe}", *flags], lambda _: None, usage="")
        assert pasted.to_dict() == command._changed(config, overrides).to_dict()


def test_a_search_begins_with_what_recomputes_least():
    config = load_config("vit_22b:debug")
    assert config.model.remat == "full"
    assert next(command._recomputing(config)) == {"model.remat": "none"}


@needs_libtpu
def test_topologies_have_the_devices_that_jax_has_on_real_chips():
    for name, chips, per_chip in (("v4:2x2x2", 8, 1), ("v5e:4x4", 16, 1), ("tpu7x:2x2x1", 4, 2)):
        target = plan.topology(name)
        assert (target.num_chips, target.per_chip) == (chips, per_chip), name
        assert make_mesh(fsdp=2, devices=target.devices).size == chips * per_chip
        assert target.chip is not None and set(target.slices) == {0}
    cut = make_mesh(fsdp=16, devices=plan.topology("v5p:4x4x8").devices)
    assert cut.shape["fsdp"] == 16
    cut = make_mesh(fsdp=256, devices=plan.topology("v4:8x8x16").devices)  # no side, no plane
    assert cut.shape["data"] == 4
    hosts = [
        {device.process_index for device in plan.topology("v5e:4x4", chips_per_host=size).devices}
        for size in ("", "1x1")
    ]
    assert (len(hosts[0]), len(hosts[1])) == (4, 16)
    slices = plan.topology("v5e:2x2", num_slices=2).slices
    assert slices == [0] * 4 + [1] * 4
    with pytest.raises(
        ValueError, match=r"'v5e:3x5' is refused by the TPU compiler .*not divisible"
    ):
        plan.topology("v5e:3x5")


@needs_libtpu
def test_loops_take_what_the_compiler_says_that_they_take_at_once():
    """What it calls temporary is more: a stack that one loop leaves to the next counts twice."""
    target = plan.topology("v5e:2x2")
    place = jax.sharding.SingleDeviceSharding(target.devices[0])
    shapes = (2, 256, 256), (1 << 18, 256)  # 268 MB a layer, much more than a chip's own memory
    w, x = (jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for shape in shapes)

    def loss(w, x):
        return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x, w)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(w, x).compile()
    stats = program.memory_analysis()
    summed = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    least = stats.argument_size_in_bytes + 2 * x.size * 4  # what each layer was given is kept
    assert least <= plan.peak_bytes(program, target) < summed


@pytest.mark.slow
@needs_libtpu
def test_a_plan_for_tpus(capsys, tmp_path, monkeypatch):
    started = []
    start = bundles._start
    monkeypatch.setattr(bundles, "_start", lambda *a: started.append(a) or start(*a))
    leaves = (
        "--config.model.dim=64",
        "--config.model.image_size=(32,32)",
        "--config.batch_size=64",
    )
    arguments = ("--config=vit_s16_i1k:debug", *leaves, "--topology=v5e:2x2")
    options = (f"--dump_hlo={tmp_path}", "--price_per_chip_hour=2")
    result = planned(capsys, *arguments, *options, "--config.mesh.fsdp=2", "--config.mesh.data=2")
    assert (result["num_chips"], result["fits"], result["topology"]) == (4, True, "v5e:2x2")
    assert result["cycles_per_step"] > 10_000
    assert 0 < result["mfu_estimate"] < 1
    assert result["collective_bytes"]["all-gather"] > 0
    assert result["images_per_second"] * result["seconds_per_step_estimate"] == pytest.approx(64)
    assert result["hours"] == result["seconds_per_step_estimate"] * result["total_steps"] / 3600
    assert result["cost"] == pytest.approx(result["hours"] * 4 * 2)
    module = hlo.parse((tmp_path / "train_step.txt").read_text())
    kernels = {row["name"]: row["times"] for row in result["kernels"]}
    assert kernels == {"attention_forward": 2, "attention_backward": 2}
    inside = sum(row["cycles"] * row["times"] for row in result["kernels"])
    assert hlo.total_cycles(module) + inside == result["cycles_per_step"]
    assert len(started) == 1  # both, beside the program: known before it was compiled
    flops = result["flops_per_step"]
    images_grad = 2 * 16 * 8 * 8 * 3 * 64  # 16 patches, which nobody wants
    wanted = flops["formula"] - 64 * images_grad
    assert flops["compiler"] - flops["recomputed"] == wanted


@pytest.mark.slow
@needs_libtpu
def test_fsdp_over_a_whole_torus_sends_what_a_ring_must(capsys):
    """Matrices of L/16, on a few tokens; the compiler alone would send twice as much."""
    shape = {"dim": 1024, "depth": 4, "num_heads": 16, "mlp_dim": 4096, "dtype": "bfloat16"}
    leaves = [f"--config.model.{key}={value}" for key, value in shape.items()]
    arguments = ("--config=vit_l16_i21k:debug", *leaves, "--config.batch_size=64")
    result = planned(capsys, *arguments, "--topology=v5p:4x4x4", "--config.mesh.fsdp=-1")
    assert result["mesh"]["fsdp"] == 64
    found, bound = result["collective_bytes"], result["ring_bound_bytes"]
    assert found["all-gather"] > found["reduce-scatter"] > 10 * found["all-reduce"]
    assert sum(found.values()) < 1.1 * sum(bound.values())


@pytest.mark.slow
@needs_libtpu
def test_of_gradients_only_parts_cross_slices(capsys):
    slices = ("--topology=v5e:4x4", "--num_slices=2", "--config.mesh.replica=2")
    arguments = ("--config=vit_s16_i1k:debug", "--config.model.dim=384", "--config.model.depth=4")
    arguments += ("--config.model.num_heads=6", "--config.model.mlp_dim=1536")
    result = planned(capsys, *arguments, "--config.batch_size=64", *slices)
    (across,) = (kind for kind in result["collective_bytes"] if "across" in kind)
    assert result["collective_bytes"][across] < 1.1 * result["ring_bound_bytes"][across]
    assert result["collective_bytes"]["reduce-scatter"] > 0  # and not the whole, twice


@pytest.mark.slow
@needs_libtpu
def test_the_update_writes_parameters_and_moments_and_nothing_else(tmp_path, capsys):
    """The norm of the update included, for which the update itself once went to memory."""
    arguments = ("--config=vit_s16_i1k:debug", "--topology=v5e:2x2", f"--dump_hlo={tmp_path}")
    shape = {"dim": 128, "mlp_dim": 640, "num_heads": 2, "depth": 1, "dtype": "bfloat16"}
    planned(capsys, *arguments, *(f"--config.model.{key}={value}" for key, value in shape.items()))
    module = hlo.parse((tmp_path / "train_step.txt").read_text())
    written = [
        array
        for _, instruction, _, fused in module.visits()
        if not fused and instruction.opcode == "fusion"
        for array in instruction.arrays
        if array.dtype == "f32" and array.sides == (128, 640)
    ]
    assert len(written) == 3
