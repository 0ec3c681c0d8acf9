"""`vit_jax.load(path)`: a model ready to call, from whatever holds its weights."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vit_jax.interop import files, huggingface, npz, timm
from vit_jax.interop.facts import Facts, Told, pair
from vit_jax.interop.layouts import BIG_VISION, GOOGLE, LAYOUTS, TIMM
from vit_jax.interop.resample import resize_patch_kernel, resize_positions
from vit_jax.interop.spec import (
    Spec,
    fill,
    grid_of,
    infer_backbone,
    make_model,
    nearest_pool,
)
from vit_jax.interop.tables import Layout, Params, Report, read, recognise
from vit_jax.models.model import Model

OWN = "vit_jax"


@dataclasses.dataclass
class Source:
    """A model as it was read: what it is, its numbers, and what became of every array."""

    spec: Spec
    params: Params
    report: Report


def load(
    path: epath.PathLike,
    *,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    step: int | None = None,
) -> Model:
    """The model of a run, an export, a Hugging Face or timm folder, a `.safetensors` or `.npz`.

    `model(images)` answers float32 logits; without a head what the original answers: the pooled
    output, else the tokens. Float images are taken as already normalised, uint8 ones are
    preprocessed as the weights want it. `model.class_names` are in the order of the logits, empty
    if nobody knows them. What was left over, missing, reshaped or assumed is warned of.

    Args:
      path: a workdir (or one of its checkpoints), a folder or a file.
      image_size: another height and width, or both in one: the position table is resampled.
      patch_size: another one: the patch embedding is resized.
      num_classes: another number of classes: a new head, its logits zero.
      num_heads: where the file does not tell; by default 64 channels a head.
      step: which checkpoint of a run; the newest by default.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no known layout, a damaged file, weights that do not make one model.
    """
    image_size, patch_size = pair(image_size), pair(patch_size)
    source = read_source(path, num_heads=num_heads, image_size=image_size, step=step)
    source = adapt(source, image_size=image_size, patch_size=patch_size, num_classes=num_classes)
    report = source.report
    if report.lines()[1:]:
        warnings.warn(
            "\n".join([f"{path}: {report.lines()[0]}", *report.lines()[1:]]), stacklevel=2
        )
    model = fill(make_model(source.spec), source.params)
    model.class_names = source.spec.class_names
    return model


def read_source(
    path: epath.PathLike,
    *,
    num_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    step: int | None = None,
) -> Source:
    """Reads and renames; see `load`. `image_size` only helps where the table is no square."""
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if num_heads is not None and num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1.")
    source = _read(path, num_heads, image_size, step)
    _agreed(source.spec.backbone["num_heads"], num_heads)
    return source


def _read(
    path: epath.Path, num_heads: int | None, image_size: tuple[int, int] | None, step: int | None
) -> Source:
    run = _run_of(path)
    if run is not None:
        from vit_jax.interop.runs import read_run  # training's libraries, only for its runs

        return Source(*read_run(run[0], step=step if run[1] is None else run[1]))
    if step is not None:
        raise ValueError(f"{path} is no folder of a run, so it has no step={step}; leave it out.")
    if path.is_dir():
        arrays, folder, single = files.read_folder(path), path, files.only_file(path)
    else:
        files.check_whole(path)
        arrays, folder, single = files.read_arrays(path), path.parent, path
    if single is not None and single.suffix == ".safetensors":
        metadata = files.safetensors_metadata(single)
        if metadata.get("format") == OWN:
            return _own(arrays, metadata, single)
    config, preprocessor = {}, {}
    if path.is_dir() or path.name == files.SINGLE:
        config = _optional_json(folder / "config.json")
        preprocessor = _optional_json(folder / "preprocessor_config.json")
    hints = {"num_heads": num_heads, "image_size": image_size}
    try:
        return _foreign(arrays, config, preprocessor, hints)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _foreign(
    arrays: files.Arrays,
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    hints: Mapping[str, Any],
) -> Source:
    arrays = huggingface.with_key_biases(timm.fuse(npz.unscan(arrays)))
    layout = recognise(list(arrays), LAYOUTS)
    given = len(arrays)
    _, arrays = layout.normalise(arrays)
    if len(arrays) < given:
        raise ValueError(f"{given - len(arrays)} arrays have the same name under {layout.name}.")
    params, report = read(layout, arrays)
    facts = _facts(layout, config, preprocessor, params, arrays)
    report.notes += facts.notes
    for name, why in facts.dropped.items():
        params.pop(name)
        report.unexpected.append(f"{name}: {why}")
    if "vit_jax" in config:  # one of our own models
        source = _written_by_us(layout, config, params, facts, report)
        if source is not None:
            return source
    known = facts.known | {"num_heads": _agreed(facts.known["num_heads"], hints["num_heads"])}
    if hints["image_size"] and not known.get("image_size"):
        known["image_size"] = _size_of_table(params, hints["image_size"])
    params, backbone, notes = infer_backbone(params, known, bare=layout is not GOOGLE)
    report.notes += notes
    head, hidden = params.get("head/fc/kernel"), params.get("head/pre_logits/kernel")
    spec = Spec(
        backbone=backbone,
        pool=facts.pool,
        num_classes=0 if head is None else head.shape[1],
        hidden_dim=0 if hidden is None else hidden.shape[1],
        mean=facts.mean,
        std=facts.std,
        crop_fraction=facts.crop_fraction,
        interpolation=facts.interpolation,
        class_names=facts.class_names,
    )
    return Source(spec, params, report)


def _written_by_us(
    layout: Layout, config: Mapping[str, Any], params: Params, facts: Facts, report: Report
) -> Source | None:
    """The model as it was before its export; None if others trained it since."""
    spec = Spec.from_json(Told(config).get("vit_jax", "a text", ""), "config.json")
    told = ("num_heads", "image_size", "depth", "qkv_bias", "final_norm")
    known = {key: spec.backbone[key] for key in told}
    params, _, _ = infer_backbone(params, known)
    reduced = huggingface.reduce(params, spec, layout)
    if reduced is None:
        return None
    names = spec.class_names and facts.class_names  # without names of its own, it got numbers
    if not _same_crop(spec, facts):
        spec = dataclasses.replace(spec, crop_fraction=facts.crop_fraction)
    told = {key: getattr(facts, key) for key in ("mean", "std", "interpolation")}
    return Source(dataclasses.replace(spec, class_names=names, **told), reduced, report)


def _same_crop(spec: Spec, facts: Facts) -> bool:
    """Whether these crops are the same in whole pixels, which is how transformers tells them."""
    if spec.crop_fraction is None or facts.crop_fraction is None:
        return spec.crop_fraction is facts.crop_fraction
    side = max(spec.backbone["image_size"])
    return abs(side / spec.crop_fraction - side / facts.crop_fraction) <= 0.5


def _facts(layout: Layout, config, preprocessor, params: Params, arrays) -> Facts:
    if layout in (GOOGLE, BIG_VISION):
        return npz.facts(params, arrays)
    if layout is TIMM:
        return timm.facts(config, params, arrays)
    return huggingface.facts(layout, config, preprocessor, params)


def _own(arrays: files.Arrays, metadata: Mapping[str, str], path: epath.Path) -> Source:
    spec = Spec.from_json(metadata.get("spec", ""), path)
    report = Report(layout="vit_jax", matched=len(arrays))
    return Source(spec, arrays, report)


def adapt(
    source: Source,
    *,
    image_size: tuple[int, int] | None = None,
    patch_size: tuple[int, int] | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """The model in another shape; what was resampled, resized or replaced is in the report.

    Args:
      source: see `read_source`.
      image_size, patch_size: pixels in height and width.
      num_classes: of a new head, whose logits are zero; 0 for none.
      mean, std: of the preprocessing, by channel and in units where white is 1.

    Raises:
      ValueError: sizes that do not go together, a negative number of classes, other than three
        numbers or a deviation that is not positive.
    """
    spec, params, report = source.spec, dict(source.params), source.report
    backbone = dict(spec.backbone)
    old_grid = grid_of(backbone)
    if patch_size is not None and tuple(patch_size) != backbone["patch_size"]:
        name = "backbone/patch_embed/kernel"
        params[name] = resize_patch_kernel(params[name], tuple(patch_size))
        report.reshaped.append(
            f"{name}: patches of {backbone['patch_size']} -> {tuple(patch_size)}, pseudo-inverse"
        )
        backbone["patch_size"] = tuple(patch_size)
    if image_size is not None:
        backbone["image_size"] = tuple(image_size)
    grid, name = grid_of(backbone), "backbone/pos_embed"
    if grid != old_grid and name in params:
        prefix = backbone["cls_token"] + backbone["dist_token"]
        params[name] = resize_positions(params[name], old_grid, grid, num_prefix=prefix)
        report.reshaped.append(f"{name}: a grid of {old_grid} -> {grid}, antialiased bicubic")
    spec = dataclasses.replace(spec, backbone=backbone)
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name}={tuple(values)} must be three numbers, of std positive ones.")
        report.reshaped.append(f"preprocessing: {name} {getattr(spec, name)} -> {tuple(values)}")
        spec = dataclasses.replace(spec, **{name: tuple(values)})
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must not be negative; 0 leaves the head out.")
    if num_classes is not None and num_classes != spec.num_classes:
        spec, params = _new_head(spec, params, num_classes, report)
    return Source(spec, params, report)


def _new_head(spec: Spec, params: Params, num_classes: int, report: Report):
    old = [name for name in params if name.startswith(("head/fc/", "head/fc_dist/"))]
    for name in old:
        array = params.pop(name)
        if num_classes:
            params[name] = np.zeros((*array.shape[:-1], num_classes), np.float32)
    if not num_classes:
        params = {name: x for name, x in params.items() if not name.startswith("head/")}
    elif not old:
        if spec.pool == "none":  # a head reads one vector an image
            spec = dataclasses.replace(spec, pool=nearest_pool(spec))
            report.reshaped.append(f"pooling: all tokens -> {spec.pool!r}, for the new head")
        width = spec.backbone["dim"] * (2 if spec.pool == "cls_gap" else 1)
        for name in ("fc", "fc_dist") if spec.pool == "cls_dist" else ("fc",):
            params[f"head/{name}/kernel"] = np.zeros((width, num_classes), np.float32)
            params[f"head/{name}/bias"] = np.zeros(num_classes, np.float32)
    report.reshaped.append(f"head: {spec.num_classes} classes -> {num_classes}, its logits zero")
    hidden = spec.hidden_dim if num_classes else 0
    new = dataclasses.replace(spec, class_names=(), num_classes=num_classes, hidden_dim=hidden)
    return new, params


def _agreed(told: int | None, given: int | None) -> int | None:
    if told and given and told != given:
        raise ValueError(f"the source tells num_heads={told}, not {given}; set num_heads={told}.")
    return told or given


def _size_of_table(params: Params, wanted: tuple[int, int]) -> tuple[int, int] | None:
    """The wanted size, if the source's table is for it or there is none."""
    if "backbone/pos_embed" not in params:
        return tuple(wanted)
    rows = len(params["backbone/pos_embed"])
    patch = params["backbone/patch_embed/kernel"].shape[:2]
    count = (wanted[0] // patch[0]) * (wanted[1] // patch[1])
    return tuple(wanted) if 0 <= rows - count <= 2 else None


def _optional_json(path: epath.Path) -> dict[str, Any]:
    return files.read_json(path) if path.exists() else {}


def _run_of(path: epath.Path) -> tuple[epath.Path, int | None] | None:
    """(workdir, step) of a workdir, of its checkpoints, or of one of them; else None."""
    candidates = [(path, None), (path.parent, None)]
    if path.name.isdigit():
        candidates.append((path.parent.parent, int(path.name)))
    for workdir, step in candidates:
        if (workdir / "checkpoints").is_dir() and (workdir / "config.json").exists():
            if workdir != path and "checkpoints" not in path.parts:
                continue
            return workdir, step
    return None
