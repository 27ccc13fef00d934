"""Every result of a folder on one page, ours beside the papers': Markdown and HTML.

    python scripts/report.py                     # runs/ -> runs/report/report.md and report.html
    python scripts/report.py --folder runs/quickstart

Reads what the scripts write below the folder: the evaluate_* scripts' JSON files (they begin with
`benchmark`), annotate.py's summaries, online.json, run.json and trainer_state.json of trainings,
and figures (.png). The papers' figures come from configs/paper_tables.yaml. A number that is not
there is shown as missing, with the command that makes it where the tables look for it. The HTML
page holds its pictures; the same inputs give the same bytes.
"""

import base64
import html
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.figures import draw_training
from lm.records import InputError, write_text
from lm.results import read_result
from scripts.report_papers import paper_tables
from scripts.report_results import escaped, found_tables

STYLE = """\
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .25em .7em; white-space: nowrap }
pre { background: #f5f5f5; padding: .7em; overflow-x: auto }
img { max-width: 100% }
"""


def main(folder: str = "runs", output_dir: str = "") -> None:
    """Write report.md and report.html, with the curves that are drawn for them.

    Args:
        folder: where results lie, at any depth.
        output_dir: where the page goes, by default FOLDER/report.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that your results are in")
    output = Path(output_dir or root / "report")
    output.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(root.rglob("*")) if path.is_file()
             and not any(part.startswith(("checkpoint-", "."))
                         for part in path.relative_to(root).parts)]
    curves = draw_curves(root, files, output)
    figures = {escaped(path.relative_to(root)): path for path in files if path.suffix == ".png"
               and path.name != "loss.png"  # plot_training.py's, which the curves show too
               and path.parent.resolve() != output.resolve()}  # the curves, of this run or before
    beside = list(paper_tables(root))
    lines = ["# Results", "", "## Beside the papers", "", *beside,
             "## What is here", "", *found_tables(root, files)]
    for title, pictures in (("Training curves", curves), ("Figures", figures)):
        lines += [f"## {title}", "", *([] if pictures else ["None.", ""])]
        for name, path in pictures.items():
            lines += [f"### {name}", "", f"![{name}]({link(path, output)})", ""]
    page = "\n".join(lines)
    write_text(output / "report.md", page)
    write_text(output / "report.html", as_html(page, output))
    missing = sum(line.count("| missing") for line in beside)
    print(f"{output}/report.md, {output}/report.html: {missing} numbers of the papers' tables are "
          "missing here")


def draw_curves(root: Path, files: Sequence[Path], output: Path) -> dict[str, Path]:
    """A picture for each training with a log, by its folder's name."""
    pictures = {}
    for path in files:
        if path.name != "trainer_state.json":
            continue
        parts = path.parent.relative_to(root).parts or (root.resolve().name,)
        picture = output / f"{'-'.join(parts)}.png"
        if draw_training(read_result(path).get("log_history", []), picture):
            pictures[escaped("/".join(parts))] = picture
    return pictures


def as_html(page: str, output: Path) -> str:
    """The page by itself: its pictures within."""
    import markdown

    def embedded(match: re.Match) -> str:
        picture = output / unquote(html.unescape(match[1]))
        return f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'

    body = markdown.markdown(page, extensions=["tables", "fenced_code"])
    body = re.sub(r'src="([^"]+)"', embedded, body)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Results</title>\n'
            f"<style>\n{STYLE}</style>\n{body}\n</html>\n")


def link(path: Path, output: Path) -> str:
    return quote(os.path.relpath(path, output))


if __name__ == "__main__":
    run(main)
