"""Help of a fit: all of our keys, a class's arguments and a task's fields by name, and near names."""

import pytest

from adamerge.runs.help import ELSEWHERE, RUN_KEYS, TRAINER_KEYS, all_keys, fit_help, help_of, near_key


def test_ours_come_first_and_all_of_them():
    text = fit_help()
    places = [text.index(f"--{key}") for key in ("model.backbone", "data.batch_size", "runs", "trainer.max_steps")]
    assert places == sorted(places) and max(map(len, text.splitlines())) <= 120
    for key in all_keys():
        if key.count(".") < 2 and key not in {"model", "trainer"}:
            assert f"--{key}" in text, key


def test_the_keys_are_the_parsers():
    import inspect

    from lightning import Trainer

    from adamerge import Calibration, Descent, Merging, TaskVectors

    known = {f"model.{key}" for key in inspect.signature(Merging).parameters}
    known |= {f"model.search.{key}" for key in inspect.signature(Descent).parameters}
    known |= {f"model.task_vectors.{key}" for key in inspect.signature(TaskVectors).parameters}
    known |= {f"data.{key}" for key in inspect.signature(Calibration).parameters}
    assert {*TRAINER_KEYS} <= {*inspect.signature(Trainer).parameters}
    known |= {f"trainer.{key}" for key in TRAINER_KEYS}
    assert {*all_keys()} == known | {*RUN_KEYS, "seed_everything", "model", "data", "trainer"}
    assert {*ELSEWHERE.values()} <= {*all_keys()}


def test_another_search_has_its_own():
    text = fit_help("adamerge.Bilevel")
    assert "--model.search.inner_lr" in text and "--model.search.inner_lr" not in fit_help()
    assert fit_help("mypaper.Search") is None, "the parser imports it"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.backbone.help=CausalLM", ["--model.backbone.max_length", "samples are cut to so many tokens"]),
        (
            "--data.help=ImageCalibration",
            ["--data.tasks", "each ImageTask has", "image_column='image'", "holds the image"],
        ),
        ("--data.help=LanguageCalibration", ["each LanguageTask has", "messages", "column of a chat"]),
        ("--data.tasks.help=ImageTask", ["--data.tasks.vocabulary", "its class names and templates"]),
        ("--model.objective.help", ["Entropy", "Shannon entropy", "PseudoLabel"]),
        ("--model.parametrization.constraint.help", ["Sigmoid", "coefficients in (0, 1)"]),
        ("--model.parametrization.help=adamerge.parametrizations.LayerWise", ["--model.parametrization.init=0.3"]),
        ("--model.passes.help", ["--model.passes.compiled=false"]),
        ("--model.task_vectors.help", ["--model.task_vectors.exclude", "glob patterns"]),
        ("--data.help", ["ImageCalibration", "TextCalibration"]),
    ],
)
def test_a_key_or_a_class_explains_itself(flag, words):
    text = help_of(flag)
    assert all(word in " ".join(text.split()) for word in words), text


@pytest.mark.parametrize(
    "flag", ["--model.search.optimizer.help=Adam", "--model.search.optimizer.help", "--data.help=x.D"]
)
def test_what_others_define_is_left_to_the_parser(flag):
    assert help_of(flag) is None


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.lrr", "model.search.lr"),
        ("lr", "model.search.lr"),
        ("learning_rate", "model.search.lr"),
        ("model.learning_rate", "model.search.lr"),
        ("batch_size", "data.batch_size"),
        ("maxsteps", "trainer.max_steps"),
        ("trainner", "trainer"),
        ("modell.lr", "model.search.lr"),
        ("output_dir", "runs"),
        ("zzzzzz", None),
    ],
)
def test_the_key_that_was_meant(key, near):
    assert near_key(key) == near
