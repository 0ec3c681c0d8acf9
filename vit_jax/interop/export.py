"""`vit-jax export`: a model written for elsewhere, with its certificate."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

import vit_jax
from vit_jax.interop import certificate, files, huggingface, npz, onnx, stablehlo, timm
from vit_jax.interop.certificate import Answer
from vit_jax.interop.files import CERTIFICATE
from vit_jax.interop.load import OWN, Source, read_source
from vit_jax.interop.spec import Spec, fill, make_model
from vit_jax.models.model import Model
from vit_jax.spelling import nearest

MAX_GRAPH = 2**31 - 2**26  # bytes: flatbuffers and protobuf count to 2^31; the graph takes some


def export(
    source: Source, *, format: str, out: epath.PathLike, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a model whole or not at all; answers its certificate.

    Args:
      source: see `load.read_source`.
      format: one of FORMATS.
      out: a folder for 'timm' and 'huggingface', else a file; the certificate lies in the folder,
        or beside the file under its name and `.certificate.json`.
      overwrite: whether what is at `out` may be replaced.

    Raises:
      FileExistsError: `out` or its certificate exists.
      ValueError: the format has no way to say this model.
    """
    if format not in FORMATS:
        raise ValueError(
            f"--format={format} is unknown{nearest(format, FORMATS)}; "
            f"choose one of {', '.join(FORMATS)}."
        )
    writer, is_folder = FORMATS[format]
    out = epath.Path(out)
    if not is_folder and out.exists() and out.suffix != f".{format}":
        raise FileExistsError(f"{out} is no .{format} and is not replaced; choose another --out.")
    # A graph that is written whole runs anywhere, so it has no accelerator's own kernel in it.
    model = fill(make_model(source.spec, attention="xla"), source.params)
    images = certificate.fixed_images(source.spec.backbone["image_size"])
    with contextlib.ExitStack() as stack:  # the last entered takes its name first
        if not is_folder:
            place = files.new_file(f"{out}.{CERTIFICATE}", overwrite=overwrite)
            beside = stack.enter_context(place)
        place = files.new_folder if is_folder else files.new_file
        path = stack.enter_context(place(out, overwrite=overwrite))
        run, target = writer(source, model, path)
        written = sorted(path.iterdir()) if is_folder else [path]
        found = {"format": format, "written_by": f"vit_jax {vit_jax.__version__}"}
        found["sha256"] = certificate.hashes(written)
        found |= certificate.certify(model, images, run, target)
        if is_folder:
            files.write_json(path / CERTIFICATE, found)
        else:
            found["sha256"] = {out.name: found["sha256"][path.name]}
            files.write_json(beside, found)
    return found


Run = Callable[[np.ndarray], Answer]


def _write_huggingface(source: Source, model: Model, folder: epath.Path) -> tuple[Run, str]:
    arrays, config, preprocessor = huggingface.export(source.params, source.spec)
    files.write_safetensors(folder / files.SINGLE, arrays, {"format": "pt"})
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "preprocessor_config.json", preprocessor)
    (folder / "README.md").write_text(_card(source, "transformers", config["architectures"][0]))
    return lambda images: huggingface.run(folder, model, images), "transformers"


def _write_timm(source: Source, model: Model, folder: epath.Path) -> tuple[Run, str]:
    arrays, config = timm.export(source.params, source.spec)
    files.write_safetensors(folder / files.SINGLE, arrays, {"format": "pt"})
    files.write_json(folder / "config.json", config)
    files.write_json(folder / "preprocessor_config.json", huggingface.preprocessor(source.spec))
    (folder / "README.md").write_text(_card(source, "timm", config["architecture"]))
    return lambda images: timm.run(folder, model, images), "timm"


def _write_npz(source: Source, model: Model, path: epath.Path) -> tuple[Run, str]:
    files.write_npz(path, npz.export(source.params, source.spec))
    source.report.notes += npz.left_out(source.spec)

    def run(images: np.ndarray) -> Answer:
        answer = _read_back(path, ".npz", source, images)
        return dataclasses.replace(answer, not_run="google's code; our own reader was")

    return run, "vit_jax"


def _write_safetensors(source: Source, model: Model, path: epath.Path) -> tuple[Run, str]:
    write_own(source, path)
    return lambda images: _read_back(path, ".safetensors", source, images), "vit_jax"


def _write_stablehlo(source: Source, model: Model, path: epath.Path) -> tuple[Run, str]:
    _check_size(source, "stablehlo")
    path.write_bytes(stablehlo.serialise(model))
    return lambda images: stablehlo.run(path, images), "flatbuffers"


def _write_onnx(source: Source, model: Model, path: epath.Path) -> tuple[Run, str]:
    _check_size(source, "onnx")
    path.write_bytes(onnx.serialise(model))
    return lambda images: onnx.run(path, images), "onnxruntime"


def _check_size(source: Source, format: str) -> None:
    size = sum(array.nbytes for array in source.params.values())
    if size > MAX_GRAPH:
        raise ValueError(
            f"--format={format} holds weights and graph in one file of at most 2 GiB, and these "
            f"weights take {size / 2**30:.1f} GiB; use --format=safetensors."
        )


def write_own(source: Source, path: epath.Path) -> None:
    """Our names, and what the model is in the file's metadata."""
    metadata = {"format": OWN, "spec": source.spec.to_json()}
    files.write_safetensors(path, source.params, metadata)


def _read_back(path: epath.Path, suffix: str, source: Source, images: np.ndarray) -> Answer:
    """Our own reader on the written file."""
    with _named(path, suffix) as named:
        b = source.spec.backbone
        read = read_source(named, num_heads=b["num_heads"], image_size=b["image_size"])
    model = fill(make_model(read.spec), read.params)
    pixels = source_pixels(source, images)
    answer = certificate.ours(model, pixels)
    return Answer(f"vit_jax {vit_jax.__version__}, read back", answer.logits, answer.features)


def source_pixels(source: Source, images: np.ndarray) -> jnp.ndarray:
    """uint8 images normalised as the exported model wants: not every format says how."""
    mean, std = (np.asarray(x, np.float32) for x in (source.spec.mean, source.spec.std))
    return jnp.asarray((images.astype(np.float32) - 255 * mean) / (255 * std))


@contextlib.contextmanager
def _named(path: epath.Path, suffix: str) -> Iterator[epath.Path]:
    """The file under a name that tells what it is, while it still has a temporary one."""
    named = path.with_name(path.name + suffix)
    path.rename(named)
    try:
        yield named
    finally:
        named.rename(path)


FORMATS: dict[str, tuple[Callable[[Source, Model, epath.Path], tuple[Run, str]], bool]] = {
    "huggingface": (_write_huggingface, True),
    "timm": (_write_timm, True),
    "npz": (_write_npz, False),
    "safetensors": (_write_safetensors, False),
    "stablehlo": (_write_stablehlo, False),
    "onnx": (_write_onnx, False),
}


def _card(source: Source, library: str, architecture: str) -> str:
    """A short model card."""
    b, spec = source.spec.backbone, source.spec
    shape = f"dim {b['dim']}, depth {b['depth']}, {b['num_heads']} heads, MLP {b['mlp_dim']}"
    count = sum(x.size for x in source.params.values())
    opens = {
        "transformers": f"`transformers.{architecture}.from_pretrained(folder)`",
        "timm": "`timm.create_model('local-dir:' + folder, pretrained=True)`",
    }[library]
    task = "image-classification" if spec.num_classes else "image-feature-extraction"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: {task}\n---\n\n"
        f"# A Vision Transformer written by vit_jax {vit_jax.__version__}\n\n"
        f"- patches of {b['patch_size']} in images of {b['image_size']}; {shape}\n"
        f"- {count:,} parameters; {spec.num_classes} classes; pooling {spec.pool!r}\n"
        f"- pixels in [0, 1] are normalised by mean {list(spec.mean)}, std {list(spec.std)}\n"
        f"- images are {_resized(spec)}, {spec.interpolation}\n"
        f"- {b['activation']}, norm epsilon {b['norm_eps']}\n\n"
        f"Open it with {opens}. `{CERTIFICATE}` tells how far its answers are from ours.\n"
    )


def _resized(spec: Spec) -> str:
    if spec.crop_fraction is None:
        return "stretched to that size"
    return f"resized to that size / {spec.crop_fraction:.4g}, then cut from the centre"
