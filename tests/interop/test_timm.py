"""timm's names and configs, without timm: what is read, what is refused, what an export says."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.interop.models import VARIANTS, images, source, spec
from vit_jax.interop import certificate, files, timm
from vit_jax.interop.load import read_source
from vit_jax.interop.spec import fill, make_model


def folder(tmp_path, variant, **config):
    """What others would have written: our arrays in timm's names, and this config.json."""
    if "architecture" in config:  # whose own depth is another
        config["model_args"] = {"depth": 2} | config.get("model_args", {})
    made = source(spec(**VARIANTS[variant]))
    arrays, _ = timm.export(made.params, made.spec)
    files.write_safetensors(epath.Path(tmp_path) / files.SINGLE, arrays, {})
    files.write_json(epath.Path(tmp_path) / "config.json", config)
    return tmp_path


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("vit_base_patch16_siglip_224", "gelu"),
        ("vit_large_patch16_siglip_384", "gelu"),
        ("vit_so400m_patch14_siglip_224", "gelu"),
        ("vit_base_patch32_siglip_256", "gelu_tanh"),
        ("vit_large_patch16_siglip_512", "gelu_tanh"),
        ("vit_so400m_patch16_siglip_gap_256.v2_webli", "gelu_tanh"),
    ],
)
def test_the_architecture_tells_the_gelu(tmp_path, architecture, activation):
    heads = {"model_args": {"num_heads": 3}}
    read = read_source(folder(tmp_path, "map", architecture=architecture, **heads))
    assert read.spec.backbone["activation"] == activation
    assert not [note for note in read.report.notes if "GELU" in note]


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_base_patch16_rpn_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_ape_224",
        "vit_small_patch16_rope_mixed_224",
        "vit_medium_patch16_rope_reg1_gap_256",
        "vit_base_patch16_clip_224",
        "vit_relpos_base_patch16_224",
        "beit_base_patch16_224",
    ],
)
def test_other_architectures_are_refused(tmp_path, architecture):
    with pytest.raises(ValueError, match=f"{architecture} is none of the architectures"):
        read_source(folder(tmp_path, "cls", architecture=architecture), num_heads=3)


def test_the_architecture_and_the_file_must_agree(tmp_path):
    with pytest.raises(ValueError, match="no table of positions, and the file is not so"):
        read_source(folder(tmp_path, "cls", architecture="vit_small_patch16_dinov3"), num_heads=3)


@pytest.mark.parametrize(
    ("variant", "why"), [("swiglu", "EVA-02"), ("rope", "it is no DINOv3"), ("cls", None)]
)
def test_a_file_without_an_architecture(tmp_path, variant, why):
    path = folder(tmp_path, variant)
    if why is None:
        notes = read_source(path, num_heads=3).report.notes
        assert any("exact GELU, epsilon 1e-06: no config.json" in note for note in notes)
        return
    with pytest.raises(ValueError, match=why):
        read_source(path, num_heads=3)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"use_post_norm": True}, "use_post_norm=True"),
        ({"rope_temperature": 50.0}, "rope_temperature=50.0"),
        ({"act_layer": "quick_gelu"}, "act_layer='quick_gelu'"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ],
)
def test_arguments_that_change_the_model_are_refused(tmp_path, arguments, why):
    config = {"architecture": "vit_base_patch16_224", "model_args": arguments}
    with pytest.raises(ValueError, match=why):
        read_source(folder(tmp_path, "cls", **config), num_heads=3)


def test_attention_pooling_over_the_patches_alone_is_refused(tmp_path):
    made = source(spec(pool="map", cls_token=True))
    arrays, config = timm.export(made.params, made.spec)
    assert config["model_args"]["pool_include_prefix"] is True
    path = epath.Path(tmp_path)
    files.write_safetensors(path / files.SINGLE, arrays, {})
    files.write_json(path / "config.json", {"architecture": "vit_base_patch16_siglip_224"})
    with pytest.raises(ValueError, match="leaves prefix tokens out"):
        read_source(path, num_heads=3)


ROPE = VARIANTS["rope"]
ABSENT = {
    "norm_eps=1e-12": VARIANTS["cls"] | {"norm_eps": 1e-12},
    "norm_eps=1e-06 \\(here it is 1e-05\\)": ROPE | {"norm_eps": 1e-6},
    "activation='gelu_tanh' beside RoPE": ROPE | {"activation": "gelu_tanh"},
    "attention pooling beside SwiGLU": {"pool": "map", "mlp": "swiglu", "mlp_dim": 32},
    "a distillation token beside": VARIANTS["distilled"] | {"num_reg_tokens": 2},
}


@pytest.mark.parametrize("why", ABSENT)
def test_what_no_argument_of_timms_says_is_refused(why):
    made = source(spec(**ABSENT[why]))
    with pytest.raises(ValueError, match=f"timm has no ViT with {why}"):
        timm.export(made.params, made.spec)


def test_a_ratio_gives_the_width_back():
    for dim in range(8, 2049, 8):
        for hidden in (dim - 3, dim * 4 // 3, 2 * dim + 5, 4 * dim, 8960):
            assert int(dim * timm._ratio(hidden, dim)) == hidden


def test_the_certificate_sees_the_other_gelu():
    made = source(spec(**VARIANTS["cls"]))
    other = dataclasses.replace(
        made.spec, backbone=made.spec.backbone | {"activation": "gelu_tanh"}
    )
    model, wrong = (fill(make_model(s), made.params) for s in (made.spec, other))
    with pytest.raises(ValueError, match="answers other logits than we do"):
        certificate.certify(model, images(), lambda x: certificate.ours(wrong, x), "timm")
    found = certificate.certify(model, images(), lambda x: certificate.ours(model, x), "timm")
    assert found["logits"]["max_abs_difference"] <= 1e-6 and jnp.isfinite(found["logits"]["rms"])


def test_a_framework_that_cannot_open_the_export_is_told_in_one_line():
    def run(_):
        raise RuntimeError("Missing key(s):\n\tblocks.0.mlp.fc1.weight")

    model = fill(make_model(spec()), source(spec()).params)
    with pytest.raises(ValueError, match="timm does not open the export") as error:
        certificate.certify(model, images(), run, "timm")
    assert "\n" not in str(error.value)


def test_names_by_number(tmp_path):
    names = {str(i): f"kind {i}" for i in np.arange(5)}
    config = {"architecture": "vit_base_patch16_224", "label_names": names}
    read = read_source(folder(tmp_path, "cls", **config), num_heads=3)
    assert read.spec.class_names == tuple(names.values())
