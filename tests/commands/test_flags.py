import pytest
from absl import flags

from vit_jax.commands.flags import parse


def define(values):
    flags.DEFINE_string("name", "x", "What to call it.", flag_values=values)
    flags.DEFINE_float("share", 0.5, "How much.", lower_bound=0.0, flag_values=values)
    flags.DEFINE_bool("strict", False, "Whether to fail.", flag_values=values)


def run(*argv):
    return parse(argv, define, usage="vit-jax some command")


def test_flags_and_other_arguments():
    values, positional = run("first", "--name=a b", "second", "--strict")
    assert positional == ["first", "second"]
    assert values.name == "a b" and values.share == 0.5 and values.strict is True


def test_each_call_starts_afresh():
    run("--name=other")
    assert run()[0].name == "x"
    assert "share" not in flags.FLAGS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nme=a"], r"unknown flag --nme; did you mean --name\?"),
        (["--zzz"], "unknown flag --zzz; there are --name, --share, --strict"),
        (["--share=much"], "share"),
        (["--share=-1"], "share"),
        (["--name"], "name"),
        (["--strict=maybe"], "strict"),
    ],
)
def test_bad_flags_are_a_valueerror_in_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as caught:
        run(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", ["--help", "-help", "-h"])
def test_help(asked, capsys):
    with pytest.raises(SystemExit) as caught:
        run("first", asked)
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("vit-jax some command\n") and "What to call it." in printed


def test_what_follows_two_dashes_is_left_alone():
    assert run("--strict", "--", "--help", "--name=a")[1] == ["--help", "--name=a"]
