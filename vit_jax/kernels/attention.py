"""Multi-head self-attention on the fused projection's output: one function, several ways to do it.

IMPLEMENTATIONS says which there are and LIMITS what they can do; `auto` takes the first in the
table AUTO that can do what is asked on the platform at hand, and logs once if that is not the very
first. The platform is that of the mesh in use (`jax.set_mesh`), which may be of devices that are
not here, else JAX's default one.
"""

import functools
import logging
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vit_jax.kernels import attention_gpu, attention_tpu
from vit_jax.kernels.devices import device_kind, mesh_device

AUTO = {"tpu": ("tpu", "xla"), "gpu": ("cudnn", "gpu", "xla")}
"""Platform -> what `auto` tries, in this order; ('xla',) on all others."""

IMPLEMENTATIONS = {
    "auto": "the first of AUTO that can do it",
    "xla": "plain products and a softmax, anywhere, any shape",
    "tpu": "the kernel for short sequences, `attention_tpu`",
    "interpret": "the same kernel, interpreted on any platform: slow, for tests",
    "cudnn": "cuDNN's flash attention, by `jax.nn.dot_product_attention`",
    "gpu": "the kernel of `attention_gpu`",
    "interpret_gpu": "the same kernel, interpreted",
}

KERNELS = {
    "tpu": (attention_tpu, False),
    "interpret": (attention_tpu, True),
    "gpu": (attention_gpu, False),
    "interpret_gpu": (attention_gpu, True),
}
"""Those of our own: the module, and whether it is interpreted."""

HEADS_AXIS = "tensor"
"""The mesh axis that heads are split over; the batch is split over all others."""


class Limits(NamedTuple):
    """What an implementation can do.

    Attributes:
      platform: '' for any.
      dtypes: of qkv.
      tokens, head_dims: the least and the largest number; head dims in steps of 8.
      masks: whether a mask may be given.
    """

    platform: str
    dtypes: tuple[str, ...]
    tokens: tuple[int, int] = (16, 1100)
    head_dims: tuple[int, int] = (32, 128)
    masks: bool = True


# Ours: where they are tested; in float32 the GPU's would use no tensor cores. cuDNN: what JAX lets
# through on every GPU (256 channels on Hopper, which no ViT has); masks have given NaN there, and
# become a bias of [tokens, tokens] in memory. Its backward pass adds in any order unless $XLA_FLAGS
# has --xla_gpu_deterministic_ops.
LIMITS = {
    "tpu": Limits("tpu", ("bfloat16", "float32")),
    "interpret": Limits("", ("bfloat16", "float32")),
    "cudnn": Limits("gpu", ("bfloat16", "float16"), (16, 2**16), (8, 128), masks=False),
    "gpu": Limits("gpu", ("bfloat16", "float16")),
    "interpret_gpu": Limits("", ("bfloat16", "float16", "float32")),
}
"""Of each implementation but 'xla', which can do everything."""

OLD_TPUS = ("TPU v2", "TPU v3")
"""Those for which the compiler refuses the kernel."""

LEAST_CAPABILITY = 8.0
"""CUDA's compute capability from which on GPUs multiply bfloat16."""

RESIDUALS = ("attention_out", "attention_lse")
"""Names of what the kernel's backward pass wants beside qkv, for rematerialisation policies."""


class Segments(NamedTuple):
    """A query attends to the keys of its number.

    Attributes:
      queries, keys: [batch, tokens] int32, 0 or more; of a key that nobody may attend to, -1.
    """

    queries: jax.Array
    keys: jax.Array


def attention(
    qkv: jax.Array,
    *,
    num_heads: int,
    mask: jax.Array | Segments | None = None,
    bias: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention (Vaswani et al. 2017, section 3.2.1); scores and softmax in float32.

    Args:
      qkv: [batch, tokens, 3 * dim], queries, keys and values side by side, heads inside each. Or
        [groups, batch, tokens, 3 * dim], each group with some of the heads, as devices that split
        them (HEADS_AXIS) project them.
      num_heads: number of heads (of a group); divides dim.
      mask: [batch, tokens] bool, the keys that are attended to; or `Segments`; or None for all.
        A query that may see no key answers zeros, and has no part in any gradient.
      bias: [3 * dim] or [groups, 3 * dim], already in qkv, as `with_bias` leaves it: its gradient
        is the sum of qkv's, which the kernel takes on its way.
      implementation: one of IMPLEMENTATIONS.

    Returns:
      [batch, tokens, dim] in qkv's dtype, heads side by side, as the next projection wants it; of
      groups, each group's.

    Raises:
      ValueError: an unknown implementation, or one that cannot do this here (the message says
        why); heads that do not divide dim, another shape, integers.
    """
    name = choose(implementation, qkv, num_heads, masked=mask is not None)
    if name not in KERNELS:
        if bias is not None:  # adds nothing, and has the gradient
            nothing = bias - jax.lax.stop_gradient(bias)
            qkv = qkv + _spread(nothing).astype(qkv.dtype)
        if name == "xla":
            attend = functools.partial(_xla, num_heads=num_heads, mask=mask)
            return attend(qkv) if qkv.ndim == 3 else jax.vmap(attend)(qkv)
        return _split(_cudnn, (qkv,), num_heads, "Q", "O")[0]
    if mask is not None and not isinstance(mask, Segments):
        mask = Segments(jnp.zeros(mask.shape, jnp.int32), mask.astype(jnp.int32) - 1)
    ids = (None, None) if mask is None else (mask.queries[:, None], mask.keys[:, :, None])
    return _kernel(qkv, bias, *ids, num_heads, name)


def with_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias, whose gradient is left to `attention`; shapes as there."""
    return x + _spread(jax.lax.stop_gradient(bias)).astype(x.dtype)


def _spread(bias):
    """Over images and tokens."""
    return jnp.expand_dims(bias, (-3, -2))


def choose(implementation: str, qkv: jax.Array, num_heads: int, *, masked: bool = False) -> str:
    """The implementation that `attention` will take, never 'auto'; raises as it does."""
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"attention={implementation!r} is unknown; choose one of {names}.")
    if len(qkv.shape) not in (3, 4) or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv is [batch, tokens, 3 * dim] with num_heads={num_heads} dividing dim, "
            f"not {tuple(qkv.shape)}."
        )
    if not jnp.issubdtype(qkv.dtype, jnp.floating):
        raise ValueError(f"qkv must be floating point, not {jnp.dtype(qkv.dtype).name}.")
    asked = qkv.shape, jnp.dtype(qkv.dtype).name, num_heads, masked
    if implementation != "auto":
        if why := _obstacle(implementation, *asked):
            raise ValueError(f"attention={implementation!r} {why}; use 'auto' or 'xla'.")
        return implementation
    reasons = []
    for name in AUTO.get(_platform(), ("xla",)):
        why = _obstacle(name, *asked)
        if not why:
            break
        reasons.append(f"{name!r}, which {why}")
    if reasons:
        _log_once(f"attention: {name!r} instead of {reasons[0]}.")
    return name


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger("vit_jax").warning(message)


def _platform() -> str:
    device = mesh_device()
    return device.platform if device is not None else jax.default_backend()


def _obstacle(name: str, shape: tuple[int, ...], dtype: str, num_heads: int, masked: bool) -> str:
    """Why an implementation cannot do a shape here, or ''."""
    if name == "xla":
        return ""
    *groups, batch, tokens, width = shape
    head_dim = width // (3 * num_heads)
    limits, platform, parts = LIMITS[name], _platform(), _parts()
    if name in ("gpu", "interpret_gpu") and attention_gpu.plgpu is None:
        return "needs Pallas' Triton backend, which this JAX lacks"
    if limits.platform not in ("", platform):
        return f"runs on {limits.platform.upper()}, not on {platform}"
    if limits.platform == "tpu" and (kind := device_kind()) in OLD_TPUS:
        return f"wants a TPU v4 or a newer one, not a {kind}"
    if limits.platform == "gpu" and (why := _unfit_gpu()):
        return why
    if dtype not in limits.dtypes:
        return f"takes {' or '.join(limits.dtypes)}, not {dtype}"
    if not limits.tokens[0] <= tokens <= limits.tokens[1]:
        return f"takes {limits.tokens[0]} to {limits.tokens[1]} tokens, not {tokens}"
    if not limits.head_dims[0] <= head_dim <= limits.head_dims[1] or head_dim % 8:
        return (
            f"takes heads of {limits.head_dims[0]} to {limits.head_dims[1]} channels in steps of "
            f"8, not {head_dim}"
        )
    if masked and not limits.masks:
        return "takes no mask"
    split = 1 if groups or parts is None else parts[1]
    if name == "tpu" and (why := attention_tpu.too_large(tokens, width, dtype, num_heads, split)):
        return why
    if parts is None:
        if limits.platform and jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
            return "needs to know the mesh where there are several devices (jax.set_mesh)"
        return ""
    if batch % parts[0]:
        return f"splits the batch over {parts[0]} devices, which do not divide {batch}"
    heads = groups[0] if groups else num_heads
    if heads % parts[1]:
        what = "groups of heads" if groups else "heads"
        return f"splits the {what} over {parts[1]} devices, which do not divide {heads}"
    return ""


def _unfit_gpu() -> str:
    """What keeps tensor cores' kernels off the GPUs that are here, or ''."""
    if jax.default_backend() != "gpu":  # compiling for a mesh of GPUs that are elsewhere
        return ""
    capability = str(jax.local_devices()[0].compute_capability)
    if capability.replace(".", "").isdigit() and float(capability) >= LEAST_CAPABILITY:
        return ""
    return f"wants an NVIDIA GPU of compute capability {LEAST_CAPABILITY} or more, not {capability}"


def _parts() -> tuple[int, int] | None:
    """Into how many the batch and the heads are split; None where nothing is to be split."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:  # manual: inside of shard_map, where arrays are parts
        return None
    heads = mesh.shape.get(HEADS_AXIS, 1)
    return mesh.size // heads, heads


def _xla(qkv, num_heads, mask):
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    # Heads in front of the tokens: XLA's CPU products are four times as fast that way round.
    qkv = qkv.reshape(batch, tokens, 3, num_heads, head_dim)
    qkv = qkv.transpose(2, 0, 3, 1, 4)  # [3, batch, heads, tokens, head_dim]
    query, key, value = qkv[0], qkv[1], qkv[2]  # unpacked, ONNX would have no name for it
    scores = jnp.matmul(query, key.mT, preferred_element_type=jnp.float32) * head_dim**-0.5
    if isinstance(mask, Segments):
        mask = mask.queries[:, :, None] == mask.keys[:, None, :]
    elif mask is not None:
        mask = mask[:, None, :]
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if mask is not None:
        weights = jnp.where(mask[:, None], weights, 0.0)  # of a query that sees no key, all
    return (weights.astype(value.dtype) @ value).swapaxes(1, 2).reshape(batch, tokens, width // 3)


def _cudnn(qkv, *, num_heads):
    batch, tokens, width = qkv.shape
    heads = qkv.reshape(batch, tokens, 3, num_heads, -1)
    lengths = {}
    if tokens % 2:  # JAX refuses to differentiate an odd number, as if there were a bias
        heads = jnp.pad(heads, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
        count = jnp.full(batch, tokens, jnp.int32)
        lengths = {"query_seq_lengths": count, "key_value_seq_lengths": count}
    parts = (heads[:, :, part] for part in range(3))
    out = jax.nn.dot_product_attention(*parts, implementation="cudnn", **lengths)
    return (out[:, :tokens].reshape(batch, tokens, width // 3),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _kernel(qkv, bias, query_ids, key_ids, num_heads, name):
    return _kernel_forward(qkv, bias, query_ids, key_ids, num_heads, name)[0]


def _kernel_forward(qkv, bias, query_ids, key_ids, num_heads, name):
    module, interpret = KERNELS[name]
    run = functools.partial(module.forward, interpret=interpret)
    out, lse = _split(run, (qkv, query_ids, key_ids), num_heads, "Q II", "O L")
    out, lse = (checkpoint_name(x, name) for x, name in zip((out, lse), RESIDUALS, strict=True))
    return out, (qkv, bias, query_ids, key_ids, out, lse)


def _kernel_backward(num_heads, name, residuals, grad):
    qkv, bias, query_ids, key_ids, out, lse = residuals
    module, interpret = KERNELS[name]
    run = functools.partial(module.backward, interpret=interpret)
    operands = (qkv, query_ids, key_ids, out, lse, grad)
    qkv_grad, sums = _split(run, operands, num_heads, "Q II O L O", "Q Q")
    if bias is None:
        return qkv_grad, None, None, None
    bias_grad = sums.sum(axis=(-3, -2), dtype=jnp.float32).astype(bias.dtype)
    return qkv_grad, bias_grad, None, None


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _split(run, operands, num_heads, inputs, outputs):
    """run(*operands, num_heads=…) on each device's own images and heads.

    Args:
      run: of arrays with a leading batch, and answering such.
      operands: None among them stay None.
      num_heads: of all devices, or of a group.
      inputs, outputs: a letter each, spaces aside: Q [batch, rows, 3 * dim], O [batch, rows, dim],
        L [batch, heads, tokens], I the same for all heads. With groups of heads all but I have
        one more axis in front.
    """
    inputs, outputs = inputs.replace(" ", ""), outputs.replace(" ", "")
    parts, grouped = _parts(), operands[0].ndim == 4
    alone = parts is None or math.prod(parts) == 1
    if alone and not grouped:
        return run(*operands, num_heads=num_heads)
    absent = [x is None for x in operands]
    kinds = [kind for kind, gone in zip(inputs, absent, strict=True) if not gone]
    operands = [x for x in operands if x is not None]

    def once(operands, num_heads):
        rest = iter(operands)
        return run(*(None if gone else next(rest) for gone in absent), num_heads=num_heads)

    def heads_of_each(*operands):
        results = once(map(_join, operands, kinds), num_heads // parts[1])
        return tuple(map(_cut, results, outputs))

    def each_group(*operands):  # a device has one of them
        results = []
        for at in range(len(operands[0])):
            group = [x if k == "I" else x[at] for x, k in zip(operands, kinds, strict=True)]
            results.append(once(group, num_heads))
        return tuple(map(jnp.stack, zip(*results, strict=True)))

    if alone:
        return each_group(*operands)
    mesh = jax.sharding.get_abstract_mesh()
    specs = _specs(mesh, grouped)
    split = jax.shard_map(
        each_group if grouped else heads_of_each,
        mesh=mesh,
        in_specs=tuple(specs[kind] for kind in kinds),
        out_specs=tuple(specs[kind] for kind in outputs),
        check_vma=False,
    )
    if grouped:
        return split(*operands)
    return tuple(map(_join, split(*map(_cut, operands, kinds)), outputs))


# A device's queries, keys and values of its heads lie apart in the whole qkv: cut in three, each is
# split by heads.
def _cut(x, kind):
    return x.reshape(*x.shape[:-1], 3, -1) if kind == "Q" else x


def _join(x, kind):
    return x.reshape(*x.shape[:-2], -1) if kind == "Q" else x


def _specs(mesh, grouped):
    """How arrays of each kind (see `_split`) lie on a mesh."""
    batch = tuple(axis for axis in mesh.axis_names if axis != HEADS_AXIS)
    heads = HEADS_AXIS if HEADS_AXIS in mesh.axis_names else None
    if grouped:
        return dict.fromkeys("QOL", PartitionSpec(heads, batch)) | {"I": PartitionSpec(batch)}
    return {
        "Q": PartitionSpec(batch, None, None, heads),
        "O": PartitionSpec(batch, None, heads),
        "L": PartitionSpec(batch, heads),
        "I": PartitionSpec(batch),
    }
