"""The tables of scripts/report.py with all results that were found, as Markdown."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lm.records import Record
from lm.results import read_result
from lm.terminal import printable

Entries = Sequence[tuple[str, Record]]  # path below the folder, what it holds
BENCHMARK = re.compile(rb'\s*\{\s*"benchmark": "(\w+)"')  # how results of evaluate_* begin
# What Markdown or HTML would take for its own: marks, links, emphasis
SPECIAL = re.compile(r"[\\`*|<>&]|\](?=[(\[:])|(?<!\w)_|_(?!\w)")
NEEDED = {  # in files that do not begin with `benchmark`; other programs have such names too
    "annotation": ("settings.judge", "responses", "positive", "negative", "failed", "requests",
                   "cost"),
    "online": ("rounds",),
    "training": ("status", "data.path")}
# Questions, and the records of the papers' test split; fewer are told
WHOLE = {"alpaca_eval": 805, "mt_bench": 160, "vicuna": 80, "summarization": 1939}


def found_tables(root: Path, files: Sequence[Path]) -> Iterator[str]:
    """A table of each kind of result."""
    results: dict[str, list[tuple[str, Record]]] = {kind: [] for kind in KINDS}
    for path in files:
        if (kind := kind_of(path)) and is_ours(kind, result := read_result(path)):
            results[kind].append((path.relative_to(root).as_posix(), result))
    for kind, entries in results.items():
        if entries:
            title, build = KINDS[kind]
            yield from (f"### {title}", "", *build(root, entries))
    if not any(results.values()):
        yield from ("Nothing yet.", "")


def kind_of(path: Path) -> str | None:
    """What kind of result a file holds, None for others."""
    by_name = {"online.json": "online", "run.json": "training"}
    if path.suffix != ".json":
        return None
    if path.name.endswith(".summary.json"):
        return "annotation"
    with open(path, "rb") as file:
        start = BENCHMARK.match(file.read(100))
    named = start[1].decode() if start else by_name.get(path.name)
    return named if named in KINDS else None


def is_ours(kind: str, result: object) -> bool:
    """Whether a file that was known by its name alone has what its table shows."""
    def has(key: str) -> bool:
        found = result
        for name in key.split("."):
            if not isinstance(found, dict) or name not in found:
                return False
            found = found[name]
        return True

    return all(map(has, NEEDED.get(kind, ())))


def alpaca(root: Path, entries: Entries) -> Iterator[str]:
    return markdown_table(
        ["model", "win rate", "± error", "wins", "draws", "losses", "undecided", "annotator",
         "file"],
        [[result["model"], f"{result['win_rate']:.2f}{part(result)}",
          figure(result["standard_error"]), *(f"{result[key]:.0f}" for key in (
              "n_wins", "n_draws", "n_wins_base", "n_undecided")),
          "-".join(filter(None, (result.get("annotator"), result.get("judge_model")))) or "-", path]
         for path, result in entries])


def ranking(root: Path, entries: Entries) -> Iterator[str]:
    tasks = dict.fromkeys(task for _, result in entries for task in result["results"])
    rows, missing = [], []
    for path, result in entries:
        rows.append([Path(path).stem, *(
            f"{score['score']:.2f} ± {figure(score['standard_error'])}{part(result)}"
            if (score := result["results"].get(task)) else "missing" for task in tasks), path])
        lacking = [task for task in tasks if task not in result["results"]]
        if lacking:
            settings = result["settings"]
            adapter = ["--peft_model_path", settings["adapter"]] if settings["adapter"] else []
            missing.append(shlex.join([
                "python", "scripts/evaluate_ranking.py", "--name", Path(path).stem,
                "--base_model_name_or_path", settings["model"], *adapter,
                "--output_dir", str(root / Path(path).parent), "--tasks", ",".join(lacking)]))
    yield from markdown_table(["model", *tasks, "file"], rows)
    if missing:
        yield from ("Missing numbers come from:", "", "```bash", *missing, "```", "")


def summarization(root: Path, entries: Entries) -> Iterator[str]:
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    return markdown_table(["summaries", *kinds, "records", "file"], [
        [model, *(interval(means[kind], key="mean") for kind in kinds), str(result["records"]),
         path] for path, result in entries for model, means in result["models"].items()])


def mt_bench(root: Path, entries: Entries) -> Iterator[str]:
    groups = dict.fromkeys(group for _, result in entries for group in result["scores"])
    turns = dict.fromkeys(turn for _, result in entries for turn in result["scores"]["all"])
    return markdown_table(
        ["model", *(f"turn {turn}" if turn != "all" else "all" for turn in turns),
         *(group for group in groups if group != "all"), "scores", "failed", "judge", "file"],
        [[result["model"], *(interval(result["scores"]["all"].get(turn), key="mean")
                             for turn in turns),
          *(figure(result["scores"].get(group, {}).get("all", {}).get("mean"))
            for group in groups if group != "all"),
          str(result["scores"]["all"]["all"]["count"]), str(result["failed"]),
          result["judge_model"], path] for path, result in entries])


def vicuna(root: Path, entries: Entries) -> Iterator[str]:
    return markdown_table(
        ["model", "against", "win rate, %", "wins, %", "ties, %", "losses, %", "questions",
         "undecided", "judge", "file"],
        [[result["model"], result["baseline"], *(
            interval(result["shares"][name], 100) for name in ("win_rate", "win", "tie", "loss")),
          str(result["shares"]["win_rate"]["total"]), str(result["undecided"]),
          result["judge_model"], path] for path, result in entries])


def constraints(root: Path, entries: Entries) -> Iterator[str]:
    for path, result in entries:
        models = result["models"]
        kinds = dict.fromkeys(kind for shares in models.values() for kind in shares)
        yield from markdown_table([path, *models], [
            [kind, *(interval(shares.get(kind), 100, total=True) for shares in models.values())]
            for kind in kinds])


def judge(root: Path, entries: Entries) -> Iterator[str]:
    names = ("accuracy", "consistency", "chose_first", "ties")
    return markdown_table(
        ["judge", "pairs", *(f"{name}, %" for name in names), "file"],
        [[result["model"], str(shares["accuracy"]["total"]),
          *(interval(shares.get(name), 100) for name in names), path]
         for path, result in entries for shares in [result["metrics"]["all"]]])


def ai_judge(root: Path, entries: Entries) -> Iterator[str]:
    names = ("readable", "right", "right_perfect", "right_faulty", "majority")
    return markdown_table(["judge", "judgments", *(f"{name}, %" for name in names), "file"], [
        [result["model"], str(result["metrics"]["readable"]["total"]),
         *(interval(result["metrics"].get(name), 100) for name in names), path]
        for path, result in entries])


def annotation(root: Path, entries: Entries) -> Iterator[str]:
    return markdown_table(
        ["judge", "responses", "positive", "negative", "failed", "requests", "dollars", "file"],
        [[result["settings"].get("model") or result["settings"]["judge"],
          *(str(result[key]) for key in ("responses", "positive", "negative", "failed",
                                         "requests")), f"{result['cost']:.2f}", path]
         for path, result in entries])


def online(root: Path, entries: Entries) -> Iterator[str]:
    from scripts.plot_online import HEAD, judgments, score

    for path, result in entries:
        rounds = result.get("rounds") or []
        measure = rounds[0]["measure"] if rounds else "no round is finished yet"
        yield from markdown_table([path, measure, *HEAD], [
            [str(entry["round"]), score(entry), *judgments(entry["stages"]),
             f"{entry['seconds'] / 60:.1f}", f"{entry['cost']:.2f}"] for entry in rounds])


def training(root: Path, entries: Entries) -> Iterator[str]:
    rows = []
    for path, result in entries:
        losses = result.get("loss") or [result.get("first_loss"), result.get("last_loss")]
        revision = result.get("git_revision") or "-"
        rows.append([str(Path(path).parent), result["status"], str(result.get("steps", "-")),
                     " → ".join(figure(loss) for loss in losses), result["data"]["path"],
                     revision[:7] + revision[40:]])
    return markdown_table(["run", "status", "steps", "loss, first → last", "data", "commit"], rows)


KINDS: dict[str, tuple[str, Callable]] = {
    "constraints": ("Constraints satisfied", constraints),
    "alpaca_eval": ("AlpacaEval, win rate against the reference in %", alpaca),
    "ranking": ("Ranking tasks, %", ranking),
    "summarization": ("Summarization, ROUGE in %", summarization),
    "mt_bench": ("MT-Bench, 1 to 10", mt_bench),
    "vicuna": ("VicunaEval", vicuna),
    "judge": ("Judges on pairs whose better response is known", judge),
    "ai_judge": ("Judges on responses whose judgment is known", ai_judge),
    "online": ("Online rounds", online),
    "annotation": ("Judgments", annotation),
    "training": ("Trainings", training),
}


def part(result: Record) -> str:
    """A remark where only some of a benchmark's questions were asked, or have an answer."""
    kind = result.get("benchmark")
    if kind == "ranking" and (limit := result.get("settings", {}).get("limit")):
        return f" (first {limit})"
    if kind not in WHOLE:
        return ""
    counted, lost = {
        "alpaca_eval": lambda: (result["n_total"], result["n_undecided"]),
        "summarization": lambda: (result["records"] + result["without_reference"], 0),
        "mt_bench": lambda: (result["scores"]["all"]["all"]["count"], result["failed"]),
        "vicuna": lambda: (result["shares"]["win_rate"]["total"], result["undecided"])}[kind]()
    asked = counted + lost
    remarks = [f"{asked:.0f} of {WHOLE[kind]}"] if asked < WHOLE[kind] else []
    if lost and 100 * lost >= asked:
        remarks += [f"{100 * lost / asked:.0f} % undecided"]
    return f" ({', '.join(remarks)})" if remarks else ""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield f"| {' | '.join(map(escaped, head))} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(map(escaped, row))} |"
    yield ""


def escaped(value: object) -> str:
    """Names and paths as they are, whatever Markdown and HTML make of their characters."""
    return SPECIAL.sub(lambda match: f"&#{ord(match[0])};",
                       " ".join(printable(str(value)).split()))


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def interval(found: Record | None, scale: float = 1, key: str = "share",
             total: bool = False) -> str:
    """A number with its 95 % interval, and of how many."""
    if not found or found[key] is None:
        return "-"
    return (f"{scale * found[key]:.2f} [{scale * found['low']:.1f}, {scale * found['high']:.1f}]"
            + (f" of {found['total']}" if total else ""))


