# SPDX-License-Identifier: MIT
"""The README's table of results."""

import pytest

from benchmarks import table
from benchmarks.families import CASES
from benchmarks.harness import records

ROOT = table.ROOT


def record(folder, date, micro_us, complete=True):
    case = next(case for case in CASES if case.device == "cpu" and case.op == "unmerge" and case.targets)
    row = {"case": case.name, "provider": "cpu", "median_us": micro_us}
    judged = case.targets[0].judge({"speedup": 1000 / micro_us})
    rows = [{**row, "provider": "baseline", "median_us": 1000.0, "targets": []}, {**row, "targets": [judged]}]
    machine = {"cpu": "Some CPU", "gpu": None, "threads": 2, "torch": "2", "commit": "c0ffee" * 7, "dirty": False}
    settings = {"device": "cpu", "suite": "all", "complete": complete}
    result = {"machine": {**machine, "date": date}, "settings": settings, "rows": rows}
    records.write_json(folder / f"{date}.json", result)


def test_the_table_shows_the_newest_complete_run(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    record(results, "2026-01-02", 100.0)
    record(results, "2026-01-03", 200.0)
    record(results, "2026-01-04", 400.0, complete=False)
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    options = ["--readme", str(readme), "--results", str(results)]

    assert table.main([*options, "--check"]) == 1
    assert "old" in readme.read_text()
    assert table.main(options) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 1 ms | - | - | 200 us (cpu) | 5.0x | at least 6x the PyTorch baseline | **missed** |" in text
    assert "[2026-01-03.json](results/2026-01-03.json)" in text
    assert "| (256, 577, 1024), r 23, bf16 | at least 70% of the copy bandwidth |" in text
    assert "| at least 15x the PyTorch baseline | not measured yet |" in text
    assert table.main([*options, "--check"]) == 0
    readme.write_text(text.replace("5.0x", "50x"))
    assert table.main([*options, "--check"]) == 1


def test_a_target_that_the_run_did_not_judge(tmp_path):
    record(tmp_path, "2026-01-02", 100.0)
    path = tmp_path / "2026-01-02.json"
    result = records.read_json(path)
    result["rows"][1]["targets"][0]["bound"] = 5
    del result["schema"]
    records.write_json(path, result)
    assert "| 100 us (cpu) | - | at least 6x the PyTorch baseline | not measured |" in table.build(tmp_path, tmp_path)


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="expected schema 2, got 1"):
        table.build(tmp_path, tmp_path)


def test_a_readme_without_markers(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(SystemExit):
        table.main(["--readme", str(readme), "--results", str(tmp_path)])
    assert "results:begin" in capsys.readouterr().err


def test_the_readme_agrees_with_the_results():
    assert table.main(["--check"]) == 0
