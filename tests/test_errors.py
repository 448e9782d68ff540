"""Hints and single lines of messages."""

import pytest

from adq_train.errors import did_you_mean, first_line


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("resnet21", ("resnet32", "resnet20", "resnet8"), " (did you mean 'resnet20'?)"),
        (
            "trainer.epoch",
            ("pretrain.epochs", "trainer.epochs"),
            " (did you mean 'trainer.epochs'?)",
        ),
        ("zzz", ("resnet20",), ""),
    ],
)
def test_the_nearest_word_is_meant_and_of_equals_the_one_that_begins_alike(word, known, hint):
    assert did_you_mean(word, known) == hint


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError(" \n one "), "one"), (KeyError(), "KeyError")],
)
def test_an_error_of_a_library_in_one_line(error, line):
    assert first_line(error) == line
