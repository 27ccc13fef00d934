"""The shell recipes, from their first to their last line, on the sample data.

On a tiny model, in an environment whose processes start at once; and the offline one on the
embedded model too, as its header offers it, in the environment itself.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_judge import save_tiny_judge

from lm.tables import PAPER_TABLES
from scripts.report_papers import MEASURES, commands_for

ROOT = Path(__file__).resolve().parents[1]
PRINCIPLES = ["helpfulness", "honesty", "instruction_following", "truthfulness"]
pytestmark = pytest.mark.skipif(
    not list(Path(sys.prefix).glob(".installed-*")),
    reason="the recipes would install their requirements here; run bash scripts/test.sh, which "
           "did so")


@pytest.fixture
def run_recipe(warm_venv) -> Callable[..., str]:
    """Run a recipe with some environment variables; its output."""

    def run(*words: str, **variables: object) -> str:
        # torchrun before torch 2.13 takes port 29500 unless told otherwise
        environment = {**os.environ, "VENV": str(warm_venv), "PET_STANDALONE": "1",
                       **{key: str(value) for key, value in variables.items()},
                       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        result = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True,
                                text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def shown(*words: str, **variables: str) -> list[list[str]]:
    """The commands of a dry run, which leaves nothing behind."""
    environment = {**os.environ, "DRY_RUN": "1", **variables}
    result = subprocess.run(["bash", *words], cwd=ROOT, env=environment, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def command_of(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables and the words after `bash` of a recipe's line."""
    before, _, after_it = line.partition("bash ")
    return dict(word.split("=", 1) for word in shlex.split(before)), shlex.split(after_it)


def after(flag: str, words: list[str]) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def paper_row(run: str) -> dict:
    tables = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))["tables"]
    return next(row for listed in tables for row in listed["rows"] if row["run"] == run)


@pytest.mark.parametrize(("recipe", "answers"), [("alpaca", "alpaca_eval.json"),
                                                 ("dialogues", "mt_bench.json")])
def test_answers_lie_in_the_models_folder_or_below_runs(recipe, answers, tmp_path):
    """Never in a folder of a model's name, which would hide the model."""
    for model, folder in ((str(tmp_path), str(tmp_path)), ("org/m", "runs/m"),
                          ("smollm2-135m-instruct", "runs/smollm2-135m-instruct")):
        lines = shown(f"scripts/evaluate_{recipe}.sh", model)
        assert [word for words in lines for word in words if word.endswith(f"/{answers}")] == [
            f"{folder}/{answers}"] * 3  # the judge is checked, they are made, they are judged


@pytest.mark.parametrize("run", ["cut-offline", "cut-online/round1", "cut-llama2-70b-chat"])
def test_scores_are_of_the_recipes_answers_and_lie_where_the_report_looks(run):
    """By the command of the recipe's header and by the report's: no GPU hour, no dollar twice."""
    row = paper_row(run)
    variables, recipe = command_of(row["recipe"])
    (answered,) = [words for words in shown(*recipe, **variables) if "scripts/generate.py" in words]
    *_, told = commands_for(Path("runs"), row, [MEASURES["alpaca"]], [None])
    more = {"GENERATE": row["generate"]} if "generate" in row else {}
    scored = shown("scripts/evaluate_alpaca.sh", f"runs/{run}/model", **more)
    assert scored == shown("scripts/evaluate_alpaca.sh", f"runs/{run}/model/", **more)
    assert scored == shown(*command_of(told)[1], **command_of(told)[0])
    checked, generated, judged = scored
    assert checked == [*judged, "--dry_run"]
    for flag in ("--base_model_name_or_path", "--output_path", "--max_new_tokens", "--load_in"):
        assert after(flag, generated) == after(flag, answered)
    outputs = Path(after("--model_outputs", judged))
    assert str(outputs) == after("--output_path", answered)
    assert str(outputs.with_suffix("") / after("--annotator", judged) / "results.json") == (
        f"runs/{MEASURES['alpaca'].file.format(run=run)}")


@pytest.mark.parametrize("recipe", ["alpaca", "dialogues"])
def test_a_price_reaches_the_judge(recipe):
    words = shown(f"scripts/evaluate_{recipe}.sh", "org/m", PRICE_IN="1", PRICE_OUT="2")[-1]
    assert (after("--price_in", words), after("--price_out", words)) == ("1", "2")
    assert "--price_in" not in shown(f"scripts/evaluate_{recipe}.sh", "org/m")[-1]


def test_dialogues_lie_where_the_report_looks():
    *_, told = commands_for(Path("runs"), paper_row("sft"), [MEASURES["mt_bench"]], [None])
    variables, words = command_of(told)
    assert variables.pop("OUT") == "runs/sft"
    lines = shown(*words, **variables)
    assert lines == shown(*words, **variables, OUT="runs/sft")
    answers, judge = after("--answers", lines[-1]), after("--judge_model", lines[-1])
    assert f"{answers.removesuffix('.json')}/{judge}/results.json" == (
        f"runs/{MEASURES['mt_bench'].file.format(run='sft')}")


def test_questions_of_your_own_need_no_references(tmp_path):
    """Those of MT-Bench are fetched, if either file is missing, before anything is answered."""
    (tmp_path / "scripts").mkdir()
    for name in ("evaluate_dialogues.sh", "environment.sh"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    downloads, own = tmp_path / "data/downloads/mt_bench", tmp_path / "q.jsonl"
    (downloads / "reference_answer").mkdir(parents=True)
    for path in (own, downloads / "question.jsonl"):
        path.touch()

    def scripts(**variables: str) -> list[str]:
        lines = shown(str(tmp_path / "scripts/evaluate_dialogues.sh"), "org/m", **variables)
        assert ("--references" in lines[-1]) == (not variables)
        return [Path(words[1]).stem for words in lines]

    checked, *asked = "evaluate_mt_bench", "generate_dialogues", "evaluate_mt_bench"
    assert scripts() == [checked, "download_data", *asked]
    assert scripts(MT_BENCH=str(own)) == scripts(REFERENCES="") == [checked, *asked]
    (downloads / "reference_answer/gpt-4.jsonl").touch()
    assert scripts() == [checked, *asked]


def test_dry_runs_show_every_command_and_leave_nothing(tmp_path):
    out = str(tmp_path / "out")
    assert shown("scripts/test.sh", "-x")[0] == ["ruff", "check", "."]
    trials = tmp_path / "trials.txt"
    trials.write_text("one --num_epochs 1\n# no trial\ntwo --num_epochs 2\n")
    sweep = shown("scripts/sweep_sample.sh", OUT=out, TRIALS=str(trials))
    assert [words[1] for words in sweep[1:]] == [
        "scripts/generate.py", *["finetune_unlikelihood.py", "scripts/generate.py"] * 2,
        "scripts/evaluate_constraints.py"]
    quickstart = shown("scripts/self_judge_quickstart.sh", OUT=out)
    assert sweep[0] == quickstart[0] == ["mkdir", "-p", out]
    assert quickstart[-1][1] == "scripts/plot_self_judge.py"
    assert not Path(out).exists()


@pytest.mark.parametrize(("value", "dry"), [("", ""), ("0", ""), ("1", "1")])
def test_only_another_value_than_0_makes_a_run_dry(value, dry, warm_venv):
    result = subprocess.run(
        ["bash", "-c", 'source scripts/environment.sh; echo "${DRY_RUN:-}"'], cwd=ROOT, text=True,
        env={**os.environ, "DRY_RUN": value, "VENV": str(warm_venv)}, capture_output=True)
    assert result.stdout == f"{dry}\n"


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Three held-out prompts."""
    path = tmp_path / "prompts.jsonl"
    lines = (ROOT / "data/sample/heldout.jsonl").read_text().splitlines()[:3]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("recipe", "folder"), [
    (["scripts/cut_offline.sh"], "."),
    (["scripts/cut_online_iter.sh", "1", "scripts/cut_online_iter.sh", "2"], "round2")])
def test_paper_recipe(run_recipe, recipe, folder, tiny_llama, prompts, tmp_path):
    """The offline recipe; two rounds of the online one, the second on the first one's model."""
    out = tmp_path / folder
    for words in (recipe[:2], recipe[2:]):
        if words:
            run_recipe(*words, BASE_MODEL=tiny_llama, DATA="data/sample/train.jsonl", GPUS=1,
                       OUT=tmp_path, ROUNDS=tmp_path, PROMPTS=prompts, MAX_STEPS=2,
                       MAX_NEW_TOKENS=4)
    settings = json.loads((out / "adapter/run.json").read_text())["settings"]
    if folder == "round2":
        assert settings["base_model"] == str(tmp_path / "round1/model")
    assert settings["learning_rate"] == 4e-4 and settings["batch_size"] == 8  # as in the paper
    answers = json.loads((out / "alpaca_eval.json").read_text())
    assert len(answers) == 3 and set(answers[0]) >= {"instruction", "output", "generator"}


def test_paper_recipe_with_the_embedded_model(run_recipe, embedded_model, prompts, tmp_path):
    """As its header says under Small; two sentences long, so that seconds are enough."""
    first = prompts.read_text().splitlines()[0]
    prompts.write_text(first + "\n")
    printed = run_recipe("scripts/cut_offline.sh", BASE_MODEL=embedded_model.name,
                         DATA="data/sample/train.jsonl", GPUS=1, OUT=tmp_path, PROMPTS=prompts,
                         MAX_STEPS=1, MAX_NEW_TOKENS=8, VENV=sys.prefix)
    assert f"answers: {tmp_path}/alpaca_eval.json" in printed
    run = json.loads((tmp_path / "adapter/run.json").read_text())
    assert run["steps"] == 1 and 0 < run["first_loss"] < 4  # a random model's is log(49152) = 10.8
    (answer,) = json.loads((tmp_path / "alpaca_eval.json").read_text())
    assert answer["instruction"] == json.loads(first)["instruction"]
    assert answer["output"].strip()
    assert load_file(tmp_path / "model/model.safetensors").keys() == load_file(
        embedded_model / "model.safetensors").keys()


@pytest.mark.parametrize(("data", "sets"), [
    ("data/shepherd.json", ["shepherd"]), ("data/summary-train.json", ["critiques"]),
    ("data/mine.json", [])])
def test_offline_recipe_never_takes_one_set_for_another(data, sets, tmp_path):
    """A copy without any data; a shell function stands for python and shows what it would get."""
    copy = tmp_path / "scripts"
    copy.mkdir()
    for name in ("cut_offline.sh", "cut_steps.sh"):
        (copy / name).write_text((ROOT / "scripts" / name).read_text())
    (copy / "environment.sh").write_text("")
    shown = subprocess.run(
        ["bash", "-c", 'python() { echo "$@"; }; torchrun() { :; }; export -f python torchrun; '
         f"bash {copy}/cut_offline.sh"], env={**os.environ, "DATA": data}, capture_output=True,
        text=True)
    assert (shown.returncode == 0) == bool(sets), shown.stderr
    assert [line.split()[1:] for line in shown.stdout.splitlines() if "download_data" in line] == (
        [sets] if sets else [])
    made = [line.split("--output ")[1].split()[0] for line in shown.stdout.splitlines()
            if "convert2alpaca" in line]
    assert made == {"data/summary-train.json": ["data/summary-test.json", data]}.get(
        data, [data] if sets else [])


def test_offline_recipe_trains_on_no_part_of_the_judgments(tmp_path):
    """A shell function stands for python: its judge fails once, having written what it has."""
    copy, data = tmp_path / "scripts", tmp_path / "data"
    copy.mkdir()
    data.mkdir()
    for name in ("cut_offline.sh", "cut_steps.sh"):
        (copy / name).write_text((ROOT / "scripts" / name).read_text())
    (copy / "environment.sh").write_text("")
    stand_in = f"""python() {{
        echo "$1"
        case "$1" in
        *convert2alpaca.py) touch "${{@: -1}}" ;;
        *annotate.py) touch "$5" "$5.judgments.jsonl" "$5.summary.json"
            [ -e "{tmp_path}/mended" ] ;;
        esac
    }}
    torchrun() {{ echo "$2"; }}; export -f python torchrun; bash {copy}/cut_offline.sh"""

    def typed() -> list[str]:
        variables = {**os.environ, "DATA": "data/ultrafeedback-9-judged.json"}
        result = subprocess.run(["bash", "-c", stand_in], env=variables, capture_output=True,
                                text=True)
        return [Path(line).stem for line in result.stdout.splitlines() if line.endswith(".py")]

    made, trained = ["download_data", "convert2alpaca"], ["finetune_unlikelihood", "merge",
                                                           "generate"]
    assert typed() == [*made, "annotate"]
    assert typed() == ["annotate"]
    (tmp_path / "mended").touch()
    assert typed() == ["annotate", *trained]
    (data / "ultrafeedback-9.json").unlink()  # who has the judgments needs nothing else
    assert typed() == trained


def test_ai_judge_recipe(run_recipe, tiny_llama, tmp_path):
    """A judge is trained on judgments and measured on others, however little it has learnt."""
    printed = run_recipe("scripts/train_ai_judge.sh", BASE_MODEL=tiny_llama,
                         DATA="data/sample/train.jsonl", GPUS=1, OUT=tmp_path, LIMIT=16, HELD_OUT=4,
                         MAX_STEPS=2, MAX_NEW_TOKENS=4)
    assert "judgments that could be read" in printed and f"judge: {tmp_path}/model" in printed
    run = json.loads((tmp_path / "adapter/run.json").read_text())
    assert run["steps"] == 2 and run["counts"]["positives"] == 16 == run["counts"]["records"]
    results = json.loads((tmp_path / "held_out_results.json").read_text())
    assert results["metrics"]["readable"]["total"] >= 4


def dialogues(folder: Path) -> dict[str, Path]:
    """Some of the sample's dialogues, to train and to measure on."""
    given = {"DATA": folder / "train.jsonl", "EVAL": folder / "test.jsonl"}
    for path, name, count in ((given["DATA"], "train", 16), (given["EVAL"], "validation", 4)):
        lines = (ROOT / f"data/sample/preferences/hh_{name}.jsonl").read_text().splitlines()
        path.write_text("\n".join(lines[:count]) + "\n")
    return given


def rated_by_principle(folder: Path) -> dict[str, object]:
    """Prompts with two completions, which all four principles rate otherwise."""
    records = [{"instruction": f"Name {number} cats.", "completions": [
        {"response": response, "annotations": {
            principle: {"Rating": rating, "Rationale For Rating": f"It has {rating} of 5."}
            for principle in PRINCIPLES}}
        for response, rating in (("Cat. " * number, "5"), ("No.", "2"))]}
        for number in range(1, 9)]
    path = folder / "rated.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return {"DATA": path, "EVAL_SIZE": 2, "PRINCIPLES": 1}


@pytest.mark.parametrize(("recipe", "name", "data", "judges"), [
    ("hh", "self-judge-hh", dialogues, ["default"]),
    ("uf", "self-judge-uf-pr", rated_by_principle, PRINCIPLES)])
def test_self_judge_recipe(run_recipe, recipe, name, data, judges, prompts, tmp_path):
    """From a base model to its policy's answers, greedy and by tournament."""
    base, out = save_tiny_judge(tmp_path / "base"), tmp_path / "out"
    config = json.loads((base / "config.json").read_text())  # the published max_length fits in
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    run_recipe(f"scripts/self_judge_{recipe}.sh", **data(tmp_path), BASE_MODEL=base, OUT=out,
               GPUS=1, ACCUMULATION=1, MAX_STEPS=2, MAX_NEW_TOKENS=4, NUM_SAMPLES=4, NESTED="1,2",
               LOAD_IN="fp32", PROMPTS=prompts)
    jsft, trained = (json.loads((out / folder / "run.json").read_text())
                     for folder in ("jsft", "self_judge"))
    assert jsft["steps"] == trained["steps"] == 2
    assert jsft["settings"]["training_args.learning_rate"] == 2e-5  # as in the paper
    assert trained["settings"]["training_args.learning_rate"] == 5e-6
    judged = json.loads((out / "judge.json").read_text())
    assert list(judged["judgments"][0]["probabilities"]) == judges[:1]  # a pair of a principle
    assert set(judged["metrics"]) == {"all", *(judges if len(judges) > 1 else ())}
    # The policy: an adapter on what JSFT made of the base, which is an adapter itself or a model
    settings, *lines = map(json.loads, (out / "tournament.json.samples.jsonl").read_text()
                           .splitlines())
    merged = {"hh": [str(out / "jsft"), str(out / "self_judge")], "uf": [str(out / "self_judge")]}
    assert settings["adapters"] == merged[recipe]
    assert list(lines[-1]["probabilities"]) == judges
    for file, generator in (("greedy", name), ("tournament", f"{name}-tournament"),
                            ("tournament.n2", f"{name}-tournament-n2")):
        answers = json.loads((out / f"{file}.json").read_text())
        assert len(answers) == 3 and {answer["generator"] for answer in answers} == {generator}


def test_the_papers_batch_is_kept_or_asked_for():
    """Micro-batches a step on fewer GPUs; where there is no whole number of them, one line."""
    def accumulation(gpus: int) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-c", "source scripts/self_judge_steps.sh; accumulation"],
                              cwd=ROOT, env={**os.environ, "GPUS": str(gpus)},
                              capture_output=True, text=True)

    assert [accumulation(gpus).stdout for gpus in (1, 2, 8)] == ["8\n", "4\n", "1\n"]
    for gpus in (3, 16):
        refused = accumulation(gpus)
        assert refused.returncode and refused.stderr.startswith(f"error: GPUS={gpus} does not")


def test_quickstart_and_again(run_recipe, tiny_llama, prompts, tmp_path):
    """The newcomer's command; typed again it trains and generates nothing anew."""
    out = tmp_path / "out"
    variables = {"MODEL": tiny_llama, "OUT": out, "PROMPTS": prompts}
    printed = run_recipe("scripts/quickstart.sh", **variables)
    assert "everything is in" in printed and (out / "loss.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results
    adapter = out / "adapter/adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    printed = run_recipe("scripts/quickstart.sh", **variables)
    assert "this run is finished" in printed and "already there" in printed
    assert adapter.stat().st_mtime_ns == before


def test_self_judge_quickstart_and_again(run_recipe, tmp_path):
    """The second newcomer's command; typed again it trains, samples and judges nothing anew."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for path in (ROOT / "data/sample/preferences").glob("*.jsonl"):
        lines = path.read_text().splitlines()[:4]
        (data / path.name).write_text("\n".join(lines) + "\n")
    variables = {"MODEL": save_tiny_judge(tmp_path / "model"), "OUT": out, "DATA": data,
                 "JSFT_STEPS": 1, "SELF_JUDGE_STEPS": 1, "MAX_NEW_TOKENS": 4}
    printed = run_recipe("scripts/self_judge_quickstart.sh", **variables)
    assert "JSFT, best of 8 samples" in printed and "everything is in" in printed
    assert (out / "self_judge.png").stat().st_size > 10_000
    models = json.loads((out / "results.json").read_text())["models"]
    assert {share["all"]["total"] for share in models.values()} == {4} and len(models) == 6
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    printed = run_recipe("scripts/self_judge_quickstart.sh", **variables)
    assert printed.count("this run is finished") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
