"""transformers' own models with random weights, beside ours: logits, every block, and back."""

import dataclasses
import io
import os
import re

import numpy as np
import pytest
from etils import epath
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.interop.models import VARIANTS, assert_close, draw, source, spec
from tests.interop.mutations import MUTATIONS
from tests.interop.test_roundtrip import REFUSED
from vit_jax.inference import eval_augmentation
from vit_jax.interop import files
from vit_jax.interop.export import export
from vit_jax.interop.huggingface import with_key_biases
from vit_jax.interop.layouts import LAYOUTS
from vit_jax.interop.load import Source, read_source
from vit_jax.interop.spec import fill, infer_backbone, make_model, params_of_shapes
from vit_jax.interop.tables import read, recognise

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SHAPE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "num_labels": 5}
VIT = SHAPE | {"intermediate_size": 96, "image_size": 32, "patch_size": 8}
DINO = SHAPE | {"image_size": 28, "patch_size": 7, "mlp_ratio": 2}

# name -> class, config class, its arguments.
FAMILIES = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "vit_not_square": (
        "ViTForImageClassification",
        "ViTConfig",
        VIT | {"image_size": (16, 48), "patch_size": (8, 12), "layer_norm_eps": 1e-5},
    ),
    "vit_features": ("ViTModel", "ViTConfig", VIT),
    "vit_no_qkv_bias": ("ViTForImageClassification", "ViTConfig", VIT | {"qkv_bias": False}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
    "mae": ("ViTMAEModel", "ViTMAEConfig", VIT | {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", DINO),
    "dinov2_features": ("Dinov2Model", "Dinov2Config", DINO),
    "dinov2_swiglu": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        DINO | {"use_swiglu_ffn": True, "mlp_ratio": 4},
    ),
    "dinov2_registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        DINO | {"num_register_tokens": 3},
    ),
    "dinov2_registers_features": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        DINO | {"num_register_tokens": 3},
    ),
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        VIT | {"num_register_tokens": 3, "image_size": (16, 32)},
    ),
    "dinov3_gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        VIT
        | {"num_register_tokens": 3, "use_gated_mlp": True, "key_bias": True}
        | {"hidden_act": "silu"},
    ),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", VIT),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "siglip_classifier": ("SiglipForImageClassification", "SiglipConfig", VIT),
}


def make(name):
    """A family's model with numbers that show every mistake."""
    model_class, config_class, options = FAMILIES[name]
    if config_class == "SiglipConfig":
        labels = options["num_labels"]
        vision = {key: value for key, value in options.items() if key != "num_labels"}
        config = transformers.SiglipConfig(vision_config=vision, num_labels=labels)
    else:
        config = getattr(transformers, config_class)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw(key, tuple(parameter.shape), rng)))
    return model


def pixels(size) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)


def theirs(model, images) -> dict[str, np.ndarray]:
    """Output, tokens after the final norm and every block's output."""
    found, hooks = {}, []
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for i, layer in enumerate(layers):

        def keep(_, __, output, i=i):
            found[f"block {i}"] = (output[0] if isinstance(output, tuple) else output).numpy()

        hooks.append(layer.register_forward_hook(keep))
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    options = {}
    if "MAE" in type(model).__name__:  # it shuffles its patches: by nothing
        patches = (images.shape[1] // 8) * (images.shape[2] // 8)
        options["noise"] = torch.arange(patches).repeat(len(images), 1).float()
    with torch.no_grad():
        answer = model(tensor, **options)
    for hook in hooks:
        hook.remove()
    output = answer.get("logits", answer.get("pooler_output"))
    found["output"] = (answer.last_hidden_state if output is None else output).numpy()
    return found


def mine(source: Source, images) -> dict[str, np.ndarray]:
    model = fill(make_model(source.spec), source.params)
    depth = source.spec.backbone["depth"]
    tokens, blocks = model.backbone.encode(model.backbone.embed(images), layers=range(depth))
    found = {f"block {i}": np.asarray(block) for i, block in enumerate(blocks)}
    return found | {"output": np.asarray(model(images)), "tokens": np.asarray(tokens)}


def compare(source: Source, model) -> None:
    images = pixels(source.spec.backbone["image_size"])
    found, wanted = mine(source, images), theirs(model, images)
    assert len(wanted) == source.spec.backbone["depth"] + 1
    for what, tensor in wanted.items():
        assert_close(found[what], tensor, what)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (model, folder), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = make(name)
            model.save_pretrained(folder)
            made[name] = model, epath.Path(folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
def test_import(saved, name):
    model, folder = saved(name)
    source = read_source(folder)
    compare(source, model)
    assert not source.report.missing
    strange = [line for line in source.report.unexpected if "no row" in line]
    assert not strange
    if source.spec.num_classes:
        assert source.spec.class_names == tuple(f"LABEL_{i}" for i in range(5))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_in_memory_are_read_too(saved, name, tmp_path):
    """transformers 5 has other names inside than it writes."""
    model, folder = saved(name)
    path = epath.Path(tmp_path / files.SINGLE)
    files.write_safetensors(path, {k: v.numpy() for k, v in model.state_dict().items()}, {})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again, wanted = read_source(tmp_path), read_source(folder)
    assert again.spec == wanted.spec
    for key, array in wanted.params.items():
        np.testing.assert_array_equal(again.params[key], array, err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_export_back(saved, name, tmp_path):
    _, folder = saved(name)
    source = read_source(folder)
    out = epath.Path(tmp_path / "out")
    found = export(source, format="huggingface", out=out)
    for what in ("logits", "features"):
        assert found[what]["max_abs_difference"] <= 1e-4 * found[what]["rms"]
    assert "transformers" in found["run_with"]
    original = files.read_arrays(folder / files.SINGLE)
    written = files.read_arrays(out / files.SINGLE)
    if name == "siglip":  # which transformers 5 writes without a prefix, and 4 does not read so
        written = {key.removeprefix("vision_model."): x for key, x in written.items()}
    if name != "siglip_classifier":  # which is written as an IJepa: the same function
        assert written.keys() == original.keys()
        for key, array in written.items():
            if "mask_token" not in key:  # it belongs to pretraining; ours is zero
                np.testing.assert_array_equal(array, original[key], err_msg=key)
    if source.spec.num_classes:
        opened = transformers.AutoModelForImageClassification.from_pretrained(out)
        assert opened.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
        square = photograph(slice(100, 527))  # of which both round the sides alike
        with torch.no_grad():
            theirs = opened(processed(out, square)).logits.numpy()
        logits = fill(make_model(source.spec), source.params)(own_pixels(source, square))
        assert_close(logits, theirs, "logits of a photo")
    again = read_source(out)
    assert again.spec == source.spec
    for key, array in source.params.items():
        np.testing.assert_array_equal(again.params[key], array, err_msg=key)


def photograph(shape: slice = slice(None)) -> Image.Image:
    """A real image, scikit-learn's: 427 rows, 640 columns or a slice of them."""
    return Image.fromarray(load_sample_image("china.jpg")[:, shape])


def processed(folder, image) -> torch.Tensor:
    """What transformers makes of an image, by what the folder tells it."""
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    return processor(image, return_tensors="pt")["pixel_values"]


def own_pixels(source: Source, image) -> np.ndarray:
    """What `predict` makes of it, [1, height, width, 3] uint8."""
    spec, file = source.spec, io.BytesIO()
    image.save(file, "PNG")
    words = {"crop_fraction": spec.crop_fraction, "interpolation": spec.interpolation}
    augment = eval_augmentation(spec.backbone["image_size"], **words)
    return augment({"image": file.getvalue()}, np.random.default_rng(0))["image"][None]


@pytest.mark.parametrize(
    "crop_fraction, interpolation",
    [(None, "bicubic"), (None, "bilinear"), (0.875, "bilinear"), (1.0, "bicubic")],
)
def test_a_photo_is_processed_as_here(saved, tmp_path, crop_fraction, interpolation):
    """Resized, cropped and normalised by what the export tells: the same pixels.

    The longer side is rounded down there and to the nearest pixel here: not in this photo.
    """
    source = read_source(saved("vit")[1])
    words = {"crop_fraction": crop_fraction, "interpolation": interpolation}
    words |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    source.spec = dataclasses.replace(source.spec, **words)
    out = epath.Path(tmp_path / "out")
    export(source, format="huggingface", out=out)
    photo = photograph(slice(590))
    theirs = processed(out, photo).numpy().transpose(0, 2, 3, 1)
    pixels = make_model(source.spec).preprocess(own_pixels(source, photo))
    np.testing.assert_allclose(theirs, pixels, atol=1e-5)


GATED, ROTARY = ("dinov2_swiglu", "dinov3_gated"), ("dinov3", "dinov3_gated")
# Which models a mistake can be made in, where these are not all.
POSSIBLE = {
    "the other GELU": [name for name in FAMILIES if name not in GATED],
    "token order": [name for name in FAMILIES if name not in ROTARY],  # they have no table
    "gate and value swapped": GATED,
    "patches transposed": [name for name in FAMILIES if name != "vit_not_square"],
    "rotary channels interleaved": ROTARY,
}
CELLS = [(name, each) for each in MUTATIONS for name in POSSIBLE.get(each, FAMILIES)]


@pytest.mark.parametrize("name, mutation", CELLS)
def test_each_mistake_is_seen(saved, name, mutation):
    model, folder = saved(name)
    source = read_source(folder)
    with pytest.raises(AssertionError, match="of the RMS"):
        compare(MUTATIONS[mutation](source), model)


def test_registers_and_class_token_swapped_are_seen(saved):
    model, folder = saved("dinov2_registers")
    source = read_source(folder)
    params = dict(source.params)
    params["backbone/reg_tokens"] = params["backbone/reg_tokens"] + params["backbone/cls_token"]
    params["backbone/cls_token"] = params["backbone/reg_tokens"][:1]
    with pytest.raises(AssertionError, match="of the RMS"):
        compare(dataclasses.replace(source, params=params), model)


# name -> class, config class, what differs from its defaults: the sizes on the hub.
PUBLISHED = {
    "google/vit-base-patch16-224": ("vit", {"num_labels": 1000}),
    "google/vit-large-patch16-224": (
        "vit",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"intermediate_size": 4096, "num_labels": 1000},
    ),
    "google/vit-huge-patch14-224-in21k": (
        "vit_features",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
        | {"intermediate_size": 5120, "patch_size": 14},
    ),
    "facebook/deit-tiny-patch16-224": (
        "vit",
        {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        | {"num_labels": 1000},
    ),
    "facebook/deit-base-distilled-patch16-224": ("deit_distilled", {"num_labels": 1000}),
    "facebook/vit-mae-base": ("mae_pretraining", {}),
    "facebook/vit-mae-huge": (
        "mae_pretraining",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
        | {"intermediate_size": 5120, "patch_size": 14},
    ),
    "facebook/dinov2-small": (
        "dinov2_features",
        {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
    ),
    "facebook/dinov2-large-imagenet1k-1-layer": (
        "dinov2",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"image_size": 518, "num_labels": 1000},
    ),
    "facebook/dinov2-giant": (
        "dinov2_features",
        {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
        | {"image_size": 518, "use_swiglu_ffn": True},
    ),
    "facebook/dinov2-with-registers-base": (
        "dinov2_registers_features",
        {"image_size": 518, "patch_size": 14},
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        "dinov3",
        {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
        | {"num_register_tokens": 4},
    ),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": (
        "dinov3",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"intermediate_size": 5120, "num_register_tokens": 4}
        | {"use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (
        "dinov3",
        {"hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32}
        | {"intermediate_size": 8192, "num_register_tokens": 4, "query_bias": False}
        | {"value_bias": False, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "facebook/ijepa_vith14_1k": (
        "ijepa_features",
        {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
        | {"intermediate_size": 5120, "patch_size": 14},
    ),
    "google/siglip-base-patch16-224": ("siglip", {}),
    "google/siglip-so400m-patch14-384": (
        "siglip",
        {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"intermediate_size": 4304, "image_size": 384, "patch_size": 14},
    ),
}
CLASSES = {name: row[:2] for name, row in FAMILIES.items()}
CLASSES["mae_pretraining"] = ("ViTMAEForPreTraining", "ViTMAEConfig")
CLASSES["ijepa_features"] = ("IJepaModel", "IJepaConfig")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_covered(name):
    """Every tensor's name and shape, on torch's meta device: no memory, no weights."""
    family, options = PUBLISHED[name]
    model_class, config_class = CLASSES[family]
    config = getattr(transformers, config_class)(**options)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    zero = np.zeros((), np.float32)
    arrays = {k: np.broadcast_to(zero, tuple(v.shape)) for k, v in model.state_dict().items()}
    arrays = with_key_biases(arrays)
    layout = recognise(list(arrays), LAYOUTS)
    _, arrays = layout.normalise(arrays)
    # All blocks have the shapes of the first, which stands for them: the rest needs no memory.
    one, depth = _first_block(arrays)
    assert depth == getattr(config, "num_hidden_layers", depth)
    params, report = read(layout, one)
    assert not [line for line in report.unexpected if "no row" in line]
    assert not report.missing
    known = {"num_heads": config.num_attention_heads}
    known |= {"pos_embed": "rope2d"} if family == "dinov3" else {}
    params, backbone, _ = infer_backbone(params, known)
    assert backbone["dim"] == config.hidden_size
    side = config.image_size // config.patch_size * config.patch_size  # 384 in patches of 14
    assert backbone["image_size"] == (side, side)
    pool = {"siglip": "map", "vit_features": "cls_tanh", "vit": "cls"}.get(family, "none")
    pool = {"deit_distilled": "cls_dist", "dinov2": "cls_gap", "dinov3": "cls"}.get(family, pool)
    head = params.get("head/fc/kernel")
    made = dataclasses.replace(
        spec(names=False),
        backbone=backbone,
        pool=pool,
        num_classes=0 if head is None else head.shape[1],
    )
    wanted = params_of_shapes(make_model(made))
    assert {key: array.shape for key, array in params.items()} == wanted


def _first_block(arrays):
    """The arrays without all blocks but the first, and how many there were."""
    shapes, one = {}, {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(?:encoder\.)?layers?\.(\d+)\.(.*)", name):
            index = int(match[1])
            shapes.setdefault(index, {})[match[2]] = array.shape
            if index:
                continue
        one[name] = array
    assert shapes and all(block == shapes[0] for block in shapes.values())
    return one, len(shapes)


@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - REFUSED["huggingface"].keys()))
def test_our_own_models_answer_the_same_there(variant, tmp_path):
    made = source(spec(**VARIANTS[variant]))
    found = export(made, format="huggingface", out=tmp_path / "out")
    for what in ("logits", "features"):
        assert found[what]["max_abs_difference"] <= 1e-4 * found[what]["rms"]
