"""The table of a comparison: sections in order, classes ranked apart, which way is better, what is not known is empty."""

import copy

from adamerge.runs.comparison_table import print_table, table_of

COSTS = {
    "seconds": 2.5, "steps": 10, "merged_passes": 1120, "teacher_passes": 0, "peak_bytes": 1 << 30, "learned": 308,
    "share": 0.00038,
}  # fmt: skip


def row(average, section, **more):
    return {
        "per_task": {"a": average}, "average": average, "spread": {"average": None}, "gap_closed": 0.25,
        "to_oracle": [average - 0.5, 0.01], "worst_task": ["a", average - 0.5, 0.01], "corrupted": {}, "protocol": {},
        "section": section, **more,
    }  # fmt: skip


def planted(**more):
    methods = {
        "pretrained": row(0.3, "reference"),
        "individual": row(0.9, "reference"),
        "task_arithmetic_0.3": row(0.45, "reference"),
        "task_arithmetic_tuned": row(0.5, "reference"),
        "large": row(0.8, "unlabelled", **{"class": "many"}, costs=COSTS | {"share": 1.0}),
        "small": row(0.6, "unlabelled", **{"class": "few"}, costs=COSTS),
        "smaller": row(0.7, "unlabelled", **{"class": "few"}, costs=COSTS),
        "old": row(0.7, "unlabelled", **{"class": None}, costs=dict.fromkeys(COSTS)),
        "ties": row(0.55, "no data", **{"class": "few"}, costs=COSTS | {"learned": 0, "share": 0.0}),
        "told": row(0.95, "labelled", **{"class": "few"}, costs=COSTS),
    }
    unit = {"name": "accuracy", "unit": "%", "factor": 100.0, "higher_is_better": True}
    return {
        "tasks": ["a"], "metric": unit, "methods": methods, "split": "test", "seeds": [], "leave_out": [], "left_out": {},
        "forward_passes": None, "tuned_lambda": 0.4, **more,
    }  # fmt: skip


def names(table):
    return {part.title: [(one[0], one[1]) for one in part.rows] for part in table.parts}


def test_sections_and_classes_are_ranked_apart():
    assert names(table_of(planted())) == {
        "references": [
            ("", "pretrained"), ("", "task_arithmetic_0.3"), ("", "task_arithmetic_tuned (0.4)"), ("", "individual"),
        ],
        "no data, up to 1% learned": [("1", "ties")],
        "unlabelled, up to 1% learned": [("1", "smaller"), ("2", "small")],
        "unlabelled, above 1% learned": [("1", "large")],
        "unlabelled, cost unknown": [("1", "old")],
        "labelled, up to 1% learned": [("1", "told")],
    }  # fmt: skip


def test_where_less_is_better_the_least_is_first():
    result = planted()
    result["metric"] |= {"higher_is_better": False, "factor": 1.0}
    assert names(table_of(result))["unlabelled, up to 1% learned"] == [("1", "small"), ("2", "smaller")]


def test_cells_by_hand():
    result = planted()
    result["methods"]["small"]["spread"]["average"] = 0.004
    result["methods"]["small"]["protocol"] = {"transductive": True}
    table = table_of(result)
    cells = {
        one[1].rstrip("*"): dict(zip(table.headings, one, strict=True)) for part in table.parts for one in part.rows
    }
    assert cells["small"] == {
        "rank": "2", "method": "small*", "a": "60.0", "average": "60.0", "± seeds": "0.4", "gap closed": "25 %",
        "to oracle": "+10.0", "± samples": "1.0", "worst task": "a +10.0", "seconds": "2.5", "steps": "10",
        "passes": "1,120", "teacher passes": "0", "peak memory": "1.00 GiB", "learned": "308", "share": "0.038 %",
    }  # fmt: skip
    unknown = {key: cells["old"][key] for key in ("seconds", "steps", "passes", "peak memory", "learned", "share")}
    assert set(unknown.values()) == {""} and cells["pretrained"]["seconds"] == ""
    assert any(note.startswith("*: calibrated on the inputs of the test split") for note in table.notes)


def test_corruptions_are_columns():
    result = planted()
    for own in result["methods"].values():
        own["corrupted"] = {"noise": 0.25, "average": 0.25}
    table = table_of(result)
    place = table.headings.index("noise (spoiled)")
    assert {one[place] for part in table.parts for one in part.rows} == {"25.0"}
    assert {len(one) for part in table.parts for one in part.rows} == {len(table.headings)}


def test_what_was_asked_for_is_said():
    table = table_of(
        planted(
            seeds=[0, 1],
            leave_out=["a"],
            forward_passes=11200,
            left_out={"bad, seed 1": "collapsed"},
            split="validation",
        )
    )
    assert table.title == "accuracy on the validation split, %; 11,200 forward passes of the merged model a search"
    told = " ".join(table.notes)
    assert (
        "the seeds 0, 1;" in told
        and "expert and data: a." in told
        and "bad, seed 1 is left out: it has collapsed." in told
    )


def test_without_a_gap_none_is_closed(capsys):
    result = copy.deepcopy(planted())
    result["methods"]["individual"]["average"] = 0.4
    table = table_of(result)
    assert {one[table.headings.index("gap closed")] for part in table.parts for one in part.rows} == {"none"}
    print_table(result)
    out = capsys.readouterr().out
    assert "smaller" in out and "teacher passes" in out and "gap closed: share" in out


def test_what_is_printed_fits_a_terminal_and_says_how_sure_it_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = planted()
    result["methods"]["adamerging_plusplus_layer_wise"] = result["methods"].pop("small")
    result["methods"]["smaller"]["spread"]["average"] = 0.004
    print_table(result)
    lines = capsys.readouterr().out.splitlines()
    first = max(number for number, line in enumerate(lines) if line.startswith("accuracy on the test split"))
    assert max(map(len, lines[first:])) <= 80
    assert any(
        line.split() == ["smaller", "70.0", "±", "0.4", "25", "%", "+20.0", "±", "1.0", "a", "+20.0"] for line in lines
    )
    assert sum(line.startswith("adamerging_plusplus_layer_wise ") for line in lines) == 3
    by_task = lines[: next(number for number, line in enumerate(lines) if line.startswith("costs"))]
    assert any(line.startswith("individual ") for line in by_task)
    costs = lines[len(by_task) : first]
    assert not any(line.startswith("individual ") for line in costs), "what costs nothing is in no table of costs"
