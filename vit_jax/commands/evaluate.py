"""`vit-jax evaluate`: the evaluations of a run's config, on one of its checkpoints."""

import json

from absl import flags
from etils import epath

from vit_jax.commands.flags import parse
from vit_jax.config import load_run_config
from vit_jax.runtime import enable_compilation_cache

USAGE = """vit-jax evaluate: evaluates a checkpoint of a run, the newest by default.

  vit-jax evaluate --workdir=runs/digits [--step=N] [--data_dir=DIR] [--json]"""


def main(argv: list[str]) -> int:
    """Runs `vit-jax evaluate`; answers the exit code."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_integer("step", None, "Which checkpoint.", flag_values=values)
        flags.DEFINE_string(
            "data_dir", None, "Where the datasets are now, if they were moved.", flag_values=values
        )
        flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)

    values, positional = parse(argv, define, usage=USAGE)
    if positional:
        raise ValueError(f"argument {positional[0]!r} is unknown; flags start with --.")
    if not values.workdir:
        raise ValueError("--workdir is missing: give the run's folder, like --workdir=runs/digits.")
    workdir = epath.Path(values.workdir)
    config = load_run_config(workdir)
    if values.data_dir:
        for section in (config.data, *config.evals.values()):
            section.data_dir = values.data_dir
    from vit_jax.evaluation import evaluate_checkpoint

    enable_compilation_cache()
    step, results = evaluate_checkpoint(config, workdir, step=values.step)
    if values.json:
        print(json.dumps({"step": step} | results))
        return 0
    print(f"checkpoint {workdir / 'checkpoints' / str(step)}")
    width = max(map(len, results), default=0)
    for name, value in results.items():
        print(
            f"{name:<{width}}  {value:.6g}"
            if isinstance(value, float)
            else f"{name:<{width}}  {value}"
        )
    return 0
