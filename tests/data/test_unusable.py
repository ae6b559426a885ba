"""Rows of real files that no sample can be made of: skipped, counted, told by row and path, and refused beyond a share."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from adamerge.data import (
    ImageCalibration,
    ImageTask,
    ImageTextCalibration,
    ImageTextTask,
    LanguageCalibration,
    LanguageTask,
    TextCalibration,
    TextTask,
)
from adamerge.errors import DataError


class Pictures:
    """Stands for a backbone that takes pictures, or what holds one."""

    def check_tasks(self, tasks):
        return

    def preprocess(self, sample):
        return pil_to_tensor(sample["image"] if isinstance(sample, dict) else sample)


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def pets(tmp_path):
    """Forty pictures, of which one is empty, one is cut, one is no picture, and one is of numbers without a white."""
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        for n in range(20):
            noise(n).save(tmp_path / "test" / name / f"{n:02}.png")
    cat = tmp_path / "test" / "cat"
    (cat / "03.png").write_bytes(b"")
    whole = (cat / "07.png").read_bytes()
    (cat / "07.png").write_bytes(whole[: len(whole) // 2])
    (cat / "11.png").write_text("not a picture")
    (cat / "12.png").unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(cat / "12.tiff")
    return tmp_path


def of_pets(folder, **arguments):
    """Calibrated on its one split, all of it, in its order."""
    return ImageCalibration(tasks={"pets": ImageTask(str(folder), ["a {}"])}, transductive=True, **arguments)


def test_broken_pictures_are_skipped_by_their_paths(pets):
    data = of_pets(pets, unusable_share=0.1)
    data.check(Pictures())
    samples = data.samples("pets", "calibration")
    assert len(samples) == 36 and len(samples.skipped) == 4 == data.skipped("calibration")["pets"]
    told = [samples.described(number) for number in samples.skipped]
    assert [line.rpartition("/")[2] for line in told] == ["03.png", "07.png", "11.png", "12.tiff"]
    assert told[1] == f"row 7 (counted from 0) of split 'test', picture {pets / 'test/cat/07.png'}"
    assert data.protocol["skipped_rows"] == {"pets": 4} and data.protocol["calibration_samples"] == {"pets": 36}
    (line,) = [line for line in data.notices() if "skipped" in line]
    assert line.startswith("task 'pets': 4 of 40 rows of the calibration split cannot be used and are skipped; row 3 ")
    assert "03.png: " in line and "07.png: " in line
    # what is left stands beside its own label
    labels = [int(data.labels("pets", "calibration")[i]) for i in range(36)]
    assert labels == [0] * 16 + [1] * 20


def test_more_than_the_share_is_an_error_with_counts_and_examples(pets):
    data = of_pets(pets)
    with pytest.raises(DataError) as found:
        data.check(Pictures())
    assert found.match(r"task 'pets', calibration split: 3 of the first 12 of 40 rows cannot be used; first row 3 ")
    assert "cat/03.png" in found.value.what and "cat/07.png" in str(found.value) and "5%" in str(found.value)


def test_a_drawn_row_is_told_by_its_number_in_the_file(tmp_path):
    texts = [f"text {n}" for n in range(40)]
    texts[23] = ""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text, "label": 0}) for text in texts))
    task = TextTask(str(tmp_path / "rows.jsonl"), classnames=["a", "b"])
    data = TextCalibration(tasks={"one": task}, calibration_fraction=0.8, unusable_share=0.1)

    class Words(Pictures):
        def preprocess(self, text):
            if not text:
                raise DataError("the text is empty")
            return {"input_ids": np.frombuffer(text.encode(), dtype=np.uint8)}

    data.serve(Words())
    skipped = data.samples("one", "calibration")
    assert list(skipped.skipped) != [23] and skipped.rows[next(iter(skipped.skipped))]["text"] == ""
    assert skipped.examples() == "row 23 (counted from 0) of split 'train': the text is empty"


TEXTS = ["a black cat", "", None, "   ", "a", "white dogs", "a dog that is as long as all this", "cats and dogs"]


@pytest.fixture
def saved(tmp_path):
    def save(**columns):
        rows = datasets.Dataset.from_dict(columns)
        datasets.DatasetDict({"calibration": rows, "test": rows}).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return save


def test_texts_of_encoders(pool_of, saved):
    backbone = pool_of("bert")["backbone"]()
    folder = saved(text=TEXTS, label=[n % 2 for n in range(8)])
    data = TextCalibration(tasks={"one": TextTask(folder, classnames=["a", "b"])}, unusable_share=0.5)
    data.check(backbone)
    assert list(data.samples("one", "calibration").skipped.items()) == [
        (1, "the text is empty"), (2, "there is no text in it"), (3, "the text is empty"),
    ]  # fmt: skip
    (batch,) = data.eval_dataloader("one", "test")
    assert batch.labels.tolist() == [0, 0, 1, 0, 1] and len(batch.inputs["input_ids"]) == 5
    assert data.skipped("test") == {"one": 3}


def test_texts_and_responses_of_language_models(pool_of, saved):
    backbone = pool_of("llama")["backbone"]()
    folder = saved(text=TEXTS, answer=["yes", "no", "yes", "no", None, "", "yes", "no"])
    whole = LanguageCalibration(tasks={"one": LanguageTask(folder)}, unusable_share=0.5)
    whole.check(backbone)
    assert set(whole.samples("one", "calibration").skipped) >= {1, 2}
    backbone.max_length = 12
    answered = LanguageCalibration(
        tasks={"one": LanguageTask(folder, "{text}:", "{answer}")}, labelled=True, unusable_share=0.9
    )
    answered.check(backbone)
    reasons = answered.samples("one", "calibration").skipped
    assert reasons[4] == reasons[5] == "the response is empty"
    assert reasons[6].startswith("there is no token to predict in the first 12 of "), "its prompt leaves no room"
    assert len(answered.labels("one", "test")) == len(answered.samples("one", "test")) == 8 - len(reasons)


def test_blank_lines_of_a_text_file(pool_of, tmp_path):
    lines = [f"a line of text {n}" if n % 20 else "" for n in range(100)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    data = LanguageCalibration(tasks={"one": LanguageTask(str(tmp_path / "lines.txt"))}, calibration_fraction=0.8)
    data.unusable_share = 0.1
    data.check(pool_of("llama")["backbone"]())
    samples = data.samples("one", "calibration")
    assert len(samples) + len(samples.skipped) == 80 and samples.skipped
    assert all(data.rows("one", "calibration")[number]["text"] == "" for number in samples.skipped)


def test_questions_about_pictures_that_are_broken(tmp_path):
    for n in range(4):
        noise(n).save(tmp_path / f"{n}.png")
    (tmp_path / "2.png").write_bytes(b"")
    rows = [{"image_path": f"{n}.png", "question": "what?"} for n in range(4)]
    (tmp_path / "vqa.json").write_text(json.dumps(rows))
    data = ImageTextCalibration(tasks={"vqa": ImageTextTask(str(tmp_path / "vqa.json"))}, unusable_share=0.3)
    data.check(Pictures())
    (told,) = data.samples("vqa", "calibration").skipped.values()
    assert "identify" in told and "\n".join(data.notices()).count(f"picture {tmp_path / '2.png'}") == 1


def test_what_is_skipped_is_no_matter_of_processes_or_of_what_a_fit_draws(pets):
    kept = []
    for workers in (0, 2):
        data = of_pets(pets, unusable_share=0.1, workers=workers)
        data.serve(Pictures())
        kept.append(data.samples("pets", "calibration").numbers)
    assert kept[0] == kept[1] == [n for n in range(40) if n not in (3, 7, 11, 12)]


def test_shots_are_of_rows_that_can_be_used(pets):
    for seed in range(3):
        data = of_pets(pets, labelled=True, shots=16, seed=seed)
        data.check(Pictures())
        assert len(data.samples("pets", "calibration")) == 32 and not data.skipped("calibration")
        found = [int(label) for label in map(data.labels("pets", "calibration").__getitem__, range(32))]
        assert found == [0] * 16 + [1] * 16
    with pytest.raises(DataError, match="class 0 has fewer samples than shots"):
        of_pets(pets, labelled=True, shots=17).check(Pictures())
