"""The page of all results, from files that the scripts themselves wrote.

    python -m pytest tests/test_report.py -n0
"""

import itertools
import os
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from fault_server import FaultServer

from lm import figures
from lm.cli import _reject_unknown_flags
from lm.records import InputError, write_json
from lm.shares import wilson
from lm.tables import PAPER_TABLES, paper_rows
from scripts import (
    annotate,
    evaluate_alpaca,
    evaluate_constraints,
    evaluate_mt_bench,
    evaluate_ranking,
    evaluate_summarization,
    evaluate_vicuna,
    plot_training,
    report,
)
from scripts.report_papers import MEASURES, commands_for, paper_tables, recipe_below

ROOT = Path(__file__).resolve().parents[1]
TABLES = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))["tables"]
NO_COMMA = [{"kind": "punctuation:no_comma", "kwargs": {}}]
LOG = [{"step": step, "loss": 2 / step, "mle": 1.0, "learning_rate": 1e-4,
        "inappropriate_share": 0.2} for step in (1, 2, 3)]


def write(path: Path, value: object) -> str:
    write_json(path, value)
    return str(path)


def measure_dialogues(root: Path, scratch: Path) -> None:
    """MT-Bench and VicunaEval, by a judge that gives a 6 and prefers what is shown first."""
    answers = [{"question_id": 1, "category": "writing", "turns": ["Sing.", "Again."],
                "outputs": ["La.", "Lala."], "generator": "a|<b>* [c](d)"}]
    mine = write(scratch / "mine.json", answers)
    theirs = write(scratch / "theirs.json", [{**answers[0], "generator": "sft"}])
    with FaultServer(answer=lambda text: "Score: 6\nVerdict: A") as server:
        judge = {"judge_model": "gpt-4", "base_url": server.url}
        evaluate_mt_bench.main(mine, **judge,
                               output_dir=str(root / "self-judge-hh/mt_bench/gpt-4"))
        evaluate_vicuna.main(mine, theirs, **judge,
                             output_dir=str(root / "self-judge-hh/vicuna/gpt-4"))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with one result of each kind."""
    root, scratch = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("scratch")
    prompts = write(scratch / "prompts.json", [{"instruction": "Sing.", "constraints": NO_COMMA}])
    outputs = [write(scratch / f"{name}.json", [
        {"instruction": "Sing.", "output": output, "generator": name, "constraints": NO_COMMA}])
        for name, output in (("base", "La, la."), ("cut", "La."))]
    evaluate_constraints.main(prompts, outputs, output=str(root / "small/results.json"), show=0)
    annotate.main(outputs[0], str(root / "small/judged.json"), judge="rules")
    evaluate_alpaca.main(
        annotations=write(scratch / "judged.json", [
            {"preference": 2 - (place % 4 == 0), "generator_2": "cut-13b"}
            for place in range(805)]),
        output_dir=str(root / "cut-offline/alpaca_eval/alpaca_eval_gpt4"))
    settings = {"model": "my model", "adapter": "my adapter", "limit": 10}
    measured = evaluate_ranking.read_measured(root / "none.json", settings, False)
    write(root / "ranking/cut-offline.json", {**measured, "results": {
        "mmlu:5:acc": {"score": 55.5, "standard_error": 0.4}}})
    write(root / "ranking/whole.json", {
        "benchmark": "ranking", "settings": {**settings, "limit": 0}, "results": {
            "mmlu:5:acc": {"score": 50.0, "standard_error": None},
            "truthfulqa_mc2:0:acc": {"score": 40.0, "standard_error": 1.0}}})
    data = write(scratch / "summaries.json", [
        {"instruction": "Sum up.", "output": "the cat sat", "judgment": None}])
    evaluate_summarization.main(data, outputs=write(scratch / "made.json", [
        {"instruction": "Sum up.", "output": "the cat sat"}]),
        output=str(root / "cut-summary/rouge.json"))
    measure_dialogues(root, scratch)
    shares = {name: asdict(wilson(3, 4)) for name in ("accuracy", "consistency", "ties")}
    write(root / "self-judge-uf/judge.json", {
        "benchmark": "judge", "model": "jsft", "metrics": {"all": shares}})
    write(root / "judge/agreement.json", {
        "benchmark": "ai_judge", "model": "small judge",
        "metrics": {name: asdict(wilson(2, 4)) for name in ("readable", "right", "majority")}})
    write(root / "small/adapter/trainer_state.json", {"log_history": LOG})
    write(root / "small/adapter/checkpoint-2/trainer_state.json", {"log_history": LOG[:2]})
    write(root / "small/adapter/run.json", {
        "status": "finished", "steps": 3, "first_loss": 2.0, "last_loss": 0.5,
        "data": {"path": "data/sample/train.jsonl"}, "git_revision": "0123456789" * 4 + "+"})
    write(root / "online/online.json", {"rounds": [
        {"round": 0, "measure": "constraints satisfied, %", "score": 45.0, "low": 33.0,
         "high": 58.0, "seconds": 60, "cost": 0.0, "stages": {}}]})
    evaluate_alpaca.main(
        annotations=write(scratch / "lost.json", [{"preference": 2.0}] * 6 + [
            {"preference": None}] * 4), max_undecided=0.5,
        output_dir=str(root / "llama2-7b-chat/alpaca_eval/alpaca_eval_gpt4"))
    figure = (root / "odd name" / "rise (1).png")
    figure.parent.mkdir()
    figure.write_bytes(b"\x89PNG and so on")
    return root


@pytest.fixture(scope="module")
def page(results) -> str:
    report.main(str(results))
    return (results / "report/report.md").read_text()


def row(page: str, start: str, nth: int = 0) -> list[str]:
    lines = [line for line in page.split("\n") if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")][1:]


def test_ours_stand_beside_the_papers_figures(page):
    """805 judgments, 202 lost: 603 / 805 = 74.91 %; ROUGE of a copy is 100."""
    assert row(page, "CUT") == ["60.84", "missing", "81.44", "missing", "55.78",
                                "55.50 (first 10)", "49.33", "missing", "61.06", "74.91"]
    copied = "100.00 (1 of 1939)"
    assert row(page, "LLaMA2-13b + CUT") == ["45.39", copied, "28.40", copied, "39.84", copied,
                                             "39.89", copied]
    assert row(page, "SELF-JUDGE") == ["44.88", "missing", "76.25", "50.00 (1 of 80)", "4.80",
                                       "6.00 (2 of 160)"]
    assert row(page, "plain") == ["80.50", "75.00"]
    assert row(page, "LLaMA2-chat-7b") == ["71.40", "100.00 (10 of 805, 40 % undecided)"]
    assert row(page, "without Align-P in L2") == ["26.37", "missing"]
    assert row(page, "ratio 0") == ["-", "missing"]


def test_all_that_was_found_is_there(page, results):
    assert row(page, "punctuation:no_comma") == [
        "0.00 [0.0, 79.3] of 1", "100.00 [20.7, 100.0] of 1"]
    assert row(page, "cut-13b")[:6] == ["74.91", "1.53", "603", "0", "202", "0"]
    assert row(page, "whole") == ["50.00 ± -", "40.00 ± 1.00", "ranking/whole.json"]
    assert row(page, "cut-offline")[:2] == ["55.50 ± 0.40 (first 10)", "missing"]
    assert row(page, "rules")[:5] == ["1", "0", "1", "0", "0"]
    assert row(page, "jsft")[:2] == ["4", "75.00 [30.1, 95.4]"]
    assert row(page, "small judge")[1:4] == ["50.00 [15.0, 85.0]", "50.00 [15.0, 85.0]", "-"]
    assert row(page, "small/adapter") == ["finished", "3", "2.00 → 0.50",
                                          "data/sample/train.jsonl", "0123456+"]
    assert row(page, "0")[0] == "45.0 [33, 58]"
    assert "checkpoint-2" not in page
    assert (results / "report/small-adapter.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_shown_as_they_are(page, results):
    """Whatever Markdown or HTML would make of them."""
    assert row(page, "a&#124;&#60;b&#62;&#42; [c&#93;(d)")[0] == "6.00 [6.0, 6.0]"
    whole = (results / "report/report.html").read_text()
    assert "<td>a&#124;&#60;b&#62;&#42; [c&#93;(d)</td>" in whole


def test_the_html_page_needs_no_other_file(page, results):
    whole = (results / "report/report.html").read_text()
    sources = re.findall(r'src="(.{22})', whole)
    assert sources == ["data:image/png;base64,"] * 2
    assert "iVBORw0KGgo" in whole
    assert "![odd name/rise (1).png](../odd%20name/rise%20%281%29.png)" in page
    assert 'href="' not in whole and whole.count("<table>") == page.count("\n| --- |")


def test_the_same_inputs_give_the_same_bytes(page, results):
    folder = results / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"report.md", "report.html", "small-adapter.png"}
    report.main(str(results))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("folder", ["report", "."])
def test_its_own_pictures_are_no_results_wherever_the_page_goes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs/small/trainer_state.json", {"log_history": LOG})
    pages = []
    for _ in range(2):
        report.main("runs", output_dir=str(tmp_path / "runs" / folder))
        pages.append((tmp_path / "runs" / folder / "report.md").read_bytes())
    assert pages[0] == pages[1] and pages[0].count(b"![") == 1


def test_an_empty_folder_is_all_missing(tmp_path, capsys):
    report.main(str(tmp_path), output_dir=str(tmp_path / "out"))
    shown = (tmp_path / "out/report.md").read_text()
    assert "Nothing yet." in shown and shown.count("None.") == 2
    figures = sum(len(line["figures"]) for listed in TABLES for line in listed["rows"])
    assert f"{figures} numbers of the papers' tables are missing" in capsys.readouterr().out
    with pytest.raises(InputError, match="no such folder"):
        report.main(str(tmp_path / "none"))


def test_the_commands_for_missing_numbers_exist(tmp_path):
    """Scripts that are there, with flags that they have."""
    shown = "\n".join(paper_tables(tmp_path))
    commands = {line for block in re.findall(r"```bash\n(.*?)```", shown, re.S)
                for line in block.splitlines()}
    assert len(commands) > 40
    scripts = {"evaluate_ranking": evaluate_ranking, "evaluate_alpaca": evaluate_alpaca,
               "evaluate_summarization": evaluate_summarization}
    assert {command for command in commands if "70b" in command} == {
        f"GENERATE='--load_in 8bit' OUTPUTS={tmp_path}/{run}/alpaca_eval.json "
        f"bash scripts/evaluate_alpaca.sh {model}" for run, model in (
            ("llama2-70b-chat", "meta-llama/Llama-2-70b-chat-hf"),
            ("cut-llama2-70b-chat", f"{tmp_path}/cut-llama2-70b-chat/model"))} | {
        recipe_below(tmp_path, line) for listed in TABLES for line in listed["rows"]
        if "70b" in line.get("recipe", "")}
    for command in commands:
        words = [word for word in shlex.split(command) if "=" not in word]
        assert words[0] in ("python", "bash") and (ROOT / words[1]).is_file(), command
        if words[0] == "python":
            _reject_unknown_flags(scripts[Path(words[1]).stem].main, words[2:])


@pytest.mark.parametrize("line", [line for listed in TABLES for line in listed["rows"]
                                  if "recipe" in line], ids=lambda line: line["name"])
def test_recipes_make_what_is_measured_in_any_folder(line, tmp_path):
    """The model, the answers that a command scores, and the judge's accuracy."""
    root = tmp_path / "my runs"
    measures = next(listed["measures"] for listed in TABLES if line in listed["rows"])
    recipe, *commands = commands_for(root, line, [MEASURES[name] for name in measures],
                                     [None] * len(measures))
    shown = subprocess.run(["bash", "-c", recipe], cwd=ROOT, capture_output=True, text=True,
                           check=True, env={**os.environ, "DRY_RUN": "1"}).stdout
    steps = [shlex.split(step) for step in shown.splitlines()
             if step.startswith(("python ", "torchrun ", "accelerate "))]
    given = [word for words in steps for word in words]
    assert not [word for word in given if word.rpartition("=")[2].startswith("runs/")]
    made = {word.partition("=")[2] or value for word, value in itertools.pairwise([*given, ""])
            if re.match(r"(--|[a-z_.]*)(output|samples_path)", word)}
    if not commands:
        assert f"{root}/{line['run']}/judge.json" in made
    for words in map(shlex.split, commands):
        if "--model_outputs" in words:  # a tournament's have the number of samples in their names
            answers = Path(words[words.index("--model_outputs") + 1])
            assert any(word.startswith(f"{answers.parent}/") for word in made)
            continue
        after = words.index("--base_model_name_or_path") + 1 if words[0] == "python" else -1
        model = Path(words[after])
        assert model.is_relative_to(root)
        assert {str(folder) for folder in (model, *model.parents) if folder != root} & made


def test_the_folder_of_the_recipes_is_not_named_again():
    assert {recipe_below(Path("runs"), line) == line["recipe"] for listed in TABLES
            for line in listed["rows"] if "recipe" in line} == {True}


def test_the_model_that_vicuna_eval_compares_with_is_made_by_a_recipe(tmp_path):
    """Before the rows that are compared with it."""
    lines = list(paper_tables(tmp_path))
    recipes = {f"{tmp_path}/{row['run']}/model": recipe_below(tmp_path, row) for listed in TABLES
               for row in listed["rows"] if "recipe" in row and "model" not in row}
    baselines = {word.removeprefix("SFT="): place for place, line in reversed([*enumerate(lines)])
                 for word in line.split() if word.startswith("SFT=")}
    assert baselines
    assert all(lines.index(recipes[model]) < place for model, place in baselines.items())


def test_mt_bench_alone_asks_for_no_vicuna_eval(tmp_path):
    """VicunaEval's command does both; the model that it compares with needs none."""
    def dialogues() -> list[str]:
        return [line for line in paper_tables(tmp_path) if "evaluate_dialogues.sh" in line]

    before = dialogues()
    for run, begins in (("sft", "TEMPLATE="), ("self-judge-uf", "TEMPLATE="), ("dpo-hh", "SFT=")):
        (line,) = [line for line in before if f"OUT={tmp_path}/{run} " in line]
        assert line.startswith(begins)
    write(tmp_path / "dpo-hh/vicuna/gpt-4/results.json", {
        "benchmark": "vicuna", "shares": {"win_rate": asdict(wilson(40, 80))}, "undecided": 0})
    (line,) = [line for line in dialogues() if f"OUT={tmp_path}/dpo-hh " in line]
    assert line.startswith("TEMPLATE=")


@pytest.mark.parametrize("value", [{}, [], {"status": "ok", "data": []}, {"settings": None}])
def test_files_of_other_programs_are_left_out(value, tmp_path):
    for name in ("run.json", "x.summary.json", "online.json"):
        write(tmp_path / name, value)
    report.main(str(tmp_path))
    assert "Nothing yet." in (tmp_path / "report/report.md").read_text()


def test_weights_that_are_there_are_not_made_again(tmp_path):
    recipe = f"OUT={tmp_path}/cut-offline bash scripts/cut_offline.sh"
    (tmp_path / "cut-offline/model").mkdir(parents=True)
    assert recipe in list(paper_tables(tmp_path))  # a folder is no weights
    (tmp_path / "cut-offline/model/model.safetensors").touch()
    lines = list(paper_tables(tmp_path))
    assert recipe not in lines
    assert f"ROUNDS={tmp_path}/cut-online bash scripts/cut_online_iter.sh 1" in lines


@pytest.mark.parametrize(("measure", "answers"), [
    ("alpaca_greedy", "greedy.json"), ("tournament4", "tournament.n4.json"), ("judge", None)])
def test_the_recipe_is_told_where_weights_alone_are_not_enough(measure, answers, tmp_path):
    """Its answers are scored, never made by a command; the judge's accuracy has none at all."""
    row = {"run": "self-judge-uf", "model": str(tmp_path / "self_judge"), "recipe": "the recipe"}
    (tmp_path / "self_judge").mkdir()
    (tmp_path / "self_judge/adapter_model.safetensors").touch()

    def told() -> list[str]:
        return list(commands_for(tmp_path, row, [MEASURES[measure]], [None]))

    assert told()[0] == f"OUT={tmp_path}/self-judge-uf the recipe"
    if answers:
        path = write(tmp_path / "self-judge-uf" / answers, [])
        assert told() == [f"python scripts/evaluate_alpaca.py --model_outputs {path}"]


def test_the_papers_tables_are_whole():
    """A figure a measure in each row; the rows that the scripts print are those of old."""
    for listed in TABLES:
        assert set(listed["measures"]) <= set(MEASURES)
        for line in listed["rows"]:
            assert len(line["figures"]) == len(listed["measures"]), line["name"]
            assert set(line) <= {"name", "label", "figures", "run", "model", "recipe",
                                 "generate"}
            assert "run" not in line or {"model", "recipe"} & set(line)
    assert list(paper_rows("arc", "hellaswag", "mmlu", "truthfulqa").values()) == [
        (59.72, 81.39, 54.97, 36.28), (60.84, 81.44, 55.78, 49.33),
        (58.02, 79.89, 54.52, 45.44), (58.45, 79.86, 55.00, 52.58)]
    assert list(paper_rows("alpaca").values()) == [(1.87,), (61.06,), (81.09,), (90.73,), (91.68,)]


def test_broken_results_are_named(tmp_path):
    (tmp_path / "results.json").write_text('{"benchmark": "vicuna", "model')
    with pytest.raises(InputError, match=r"results\.json: cannot be read as JSON"):
        report.main(str(tmp_path))


@pytest.mark.parametrize(("value", "field"), [
    ({"benchmark": "alpaca_eval"}, "model"),
    ({"benchmark": "vicuna", "model": "m", "baseline": "b", "shares": {}}, "win_rate"),
    ({"benchmark": "summarization", "models": {"m": {}}}, "rouge1")])
def test_results_that_lack_a_field_are_named(value, field, tmp_path):
    write(tmp_path / "results.json", value)
    with pytest.raises(InputError, match=rf"results\.json: field '{field}' is missing"):
        report.main(str(tmp_path))


def test_a_paper_figure_of_a_file_that_lacks_a_field_is_named(tmp_path):
    write(tmp_path / "cut-summary/rouge.json", {
        "benchmark": "summarization", "models": {"m": {"rouge1": {"mean": 40.0}}}})
    with pytest.raises(InputError, match=r"rouge\.json: field 'records' is missing"):
        list(paper_tables(tmp_path))


def test_the_curves_of_one_training_need_not_be_cuts(tmp_path):
    """DPO's log has rewards, and no likelihood part."""
    log = [{"step": 1, "loss": 0.69, "rewards/margins": 0.1}, {"step": 1, "train_runtime": 2.0}]
    write(tmp_path / "trainer_state.json", {"log_history": log})
    assert [title for title, names, scale in figures.TRAINING_PANELS
            if figures.lines_of(log, names, scale)] == ["Loss", "Rewards"]
    plot_training.main(str(tmp_path))
    drawn = (tmp_path / "loss.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    plot_training.main(str(tmp_path))
    assert (tmp_path / "loss.png").read_bytes() == drawn
    write(tmp_path / "trainer_state.json", {"log_history": log[1:]})
    with pytest.raises(InputError, match="its log has nothing to draw"):
        plot_training.main(str(tmp_path))
