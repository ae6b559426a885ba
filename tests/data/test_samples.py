"""Samples: what rows can be samples is known at once, each is decoded once, and what cannot be used is counted."""

import re
from collections import Counter

import datasets
import pytest
import torch

from adamerge.data import samples as module
from adamerge.data.row_numbers import numbered
from adamerge.data.samples import Samples, can_be_used, skipped_lines
from adamerge.errors import DataError


def letters(text):
    if "!" in text:
        raise OSError("broken\ndata stream")
    return {"input_ids": torch.tensor([ord(letter) for letter in text])}


def pixels(text):
    if "!" in text:
        raise DataError("the text is loud", todo="whisper")
    return torch.full((3,), ord(text[0]), dtype=torch.uint8)


def table(texts):
    return datasets.Dataset.from_dict({"text": texts, "label": list(range(len(texts)))})


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict({"text": ["abc", "d", "ef"], "label": [0, 1, 1], "other": ["x", "y", "z"]})


def test_several_columns_are_one_sample(rows):
    seen = []
    samples = Samples(rows, ["text", "other"], lambda row: seen.append(row) or torch.zeros(1), "letters")
    assert seen[0] == {"text": "abc", "other": "x"} and len(samples) == len(seen) == 3


def test_a_sample_is_decoded_once(rows):
    seen = []
    samples = Samples(rows, ["text"], lambda text: seen.append(text) or letters(text), "letters")
    for _ in range(3):
        assert [chr(samples[i]["input_ids"][0]) for i in (1, 0, 2)] == ["d", "a", "e"]
    assert seen == ["abc", "d", "ef"]


def test_what_is_beyond_the_bytes_that_are_kept_is_read_again_when_it_is_drawn(rows, monkeypatch):
    monkeypatch.setattr(module, "KEPT_AHEAD", 1)
    seen = Counter()

    def counted(text):
        seen[text] += 1
        return pixels(text)

    samples = Samples(rows, ["text"], counted, "letters")
    assert seen == {"abc": 1, "d": 1, "ef": 1} and len(samples) == 3
    assert [int(samples[i][0]) for i in (2, 2, 0)] == [ord("e"), ord("e"), ord("a")]
    assert seen == {"abc": 1, "d": 1, "ef": 2}, "the first fitted in; the last is kept once it was drawn"


@pytest.mark.parametrize("read", [letters, pixels])
def test_processes_that_read_change_nothing(read):
    """The same samples and reasons, and no number of the global generator is drawn."""
    texts = [*"abcdefghij", "loud!", *"klmnopqrst"]
    state = torch.get_rng_state()
    alone, helped = (Samples(table(texts), ["text"], read, "t", workers=workers) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert alone.numbers == helped.numbers == [*range(10), *range(11, 21)] and alone.skipped == helped.skipped
    for one, other in zip(map(alone.__getitem__, range(20)), map(helped.__getitem__, range(20)), strict=True):
        same = [(one, other)] if isinstance(one, torch.Tensor) else [(one[key], other[key]) for key in one]
        assert all(torch.equal(*pair) for pair in same)
    assert read is letters or (helped[3].is_shared() and not alone[3].is_shared())


def test_rows_that_cannot_be_used_are_skipped_and_counted():
    rows = numbered(table([*"abcdefghij", "loud!", *"klmnopqrst"]), "train").shuffle(seed=3)
    samples = Samples(rows, ["text"], letters, "letters")
    expected = [text for text in rows["text"] if text != "loud!"]
    assert ["".join(map(chr, samples[i]["input_ids"])) for i in range(len(samples))] == expected
    assert list(samples.skipped.values()) == ["broken data stream"]
    assert skipped_lines({("letters", "test"): samples}) == [
        "task 'letters': 1 of 21 rows of the test split cannot be used and are skipped; "
        "row 10 (counted from 0) of split 'train': broken data stream"
    ]
    assert skipped_lines({("letters", "test"): Samples(rows.select(range(3)), ["text"], len_of, "x")}) == []


def len_of(text):
    return torch.tensor([len(text)])


@pytest.mark.parametrize(("share", "ends"), [(0.05, True), (0.1, False), (0.0, True)])
def test_up_to_a_share(share, ends):
    """Two of twenty."""
    rows = table([*"abcdefghi", "one!", "two!", *"jklmnopqr"])
    if not ends:
        assert len(Samples(rows, ["text"], pixels, "letters", unusable_share=share)) == 18
        return
    with pytest.raises(DataError) as found:
        Samples(rows, ["text"], pixels, "letters", unusable_share=share)
    told = 2 if share else 1
    first = f"letters: {told} of the first {9 + told} of 20 rows cannot be used; first row 9: the text is loud"
    assert found.value.what == first
    assert found.value.todo.startswith("whisper; or ") and "data.unusable_share" in found.value.todo
    assert ("row 10: the text is loud" in str(found.value)) is (told == 2)
    assert f"at most {share:.0%} of the rows" in str(found.value)


def test_where_no_row_can_be_used_there_is_nothing_to_fit():
    with pytest.raises(DataError, match=re.escape("letters: 2 of 2 rows cannot be used; first row 0: the text is")):
        Samples(table(["a!", "b!"]), ["text"], pixels, "letters", unusable_share=1.0)


def test_a_row_that_can_be_read_no_more_is_named():
    gone = set()

    def read(text):
        if text in gone:
            raise FileNotFoundError("no such picture")
        return pixels(text)

    samples = Samples(table(["a", "b"]), ["text"], read, "letters")
    samples._decoded.clear()  # as beyond what is kept
    gone.add("b")
    assert int(samples[0][0]) == ord("a")
    with pytest.raises(DataError, match="letters: row 1 cannot be read any more: no such picture"):
        samples[1]


def test_memory_that_runs_out_is_no_fault_of_a_row():
    def too_large(text):
        raise MemoryError

    with pytest.raises(MemoryError):
        Samples(table(["a"]), ["text"], too_large, "letters", unusable_share=1.0)


def test_pictures_must_have_one_shape(rows):
    with pytest.raises(DataError, match="letters: row 1 has another shape"):
        Samples(rows, ["text"], lambda text: torch.zeros(len(text)), "letters")


def test_whether_one_row_can_be_used():
    rows = table(["a", "b!"])
    assert [can_be_used(rows, ["text"], pixels, number) for number in (0, 1)] == [True, False]
