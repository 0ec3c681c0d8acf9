"""Small models with numbers large enough that every part of them matters."""

import numpy as np

from vit_jax.interop.load import Source
from vit_jax.interop.spec import Spec, make_model, params_of_shapes
from vit_jax.interop.tables import Report

BACKBONE = {
    "image_size": (16, 16),
    "patch_size": (4, 4),
    "dim": 24,
    "depth": 2,
    "num_heads": 3,
    "mlp_dim": 48,
    "cls_token": False,
    "dist_token": False,
    "num_reg_tokens": 0,
    "pos_embed": "learned",
    "mlp": "mlp",
    "activation": "gelu_tanh",
    "norm": "layernorm",
    "norm_eps": 1e-6,
    "qk_norm": False,
    "qkv_bias": True,
    "parallel": False,
    "layer_scale": 0.0,
    "final_norm": True,
}


def spec(pool="gap", num_classes=5, hidden_dim=0, names=True, **backbone) -> Spec:
    """A `Spec` of BACKBONE with other options."""
    unknown = backbone.keys() - BACKBONE.keys()
    assert not unknown, unknown
    return Spec(
        backbone=BACKBONE | backbone,
        pool=pool,
        num_classes=num_classes,
        hidden_dim=hidden_dim,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        class_names=tuple(f"kind {i}" for i in range(num_classes)) if names else (),
    )


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Numbers for a parameter of ours or theirs.

    Embeddings are small, so that the first norm's epsilon shows; the branches are large, so that
    a wrong GELU, head split or scale shows behind the residual.
    """
    noise = rng.standard_normal(shape)
    embeds = ("patch_embed", "embeddings", "cls_token", "dist_token", "reg_token", "pos_embed")
    if any(word in name for word in embeds) or name == "cls" or name.startswith("embedding/"):
        noise *= 0.0005 if len(shape) == 4 else 0.003
    elif len(shape) >= 2:
        noise *= 1.5 * (np.prod(shape) / max(shape)) ** -0.5
    elif _is_scale(name):
        noise = 1 + 0.3 * noise
    else:
        noise *= 0.3
    return noise.astype(np.float32)


def _is_scale(name: str) -> bool:
    if "gamma" in name or "lambda1" in name:
        return True
    return "norm" in name.lower() and name.endswith(("scale", "weight"))


def source(spec: Spec, seed: int = 0) -> Source:
    """That model with numbers drawn by `draw`."""
    rng = np.random.default_rng(seed)
    shapes = params_of_shapes(make_model(spec))
    params = {name: draw(name, shape, rng) for name, shape in shapes.items()}
    return Source(spec, params, Report(layout="drawn", matched=len(params)))


def images(batch=2, size=(16, 16), seed=1) -> np.ndarray:
    """uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (batch, *size, 3), np.uint8)


def assert_close(found, wanted, what: str, tolerance: float = 1e-4) -> None:
    """To `tolerance` of the wanted tensor's root mean square."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape, what
    worst = np.abs(found - wanted).max() / np.sqrt(np.mean(wanted**2))
    assert worst <= tolerance, f"{what}: {worst:.2g} of the RMS"


# Rows: what is particular, pooling, and the rest of a model that other frameworks have.
VARIANTS = {
    "gap": {},
    "cls": {"pool": "cls", "cls_token": True, "activation": "gelu"},
    "sincos": {"pos_embed": "sincos2d"},
    "hidden": {"pool": "cls", "cls_token": True, "hidden_dim": 7},
    "layer_scale": {"pool": "cls", "cls_token": True, "layer_scale": 1.0, "activation": "gelu"},
    "distilled": {
        "pool": "cls_dist",
        "cls_token": True,
        "dist_token": True,
        "activation": "gelu",
    },
    "registers": {
        **{"pool": "cls", "cls_token": True, "num_reg_tokens": 2, "layer_scale": 1.0},
        **{"activation": "gelu"},
    },
    "swiglu": {"pool": "cls", "cls_token": True, "mlp": "swiglu", "mlp_dim": 32},
    "rope": {
        **{"pool": "cls", "cls_token": True, "num_reg_tokens": 2, "layer_scale": 1.0},
        **{"pos_embed": "rope2d", "qkv_bias": False, "norm_eps": 1e-5, "activation": "gelu"},
    },
    "map": {"pool": "map"},
    "map_features": {"pool": "map", "num_classes": 0},
    "gap_norm": {"pool": "gap_norm", "cls_token": True, "final_norm": False, "activation": "gelu"},
    "qk_norm": {"qk_norm": True},
    "rmsnorm": {"norm": "rmsnorm"},
    "parallel": {"parallel": True, "qkv_bias": False, "qk_norm": True},
    "tokens": {"pool": "none", "num_classes": 0},
    "cls_gap": {"pool": "cls_gap", "cls_token": True, "layer_scale": 1.0},
    "not_square": {"image_size": (16, 24), "patch_size": (4, 2)},
}
