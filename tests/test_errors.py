"""Errors: one family, whose message finishes the debugging, and whose exit code says whose fault it is."""

import inspect

import pytest

from adamerge import errors
from adamerge.errors import did_you_mean, nearest

FAMILY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
CODES = {
    "AdamergeError": 3, "ConfigError": 2, "CheckpointError": 3, "CoefficientsError": 3, "DataError": 3,
    "DivergedError": 4, "CollapsedError": 4, "ExportError": 5,
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_family_and_exit_codes(kind):
    assert issubclass(kind, errors.AdamergeError) and kind.exit_code == CODES[kind.__name__]
    assert kind.__doc__ and kind.exit_code not in (0, 1)


def test_every_field_is_a_line_and_an_attribute():
    error = errors.CheckpointError("what", where="here", expected=3, got=0, todo="do it")
    assert str(error).splitlines() == ["what", "  where: here", "  expected 3, got 0", "  what to do: do it"]
    assert (error.what, error.where, error.expected, error.got, error.todo) == ("what", "here", 3, 0, "do it")


def test_the_first_line_stands_alone():
    assert str(errors.DataError("what")) == "what"


@pytest.mark.parametrize(
    ("known", "line"),
    [
        ({"got": 0}, "  got 0"),
        ({"expected": 3}, "  expected 3"),
        ({"expected": 3, "got": None}, "  expected 3"),
        ({"expected": 0, "got": False}, "  expected 0, got False"),
    ],
)
def test_what_is_not_known_is_not_printed(known, line):
    assert str(errors.DataError("what", **known)).splitlines() == ["what", line]


def test_siblings_do_not_catch_each_other():
    with pytest.raises(errors.CoefficientsError):
        try:
            raise errors.CoefficientsError("it")
        except errors.CheckpointError:
            pytest.fail("a sibling caught it")


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("Entrpy", ["Entropy", "Trust"], "Entropy"),
        ("blockcopy", ["WholeCopy", "BlockCopy"], "BlockCopy"),
        ("zzz", ["Entropy"], None),
        ("a", [], None),
    ],
)
def test_the_word_that_was_probably_meant(word, known, near):
    assert nearest(word, known) == near
    assert did_you_mean(word, known) == ("" if near is None else f"; did you mean '{near}'?")


@pytest.mark.parametrize(
    ("what", "whose", "told"),
    [
        ("'/a/base': no such file", "base", "base: '/a/base': no such file"),
        ("expert 'cars' lacks 'x'", "expert 'cars'", "expert 'cars' lacks 'x'"),
        ("no 'x'", "expert 'cars'", "expert 'cars': no 'x'"),
        ("no 'x'", "", "no 'x'"),
    ],
)
def test_an_error_says_whose_it_is_once(what, whose, told):
    error = errors.CheckpointError(what, where="w", expected=1, got=2, todo="t").told_of(whose)
    assert type(error) is errors.CheckpointError and error.what == told
    assert (error.where, error.expected, error.got, error.todo) == ("w", 1, 2, "t")
    assert error.told_of("x", "other").todo == "other"
