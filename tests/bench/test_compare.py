"""`cfpp bench --compare`: which of two results is worse, by the metric's direction and tolerance."""

import json

import pytest

from cfpp_rt.bench.latency.compare import LESS_IS_BETTER, compare, differing_machines, parse_tolerances
from cfpp_rt.cli.main import main
from cfpp_rt.errors import InputError

ROW = {"bench": "latency", "contender": "ours", "model": "world", "commit": "a", "frame_ms_p50": 10.0, "fps": 100.0}


@pytest.mark.parametrize(
    "change,regressions",
    [
        ({}, []),
        ({"frame_ms_p50": 10.9}, []),
        ({"frame_ms_p50": 11.1}, ["frame_ms_p50"]),
        ({"frame_ms_p50": 1.0, "fps": 1000.0}, []),
        ({"fps": 89.0}, ["fps"]),
        ({"fps": 89.0, "frame_ms_p50": 20.0}, ["fps", "frame_ms_p50"]),
        ({"fps": None}, ["fps"]),
    ],
    ids=["same", "within", "slower", "better", "fewer", "both", "gone"],
)
def test_regressions(change, regressions):
    lines = compare([ROW], [{**ROW, **change, "commit": "b", "date": "later"}])
    assert [line.split(": ")[1].split()[0] for line in lines] == regressions
    assert all(line.startswith("latency ours world: ") for line in lines)


def test_tolerance_per_metric():
    slower = [{**ROW, "frame_ms_p50": 10.6, "fps": 60.0}]
    assert len(compare([ROW], slower, parse_tolerances(["frame_ms_p50=0.05", "fps=0.5"]))) == 1
    for wrong in ("frame_ms_p50", "frame_ms_p50=x", "frame_ms_p50=-1", "nothing=0.1"):
        with pytest.raises(InputError, match="METRIC=SHARE"):
            parse_tolerances([wrong])


def test_rows_belong_together_by_what_was_measured():
    eager = {**ROW, "contender": "eager", "frame_ms_p50": 30.0}
    assert compare([ROW, eager], [eager, ROW]) == []
    assert len(compare([ROW, eager], [ROW])) == 2  # both metrics of a row that is gone
    assert compare([{**ROW, "frame_ms_p50": 1.0}, ROW], [ROW]) == [], "of several rows the last counts"
    with pytest.raises(InputError, match="nothing to compare"):
        compare([ROW], [eager])


def test_from_nothing_to_something_is_a_regression():
    late = {"bench": "requests", "late_percent": 0.0}
    assert len(compare([late], [{**late, "late_percent": 0.5}])) == 1


def test_every_metric_has_a_direction():
    assert (
        LESS_IS_BETTER["fps"] is False
        and LESS_IS_BETTER["percent_of_roof"] is False
        and LESS_IS_BETTER["ttff_ms"] is True
    )


def test_other_machines_are_named():
    here = {**ROW, "cpu": "EPYC", "threads": 1}
    assert differing_machines([here], [here]) is None
    assert differing_machines([here], [{**here, "threads": 2}]) == "threads differs: 1 before, 2 after"


def test_command(tmp_path, capsys):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    before.write_text(json.dumps(ROW) + "\n")
    after.write_text(json.dumps({**ROW, "frame_ms_p50": 20.0}) + "\n")
    assert main(["bench", "--compare", str(before), str(before)]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--compare", str(before), str(after)])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "latency ours world: frame_ms_p50 was 10, is 20 (2.00 x)"
    after.write_text("{}\nno json")
    assert main(["bench", "--compare", str(before), str(after)]) == 2
    assert "b.jsonl, line 2" in capsys.readouterr().err
