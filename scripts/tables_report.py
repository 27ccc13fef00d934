"""The report of scripts/tables.py: results/SIZE.json -> results/README.md and figures.

Everything is computed from those files, configs/tables.yaml and configs/paper_tables.yaml; the same
files give the same bytes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lm.figures import panels
from lm.records import InputError, Record, write_text
from lm.results import read_result
from lm.tables import PAPER_TABLES
from scripts.report_results import escaped, markdown_table
from scripts.tables_statistics import (
    Difference,
    Interval,
    Measurement,
    difference,
    over_prompts,
    over_seeds,
    percent,
)

HEAD = """\
# Every table of both papers at small scale

Made by `scripts/tables.py` from the files beside it and `configs/tables.yaml`; not written by hand.
The papers' figures are of larger models, other data and other measures: what can be compared is the
order of the rows, not the figures.

Here a figure is the share, in per cent, of the held-out constraints that a model's answers satisfy,
decided by IFEval's checkers, or of the held-out pairs or responses that a judge decides rightly. It
is the mean over seeds. **By seed** is the t-interval (95 %) over seeds; there is none of one seed,
or of seeds that all agree. **By prompt** is a bootstrap over prompts (or pairs) of what is averaged
over seeds, a figure or a paired difference; of a single seed's figure, or where prompts differ from
seed to seed, it is Wilson's interval, and of a difference none. An order that a paper claims
*holds* if all intervals of the difference lie above 0, *does not hold* if all lie below, and cannot
be told if one includes 0 or there is none by seed. A difference covers only the seeds that both
rows have; it has an interval by prompt only if they have the prompts in common too. Intervals are
not corrected for the number of claims.
"""


def write(settings: Mapping, folder: Path) -> None:
    """Write README.md and the figures, the largest size first."""
    import yaml

    papers = yaml.safe_load(PAPER_TABLES.read_text(encoding="utf-8"))["tables"]
    found = [read_result(path) for size in reversed(settings["sizes"])
             if (path := folder / f"{size}.json").is_file()]
    if not found:
        raise InputError(f"{folder}: holds no results; bash scripts/tables.sh --size smoke makes "
                         "some")
    lines = [HEAD]
    for told in found:
        lines += section(settings, told, papers, folder)
    write_text(folder / "README.md", "\n".join(lines).rstrip() + "\n")
    print(f"{folder}/README.md: {', '.join(told['size'] for told in found)}")


def section(settings: Mapping, told: Record, papers: Sequence[Record],
            folder: Path) -> Iterator[str]:
    """All that is known of a size."""
    yield from (f"## Size {told['size']}", "", *run_lines(told), "")
    for listed in settings["tables"]:
        yield from table_lines(settings, told, papers, listed, folder)
    yield from trials(settings, told)


def run_lines(told: Record) -> Iterator[str]:
    """What was run: command, machine, days, revisions, seeds, and how long it took."""
    done = [cell for cell in told["cells"].values() if "figures" in cell]
    days = sorted({cell["finished"] for cell in done})
    revisions = sorted({cell["git_revision"][:12] + "+" * cell["git_revision"].endswith("+")
                        for cell in done if cell["git_revision"]})
    failed = len(told["cells"]) - len(done)
    yield (f"`bash scripts/tables.sh --size {told['size']}`: {told['model']}, seeds "
           f"{', '.join(map(str, told['values']['seeds']))}; {len(done)} cells"
           + (f", {failed} failed" if failed else "")
           + f", {sum(cell['seconds'] for cell in done) / 3600:.1f} hours of cells")
    yield f"on {'; '.join(sorted({cell['machine'] for cell in done}))}"
    yield f"({' to '.join([days[0], days[-1]] if days[1:] else days)}),"
    yield (f"at commit {', '.join(revisions)} (+: with uncommitted changes); "
           + ", ".join(f"{name} {version}" for name, version in told["versions"].items()) + ".")


def table_lines(settings: Mapping, told: Record, papers: Sequence[Record], listed: Mapping,
                folder: Path) -> Iterator[str]:
    """A table of the papers, ours beside it, what was claimed, what is missing, the figure."""
    yield from (f"### {escaped(listed['title'])}", "", listed["about"], "")
    if not listed["rows"]:
        yield from papers_alone(papers, listed["papers"])
        return
    measured = {row["name"]: measurement(settings, told, row) for row in listed["rows"]}
    columns = listed.get("papers", [])
    against = measured[listed["against"]]
    rows = []
    for row in listed["rows"]:
        ours = measured[row["name"]]
        theirs = [their_figure(papers, column, name) for column, name in
                  zip(columns, row.get("paper", [None] * len(columns)), strict=True)]
        rows.append([row["name"], *theirs, *our_cells(ours, against),
                     *training(told, row)])
    yield from markdown_table(
        ["", *(f"paper: {column['head']}" for column in columns), "here, %", "by seed",
         "by prompt", f"above {listed['against']}", "by seed", "by prompt", "seeds",
         "training steps", "tokens"], rows)
    yield from claims(listed, measured)
    yield from missing(settings, told, listed)
    if any(measured.values()):
        picture = folder / f"{told['size']}-{listed['key']}.png"
        draw(listed, measured, picture)
        yield from (f"![{escaped(listed['title'])}]({picture.name})", "")


def measurement(settings: Mapping, told: Record, row: Mapping) -> Measurement:
    """A row's figures by seed; the seed of what is made once is None."""
    recipe = settings["recipes"][settings["rows"][row["row"]]["recipe"]]
    name = row.get("figure") or settings["rows"][row["row"]].get("measure", recipe.get("measure"))
    return {None if cell["part"] == "once" else int(cell["part"].removeprefix("seed")):
            cell["figures"][name]
            for cell in told["cells"].values() if cell["row"] == row["row"]
            and not cell["part"].startswith("trial") and name in cell.get("figures", {})}


def our_cells(ours: Measurement, against: Measurement) -> list[str]:
    """Mean and intervals, difference and its intervals, and how many seeds."""
    if not ours:
        return ["missing", *["-"] * 6]
    values = [percent(figure) for figure in ours.values()]
    apart = difference(ours, against) if against and ours is not against else None
    return [f"{sum(values) / len(values):.1f}", interval(over_seeds(values)),
            interval(over_prompts(ours)), *(
                [f"{apart.mean:+.1f}", interval(apart.by_seed), interval(apart.by_prompt)]
                if apart else ["-"] * 3), "-" if None in ours else str(len(ours))]


def interval(found: Interval) -> str:
    return "-" if found is None else f"[{found[0]:.1f}, {found[1]:.1f}]"


def training(told: Record, row: Mapping) -> Iterator[str]:
    """Mean over the seeds of the steps and of the tokens that were trained on."""
    for what in ("steps", "tokens"):
        known = [cell[what] for cell in told["cells"].values()
                 if cell["row"] == row["row"] and cell["part"].startswith("seed")
                 and cell.get(what) and row.get("trained", True)]
        yield f"{sum(known) / len(known):.0f}" if known else "-"


def their_figure(papers: Sequence[Record], column: Mapping, name: str | None) -> str:
    """The paper's figure of a row; a dash where it has none."""
    if name is None:
        return "-"
    (table,) = [table for table in papers if table["title"] == column["table"]]
    (row,) = [row for row in table["rows"] if row["name"] == name]
    value = row["figures"][table["measures"].index(column["measure"])]
    return "-" if value is None else f"{value:.2f}"


def papers_alone(papers: Sequence[Record], columns: Sequence[Mapping]) -> Iterator[str]:
    """A table that has no counterpart here."""
    (table,) = [table for table in papers if table["title"] == columns[0]["table"]]
    yield from markdown_table(
        ["", *(f"paper: {column['head']}" for column in columns)],
        [[row["name"], *(their_figure(papers, column, row["name"]) for column in columns)]
         for row in table["rows"]])


def claims(listed: Mapping, measured: Mapping[str, Measurement]) -> Iterator[str]:
    """A line for each order that the paper claims, or that a reader will ask for."""
    for above, below in listed.get("claims", []):
        found = difference(measured[above], measured[below])
        said = "missing" if found is None else f"**{found.verdict()}** ({in_words(found)})"
        yield f"- {escaped(above)} above {escaped(below)}: {said}"
    if listed.get("claims"):
        yield ""


def in_words(found: Difference) -> str:
    return (f"{found.mean:+.1f} points; by seed {interval(found.by_seed)}, "
            f"by prompt {interval(found.by_prompt)}")


def missing(settings: Mapping, told: Record, listed: Mapping) -> Iterator[str]:
    """What failed, and the command that runs what is not there."""
    rows = list(dict.fromkeys(row["row"] for row in listed["rows"]))
    for name, cell in told["cells"].items():
        if cell["row"] in rows and "error" in cell:
            yield from (f"Failed: {name}: {escaped(cell['error'])}", "")
    lacking = [row for row in rows if wanted_parts(settings, told, row) - {
        cell["part"] for cell in told["cells"].values()
        if cell["row"] == row and "figures" in cell}]
    if lacking:
        yield from ("Missing cells come from:", "", "```bash",
                    f'bash scripts/tables.sh --size {told["size"]} --go_on '
                    f'--only "{"|".join(lacking)}"',
                    "```", "")


def wanted_parts(settings: Mapping, told: Record, row: str) -> set[str]:
    """The names of a row's cells, trials apart."""
    if settings["rows"][row].get("once"):
        return {"once"}
    return {f"seed{seed}" for seed in told["values"]["seeds"]}


def trials(settings: Mapping, told: Record) -> Iterator[str]:
    """The learning rates that were tried, with what each gave on the validation prompts."""
    yield from ("### Learning rates", "",
                "Tried with the first seed and measured on validation prompts, which no table "
                "shows; the best is used for all seeds, of equal ones the first. All methods of "
                "a paper had as many trials; ablations and amounts of data take the rate of their "
                "full method. A trial is one run, of online CUT its first round, of the AI judge "
                "with as many responses less to learn from, and few prompts, so that of close ones "
                "another may be the best; beyond the largest or the smallest there may be a better "
                "one. Nothing else was searched here: the other settings are "
                "the quickstarts', which were chosen for CUT and for SELF-JUDGE.", "")
    rows = []
    for row, given in settings["rows"].items():
        cells = [cell for cell in told["cells"].values()
                 if cell["row"] == row and "figures" in cell]
        used = sorted({cell["learning_rate"] for cell in cells
                       if cell["part"].startswith("seed")} - {""})
        if not used:
            continue
        measure = given.get("measure", settings["recipes"][given["recipe"]].get("measure"))
        known = {cell["learning_rate"]: cell["figures"][measure] for cell in cells
                 if cell["part"].startswith("trial")}
        tried = {rate: known[rate] for rate in map(str, given.get("rates", [])) if rate in known}
        how = ", ".join(f"{rate}: {percent(figure):.1f}" for rate, figure in tried.items()) or (
            f"as {given['tuned_as']}" if "tuned_as" in given else "not searched")
        rows.append([row, how, ", ".join(used) + at_the_edge(tried, used)])
    yield from markdown_table(["row", "tried: validation, %", "used"], rows)


def at_the_edge(tried: Iterable[str], used: Sequence[str]) -> str:
    """Whether the best learning rate is the last one in its direction."""
    rates = sorted(map(float, tried))
    if len(used) != 1 or len(rates) < 2:
        return ""
    return {rates[-1]: " (the largest)", rates[0]: " (the smallest)"}.get(float(used[0]), "")


def draw(listed: Mapping, measured: Mapping[str, Measurement], picture: Path) -> None:
    """Bars, or a curve with the other rows as lines; the bars of error are the intervals by seed.

    Of a single seed they are those by prompt.
    """
    points = {}
    for row in listed["rows"]:
        if ours := measured[row["name"]]:
            values = [percent(figure) for figure in ours.values()]
            low, high = over_seeds(values) or over_prompts(ours)
            middle = sum(values) / len(values)
            points[row["name"]] = (row.get("x"), middle, max(0, middle - low),
                                   max(0, high - middle))
    curve = {name: point for name, point in points.items() if point[0] is not None}
    size = (5.5, 3.2) if curve else (7, 0.6 + 0.35 * len(points))
    with panels(picture, 1, 1, size, dpi=80) as [axis]:
        axis.set_title(re.sub(r"^(.{60}).+", r"\1 ...", listed["title"]), fontsize=10)
        if not curve:
            names = list(points)[::-1]
            _, middles, lows, highs = zip(*(points[name] for name in names), strict=True)
            axis.barh(names, middles, xerr=[lows, highs], capsize=3, color="tab:blue", alpha=0.7)
            axis.set(xlabel="%")
        else:
            x, middles, lows, highs = zip(*curve.values(), strict=True)
            axis.errorbar(x, middles, [lows, highs], marker="o", capsize=3)
            for name, point in points.items():
                if name not in curve:
                    axis.axhline(point[1], linestyle="--", color="gray", label=name)
                    axis.legend(frameon=False)
            axis.set(xlabel=listed["curve"], ylabel="%", xticks=x)
