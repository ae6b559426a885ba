"""Where the texts come from: each source gives what its package says, with the right label, the same way twice."""

import gettext
import json
import struct
import unicodedata

import pytest

from adamerge.testbed import text_sources
from adamerge.testbed.text_files import package_folder
from adamerge.testbed.text_python import Text
from adamerge.testbed.text_sources import (
    CharacterNames,
    Errors,
    Example,
    Roles,
    Snippets,
    Summaries,
    Translations,
    Verses,
    catalogue,
)

HARVESTS = {
    "boxes": (
        Text("function", "Open it."),
        Text("class", "All of Boxes."),
        Text("error", "no lid", "KeyError"),
        Text("comment", "Why."),
    ),
    "lids": (Text("class", "Close it."), Text("error", "too wide", "ValueError"), Text("error", "odd", "OddError")),
}


@pytest.fixture
def harvested(monkeypatch):
    monkeypatch.setattr(text_sources, "harvest", HARVESTS.__getitem__)


def test_a_catalogue_is_read_as_gettext_reads_it():
    file = package_folder("django") / "conf/locale/de/LC_MESSAGES/django.mo"
    mine = catalogue(file.read_bytes())
    with file.open("rb") as opened:
        theirs = gettext.GNUTranslations(opened)
    messages = [message for message in mine if message and "\0" not in message]
    assert len(messages) > 200
    assert all(theirs.gettext(message) == mine[message] for message in messages)


def test_what_is_no_catalogue_is_refused():
    with pytest.raises(ValueError, match="not a little-endian gettext catalogue: it begins with"):
        catalogue(struct.pack(">5I", 0x950412DE, 0, 0, 28, 28))


def test_translations_of_one_message_share_a_key():
    examples = list(Translations(("de", "fr")).examples())
    german = {key: text for text, label, key in examples if label == 0}
    french = {key: text for text, label, key in examples if label == 1}
    assert german["This field is required."] == "Dieses Feld ist zwingend erforderlich."
    assert french["This field is required."] == "Ce champ est obligatoire."
    assert all("\0" not in key and text != key for text, _, key in examples)


def test_snippets_are_windows_that_do_not_overlap(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\n\n  two\nthree\nfour\nfive\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\n\xff\n")
    (tmp_path / "c.md").write_text("six\nseven\n")
    monkeypatch.setattr(text_sources, "package_folder", lambda package: tmp_path)
    examples = list(Snippets((("here", "*.txt"), ("here", "*.md"))).examples())
    assert examples == [Example("one two", 0), Example("three four", 0), Example("six seven", 1)]


def test_summaries_leave_out_those_that_name_their_package(harvested):
    assert list(Summaries(("boxes", "lids")).examples()) == [Example("Open it.", 0), Example("Close it.", 1)]


def test_roles_are_labelled_in_their_order(harvested):
    examples = list(Roles(("boxes", "lids"), ("error", "function", "class")).examples())
    assert examples == [
        Example("Open it.", 1),
        Example("All of Boxes.", 2),
        Example("no lid", 0),
        Example("Close it.", 2),
        Example("too wide", 0),
        Example("odd", 0),
    ]


def test_errors_are_labelled_by_their_exception(harvested):
    source = Errors(("boxes", "lids"), (("ValueError",), ("IndexError", "KeyError")))
    assert list(source.examples()) == [Example("no lid", 1), Example("too wide", 0)]


def test_verses_are_those_of_the_books():
    examples = list(Verses(("Psalms", "Genesis")).examples())
    assert Example("In the beginning God created the heaven and the earth.", 1) in examples
    with (package_folder("bible") / "data" / "kjv.jsonl").open() as file:
        books = [json.loads(line)["book"] for line in file]
    assert len(examples) == books.count("Psalms") + books.count("Genesis")


def test_character_names_are_unicodes():
    examples = list(CharacterNames((((0x2190, 0x2191),), ((0x2600, 0x2600), (0x2602, 0x2602)))).examples())
    assert [label for _, label, _ in examples] == [0, 0, 1, 1]
    assert [text for text, _, _ in examples] == [unicodedata.name(sign).lower() for sign in "←↑☀☂"]
