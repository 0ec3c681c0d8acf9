"""`vit-jax export`: a model for elsewhere, with a certificate of what it answers there."""

from absl import flags

from vit_jax.commands import weights
from vit_jax.commands.flags import parse

USAGE = """vit-jax export: writes weights for elsewhere.

  vit-jax export --workdir=DIR [--step=N] | --model=PATH
      --format=huggingface|timm|npz|safetensors|stablehlo|onnx --out=PATH [--overwrite]
      [--image_size=384]"""


def main(argv: list[str]) -> int:
    """Runs `vit-jax export`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        weights.define_source(values)
        flags.DEFINE_string("format", None, "What to write.", flag_values=values)
        flags.DEFINE_string("out", None, "Folder or file to write.", flag_values=values)
        flags.DEFINE_bool("overwrite", False, "Replace what is there.", flag_values=values)

    values, positional = parse(argv, define, usage=USAGE)
    if positional:
        raise ValueError(f"argument {positional[0]!r} is unknown; flags start with --.")
    weights.check_source(values)
    for name in ("format", "out"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing; see vit-jax export --help.")
    from vit_jax.interop.certificate import lines
    from vit_jax.interop.export import export

    source = weights.read(values)
    with weights.cleaning_up():
        found = export(source, format=values.format, out=values.out, overwrite=values.overwrite)
    print("\n".join(source.report.lines()))
    for name, digest in found["sha256"].items():
        print(f"{name}  sha256 {digest}")
    print("\n".join(lines(found)))
    print(f"done: {values.format} in {values.out}")
    return 0
