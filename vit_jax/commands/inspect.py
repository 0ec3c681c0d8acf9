"""`vit-jax inspect`: what is in a checkpoint or a file of weights."""

import json

from absl import flags

from vit_jax.commands.flags import parse, parse_size

USAGE = """vit-jax inspect: what is in a checkpoint: format, shapes, types, bytes, preprocessing.

  vit-jax inspect PATH [--diff=OTHER] [--json]"""


def main(argv: list[str]) -> int:
    """Runs `vit-jax inspect`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("diff", None, "Another one to compare with.", flag_values=values)
        flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
        flags.DEFINE_integer("num_heads", None, "Where no file tells.", flag_values=values)
        flags.DEFINE_string("image_size", None, "Likewise: 8 or 8x4.", flag_values=values)

    values, positional = parse(argv, define, usage=USAGE)
    if len(positional) != 1:
        raise ValueError("give one path: vit-jax inspect PATH [--diff=OTHER].")
    size = parse_size("image_size", values.image_size)
    from vit_jax.interop.load import read_source
    from vit_jax.interop.summary import compare, describe, table

    told = {"num_heads": values.num_heads, "image_size": size}
    source = read_source(positional[0], **told)
    if values.diff:
        found = compare(source, read_source(values.diff, **told))
    else:
        found = describe(source)
    print(json.dumps(found) if values.json else "\n".join(table(found)))
    return 0
