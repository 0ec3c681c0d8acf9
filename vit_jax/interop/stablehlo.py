"""StableHLO: a model as one file that runs without this package, on any platform of three."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from vit_jax.interop.certificate import Answer, graph_answers
from vit_jax.models.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")


def serialise(model: Model) -> bytes:
    """uint8 images of any number -> what `graph_answers` does, weights and preprocessing included.

    It is read by `jax.export.deserialize(bytearray(…)).call(images)["logits"]`.

    Raises:
      ImportError: flatbuffers, which serialising needs, is missing.
    """
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        message = "stablehlo needs flatbuffers: pip install 'vit-jax[stablehlo]'."
        raise ImportError(message, name="flatbuffers") from error
    graphdef, state = nnx.split(model)
    variables = nnx.to_pure_dict(state)

    def answer(images: jax.Array) -> dict[str, jax.Array]:
        return graph_answers(nnx.merge(graphdef, variables), images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.backbone.image_size, 3), jnp.uint8)
    return bytes(jax.export.export(jax.jit(answer), platforms=PLATFORMS)(images).serialize())


def run(path: epath.Path, images: np.ndarray) -> Answer:
    """What a serialised model answers on the CPU.

    Accelerators multiply float32 in bfloat16 or TF32 by default, which would hide a mistake.
    """
    try:
        (cpu, *_) = jax.local_devices(backend="cpu")
    except RuntimeError:
        return Answer("", not_run="JAX has no CPU here; let JAX_PLATFORMS end in ',cpu'")
    with jax.default_device(cpu):
        found = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    runner = f"jax {jax.__version__}, cpu"
    return Answer(runner, **{name: np.asarray(array) for name, array in found.items()})
