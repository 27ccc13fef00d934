"""The small-scale study: its rows, the runner that is killed and goes on, the report.

    python -m pytest tests/test_tables.py -n0
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lm.cli import _reject_unknown_flags
from lm.records import InputError, write_json
from lm.tables import PAPER_TABLES
from scripts import tables, tables_data, tables_report
from scripts.tables_cells import (
    Cell,
    Study,
    chosen_rate,
    commands_of,
    figures_in,
    needs,
    plan,
)
from scripts.tables_statistics import Difference, by_prompt, difference, over_prompts, over_seeds

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = yaml.safe_load((ROOT / tables.CONFIG).read_text(encoding="utf-8"))
EXPECTED = ROOT / "tests" / "tables_expected.md"
SIZES = list(SETTINGS["sizes"])


def study(tmp_path: Path, rows: dict, recipes: dict | None = None, trials: int = 2) -> Study:
    """A study of tiny commands: `{python}` prints, measures or fails in a fraction of a second."""
    measure = ("python -c \"import json,sys; sys.path; "
               "open('{cell}/a.results.json','w').write(json.dumps(dict(benchmark='constraints', "
               "models=dict(greedy={{}}), answers=[dict(outputs=dict(greedy=dict(satisfied=[h]))) "
               "for h in map(bool, {held})])))\"")
    recipes = recipes or {"measured": {"measure": "greedy", "results": "*.results.json",
                                       "commands": ["python -c \"{first}\"", measure],
                                       "defaults": {"held": "[0, 1]", "first": "0"}}}
    return Study({"model": "none/here", "sizes": {"small": {"seeds": [0, 1], "trials": trials}},
                  "recipes": recipes, "rows": rows, "tables": []}, "small", tmp_path / "small")


def run_all(given: Study, only: str = "") -> dict[str, str]:
    return tables.run_all(given, plan(given, only), jobs=2, threads=1)


def cell(given: Study, name: str) -> dict:
    return json.loads((given.folder / name / "cell.json").read_text())


def one_of_each(given: Study) -> dict[str, Cell]:
    """A cell of each row, with the first seed if it has one."""
    return {one.row: one for one in reversed(plan(given)) if not one.rate}


@pytest.mark.parametrize("size", SIZES)
def test_every_command_of_every_row_has_flags_that_exist(size, tmp_path):
    """Each cell's commands, against the function that the script hands to `lm.cli.run`."""
    given = Study(SETTINGS, size, tmp_path)
    cells = one_of_each(given)
    assert cells.keys() == SETTINGS["rows"].keys()
    checked = set()
    for one in cells.values():
        for command in commands_of(given, one):
            assert "{" not in command.replace("templates={file", ""), command
            python, script, *arguments = shlex.split(command)
            assert python == "python"
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            _reject_unknown_flags(module.main, arguments)
            checked.add(script)
    assert len(checked) >= 10


def test_the_overrides_of_yaml_runs_exist(tmp_path):
    """`section.key=value` of train_jsft.py and train_self_judge.py."""
    from self_judge.config import load_config

    given, read = Study(SETTINGS, "cpu", tmp_path), set()
    for one in one_of_each(given).values():
        for command in commands_of(given, one):
            overrides = [word for word in shlex.split(command) if re.match(r"[\w.]+=", word)]
            if config := re.search(r"--config=(\S+)", command):
                load_config(str(ROOT / config[1]), overrides)
                read |= {config[1], one.row}
    assert {"configs/sample_jsft.yaml", "configs/sample_self_judge.yaml", "raft", "rso"} <= read


def test_the_report_shows_rows_and_papers_that_exist():
    papers = {table["title"]: table for table in yaml.safe_load(PAPER_TABLES.read_text())["tables"]}
    for listed in SETTINGS["tables"]:
        names = [row["name"] for row in listed["rows"]]
        assert {row["row"] for row in listed["rows"]} <= SETTINGS["rows"].keys()
        assert {name for claim in listed.get("claims", []) for name in claim} <= {*names}
        assert not names or listed["against"] in names
        for place, column in enumerate(listed.get("papers", [])):
            theirs = papers[column["table"]]
            assert column["measure"] in theirs["measures"]
            assert {row["paper"][place] for row in listed["rows"] if "paper" in row} - {None} <= {
                row["name"] for row in theirs["rows"]}


ABLATIONS = {"without_l1", "without_align_p", "without_align_n", "without_detection", "paper_loss",
             "paper_loss_without_weight", "positive_judgment", "downsample_quarter",
             "downsample_half", "downsample_1", "judgments_quarter", "judgments_half",
             "rewards_quarter", "rewards_half", "judge_only", "jsft_plain", "jsft_principles",
             "jsft_rationales", "live_judge", "second_round", "ai_judge_small",
             "ai_judge_medium"}  # at their full method's rate


def test_methods_are_tried_equally_often_and_trials_never_see_the_held_out_prompts(tmp_path):
    given = Study(SETTINGS, "cpu", tmp_path)
    trials = [one for one in plan(given) if one.rate]
    by_row = {row: sum(one.row == row for one in trials) for row in {one.row for one in trials}}
    papers = {"cut": 4, "jsft": 3}  # trials of each method of a paper
    assert set(by_row.values()) == set(papers.values()) and len(by_row) >= 15
    trained = {row for row, given_row in SETTINGS["rows"].items() if any(
        "{rate}" in command for command in SETTINGS["recipes"][given_row["recipe"]]["commands"])}
    assert trained - by_row.keys() == ABLATIONS
    for row, recipe in ((row, SETTINGS["rows"][row]["recipe"]) for row in by_row):
        assert by_row[row] == papers["cut" if recipe in ("train", "ai_judge", "online") else "jsft"]
    for one in trials:
        text = "\n".join(commands_of(given, one))
        assert "validation" in text and "heldout" not in text


def test_rows_that_share_a_cell_run_it_once(tmp_path):
    cells = plan(Study(SETTINGS, "cpu", tmp_path))
    assert len({one.name for one in cells}) == len(cells)
    order = [one.part for one in cells]
    assert order.index("seed1") > max(place for place, part in enumerate(order)
                                      if part == "once" or part.startswith("trial"))


def test_one_row_brings_what_it_needs(tmp_path):
    names = {one.row for one in plan(Study(SETTINGS, "cpu", tmp_path), "rso")}
    assert names == {"data", "jsft", "labels", "rso"}
    with pytest.raises(InputError, match=r"--only 'nothing' is the name of no row.*cut.*table2"):
        plan(Study(SETTINGS, "cpu", tmp_path), "nothing")


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"--only '\(' is no regular expression \(missing \)"):
        plan(Study(SETTINGS, "cpu", tmp_path), "(")
    config, results = tmp_path / "study.yaml", tmp_path / "cpu.json"
    for text, message in (("sizes: [", r"study\.yaml: broken YAML \(.*line 1.*mend that line"),
                          ("rows: {}", r"study\.yaml: expected `sizes`, `recipes`, `rows`")):
        config.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            tables.main("cpu", config=str(config))
        assert "\n" not in str(error.value)
    results.write_text('{"cells": ')
    for more in ({"go_on": True}, {"report_only": True}):
        with pytest.raises(InputError, match=r"cpu\.json: cannot be read as JSON .*; delete it"):
            tables.main("cpu", config=str(ROOT / tables.CONFIG), results=str(tmp_path),
                        output_dir=str(tmp_path / "runs"), **more)


def test_what_is_done_is_not_done_again(tmp_path):
    given = study(tmp_path, {"one": {"recipe": "measured", "once": True},
                             "two": {"recipe": "measured", "first": "print('{of[one]}')"}})
    assert run_all(given) == {}
    assert cell(given, "one/once")["figures"] == {
        "greedy": {"hits": 1, "total": 2, "items": "01"}}
    assert [other.name for other in needs(given, Cell("two", "seed1", 1))] == ["one/once"]
    before = {path: path.stat().st_mtime_ns for path in given.folder.rglob("*.json")}
    assert run_all(given) == {}
    assert {path: path.stat().st_mtime_ns for path in given.folder.rglob("*.json")} == before


def test_figures_outlive_their_folders(tmp_path):
    given = study(tmp_path, {"one": {"recipe": "measured"}, "two": {"recipe": "measured"}})
    results = tmp_path / "small.json"
    run_all(given, "one")
    tables.collect(given, results)
    ones = json.loads(results.read_text())["cells"]
    shutil.rmtree(given.folder / "one")
    run_all(given, "two")
    tables.collect(given, results)
    both = json.loads(results.read_text())["cells"]
    assert sorted(both) == ["one/seed0", "one/seed1", "two/seed0", "two/seed1"]
    assert {name: both[name] for name in ones} == ones


def test_going_on_runs_what_the_results_lack(tmp_path):
    """On another machine: no folder is there, but the results are."""
    rows = {"source": {"recipe": "measured", "once": True},
            "one": {"recipe": "measured", "rates": ["1", "2"], "first": "print({rate})"},
            "two": {"recipe": "measured", "first": "open('{of[source]}/a.results.json')"}}
    given = study(tmp_path, rows)
    run_all(given, "source|one")
    tables.collect(given, tmp_path / "small.json")
    other = replace(study(tmp_path / "elsewhere", rows),
                    results=tables.published(tmp_path / "small.json")["cells"])

    def planned(only: str = "") -> list[str]:
        return [cell.name for cell in plan(other, only)]

    assert planned("one") == []
    assert planned("two") == ["source/once", "two/seed0", "two/seed1"]  # its folder is read
    assert run_all(other) == {}
    assert sorted(path.parent.name for path in other.folder.rglob("cell.json")) == [
        "once", "seed0", "seed1"]
    rows["one"]["first"] = "print({rate}, {seed})"
    assert planned("one") == ["one/trial-1", "one/trial-2", "one/seed0", "one/seed1"]
    rows["one"]["first"] = "print({rate})"
    del other.results["one/trial-2"]
    assert planned("one") == ["one/trial-2", "one/seed0", "one/seed1"]
    rows["source"]["first"] = "1"
    assert planned("two")[0] == "source/once"


def test_a_trial_of_other_settings_chooses_nothing(tmp_path):
    """It was best in its day; another machine's results are those of today."""
    rows = {"one": {"recipe": "measured", "rates": ["1", "2"], "held": "[0, {rate} == 1]"}}
    stale, other = study(tmp_path / "stale", rows), study(tmp_path / "other", rows)
    run_all(stale)
    rows["one"]["held"] = "[0, {rate} == 2]"
    run_all(other)
    tables.collect(other, tmp_path / "small.json")
    gone_on = replace(stale, results=tables.published(tmp_path / "small.json")["cells"])
    assert chosen_rate(gone_on, "one") == "2" and plan(gone_on) == []


def test_a_trial_may_be_shorter(tmp_path):
    """Of online CUT it is the first round."""
    given = study(tmp_path, {"one": {"recipe": "long", "rates": ["1", "2"]}}, {"long": {
        "commands": ["python -c \"print({rounds}, '{split}')\""], "defaults": {"rounds": 3},
        "trial": {"rounds": 1}}})
    assert {one.part: commands_of(given, one)[0].split('"')[1] for one in plan(given)} == {
        "trial-1": "print(1, 'validation')", "trial-2": "print(1, 'validation')",
        "seed0": "print(3, 'heldout')", "seed1": "print(3, 'heldout')"}


def test_trials_keep_nothing_that_no_cell_reads(tmp_path):
    rows = {"one": {"recipe": "kept", "rates": ["1", "2"]}}
    given = study(tmp_path, rows, {"kept": {"discard_of_trials": ["model"], "commands": [
        "python -c \"import os; os.makedirs('{cell}/model')\""]}})
    trials = [one for one in plan(given) if one.rate]
    assert tables.run_all(given, trials, jobs=1, threads=1) == {}
    assert not list(given.folder.glob("one/trial-*/model"))
    assert (given.folder / "one/trial-1/cell.json").exists()


def test_results_of_other_settings_are_dropped(tmp_path):
    rows = {"one": {"recipe": "measured"}, "two": {"recipe": "measured"}}
    given = study(tmp_path, rows)
    run_all(given)
    tables.collect(given, tmp_path / "small.json")
    shutil.rmtree(given.folder)
    rows["two"]["held"] = "[1, 1]"
    tables.collect(given, tmp_path / "small.json")
    assert list(tables.published(tmp_path / "small.json")["cells"]) == ["one/seed0", "one/seed1"]


def test_a_changed_cell_is_run_anew_beside_the_former(tmp_path, capsys):
    rows = {"one": {"recipe": "measured", "once": True}, "two": {"recipe": "measured"}}
    given = study(tmp_path, rows)
    run_all(given)
    untouched = cell(given, "two/seed0")
    rows["one"]["held"] = "[1, 1]"
    run_all(given)
    assert cell(given, "one/once")["figures"]["greedy"]["hits"] == 2
    assert cell(given, "one/once.old1")["figures"]["greedy"]["hits"] == 1
    assert cell(given, "two/seed0") == untouched
    assert "one/once: run anew, the former one is kept as once.old1 (commands changed)" in (
        capsys.readouterr().out)


def test_a_changed_input_is_noticed(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[1]")
    given = study(tmp_path, {"one": {"recipe": "measured", "once": True,
                                     "first": f"0\" {data} \""}})
    run_all(given)
    data.write_text("[2]")
    run_all(given)
    assert (given.folder / "one/once.old1/cell.json").exists()
    data.unlink()  # after its use it may go
    run_all(given)
    assert not (given.folder / "one/once.old2").exists()


def test_a_failing_cell_stops_no_other_but_those_that_need_it(tmp_path):
    rows = {"bad": {"recipe": "measured", "once": True, "first": "import nowhere"},
            "needy": {"recipe": "measured", "once": True, "first": "print('{of[bad]}')"},
            "good": {"recipe": "measured"}}
    given = study(tmp_path, rows)
    failed = run_all(given)
    assert set(failed) == {"bad/once", "needy/once"}
    assert "exit code 1: ModuleNotFoundError: No module named 'nowhere'" in failed["bad/once"]
    assert failed["needy/once"] == "needs bad/once"
    assert (given.folder / "good/seed1/cell.json").exists()
    tables.collect(given, tmp_path / "small.json")
    told = json.loads((tmp_path / "small.json").read_text())["cells"]
    assert "nowhere" in told["bad/once"]["error"] and "figures" in told["good/seed0"]
    rows["bad"]["first"] = "0"
    assert run_all(given) == {}
    assert not (given.folder / "bad/once/failed.json").exists()


def test_the_best_trial_gives_the_rate_and_of_equal_ones_the_first(tmp_path):
    rows = {"one": {"recipe": "measured", "rates": ["2e-3", "1e-3", "9"], "held": "[0, '{rate}' "
                    "!= '2e-3']".replace("'", "\\'")},
            "other": {"recipe": "measured", "tuned_as": "one", "first": "print({rate})"}}
    given = study(tmp_path, rows, trials=3)
    rows["one"]["held"] = "[0, {rate} != 2e-3]"
    assert chosen_rate(given, "one") == "2e-3"  # until it is known
    assert run_all(given) == {}
    assert chosen_rate(given, "one") == chosen_rate(given, "other") == "1e-3"
    assert cell(given, "one/seed1")["settings"]["learning_rate"] == "1e-3"
    assert "print(1e-3)" in cell(given, "other/seed0")["settings"]["commands"][0]


def test_a_killed_run_goes_on(tmp_path):
    """kill -9 of the runner alone: its cell lives on and is waited for, then is done once more."""
    config = {"model": "none/here", "tables": [], "sizes": {"small": {"seeds": [0], "trials": 1}},
              "recipes": {"slow": {"commands": [
                  "python -c \"import os, time; open('{cell}/began','a').write('x'); "
                  "[time.sleep(0.05) for _ in iter(lambda: os.path.exists('{go}'), True)]\""]}},
              "rows": {"first": {"recipe": "slow", "once": True, "go": "/"},
                       "second": {"recipe": "slow", "once": True, "go": str(tmp_path / "go")}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "scripts/tables.py", "--size", "small", "--config",
               str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "runs"),
               "--results", str(tmp_path / "results"), "--jobs", "1", "--threads", "1"]
    folder, log = tmp_path / "runs/small", tmp_path / "log"
    run = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: (folder / "second/once/began").exists())
    run.kill()
    run.wait()
    with open(log, "w") as file:
        again = subprocess.Popen(command, cwd=ROOT, stdout=file)
    wait_for(lambda: "waiting for its end" in log.read_text())
    (tmp_path / "go").touch()
    assert again.wait() == 0
    assert (folder / "first/once/began").read_text() == "x"
    assert (folder / "second/once/began").read_text() == "xx"
    assert (folder / "second/once/cell.json").exists()
    assert (tmp_path / "results/README.md").exists()


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_dry_run_shows_what_is_missing(tmp_path, capsys):
    tables.main("cpu", only="base", dry_run=True, config=str(ROOT / tables.CONFIG),
                output_dir=str(tmp_path))
    printed = capsys.readouterr().out
    assert re.findall(r"^# (.*)", printed, re.M) == ["data/once", "base/once"]
    assert "python scripts/generate.py --base_model_name_or_path" in printed
    assert not (tmp_path / "cpu").exists()


def test_figures_of_each_kind_of_result(tmp_path):
    write_json(tmp_path / "a.json", {"benchmark": "judge", "metrics": {"all": {"accuracy": {
        "hits": 1.5, "total": 3}}}, "judgments": [{"winner": "A"}, {"winner": "B"},
                                                  {"winner": None}]})
    write_json(tmp_path / "b.json", {"benchmark": "ai_judge", "verdicts": {
        "right": [True, False, True, True]}})
    assert figures_in(tmp_path, "*.json") == {
        "judge": {"hits": 1.5, "total": 3, "items": "10="},
        "right": {"hits": 3, "total": 4, "items": "1011"}}


def figure(items: str) -> dict:
    return {"hits": items.count("1"), "total": len(items), "items": items}


def test_statistics_by_hand():
    """70, 73, 76: mean 73, standard deviation 3, error 3 / sqrt(3), t(0.975, 2) = 4.3027."""
    low, high = over_seeds([70.0, 73.0, 76.0])
    assert (low, high) == pytest.approx((73 - 4.3027 * 3**0.5, 73 + 4.3027 * 3**0.5), abs=1e-3)
    assert over_seeds([70.0]) is None and over_seeds([70.0, 70.0]) is None
    low, high = over_prompts({0: figure("1" * 17 + "0" * 12), 1: figure("1" * 17 + "0" * 14)})
    assert (round(low), round(high)) == (44, 68)  # Wilson of 34 of 60, as in lm/shares.py
    # On the same prompts the seeds' mean is 1, 1/2, 0, 1/2. Of the 256 draws of four, one has the
    # mean 0 and 8 have 1/8: more than 2.5 %; and as many 1 and 7/8.
    assert over_prompts({0: figure("1101"), 1: figure("1000")}) == (12.5, 87.5)


def test_differences_are_paired():
    one, other = {0: figure("1101"), 1: figure("1111")}, {0: figure("0101"), 1: figure("0101")}
    found = difference(one, other)
    assert found.mean == 37.5  # 75 - 50 and 100 - 50
    assert found.by_seed == pytest.approx((37.5 - 12.706 * 12.5, 37.5 + 12.706 * 12.5), abs=0.1)
    # The prompts' differences are 100, 0, 50, 0. Of the 256 draws of four, 1 + 4 have a mean above
    # 75: less than 2.5 %. 16 draws have a mean of 0: more than that.
    assert found.by_prompt == (0.0, 75.0)
    assert found.verdict() == "cannot be told (an interval includes 0)"
    assert difference(one, {None: figure("0101")}).mean == 37.5  # once goes with every seed
    assert difference({0: figure("1")}, {1: figure("1")}) is None
    assert by_prompt([(figure("11"), {"hits": 1, "total": 2})]) is None  # no verdicts kept


@pytest.mark.parametrize(("by_seed", "by_prompts", "verdict"), [
    ((1, 5), (2, 4), "holds"), ((-5, -1), (-4, -2), "does not hold"),
    ((-1, 5), (2, 4), "cannot be told (an interval includes 0)"),
    ((1, 5), (-2, 4), "cannot be told (an interval includes 0)"),
    ((1, 5), None, "holds"), (None, (2, 4), "cannot be told (no spread over seeds is known)")])
def test_an_order_holds_only_if_no_interval_includes_0(by_seed, by_prompts, verdict):
    assert Difference(0, by_seed, by_prompts).verdict() == verdict


def fixture_results(folder: Path) -> dict:
    """A small study's figures: one row better, one worse, one failed, one that was not run."""
    def one(row, part, items, rate="", **more):
        return {"row": row, "part": part, "figures": {"greedy": figure(items)}, "tokens": 1000,
                "seconds": 60.0, "finished": "2026-11-25", "git_revision": "0" * 40 + "+",
                "machine": "a machine, 2 cores", "learning_rate": rate, **more}

    cells = {"base/once": one("base", "once", "0011" * 10)}
    for rate, items in (("2e-3", "0101"), ("1e-3", "0111")):
        cells[f"cut/trial-{rate}"] = one("cut", f"trial-{rate}", items, rate)
    for seed in (0, 1, 2):
        cells[f"cut/seed{seed}"] = one("cut", f"seed{seed}", "1111" * 9 + "0" * seed +
                                       "1" * (4 - seed), "1e-3")
        cells[f"mle/seed{seed}"] = one(
            "mle", f"seed{seed}", "0001" * 9 + "1" * seed + "0" * (4 - seed), "2e-3", steps=20)
    cells["dpo/seed0"] = {"row": "dpo", "part": "seed0", "error": "exit code 1: a | b"}
    write_json(folder / "cpu.json", {
        "size": "cpu", "model": "m", "versions": {"python": "3.11"},
        "values": {"seeds": [0, 1, 2], "trials": 2}, "cells": cells})
    return {"sizes": {"cpu": {}}, "recipes": {"train": {"measure": "greedy"}},
            "rows": {"base": {"recipe": "train", "once": True},
                     "mle": {"recipe": "train", "tuned_as": "cut"}, "dpo": {"recipe": "train"},
                     "cut": {"recipe": "train", "rates": ["2e-3", "1e-3"]}},
            "tables": [{"key": "table2", "title": "A table", "about": "What it is.",
                        "against": "base", "papers": [
                            {"table": "CUT, Table 2: LLaMA2-13b, cold start, offline",
                             "measure": "alpaca", "head": "13b"}],
                        "rows": [{"name": "base", "row": "base", "paper": ["LLaMA2-13b"]},
                                 {"name": "MLE", "row": "mle"}, {"name": "DPO", "row": "dpo"},
                                 {"name": "CUT", "row": "cut", "paper": ["CUT"]}],
                        "claims": [["CUT", "base"], ["MLE", "base"], ["CUT", "DPO"]]}]}


def test_the_report_is_byte_stable(tmp_path):
    """The expected text is committed; the figure is the same twice."""
    settings = fixture_results(tmp_path)
    tables_report.write(settings, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == EXPECTED.read_text(encoding="utf-8")
    assert "CUT above base: **holds**" in text and "MLE above base: **does not hold**" in text
    assert "CUT above DPO: missing" in text
    picture = (tmp_path / "cpu-table2.png").read_bytes()
    tables_report.write(settings, tmp_path)
    assert (tmp_path / "cpu-table2.png").read_bytes() == picture


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    """Every result says what it was made of, or nobody could go on from it."""
    for path in (ROOT / "results").glob("*.json"):
        shutil.copy(path, tmp_path)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all("made_of" in one for one in cells.values() if "figures" in one)
    tables_report.write(SETTINGS, tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "results/README.md").read_text()


def test_data(tmp_path):
    tables_data.main(str(tmp_path / "data"), str(ROOT / "data/sample"), records=4,
                     prompts_per_kind=1, heldout_per_kind=2, preferences=4)

    def records(name):
        return [json.loads(line) for line in (tmp_path / "data" / name).read_text().splitlines()]

    assert all(record["score"] == (record["judgment"] is None)
               for record in records("train.jsonl"))
    assert len(records("validation.jsonl")) == 4 and len(records("heldout.jsonl")) == 8
    splits = [{record["instruction"] for record in records(f"{split}.jsonl")}
              for split in ("train", "validation", "heldout")]
    assert not splits[0] & splits[1] and not splits[1] & splits[2]
    rated = records("rated.jsonl")
    assert {record["score"] for record in rated} == {0, 1}
    assert all((record["judgment"] is None) == bool(record["score"]) for record in rated)
    assert len({record["instruction"] for record in records("rated_half.jsonl")}) == 2
