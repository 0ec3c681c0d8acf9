"""timm's own models with random weights, beside ours: logits, every block, and back."""

import functools
import json
import re

import numpy as np
import pytest
from etils import epath

from tests.interop.models import VARIANTS, assert_close, draw, source, spec
from tests.interop.mutations import MUTATIONS
from tests.interop.real_timm import import_timm
from vit_jax.interop import files
from vit_jax.interop.export import export
from vit_jax.interop.layouts import TIMM
from vit_jax.interop.load import read_source
from vit_jax.interop.spec import fill, infer_backbone, make_model, params_of_shapes
from vit_jax.interop.tables import read
from vit_jax.interop.timm import ARCHITECTURES, DEPTHS, HEADS, facts

torch = pytest.importorskip("torch")
timm = import_timm()
pytestmark = pytest.mark.parity

TINY = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
# One of each kind that is read; what is not told is the architecture's own.
READ = {
    "vit_tiny_patch16_224": TINY,
    "vit_huge_patch14_224": {"img_size": 28, "depth": 1, "embed_dim": 160, "num_classes": 5},
    "vit_base_patch16_gap_224": TINY,
    "vit_medium_patch16_reg4_gap_256": TINY,
    "deit_tiny_distilled_patch16_224": TINY,
    "deit3_small_patch16_224": TINY,
    "eva_large_patch14_196": TINY | {"img_size": 28},
    "eva_giant_patch14_224": TINY | {"img_size": 28},
    "vit_small_patch14_dinov2": TINY | {"img_size": 28, "num_classes": 0},
    "vit_giant_patch14_reg4_dinov2": TINY | {"img_size": 28, "num_classes": 0},
    "vit_small_patch16_dinov3": TINY | {"img_size": (32, 48), "num_classes": 0},
    "vit_small_plus_patch16_dinov3_qkvb": TINY | {"global_pool": "token"},
    "vit_base_patch16_siglip_224": TINY | {"num_classes": 0},
    "vit_base_patch32_siglip_256": TINY | {"num_classes": 0, "img_size": 64},
    "vit_base_patch16_siglip_gap_224": TINY,
}
# Whose arrays have the names of the table, or nearly so, and who compute something else.
REFUSED = {
    "eva02_tiny_patch14_224": TINY | {"img_size": 28},
    "eva02_enormous_patch14_clip_224": TINY | {"img_size": 28},
    "vit_base_patch16_rpn_224": TINY,
    "vit_base_patch16_clip_224": TINY,
    "vit_medium_patch16_rope_reg1_gap_256": TINY,
    "vit_small_patch16_rope_224": TINY,
    "vit_small_patch16_rope_ape_224": TINY,
    "vit_small_patch16_rope_mixed_224": TINY,
}
LONE = ("eva02_tiny", "patch16_clip", "rope_reg1", "rope_224", "rope_mixed")  # by arrays alone


def loud(name, options):
    """A model with numbers that show every mistake."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(key, tuple(parameter.shape), rng)))
    return model


def save(model, folder) -> epath.Path:
    """As timm itself writes it for the hub, config.json and all."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return epath.Path(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (model, folder), made once."""

    @functools.cache
    def get(name):
        model = loud(name, (READ | REFUSED)[name])
        return model, save(model, tmp_path_factory.mktemp(name))

    return get


def theirs(model, images) -> dict[str, np.ndarray]:
    found, hooks = {}, []
    for i, block in enumerate(model.blocks):

        def keep(_, __, output, i=i):
            found[f"block {i}"] = output.numpy()

        hooks.append(block.register_forward_hook(keep))
    with torch.no_grad():
        found["output"] = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    for hook in hooks:
        hook.remove()
    return found


def compare(read, model) -> None:
    ours = fill(make_model(read.spec), read.params)
    size = read.spec.backbone["image_size"]
    images = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    layers = range(read.spec.backbone["depth"])
    _, blocks = ours.backbone.encode(ours.backbone.embed(images), layers=layers)
    found = {f"block {i}": np.asarray(block) for i, block in enumerate(blocks)}
    found["output"] = np.asarray(ours(images))
    wanted = theirs(model, images)
    assert len(wanted) == len(layers) + 1
    for what, tensor in wanted.items():
        assert_close(found[what], tensor, what)


@pytest.mark.parametrize("name", READ)
def test_import(saved, name):
    model, folder = saved(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name
    source = read_source(folder)
    assert not source.report.missing and not source.report.unexpected
    compare(source, model)


@pytest.mark.parametrize("name", READ)
def test_export_back(saved, name, tmp_path):
    model, folder = saved(name)
    source = read_source(folder)
    out = epath.Path(tmp_path / "out")
    found = export(source, format="timm", out=out)
    assert "timm" in found["run_with"]
    for what in ("logits", "features"):
        assert found[what]["max_abs_difference"] <= 1e-4 * found[what]["rms"]
    again = read_source(out)
    assert again.spec == source.spec
    for key, array in source.params.items():
        np.testing.assert_array_equal(again.params[key], array, err_msg=key)
    if name == "eva_giant_patch14_224":  # which goes back as a ViT whose keys' bias is 0
        return
    written = files.read_arrays(out / files.SINGLE)
    original = {key: x.numpy() for key, x in model.state_dict().items()}
    if (
        written["pos_embed" if "pos_embed" in written else "cls_token"].shape
        == original.get("pos_embed", original.get("cls_token")).shape
    ):
        assert written.keys() == original.keys()
        for key, array in written.items():
            np.testing.assert_array_equal(array, original[key], err_msg=key)


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_is_refused(saved, name):
    _, folder = saved(name)
    with pytest.raises(ValueError, match="architectures that are read|compute something"):
        read_source(folder)


@pytest.mark.parametrize("name", [n for n in REFUSED if any(part in n for part in LONE)])
def test_a_lone_file_is_refused_by_its_arrays(saved, name, tmp_path):
    _, folder = saved(name)
    lone = epath.Path(tmp_path / "lone.safetensors")
    lone.write_bytes((folder / files.SINGLE).read_bytes())
    with pytest.raises(ValueError, match="RoPE|compute something"):
        read_source(lone, num_heads=3)


def test_a_lone_file_says_what_is_assumed(saved, tmp_path):
    model, folder = saved("vit_tiny_patch16_224")
    lone = epath.Path(tmp_path / "lone.safetensors")
    lone.write_bytes((folder / files.SINGLE).read_bytes())
    source = read_source(lone, num_heads=3)
    compare(source, model)
    assert any("no config.json names the architecture" in note for note in source.report.notes)


def test_arguments_that_change_the_model_are_refused(tmp_path):
    options = TINY | {"pool_include_prefix": True, "pre_norm": False, "scale_mlp_norm": True}
    folder = save(loud("vit_tiny_patch16_224", options), tmp_path / "a")
    with pytest.raises(ValueError, match=r"compute something|scale_mlp_norm"):
        read_source(folder)
    folder = save(loud("vit_tiny_patch16_224", TINY | {"act_layer": "relu"}), tmp_path / "b")
    with pytest.raises(ValueError, match="act_layer='relu' is not supported"):
        read_source(folder)


ALL = sorted(
    {
        name
        for module in ("vision_transformer", "deit", "eva", "beit")
        for name in timm.list_models(module=module)
        if any(re.fullmatch(pattern, name) for pattern, _ in ARCHITECTURES)
    }
)
OTHER_BLOCKS = r"vit_d?pwee_\w+|vit_d(wee|little)_\w+"  # refused by their arrays' names


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_the_table_of_architectures_is_timms():
    """For all that are read: GELU, epsilon, RoPE, heads, and no part that ours do not have."""
    assert len(ALL) > 100
    for name in ALL:
        if re.fullmatch(OTHER_BLOCKS, name):
            continue
        model = on_meta(name, depth=1)
        kind = next(k for pattern, k in ARCHITECTURES if re.fullmatch(pattern, name))
        heads = next((n for pattern, n in HEADS if re.fullmatch(pattern, name)), None)
        block = model.blocks[0]
        assert type(block).__name__ in ("Block", "EvaBlock"), name
        assert block.attn.num_heads == (heads or model.embed_dim // 64), name
        assert isinstance(model.norm_pre, torch.nn.Identity), name
        norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {kind.norm_eps}, name
        rope = getattr(model, "rope", None)
        names = [] if rope is None else [type(rope).__name__]
        assert names == (["RotaryEmbeddingDinoV3"] if kind.rope else []), name
        act = getattr(block.mlp, "act", None)
        if isinstance(act, torch.nn.SiLU):
            continue
        x = torch.linspace(-3, 3, 7)
        approximate = "tanh" if kind.activation == "gelu_tanh" else "none"
        wanted = torch.nn.functional.gelu(x, approximate=approximate)
        if act is not None:
            torch.testing.assert_close(act(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted({re.sub(r"_.*", "", name) for name in ALL}))
def test_depths_are_timms(family):
    """What a folder without its last blocks is refused by."""
    checked = 0
    for name in ALL:
        if re.sub(r"_.*", "", name) != family or re.fullmatch(OTHER_BLOCKS, name):
            continue
        if depth := next((n for pattern, n in DEPTHS if re.fullmatch(pattern, name)), None):
            assert depth == len(on_meta(name).blocks), name
            checked += 1
    assert checked or family not in ("vit", "deit", "deit3", "flexivit", "eva")


PUBLISHED = (
    *("vit_tiny_patch16_224", "vit_small_patch32_384", "vit_base_patch8_224"),
    *("vit_large_patch14_224", "vit_huge_patch14_224", "vit_giant_patch14_224"),
    *("vit_gigantic_patch14_224", "flexivit_large", "deit_base_distilled_patch16_384"),
    *("deit3_medium_patch16_224", "deit3_huge_patch14_224", "eva_giant_patch14_560"),
    *("vit_base_patch14_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_small_plus_patch16_dinov3"),
    *("vit_huge_plus_patch16_dinov3_qkvb", "vit_7b_patch16_dinov3", "vit_large_patch16_siglip_512"),
    *("vit_so400m_patch14_siglip_378", "vit_giantopt_patch16_siglip_gap_384"),
    *("vit_base_patch16_reg4_gap_256", "vit_huge_patch16_gap_448"),
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_covered(name):
    """Every tensor's name and shape, on torch's meta device: no memory, no weights."""
    from vit_jax.interop.timm import fuse

    model = on_meta(name)
    arrays = {
        key: np.empty(tuple(x.shape), np.float32)
        if 0 in x.shape or x.numel() < 2**16
        else np.broadcast_to(np.zeros((), np.float32), tuple(x.shape))
        for key, x in model.state_dict().items()
    }
    blocks = {}
    for key in list(arrays):
        if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", key):
            blocks.setdefault(int(match[1]), {})[match[2]] = arrays[key].shape
            if int(match[1]):  # all have the shapes of the first, which stands for them
                del arrays[key]
    assert len(blocks) == len(model.blocks)
    assert all(block == blocks[0] for block in blocks.values())
    params, report = read(TIMM, fuse(arrays))
    assert not report.missing and not report.unexpected
    size = model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    config = {"architecture": name, "global_pool": model.global_pool}
    config |= {"pretrained_cfg": {"input_size": [3, *size]}}
    told = facts(config, params, arrays)
    heads = told.known["num_heads"] or model.embed_dim // 64
    assert heads == model.blocks[0].attn.num_heads
    # One block stands for all of them here.
    params, backbone, _ = infer_backbone(params, told.known | {"num_heads": heads, "depth": 1})
    head = params.get("head/fc/kernel")
    made = spec(pool=told.pool, num_classes=0 if head is None else head.shape[1], names=False)
    made.backbone.update(backbone)
    wanted = params_of_shapes(make_model(made))
    assert {key: array.shape for key, array in params.items()} == wanted


@pytest.mark.parametrize("name", [*READ][::2])
def test_each_mistake_is_seen(saved, name):
    model, folder = saved(name)
    source = read_source(folder)
    b = source.spec.backbone
    for mutation, mutate in MUTATIONS.items():
        if "GELU" in mutation and b["mlp"] == "swiglu":
            continue  # it has none
        if mutation == "token order" and b["pos_embed"] != "learned":
            continue  # it has no table
        with pytest.raises(AssertionError, match="of the RMS"):
            compare(mutate(source), model)
            pytest.fail(mutation)


NOT_THERE = {"hidden", "rmsnorm", "parallel", "tokens", "cls_gap"}
ROPE = VARIANTS["rope"]
OURS = {name: VARIANTS[name] for name in sorted(VARIANTS.keys() - NOT_THERE)} | {
    "rope_swiglu": ROPE | {"mlp": "swiglu", "mlp_dim": 36},
    "rope_gap": ROPE | {"pool": "gap", "layer_scale": 0.0, "image_size": (16, 24)},
    "rope_gap_norm": ROPE | {"pool": "gap_norm", "final_norm": False},
    "rope_map": ROPE | {"pool": "map"},
    "rope_qk_norm": ROPE | {"qk_norm": True},
    "map_beside_cls": {"pool": "map", "cls_token": True},
    "ratio": {"dim": 88, "mlp_dim": 120, "num_heads": 4},
    "swiglu_ratio": VARIANTS["swiglu"] | {"dim": 88, "mlp_dim": 60, "num_heads": 4},
    "swiglu_registers": VARIANTS["swiglu"] | {"num_reg_tokens": 2},
}


@pytest.mark.parametrize("name", OURS)
def test_our_own_models_answer_the_same_there(name, tmp_path):
    made = source(spec(**OURS[name]))
    found = export(made, format="timm", out=tmp_path / "out")
    assert "timm" in found["run_with"]
    for what in ("logits", "features"):
        assert found[what]["max_abs_difference"] <= 1e-4 * found[what]["rms"]
    again = read_source(tmp_path / "out")
    assert again.spec == made.spec
