import pytest

from vit_jax.spelling import nearest


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("learning_rat", " (did you mean 'learning_rate'?)"),
        ("clip", " (did you mean 'clip_norm'?)"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_the_nearest_word_is_named_if_there_is_one(word, wanted):
    assert nearest(word, {"learning_rate": 1, "clip_norm": 2}) == wanted


def test_without_choices_nothing_is_near():
    assert nearest("word", iter(())) == ""
