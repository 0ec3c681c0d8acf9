"""`vit-jax import`: weights from elsewhere as a folder of ours."""

from absl import flags
from etils import epath

from vit_jax.commands import weights
from vit_jax.commands.flags import parse, parse_size

USAGE = """vit-jax import: reads weights from elsewhere and writes them in our own names.

  vit-jax import --source=PATH --out=DIR [--image_size=384 --patch_size=16 --num_classes=10]
      [--mean=0.485,0.456,0.406 --std=0.229,0.224,0.225]

PATH: a Hugging Face or timm folder, a .safetensors, or a .npz of google's."""


def main(argv: list[str]) -> int:
    """Runs `vit-jax import`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("source", None, "Weights to read.", flag_values=values)
        flags.DEFINE_string("out", None, "Folder to write.", flag_values=values)
        flags.DEFINE_bool("overwrite", False, "Replace the folder.", flag_values=values)
        flags.DEFINE_string("image_size", None, "Resample to 384 or 384x256.", flag_values=values)
        flags.DEFINE_string("patch_size", None, "Resize patches to 8 or 8x4.", flag_values=values)
        flags.DEFINE_integer("num_classes", None, "A new head; 0: none.", flag_values=values)
        flags.DEFINE_string("mean", None, "Of pixels in [0, 1], by channel.", flag_values=values)
        flags.DEFINE_string("std", None, "Likewise.", flag_values=values)
        flags.DEFINE_integer("num_heads", None, "Where no file tells.", flag_values=values)

    values, positional = parse(argv, define, usage=USAGE)
    if positional:
        raise ValueError(f"argument {positional[0]!r} is unknown; flags start with --.")
    for name in ("source", "out"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing: vit-jax import --source=PATH --out=DIR.")
    image_size = parse_size("image_size", values.image_size)
    patch_size = parse_size("patch_size", values.patch_size)
    mean, std = (_numbers(name, values[name].value) for name in ("mean", "std"))
    from vit_jax.interop import files
    from vit_jax.interop.export import write_own
    from vit_jax.interop.load import adapt, read_source
    from vit_jax.interop.spec import fill, make_model

    files.check_folder(values.out, overwrite=values.overwrite)  # before much is read
    source = read_source(values.source, num_heads=values.num_heads, image_size=image_size)
    source = adapt(
        source,
        image_size=image_size,
        patch_size=patch_size,
        num_classes=values.num_classes,
        mean=mean,
        std=std,
    )
    fill(make_model(source.spec), source.params)  # whatever is wrong is said now
    with (
        weights.cleaning_up(),
        files.new_folder(values.out, overwrite=values.overwrite) as folder,
    ):
        write_own(source, folder / files.SINGLE)
        report = {"source": values.source, "sha256": files.sha256(folder / files.SINGLE)}
        files.write_json(folder / files.IMPORTED, report | vars(source.report))
    print("\n".join(source.report.lines()))
    count = sum(x.size for x in source.params.values())
    print(f"{count:,} parameters in {epath.Path(values.out) / files.SINGLE}")
    return 0


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """'0.5,0.5,0.5' as numbers; None stays None."""
    if text is None:
        return None
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise ValueError(f"--{name}={text} must be like 0.5,0.5,0.5.") from error
