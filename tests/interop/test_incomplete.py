"""Weights that are not whole and files that are not sound: refused in one line, or told of."""

import json
import os
import re
import signal

import numpy as np
import pytest
from etils import epath

import vit_jax
from tests.interop.models import source, spec
from vit_jax.commands.weights import cleaning_up
from vit_jax.interop import files, huggingface, npz, timm
from vit_jax.interop.export import write_own
from vit_jax.interop.load import read_source
from vit_jax.interop.summary import describe

CLS = {"pool": "cls", "cls_token": True, "activation": "gelu"}


@pytest.fixture(scope="module")
def made():
    return source(spec(**CLS))


@pytest.fixture(scope="module")
def exported(made):
    """What others' transformers would have written: arrays, both configs."""
    arrays, config, preprocessor = huggingface.export(made.params, made.spec)
    del config["vit_jax"]
    return arrays, config, preprocessor


def transformers_folder(path, arrays, config, preprocessor, name=files.SINGLE):
    files.write_safetensors(epath.Path(path) / name, arrays, {})
    files.write_json(epath.Path(path) / "config.json", config)
    files.write_json(epath.Path(path) / "preprocessor_config.json", preprocessor)
    return path


def timm_folder(path, made, config=None, without="no such name"):
    arrays, own = timm.export(made.params, made.spec)
    del own["vit_jax"]
    arrays = {name: x for name, x in arrays.items() if not name.startswith(without)}
    files.write_safetensors(epath.Path(path) / files.SINGLE, arrays, {})
    files.write_json(epath.Path(path) / "config.json", config or own)
    return path


def reason(path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read_source(path, **options)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text


@pytest.mark.parametrize(
    "gone, words",
    [
        (r"layer\.1\.", "depth=1, the model has depth=2"),
        (r"^vit\.layernorm\.", "final_norm=False, the model has final_norm=True"),
        (r"attention\.attention\.\w+\.bias", "qkv_bias=False, the model has qkv_bias=True"),
    ],
)
def test_transformers_weights_that_lack_a_part(tmp_path, exported, gone, words):
    arrays, *configs = exported
    left = {name: x for name, x in arrays.items() if not re.search(gone, name)}
    assert 0 < len(left) < len(arrays)
    assert words in reason(transformers_folder(tmp_path, left, *configs))


def test_our_own_export_that_lacks_a_part(tmp_path, made):
    arrays, *configs = huggingface.export(made.params, made.spec)
    left = {k: x for k, x in arrays.items() if ".layer.1." not in k}
    words = "depth=1, the model has depth=2"
    assert words in reason(transformers_folder(tmp_path, left, *configs))


def test_timm_weights_that_lack_a_part(tmp_path, made):
    assert "depth=1, the model has depth=2" in reason(
        timm_folder(tmp_path, made, without="blocks.1")
    )
    assert "final_norm=True" in reason(timm_folder(tmp_path, made, without="norm."), num_heads=3)
    plain = {"architecture": "vit_base_patch16_224"}
    assert "the model has depth=12" in reason(timm_folder(tmp_path, made, plain), num_heads=3)


def test_google_weights_without_the_last_norm(tmp_path):
    made = source(spec())
    arrays = npz.export(made.params, made.spec)
    path = epath.Path(tmp_path / "w.npz")
    files.write_npz(path, {k: x for k, x in arrays.items() if "encoder_norm" not in k})
    assert "final_norm=False, the model has final_norm=True" in reason(path)


@pytest.mark.parametrize("format", [npz, timm])
@pytest.mark.parametrize("depth, told", [(11, True), (12, False)])
def test_a_lone_file_without_its_last_block(tmp_path, format, depth, told):
    """Arrays alone do not tell a shallower model from one that was cut short."""
    widths = {"dim": 192, "mlp_dim": 768, "image_size": (8, 8), "patch_size": (8, 8)}
    made = source(spec(**widths, depth=depth, activation="gelu_tanh"))
    arrays = format.export(made.params, made.spec)
    if format is npz:
        files.write_npz(path := epath.Path(tmp_path / "w.npz"), arrays)
    else:
        files.write_safetensors(path := epath.Path(tmp_path / "w.safetensors"), arrays[0], {})
    wanted = "depth=11: ViT-Ti, as wide, has 12; the file may be cut short"
    assert (wanted in read_source(path, num_heads=3).report.notes) == told


def test_a_part_of_several_files(tmp_path, exported):
    name = "model-00001-of-00002.safetensors"
    transformers_folder(tmp_path, *exported, name=name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="is one part of 2: fetch the others and their index"):
            read_source(path)
    places = dict.fromkeys(exported[0], name)
    files.write_json(epath.Path(tmp_path) / files.INDEX, {"weight_map": places | {"other": name}})
    with pytest.raises(ValueError, match="lacks other, which"):
        read_source(tmp_path)


def test_a_head_that_is_promised(tmp_path, exported):
    arrays, *configs = exported
    left = {name: x for name, x in arrays.items() if not name.startswith("classifier")}
    with pytest.warns(UserWarning, match="no head: config.json says ViTForImageClassification"):
        vit_jax.load(transformers_folder(tmp_path, left, *configs))


def test_another_pooler(tmp_path):
    made = source(spec(**CLS | {"pool": "cls_tanh", "num_classes": 0}))
    arrays, config, preprocessor = huggingface.export(made.params, made.spec)
    del config["vit_jax"]
    for act, refused in (("tanh", False), ("relu", True)):
        path = transformers_folder(tmp_path, arrays, config | {"pooler_act": act}, preprocessor)
        if refused:
            assert "pooler_act='relu'; only 'tanh'" in reason(path)
        else:
            assert read_source(path).spec.pool == "cls_tanh"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pool": "cls", "cls_token": True, "qkv_bias": False}, "qkv_bias=True"),
        ({"pool": "map", "cls_token": True}, "cls_token=True pool by cls, not by 'map'"),
    ],
)
def test_what_googles_code_does_not_have(options, words):
    made = source(spec(**options))
    with pytest.raises(ValueError, match=words):
        npz.export(made.params, made.spec)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_dinov2_takes_its_table_for_a_square(registers, num_classes):
    """Theirs resamples positions whenever the image is no square, from the root of their number."""
    part = {"pool": "cls", "cls_token": True, "layer_scale": 1.0, "num_classes": num_classes}
    part |= {"num_reg_tokens": registers, "activation": "gelu"}
    with pytest.raises(ValueError, match="on a grid that is no square; use --format=timm"):
        huggingface.choose(spec(**part, image_size=(16, 24)))
    huggingface.choose(spec(**part, image_size=(16, 24), patch_size=(4, 6)))


def test_timms_older_config(tmp_path, made):
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    told |= {"crop_pct": 0.75, "input_size": [3, 16, 16], "labels": list("abcde")}
    config = {"architecture": "vit_base_patch16_224", "model_args": {"depth": 2, "num_heads": 3}}
    found = read_source(timm_folder(tmp_path, made, config | told)).spec
    assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.4, 0.5, 0.6)
    assert (found.crop_fraction, found.interpolation) == (0.75, "bilinear")
    assert found.class_names == tuple("abcde")


DAMAGED = [
    *[("config", {"image_size": x}) for x in ([16], {"h": 16}, "16", 0)],
    *[("config", {"num_attention_heads": x}) for x in ("3", 0, True, 1.5)],
    *[("config", {"id2label": x}) for x in (["a"], {"a": "x"})],
    *[("config", {key: 5}) for key in ("hidden_act", "vision_config", "model_type", "vit_jax")],
    ("config", {"hidden_act": ["gelu"]}),
    ("config", {"layer_norm_eps": "1e-6"}),
    ("config", {"architectures": "ViT"}),
    *[("preprocessor", {"image_mean": x}) for x in (0.5, [0.5], "x", [None] * 3)],
    *[("preprocessor", {"size": x}) for x in ("x", {}, {"height": "a"})],
    *[("preprocessor", {"rescale_factor": x}) for x in (0, "x")],
    *[("preprocessor", {key: []}) for key in ("crop_size", "resample", "do_resize")],
    ("preprocessor", {"image_std": [0, 0, 0]}),
]


@pytest.mark.parametrize("file, values", DAMAGED)
def test_a_damaged_file_of_transformers(tmp_path, exported, file, values):
    arrays, config, preprocessor = exported
    config = config | values if file == "config" else config
    preprocessor = preprocessor | values if file == "preprocessor" else preprocessor
    text = reason(transformers_folder(tmp_path, arrays, config, preprocessor))
    name = "config.json" if file == "config" else "preprocessor_config.json"
    assert f"its {name} is damaged ({next(iter(values))}" in text


@pytest.mark.parametrize(
    "values",
    [
        *({"model_args": x} for x in ([1], {"num_heads": "1"}, {"img_size": [16]}, {"depth": 0})),
        *({"model_args": {"act_layer": x}} for x in (5, [1])),
        *({"pretrained_cfg": x} for x in ([1], {"mean": "x"}, {"std": [0] * 3})),
        *({"pretrained_cfg": {"crop_pct": x}} for x in ("x", 0)),
        *({"architecture": 5}, {"label_names": "abcde"}),
    ],
)
def test_a_damaged_file_of_timm(tmp_path, made, values):
    config = {"architecture": "vit_base_patch16_224", "model_args": {"depth": 2}} | values
    assert "its config.json is damaged (" in reason(
        timm_folder(tmp_path, made, config), num_heads=3
    )


@pytest.mark.parametrize(
    "name, array, words",
    [
        ("head/bias", np.zeros(5, np.complex64), "head/bias is complex64"),
        ("head/bias", np.zeros(5, [("a", "f4")]), "head/bias is "),
        ("head/bias", np.array(["1"] * 5), "head/bias is <U1"),
        ("head/kernel", np.zeros(24, np.float32), "head/fc/kernel has the shape (24,)"),
        ("embedding/kernel", np.zeros((48, 24), np.float32), "not 4 axes"),
        ("Transformer/posembed_input/pos_embedding", np.float32(1), r"() should begin with 1"),
        ("Transformer/encoderblock/x", np.float32(1), "a single number, not one array a block"),
        ("Transformer/encoder_norm/scale", np.float32(1), "too few axes"),
    ],
)
def test_an_npz_with_odd_arrays(tmp_path, name, array, words):
    drawn = source(spec(pool="cls", cls_token=True))
    path = tmp_path / "w.npz"
    np.savez(path, **npz.export(drawn.params, drawn.spec) | {name: array})
    assert words in reason(path)


@pytest.mark.parametrize(
    "values",
    [
        *({"version": x} for x in ("3", None, 0)),
        *({"pool": x} for x in ("nonsense", 5)),
        *({"mean": x} for x in ("abc", [1, 2])),
        *({"std": [0, 1, 1]}, {"class_names": 5}, {"interpolation": "x"}, {"strange": 1}),
        *({"backbone": x} for x in ([1], {}, {"dim": "24"}, {"patch_size": [0, 0]})),
        *({"backbone": {"pos_embed": x}} for x in ("x", 1)),
    ],
)
def test_a_description_of_ours_that_is_damaged(tmp_path, made, values):
    path = epath.Path(tmp_path / "own.safetensors")
    described = json.loads(made.spec.to_json())
    backbone = values.get("backbone")
    if backbone:
        values = {"backbone": described["backbone"] | backbone if type(backbone) is dict else [1]}
    described = json.dumps(described | values)
    files.write_safetensors(path, made.params, {"format": "vit_jax", "spec": described})
    reason(path)


def test_inspect_tells_what_does_not_fit(tmp_path, made):
    params = dict(made.params, stray=np.zeros(3, np.float32))
    del params["backbone/norm/bias"]
    path = epath.Path(tmp_path / "weights.safetensors")
    metadata = {"format": "vit_jax", "spec": made.spec.to_json()}
    files.write_safetensors(path, params, metadata)
    wrong = ["  misfit: backbone/norm/bias is missing", "  misfit: stray is left over"]
    assert describe(read_source(tmp_path))["report"] == wrong  # a folder's only file, of any name
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        read_source(path, num_heads=0)


def test_load_tells_of_what_it_reshaped_and_knows_the_classes(tmp_path, made):
    path = epath.Path(tmp_path / "own.safetensors")
    write_own(made, path)
    with pytest.warns(UserWarning, match=r"reshaped: backbone/pos_embed: a grid of \(4, 4\)"):
        model = vit_jax.load(path, image_size=(32, 16))
    assert model.class_names == made.spec.class_names != ()


def test_sigterm_leaves_nothing_half_written(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as ended,
        cleaning_up(),
        files.new_folder(tmp_path / "out", overwrite=False) as folder,
    ):
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before
