"""YAML files of anybody: read as OmegaConf reads them, or refused in one line and at once."""

import os

import pytest
from omegaconf import OmegaConf

from adq_train.errors import UserError
from adq_train.storage.yaml_files import MAX_BYTES, read_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
# Unguarded, the bombs take longer than anybody waits.
BAD = {
    "a syntax error": ("a: [1\nb: 2\n", ", line 2"),
    "a colon too many": ("a: b: c\n", ", line 1, column 5: mapping values are not allowed"),
    "a tab": ("a:\n\tb: 1\n", ", line 2, column 1: found character '\\t' that cannot start"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", ", line 3, column 1: found duplicate key a; keep one"),
    "a tag of Python": (
        "a: !!python/object/apply:os.system [true]\n",
        ", line 1, column 4: a tag tag:yaml",
    ),
    "a path of Python": ("a: !!python/object/apply:pathlib.Path [a]\n", "are not read"),
    "bytes": ("a: !!binary aGk=\n", "are not read"),
    "another tag": ("a: !include b.yaml\n", "tags (!…) are not read"),
    "an alias of nothing": ("a: *b\n", "found undefined alias"),
    "two documents": ("a: 1\n---\nb: 1\n", ", line 2, column 1: a second document begins; keep"),
    "a character that is none": ("a: 1\nb: \x07\n", ", line 2: a character that YAML does not"),
    "a value that holds itself": ("a: &a [*a]\n", "or holds itself"),
    "a map that holds itself": ("a: &a\n  b: *a\n", "or holds itself"),
    "aliases of aliases": (BOMB, "more than 50,000; write out"),
    "merges of merges": (MERGE_BOMB, "more than 50,000; write out"),
    "depth": ("[" * 200 + "]" * 200, "nested more than 50 levels deep"),
    "great depth": ("a: " + "[" * 100_000, "nested more than 50 levels deep"),
    "a number too long": ("a: " + "9" * 5000 + "\n", "a value that cannot be read"),
    "too large": ("a: " + "b" * MAX_BYTES, "is larger than 1,000,000 bytes"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf_8_are_shown_by_their_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml, line 2: .* save the file as UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, reason in (
        (tmp_path / "pipe.yaml", "is not a regular file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "nothing.yaml", "No such file"),
    ):
        with pytest.raises(UserError, match=reason):
            read_yaml(path)


def test_a_good_file_means_what_it_means_to_omegaconf(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text(
        "a: 1e-3\nb: 2024-01-02\nc: &c {x: on, y: null}\nd: {<<: *c, z: '${a}'}\ne: ä\nf: 010\n"
    )
    assert read_yaml(path) == OmegaConf.to_container(OmegaConf.load(path))
    path.write_text("")
    assert read_yaml(path) is None
