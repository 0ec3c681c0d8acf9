"""A torch model with timm's names, beside ours: in, out, and bit for bit the same arrays."""

import json

import numpy as np
import pytest
from etils import epath

from tests.interop.models import VARIANTS, assert_close, draw, source, spec
from vit_jax.interop import files, timm
from vit_jax.interop.load import read_source
from vit_jax.interop.spec import fill, make_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

# name -> arguments of the reference, what a config.json says of it.
MODELS = {
    "augreg": ({}, {}),
    "deit": ({"dist": True}, {}),
    "deit3": ({"no_embed_class": True, "layer_scale": True}, {}),
    "dinov2": ({"layer_scale": True, "num_classes": 0}, {}),
    "dinov2_reg4": (
        {"layer_scale": True, "reg_tokens": 4, "no_embed_class": True, "num_classes": 0},
        {},
    ),
    "dinov2_giant": ({"layer_scale": True, "mlp": "swiglu", "hidden": 32}, {}),
    "dinov3": (
        {"rope": True, "reg_tokens": 4, "qkv_bias": False, "eps": 1e-5, "num_classes": 0},
        {"pretrained_cfg": {"input_size": [3, 16, 16]}},
    ),
    "dinov3_plus": (
        {"rope": True, "reg_tokens": 4, "mlp": "swiglu", "eva_mlp": True, "eps": 1e-5}
        | {"qkv_bias": False},
        {"pretrained_cfg": {"input_size": [3, 16, 16]}},
    ),
    "dinov3_qkvb": (
        {"rope": True, "reg_tokens": 4, "eva_bias": True, "eps": 1e-5, "num_classes": 0},
        {"pretrained_cfg": {"input_size": [3, 16, 16]}},
    ),
    "siglip": (
        {
            **{"class_token": False, "global_pool": "map", "num_classes": 0},
            **{"act_layer": "gelu_tanh"},
        },
        {"architecture": "vit_base_patch32_siglip_256", "model_args": {"depth": 2}},
    ),
    "siglip_gap": (
        {"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"},
        {"model_args": {"act_layer": "gelu_tanh"}, "global_pool": "avg"},
    ),
    "mae_finetuned": ({"global_pool": "avg", "fc_norm": True}, {"global_pool": "avg"}),
    "gap_beside_cls": ({"global_pool": "avg"}, {"global_pool": "avg"}),
    "qk_norm": ({"qk_norm": True}, {}),
    "not_square": (
        {"img_size": (16, 24), "patch_size": (4, 2)},
        {"pretrained_cfg": {"input_size": [3, 16, 24]}},
    ),
}


def run(model, images):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def pixels(size):
    return np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)


def loud(model):
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape), rng)))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_back(name, tmp_path):
    from tests.interop.torch_vit import Vit

    options, config = MODELS[name]
    model = loud(Vit(**options))
    state = model.state_dict()
    path = epath.Path(tmp_path / files.SINGLE)
    files.write_safetensors(path, {key: x.numpy() for key, x in state.items()}, {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_source(tmp_path, num_heads=3)
    assert not read.report.missing and not read.report.unexpected
    images = pixels(read.spec.backbone["image_size"])
    assert_close(fill(make_model(read.spec), read.params)(images), run(model, images), name)
    arrays, _ = timm.export(read.params, read.spec)
    assert arrays.keys() == state.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, state[key].numpy(), err_msg=key)


def test_eva(tmp_path):
    """The first EVA: a ViT whose keys have no bias. It goes back as one whose keys' bias is 0."""
    from tests.interop.torch_vit import Vit

    model = loud(Vit(eva_bias=True, global_pool="avg", fc_norm=True))
    arrays = {key: x.numpy() for key, x in model.state_dict().items()}
    assert "blocks.0.attn.q_bias" in arrays and "blocks.0.attn.qkv.bias" not in arrays
    path = epath.Path(tmp_path / files.SINGLE)
    files.write_safetensors(path, arrays, {})
    read = read_source(path, num_heads=3)
    assert not read.report.missing and not read.report.unexpected
    images = pixels(read.spec.backbone["image_size"])
    wanted = run(model, images)
    assert_close(fill(make_model(read.spec), read.params)(images), wanted, "eva")
    written, config = timm.export(read.params, read.spec)
    assert config["architecture"] == "vit_base_patch16_224"
    plain = Vit(global_pool="avg", fc_norm=True)
    plain.load_state_dict({key: torch.from_numpy(x.copy()) for key, x in written.items()})
    np.testing.assert_allclose(run(plain, images), wanted, rtol=1e-5, atol=1e-5)


REFUSED = {"hidden", "rmsnorm", "parallel", "tokens", "cls_gap", "map_features"}


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - REFUSED))
def test_export_opens_with_the_arguments_it_says(variant):
    """config.json's model_args build the model that the arrays are of."""
    from tests.interop.torch_vit import Vit

    made = source(spec(**VARIANTS[variant]))
    arrays, config = timm.export(made.params, made.spec)
    given = dict(config["model_args"])
    rope = config["architecture"] == "vit_base_patch16_dinov3"
    reference = {
        key: given[key]
        for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "qkv_bias")
    }
    reference |= {key: given[key] for key in ("class_token", "qk_norm", "global_pool")}
    swiglu = made.spec.backbone["mlp"] == "swiglu"
    hidden = round(given["mlp_ratio"] * given["embed_dim"])
    packed = swiglu and not rope
    reference |= {"hidden": hidden // 2 if packed else hidden, "mlp": "swiglu" if swiglu else "mlp"}
    reference |= {"rope": rope, "eva_mlp": rope and given.get("swiglu_align_to", 0) > 0}
    reference["eps"] = 1e-5 if rope else 1e-6
    reference |= {"layer_scale": given["init_values"] is not None}
    reference |= {"reg_tokens": given.get("reg_tokens", given.get("num_reg_tokens"))}
    reference |= {"no_embed_class": given.get("no_embed_class", False)}
    reference |= {"fc_norm": given.get("fc_norm", False)}
    reference |= {"act_layer": given.get("act_layer", "gelu")}
    reference |= {"dist": config["architecture"].startswith("deit"), "num_classes": 5}
    reference["img_size"] = tuple(reference["img_size"])
    reference["patch_size"] = tuple(reference["patch_size"])
    model = Vit(**reference)
    model.load_state_dict({key: torch.from_numpy(x.copy()) for key, x in arrays.items()})
    images = pixels(made.spec.backbone["image_size"])
    assert_close(run(model, images), fill(make_model(made.spec), made.params)(images), variant)


def test_positions_are_resampled_as_torch_does():
    from vit_jax.interop.resample import keys_cubic, resize_matrix

    grid = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 6, 8)))
    options = {"mode": "bicubic", "antialias": True, "align_corners": False}
    for new in ((12, 5), (3, 20), (4, 4)):
        wanted = torch.nn.functional.interpolate(grid, size=new, **options)[0].numpy()
        rows, columns = (resize_matrix(a, b, keys_cubic) for a, b in zip((6, 8), new, strict=True))
        found = np.einsum("ai,bj,dij->dab", rows, columns, grid[0].numpy())
        np.testing.assert_allclose(found, wanted, atol=1e-6)
