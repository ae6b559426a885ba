"""A pool of single data files, as the README has it: fitted, told of where the fit begins, and tested."""

import json

from pico import pico_pool
from running import command, fit_words, without_pictures, write_yaml

from adamerge.io.untrusted_files import read_json


def language_pool(tmp_path):
    pool = pico_pool("llama", tmp_path / "models")
    sql = "".join(json.dumps({"question": "a" * (n % 5 + 1), "query": "b"}) + "\n" for n in range(40))
    (tmp_path / "sql.jsonl").write_text(sql)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    sql_task = {"dataset": str(tmp_path / "sql.jsonl"), "text": "{question}", "response": "{query}"}
    tasks = {"one": sql_task, "two": {"dataset": str(tmp_path / "chat.jsonl"), "messages": "messages"}}
    config = {
        "model": {
            "backbone": {"class_path": "adamerge.backbones.CausalLM", "init_args": {"model": str(pool["base"])}},
            "task_vectors": {"base": str(pool["base"]), "experts": {k: str(v) for k, v in pool["experts"].items()}},
        },
        "data": {"class_path": "adamerge.data.LanguageCalibration", "init_args": {"tasks": tasks}},
    }
    return write_yaml(tmp_path / "pool.yaml", config)


def test_it_is_fitted_and_tested_on_rows_that_are_drawn_apart(tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    pool, runs = language_pool(tmp_path), f"--runs={tmp_path / 'runs'}"
    done = command(capfd, "fit", *fit_words(pool, runs, "--name=n", "--id=1", "--leave_out=[two]", steps=1))
    assert done.code == 0, done.err
    assert done.out.splitlines()[:3] == [
        "one: calibration 4 (drawn from 40 rows of train, seed 0), validation 4 (drawn), test 8 (drawn)",
        "two: calibration 3 (drawn from 30 rows of train, seed 0), validation 3 (drawn), test 6 (drawn)",
        "two: calibrated on, though no expert of that name is merged;"
        " --leave_out takes experts alone, --tasks narrows experts and data",
    ]
    run = tmp_path / "runs" / "n" / "1"
    drawn = read_json(run / "summary.json")["protocol"]["drawn_from_train"]
    assert drawn["one"] == {"calibration": 4, "validation": 4, "test": 8, "of": 40}
    tested = command(capfd, "test", run)
    assert tested.code == 0 and set(read_json(run / "summary.json")["test"]["per_task"]) == {"one", "two"}
    (tmp_path / "chat.jsonl").write_text('{"messages": [\n')
    refused = command(capfd, "fit", *fit_words(pool, runs, "--name=n", "--id=2", steps=1))
    assert refused.code == 3 and "task 'two': the data file" in refused.error and "line 1 is no JSON" in refused.error
    assert not (tmp_path / "runs" / "n" / "2").exists()
