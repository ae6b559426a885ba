"""Texts of language models: templates over columns, words for numbers, chats, and tokens as labels."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from adamerge.backbones import IGNORED
from adamerge.data import LanguageCalibration, LanguageTask
from adamerge.errors import ConfigError, DataError


def letters(sample):
    text = sample if isinstance(sample, str) else sample["prompt"] + sample["response"]
    prompt = 0 if isinstance(sample, str) else len(sample["prompt"])
    counts = [False] * prompt + [True] * (len(text) - prompt)
    return {"input_ids": torch.tensor([ord(letter) for letter in text]), "counts": torch.tensor(counts)}


def following(sample):
    after = torch.where(sample["counts"], sample["input_ids"], IGNORED)
    return torch.cat([after[1:], torch.tensor([IGNORED])])


READER = SimpleNamespace(preprocess=letters, labels=following)


@pytest.fixture
def folder(tmp_path):
    def rows(start):
        texts = [f"t{number}" for number in range(start, start + 20)]
        return datasets.Dataset.from_dict({"premise": texts, "label": [number % 2 for number in range(20)]})

    datasets.DatasetDict({"train": rows(0), "test": rows(100)}).save_to_disk(tmp_path / "pairs")
    return str(tmp_path / "pairs")


def test_the_whole_text_counts_without_a_response(folder):
    data = LanguageCalibration(tasks={"one": LanguageTask(folder, "<{premise}>")})
    data.serve(READER)
    assert [len(data.rows("one", split)) for split in ("calibration", "validation", "train", "test")] == [2, 2, 16, 20]
    labels = data.labels("one", "test")
    assert "".join(map(chr, data.samples("one", "test")[0]["input_ids"])) == "<t100>"
    assert labels[0].tolist() == [*map(ord, "t100>"), IGNORED]
    assert data.labelled_tasks("test") == ["one"] and data.tasks.keys() == {"one"}


def test_prompts_responses_and_words_for_numbers(folder):
    task = LanguageTask(folder, "q {premise} a ", response="{label}", words={"label": ["no", "yes"]})
    data = LanguageCalibration(tasks={"one": task})
    data.serve(READER)
    assert task.fields() == ["label", "premise"]
    assert task.sample({"premise": "p", "label": 1}) == {"prompt": "q p a ", "response": "yes"}
    found = [number for number in data.labels("one", "test")[1].tolist() if number != IGNORED]
    assert "".join(map(chr, found)) == "yes"


@pytest.mark.parametrize(
    ("response", "words", "said"), [("{label}", {"label": ["no", "yes"]}, "yes"), ("{label:.1f}", {}, "1.0")]
)
def test_responses_reach_no_unlabelled_calibration(folder, response, words, said):
    task = LanguageTask(folder, "q {premise} a ", response, words=words)
    row, whole = {"premise": "p", "label": 1}, {"prompt": "q p a ", "response": said}
    for labelled, split, expected in (
        (False, "calibration", "q p a "),
        (False, "test", whole),
        (True, "calibration", whole),
    ):
        assert LanguageCalibration(tasks={"one": task}, labelled=labelled).read("one", split, row) == expected


def test_responses_that_are_input_are_read_and_the_protocol_says_so(folder):
    plain = LanguageTask(folder, "{premise}", "{label}")
    read = LanguageTask(folder, "{premise}", "{label}", response_is_input=True)
    chat = LanguageTask(folder, messages="premise")
    row = {"premise": "p", "label": 1}
    data = LanguageCalibration(tasks={"plain": plain, "read": read, "chat": chat})
    assert data.read("plain", "calibration", row) == "p"
    assert data.read("read", "calibration", row) == {"prompt": "p", "response": "1"}
    assert data.protocol["responses_read_as_text"] == ["read", "chat"]
    assert "responses_read_as_text" not in LanguageCalibration(tasks={"plain": plain}).protocol
    assert "responses_read_as_text" not in LanguageCalibration(tasks={"read": read}, labelled=True).protocol
    assert LanguageCalibration(tasks={"read": read, "chat": chat}, only=["read"]).protocol[
        "responses_read_as_text"
    ] == ["read"]


@pytest.mark.parametrize("number", [-1, 2, None, 0.5])
def test_a_number_that_no_word_stands_for_is_refused(folder, number):
    """-1 where labels are not published; Python would take the last word."""
    task = LanguageTask(folder, "{premise}", response="{label}", words={"label": ["no", "yes"]})
    with pytest.raises(DataError, match=r"(?s)column 'label' holds .*0 to 1: .*no.*yes.*test: validation"):
        task.sample({"premise": "p", "label": number})
    assert task.sample({"premise": "p", "label": number}, responds=False) == "p", "where it is not asked for"


@pytest.mark.parametrize("key", ["text", "response"])
@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{", "cannot be filled"),
        ("a }", "cannot be filled"),
        ("{}", "names no column"),
        ("{0}: {a}", "names no column"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused_before_the_data_are_read(key, template, told):
    with pytest.raises(ConfigError) as found:
        LanguageTask("nowhere", **{key: template})
    assert found.value.what.startswith(f"the task of nowhere: {key} '{template}' {told}")


def test_a_text_is_made_of_columns():
    with pytest.raises(ConfigError, match="text 'hello' is the same for all rows"):
        LanguageTask("nowhere", "hello")
    assert LanguageTask("nowhere", "{{{a.b}}} {c[0]:>3}", "{d!r}").fields() == ["a", "c", "d"]


def test_chats_are_handed_on():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    task = LanguageTask("anywhere", messages="chat")
    assert task.fields() == ["chat"] and task.sample({"chat": messages}) == {"messages": messages}


def test_files_of_json_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {number}"}) for number in range(10)))
    data = LanguageCalibration(tasks={"one": LanguageTask(str(path))}, calibration_fraction=0.3)
    assert len(data.rows("one", "calibration")) == 3


def test_a_column_that_lacks_is_named(folder):
    with pytest.raises(DataError, match="task 'one': split '.*' of .* has no column 'hypothesis'"):
        LanguageCalibration(tasks={"one": LanguageTask(folder, "{hypothesis}")}).rows("one", "test")


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_an_empty_or_broken_file_is_named(tmp_path, content):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="task 'one'.*"):
        LanguageCalibration(tasks={"one": LanguageTask(str(path))}).rows("one", "calibration")


def test_labelled_batches_hold_the_tokens(folder):
    data = LanguageCalibration(tasks={"one": LanguageTask(folder, "{premise}")}, batch_size=3, labelled=True)
    data.serve(READER)
    data.loop = SimpleNamespace(max_steps=2, global_rank=0, world_size=1, global_step=0)
    batch = next(iter(data.train_dataloader()))["one"]
    for ids, labels in zip(batch.inputs["input_ids"], batch.labels, strict=True):
        length = int((ids != 0).sum())
        assert labels[: length - 1].tolist() == ids[1:length].tolist() and set(labels[length - 1 :].tolist()) == {
            IGNORED
        }


def test_a_response_that_names_no_column_is_refused():
    with pytest.raises(ConfigError, match="^the task of nowhere: response 'answer' is the same for all rows") as caught:
        LanguageTask("nowhere", "{question}", "answer")
    assert "response: '{answer}'" in caught.value.todo
