"""Where the language models' texts come from: files without their header, lines, translations that stay together."""

import gettext
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamerge.testbed import causal_sources as sources
from adamerge.testbed.causal_sources import Document, Files, Lines, Translations, chunks, package_folder, read_catalogue

CATALOGUE = "locale/fr/LC_MESSAGES/messages.mo"


def write_catalogue(file, pairs, order="<"):
    """A .mo file of byte order ``order``, as gettext's manual describes it."""
    entries = sorted((original.encode(), translated.encode()) for original, translated in pairs)
    offset = 28 + 16 * len(entries)
    tables, body = [[], []], b""
    for column in (0, 1):
        for entry in entries:
            tables[column] += [len(entry[column]), offset + len(body)]
            body += entry[column] + b"\0"
    numbers = [0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0, *tables[0], *tables[1]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack(f"{order}{len(numbers)}I", *numbers) + body)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "package_folder", lambda package: tmp_path / package)
    return tmp_path


def test_files_lose_their_header_once_and_are_sorted_by_name(folder):
    (folder / "one" / "sub").mkdir(parents=True)
    (folder / "one" / "b.py").write_text("# licence\n#\n\nx = 1\n# kept\n")
    (folder / "one" / "sub" / "a.py").write_text("y = 'é'\n", encoding="utf-8")
    (folder / "one" / "c.txt").write_text("no\n")
    source = Files("One", ("one",), ("**/*.py", "*.py"), header=r"^(#[^\n]*\n|\s*\n)+")
    assert source.documents() == [Document("one/b.py", "x = 1\n# kept\n"), Document("one/sub/a.py", "y = 'é'\n")]
    assert source.distributions == ("One",)


def test_lines_give_their_last_field(folder):
    (folder / "one").mkdir()
    (folder / "one" / "words.txt").write_text("n1\tfirst\nn2\tsecond\nn3\tx\tthird\n")
    source = Lines("One", "one", "words.txt", lines=2)
    assert source.documents() == [Document("000000", "first\nsecond"), Document("000002", "third")]


@pytest.mark.parametrize("order", "<>")
def test_a_catalogue_of_either_byte_order(tmp_path, order):
    pairs = [("", "Content-Type: text/plain"), ("a", "à"), ("one\0many", "un\0plusieurs"), ("empty", "")]
    write_catalogue(tmp_path / "m.mo", pairs, order)
    assert read_catalogue(tmp_path / "m.mo") == {"a": "à", "one": "un"}


def test_catalogues_are_read_as_gettext_reads_them():
    file = package_folder("trac") / CATALOGUE
    ours = read_catalogue(file)
    with file.open("rb") as opened:
        theirs = gettext.GNUTranslations(opened)
    singular = {original: text for original, text in ours.items() if theirs.gettext(original) != original}
    assert len(singular) > 1000
    assert all(theirs.gettext(original) == text for original, text in singular.items())


def test_a_message_and_its_translations_are_one_document(folder):
    """Two messages a document, in the order of the originals; what is as the original is no translation."""
    write_catalogue(folder / "one" / "fr.mo", [("a", "a-fr"), ("b", "b-fr"), ("c", "c-fr"), ("d", "d")])
    write_catalogue(folder / "one" / "it.mo", [("b", "b-it"), ("c", "c-it")])
    source = Translations([("One", "one", "{}.mo"), ("Two", "one", "missing-{}.mo")], ("fr", "it", "xx"), messages=2)
    texts = [document.text for document in source.documents()]
    assert texts == ["a-fr\nb-fr\nb-it", "c-fr\nc-it"]
    assert len({document.name for document in source.documents()}) == 2
    assert source.distributions == ("One", "Two")


def test_chunks_by_hand():
    assert chunks("ab\ncd\nef", 5) == ["ab\ncd", "ef"]
    assert chunks("ab\ncd\nef", 8) == ["ab\ncd\nef"]
    assert chunks("  ab\n\n\n\ncd  ", 7) == ["  ab", "cd"]  # blank lines at an end go, indentation stays
    assert chunks("one two three", 8) == ["one two", "three"]
    assert chunks("ééé", 4) == ["éé", "é"]  # bytes are counted, characters are never cut
    assert chunks("\n \n", 9) == []


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é\n", max_size=120), st.integers(2, 20))
def test_chunks_lose_nothing_but_white_space(text, size):
    found = chunks(text, size)
    assert all(chunk and len(chunk.encode()) <= size for chunk in found)
    assert "".join("".join(chunk.split()) for chunk in found) == "".join(text.split())


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package'.*adamerge\[demo\]"):
        package_folder("no_such_package")


def test_versions_and_fingerprints():
    source = Files("Trac", ("trac",), ("*.py",))
    assert sources.versions(source).startswith("Trac==1")
    assert sources.fingerprint("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
