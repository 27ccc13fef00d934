"""The harness run on a task of our own, and its numbers in the table.

    python -m pytest tests/test_evaluate_ranking.py
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lm.records import InputError
from scripts import evaluate_ranking
from scripts.evaluate_ranking import PAPER_TASKS, Task, add, read_score, read_tasks, summary

SCRIPT = "scripts/evaluate_ranking.py"
QUESTIONS = [{"question": f"Name {word}.", "choices": ["Red, green and blue.", other, "the cat"],
              "answer": place % 3}
             for place, (word, other) in enumerate([
                 ("three colours", "1"), ("a fox", "The quick brown fox"), ("a dog", "0"),
                 ("the task", "jumps over"), ("the mat", "sat on the mat"), ("it all", "that is")])]
TASK_FILE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1.0}}
"""
GROUP_FILE = """\
group: tiny_group
task: [tiny_choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory) -> Path:
    """A task of the harness whose data lie in a file here."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "tiny_choice.yaml").write_text(TASK_FILE.format(data=data))
    (folder / "tiny_group.yaml").write_text(GROUP_FILE)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory) -> Path:
    """An adapter with large random weights, so that it answers otherwise than its base."""
    from lm.models import add_lora, load_model

    torch.manual_seed(1)
    model = add_lora(load_model(str(tiny_llama)), 4, 64, 0.0, "all-linear")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("adapters") / "judged"
    model.save_pretrained(folder)
    return folder


def accuracy_by_hand(folder: Path, adapter: Path | None = None) -> float:
    """How often the right choice has the highest log-probability after its question."""
    from lm.models import load_adapter, load_model, load_tokenizer

    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder)).eval()
    model = load_adapter(model, adapter).eval() if adapter else model
    right = 0
    for question in QUESTIONS:
        prompt = f"{question['question']}\nAnswer:"
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(f"{prompt} {choice}", return_tensors="pt")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            with torch.no_grad():
                log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            rows = log_probs.gather(-1, ids[0, 1:, None])[start - 1:]
            scores.append(rows.sum().item())
        right += scores.index(max(scores)) == question["answer"]
    return 100 * right / len(QUESTIONS)


def test_local_task_on_model_and_adapter(run_warm, tiny_llama, adapter, tasks_folder, tmp_path):
    """A task, and a group of tasks as MMLU is one; what is measured is not measured again."""
    common = ["--include_path", tasks_folder, "--output_dir", tmp_path,
              "--base_model_name_or_path", tiny_llama]
    base = [*common, "--tasks", "tiny_choice:0:acc", "--name", "base"]
    judged = [*common, "--tasks", "tiny_group:0:acc", "--peft_model_path", adapter]
    expected = {"base": accuracy_by_hand(tiny_llama),
                "judged": accuracy_by_hand(tiny_llama, adapter)}
    assert expected["base"] != expected["judged"]  # so that the adapter's number is its own
    for name, arguments in (("base", base), ("judged", judged)):
        done = run_warm(SCRIPT, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        (result,) = json.loads((tmp_path / f"{name}.json").read_text())["results"].values()
        assert result["score"] == pytest.approx(expected[name])
        row = next(line for line in done.stdout.split("\n") if line.startswith(f"{name} "))
        assert f" {expected[name]:.2f} ± " in row
    assert (tmp_path / "base" / "tiny_choice.log").stat().st_size > 100
    again = run_warm(SCRIPT, *base)
    assert again.stdout.startswith("tiny_choice: measured already\n")
    assert f" {expected['base']:.2f} ± " in again.stdout and "missing" in again.stdout


def test_a_task_that_the_harness_lacks_is_one_line(run_warm, tiny_llama, tmp_path):
    result = run_warm(SCRIPT, "--base_model_name_or_path", tiny_llama, "--output_dir", tmp_path,
                     "--tasks", "no_such_one:0:acc")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no_such_one: lm_eval stopped" in result.stderr and "not found" in result.stderr
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "arc_challenge"], "'arc_challenge' is not task:shots:metric"),
    (["--base_model_name_or_path", "/none"], "no such model folder"),
])
def test_wrong_flags_are_one_line(run_cli, arguments, message):
    result = run_cli(SCRIPT, *arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def test_other_settings_are_never_mixed(run_cli, tiny_llama, tmp_path):
    settings = {"model": str(tiny_llama), "limit": 10, "dtype": "auto", "model_args": ""}
    (tmp_path / "base.json").write_text(json.dumps({
        "benchmark": "ranking", "settings": settings, "results": {}}))
    result = run_cli(SCRIPT, "--base_model_name_or_path", tiny_llama, "--name", "base",
                     "--output_dir", tmp_path)
    assert result.returncode == 2 and "limit was 10, is 0" in result.stderr


SCORE = {"score": 50.0, "standard_error": None}


def test_runs_of_one_model_at_the_same_time_keep_each_others_results(tiny_llama, tmp_path,
                                                                    monkeypatch):
    """One benchmark a GPU: the other one begins and ends while the first is under way."""
    def measure(task: Task, *_) -> dict:
        if task.name == "slow":
            evaluate_ranking.main(**flags, tasks="quick:0:acc")
        measured.append(task.name)
        return SCORE

    flags = {"base_model_name_or_path": str(tiny_llama), "name": "m", "output_dir": str(tmp_path)}
    measured: list[str] = []
    monkeypatch.setattr(evaluate_ranking, "measure", measure)
    evaluate_ranking.main(**flags, tasks="slow:0:acc,quick:0:acc")
    assert measured == ["quick", "slow"]  # nothing twice
    assert set(json.loads((tmp_path / "m.json").read_text())["results"]) == {
        "slow:0:acc", "quick:0:acc"}
    evaluate_ranking.main(**flags, tasks="quick:0:acc", overwrite=True)
    assert measured[2:] == ["quick"]
    evaluate_ranking.main(**flags, tasks="quick:0:acc", overwrite=True, limit=3)
    assert set(json.loads((tmp_path / "m.json").read_text())["results"]) == {"quick:0:acc"}


def test_results_that_come_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: add(tmp_path / "m.json", {}, False, {f"t{number}": SCORE}),
                      range(48)))
    assert len(json.loads((tmp_path / "m.json").read_text())["results"]) == 48


def test_other_files_of_the_folder_are_no_results(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"benchmark": "judge", "metrics": {}}')
    shown = summary(tmp_path, read_tasks(PAPER_TASKS))[0]
    assert "list" not in shown and "other" not in shown and "paper: " in shown
    with pytest.raises(InputError, match=r"list\.json: is no result of this script; give another"):
        add(tmp_path / "list.json", {}, True, {"t": SCORE})


def test_the_papers_tasks_are_the_harness_own():
    """Names, metrics: as the pinned version has them."""
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    tasks = read_tasks(PAPER_TASKS)
    assert [(task.name, task.shots) for task in tasks] == [
        ("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("truthfulqa_mc2", 0)]
    assert all(task.name in known for task in tasks)
    assert read_tasks(("a:1:acc", "b:0:acc_norm")) == [Task("a", 1, "acc"),
                                                       Task("b", 0, "acc_norm")]


def test_scores_are_read_in_per_cent():
    report = {"results": {"t": {"alias": "t", "acc,none": 0.25, "acc_stderr,none": 0.125,
                                "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"}},
              "total_evaluation_time_seconds": "1.5", "lm_eval_version": "0"}
    score = read_score(report, Task("t", 0, "acc"))
    assert (score["score"], score["standard_error"], score["seconds"]) == (25, 12.5, 1.5)
    assert read_score(report, Task("t", 0, "acc_norm"))["standard_error"] is None
    with pytest.raises(InputError, match="no metric f1; it has acc, acc_norm"):
        read_score(report, Task("t", 0, "f1"))


def test_missing_numbers_are_shown_as_missing_beside_the_papers(tmp_path):
    result = {"score": 58.123, "standard_error": 1.44}
    (tmp_path / "mine.json").write_text(json.dumps(
        {"benchmark": "ranking", "settings": {"limit": 7},
         "results": {"arc_challenge:25:acc_norm": result}}))
    lines = "\n".join(summary(tmp_path, read_tasks(PAPER_TASKS))).split("\n")
    assert lines[2].split() == ["mine", "58.12", "±", "1.44", "missing", "missing", "missing"]
    assert lines[-1] == "mine: only the first 7 questions of each task"
    cut = next(line for line in lines if line.startswith("paper: LLaMA2-13b + CUT"))
    assert cut.split()[-4:] == ["60.84", "81.44", "55.78", "49.33"]
    assert "-" in summary(tmp_path, [Task("mine", 0, "acc")])[0].split("\n")[-1]
