"""A table of mistakes: each makes of a model that was read one that is wrong in one way."""

import dataclasses

import numpy as np

from vit_jax.interop.load import Source


def _qkv(change):
    """A mutation of every qkv kernel, seen as [dim, 3, heads, head_dim]."""

    def mutate(source: Source) -> Source:
        params = dict(source.params)
        heads = source.spec.backbone["num_heads"]
        for name, kernel in source.params.items():
            if name.endswith("attn/qkv/kernel"):
                split = kernel.reshape(len(kernel), 3, heads, -1)
                params[name] = np.ascontiguousarray(change(split)).reshape(kernel.shape)
        return dataclasses.replace(source, params=params)

    return mutate


def _backbone(**options):
    def mutate(source: Source) -> Source:
        changed = {
            key: value(source.spec.backbone[key]) if callable(value) else value
            for key, value in options.items()
        }
        spec = dataclasses.replace(source.spec, backbone=source.spec.backbone | changed)
        return dataclasses.replace(source, spec=spec)

    return mutate


def _order(source: Source) -> Source:
    """Positions as if the first token stood last."""
    params = dict(source.params)
    params["backbone/pos_embed"] = np.roll(params["backbone/pos_embed"], 1, axis=0)
    return dataclasses.replace(source, params=params)


def _scale(split):
    wrong = split.copy()
    wrong[:, 0] *= (
        split.shape[3] / (split.shape[2] * split.shape[3])
    ) ** 0.5  # by dim, not head_dim
    return wrong


def _gate(source: Source) -> Source:
    """SwiGLU's gate and value, each in the other's place."""
    swapped = {
        name: np.concatenate(np.split(array, 2, axis=-1)[::-1], axis=-1)
        for name, array in source.params.items()
        if "/mlp/fc1/" in name
    }
    return dataclasses.replace(source, params=source.params | swapped)


def _transposed(source: Source) -> Source:
    """Patches, which are square, seen columns first."""
    name = "backbone/patch_embed/kernel"
    changed = np.ascontiguousarray(source.params[name].swapaxes(0, 1))
    return dataclasses.replace(source, params=source.params | {name: changed})


def _interleaved(split):
    """Rotated pairs side by side: without rotation queries and keys would not tell."""
    order = np.arange(split.shape[3]).reshape(2, -1).T.reshape(-1)
    wrong = split.copy()
    wrong[:, :2] = split[:, :2][..., order]
    return wrong


MUTATIONS = {
    "the other GELU": _backbone(activation=lambda is_: {"gelu": "gelu_tanh"}.get(is_, "gelu")),
    "another epsilon": _backbone(norm_eps=lambda eps: 1e-6 if eps != 1e-6 else 1e-5),
    "an epsilon of torch's default": _backbone(norm_eps=lambda eps: 1e-5 if eps != 1e-5 else 1e-6),
    "token order": _order,
    "heads side by side with q, k, v": _qkv(lambda split: split.swapaxes(1, 2)),
    "heads split the other way": _qkv(lambda split: split.swapaxes(2, 3)),
    "scale by dim": _qkv(_scale),
    "keys and values swapped": _qkv(lambda split: split[:, [0, 2, 1]]),
    "gate and value swapped": _gate,
    "patches transposed": _transposed,
    "rotary channels interleaved": _qkv(_interleaved),
}
