"""Fetch the published data sets, checksums verified where one is known.

    python scripts/download_data.py                    # list the sets
    python scripts/download_data.py cut_iter shepherd  # fetch two of them
    python scripts/download_data.py --readme           # rewrite data/README.md from the table below

Files arrive in `data/downloads/<set>/`, whole or not at all. Running it again fetches only what
is missing or does not match its checksum; a broken Hub transfer goes on where it stopped.
"""

import difflib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.records import InputError, first_line, sha256, write_text

README = Path(__file__).resolve().parents[1] / "data" / "README.md"
HUB_URL = re.compile(r"https://huggingface\.co/datasets/([^/]+/[^/]+)/resolve/main/(.+)")


@dataclass(frozen=True)
class DataFile:
    """One file; None is "unknown": nobody had the file at hand when this table was written."""

    name: str  # below data/downloads/<set>/
    url: str
    records: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class DataSet:
    name: str
    about: str
    source: str  # the page to read before use
    licence: str | None
    files: tuple[DataFile, ...]
    schema: str  # Markdown


def _unverified(prefix: str, *names: str) -> tuple[DataFile, ...]:
    return tuple(DataFile(name, prefix + name) for name in names)


CUT_ITER = "https://raw.githubusercontent.com/wwxu21/CUT/HEAD/data/iter/"
SHEPHERD = "https://raw.githubusercontent.com/facebookresearch/Shepherd/HEAD/data/"
FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/HEAD/fastchat/llm_judge/data/"

DATA_SETS = (
    DataSet(
        "cut_iter",
        "CUT's online iterations: 1000 Alpaca instructions each, responses of the model of that "
        "iteration, judgments by GPT-4.",
        "https://github.com/wwxu21/CUT",
        "Apache-2.0 (the repository's)",
        (DataFile("train-alpaca-sample-iter1.json", CUT_ITER + "train-alpaca-sample-iter1.json",
                  1000, "aa327e51dc78331c743641e147b5d9f4af55636915a6b240575b8884c30af470"),
         DataFile("train-alpaca-sample-iter2.json", CUT_ITER + "train-alpaca-sample-iter2.json",
                  1000, "dc25c5a778bb964926275614651f279d9750df48a944a3b59fc40a85403dc980"),
         DataFile("train-alpaca-sample-iter3.json", CUT_ITER + "train-alpaca-sample-iter3.json",
                  1000, "a23c4ce30b98c8f465ad07efeb709a99f405ef067452f1ed52dff47ea83ce2da"),
         DataFile("train-alpaca-sample-iter4.json", CUT_ITER + "train-alpaca-sample-iter4.json",
                  1000),
         DataFile("train-alpaca-sample-iter5.json", CUT_ITER + "train-alpaca-sample-iter5.json",
                  1000)),
        "A CUT record: `id` (number), `instruction`, `input`, `output` (text), `judgment` (text, "
        "or null where the response was judged perfect; `$ERROR$` where the annotation failed).",
    ),
    DataSet(
        "cut_ultrafeedback",
        "CUT's re-annotations of UltraFeedback responses with judgments. Where they lie inside "
        "the repository is not known here, so this fetches the repository's archive.",
        "https://github.com/wwxu21/CUT",
        "Apache-2.0 (the repository's)",
        (DataFile("CUT.tar.gz", "https://codeload.github.com/wwxu21/CUT/tar.gz/HEAD"),),
        "unknown; unpack with `tar xzf` and look below `data/`.",
    ),
    DataSet(
        "shepherd",
        "Shepherd's human feedback on answers to reasoning questions. Two parallel files; "
        "`scripts/convert2alpaca.py` makes CUT records of them.",
        "https://github.com/facebookresearch/Shepherd",
        None,
        (DataFile("human_data_for_model.jsonl", SHEPHERD + "human_data_for_model.jsonl",
                  1317, "bececda0fab23bf2faf11c9830323a30aa34d4aafbf5067996d34c7e1905ff8a"),
         DataFile("human_data_raw.jsonl", SHEPHERD + "human_data_raw.jsonl",
                  1317, "d3c37ca0aa2cee25c754dc789620cec603e9569cc3acae7626919085cdc98217")),
        "`human_data_for_model.jsonl`: `id` (number), `dataset`, `question`, `answer`, "
        "`feedback` (text). `human_data_raw.jsonl`: `id`, `dataset`, `latestLabel` (the "
        "annotation as collected), `metadata` {`context` = the question, `output_candidate` = "
        "the answer, `output_correct`} (text).",
    ),
    DataSet(
        "critiques",
        "Critiques of summaries and answers (Saunders et al. 2022, Self-critiquing models); "
        "`scripts/convert2alpaca.py` makes CUT records of them.",
        "https://openaipublic.blob.core.windows.net/critiques/README.md",
        None,
        _unverified("https://openaipublic.blob.core.windows.net/critiques/dataset/base/",
                    "train.jsonl.gz", "test.jsonl.gz"),
        "Not checked. What `scripts/convert2alpaca.py` expects stands at its top.",
    ),
    DataSet(
        "hh",
        "Anthropic's helpfulness dialogues in pairs, two of its subsets.",
        "https://huggingface.co/datasets/Anthropic/hh-rlhf",
        "MIT",
        _unverified("https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/",
                    "helpful-base/train.jsonl.gz", "helpful-base/test.jsonl.gz",
                    "helpful-online/train.jsonl.gz", "helpful-online/test.jsonl.gz"),
        "`chosen`, `rejected`: a dialogue each, text with turns that begin `\\n\\nHuman:` and "
        "`\\n\\nAssistant:`.",
    ),
    DataSet(
        "ultrafeedback",
        "Instructions from six sources, four responses each, rated by GPT-4 on four principles.",
        "https://huggingface.co/datasets/openbmb/UltraFeedback",
        "MIT",
        _unverified("https://huggingface.co/datasets/openbmb/UltraFeedback/resolve/main/",
                    "evol_instruct.jsonl", "false_qa.jsonl", "flan.jsonl", "sharegpt.jsonl",
                    "truthful_qa.jsonl", "ultrachat.jsonl"),
        "Not checked: `source`, `instruction` (text), `models` (list), `completions` (list of "
        "{`model`, `principle`, `custom_system_prompt`, `response`, `annotations`: principle -> "
        "{`Rating`, `Rationale` or `Rationale For Rating`}}).",
    ),
    DataSet(
        "alpaca",
        "The 52k instructions of Stanford Alpaca, which CUT's iterations draw from. This is the "
        "JSON file; the same instructions are on the Hub as tatsu-lab/alpaca.",
        "https://github.com/tatsu-lab/stanford_alpaca",
        "CC BY-NC 4.0",
        _unverified("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/HEAD/",
                    "alpaca_data.json"),
        "Not checked: `instruction`, `input` (often empty), `output` (text).",
    ),
    DataSet(
        "mt_bench",
        "MT-Bench: 80 questions of two turns in eight categories; GPT-4's answers to those of "
        "math, coding and reasoning, for the judge to compare with. "
        "`scripts/generate_dialogues.py` answers them, `scripts/evaluate_mt_bench.py` has the "
        "answers scored.",
        "https://github.com/lm-sys/FastChat",
        "Apache-2.0 (the repository's)",
        (DataFile("question.jsonl", FASTCHAT + "mt_bench/question.jsonl", 80),
         DataFile("reference_answer/gpt-4.jsonl",
                  FASTCHAT + "mt_bench/reference_answer/gpt-4.jsonl")),
        "Not checked: `question_id` (number), `category` (text), `turns` (list of texts), "
        "`reference` (list of texts; not everywhere). References: `question_id`, `choices` (list "
        "of {`turns`: list of texts}).",
    ),
    DataSet(
        "vicuna",
        "VicunaEval: 80 questions of one turn; `scripts/evaluate_vicuna.py` has two models' "
        "answers compared.",
        "https://github.com/lm-sys/FastChat",
        "Apache-2.0 (the repository's)",
        (DataFile("question.jsonl", FASTCHAT + "vicuna_bench/question.jsonl", 80),),
        "Not checked: `question_id` (number), `category` (text), `turns` (list of one text).",
    ),
)

README_TOP = """\
# Data

Written by `python scripts/download_data.py --readme` from the table in that script; change it
there. `python scripts/download_data.py NAME ...` fetches a set into `data/downloads/NAME/`.

Checksums stand here only for files that were at hand, counts only for those and for what the
authors state. **Unknown** means just that. A file without a checksum is *not verified*: its
sha256 is printed after the download, so that you can compare or note it. The addresses and
licences were written down from memory: no address could be reached from where this was written,
so read the source's page before you use a set. Where a download fails, fetch the file by hand and
put it at the path that the message names.

## sample

`data/sample/` comes with this repository; everything below does not. It is this project's own
(Apache-2.0), written by [`scripts/make_sample_data.py`](../scripts/make_sample_data.py): short
instructions with constraints that a program can check, responses of a small model, judgments in
words.

| file | record |
| --- | --- |
| `data/sample/train.jsonl` | `{id, instruction, input, output, judgment, constraints}`: a CUT \
record, judgment null where every constraint holds |
| `data/sample/validation.jsonl` | `{id, instruction, constraints}`: to choose settings on |
| `data/sample/heldout.jsonl` | `{id, instruction, constraints}`: to measure on |
| `data/sample/instructions.jsonl` | `{id, instruction, constraints}`: for online rounds |
| `data/sample/preferences/*.jsonl` | UltraFeedback's schema and `constraints`, rated answers |
| `data/sample/preferences/hh_*.jsonl` | HH's schema: the same answers, a pair a line |
"""


def main(*names, folder: str = "data/downloads", readme: bool = False) -> None:
    """List the data sets, or fetch those named.

    Args:
        names: data sets to fetch, for example: cut_iter shepherd. None: list them all.
        folder: where the files go, one folder a set.
        readme: write data/README.md from the table, and fetch nothing.
    """
    if readme:
        write_text(README, readme_text())
        print(f"wrote {README}")
        return
    known = {data_set.name: data_set for data_set in DATA_SETS}
    for name in map(str, names):
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(f"no data set {name}; did you mean {nearest}? "
                             f"(there are {', '.join(known)})")
    for name in names:
        for file in known[name].files:
            fetch(file, Path(folder) / name)
    if not names:
        print(listing())


def fetch(file: DataFile, folder: Path) -> None:
    """Bring one file to `folder/file.name`, unless it is there and as it should be."""
    target = folder / file.name
    if target.is_file():
        digest = sha256(target)
        if file.sha256 in (None, digest):
            print(f"{target}: there already, {_verdict(file, digest)}")
            return
        print(f"{target}: does not match its checksum; fetching it again")
    partial = folder / ".partial"  # a kill leaves its rubbish here, never at the target
    partial.mkdir(parents=True, exist_ok=True)
    by_hand = f"fetch {file.url} by hand and put it at {target}"
    hub = HUB_URL.fullmatch(file.url)
    try:
        arrived = _from_hub(*hub.groups(), partial) if hub else _from_web(file.url, partial)
    except ConnectionError as error:
        raise InputError(f"{file.name}: {error}; {by_hand}") from error
    digest = sha256(arrived)
    if file.sha256 in (None, digest):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(arrived, target)
    shutil.rmtree(partial)
    if file.sha256 not in (None, digest):
        raise InputError(f"{file.name}: not kept, {file.url} gave sha256 {digest}, expected "
                         f"{file.sha256}; the source may have changed, or the transfer broke: "
                         f"try again, or {by_hand}")
    print(f"{target}: {target.stat().st_size:,} bytes, {_verdict(file, digest)}")


def _verdict(file: DataFile, digest: str) -> str:
    return "sha256 verified" if file.sha256 else f"not verified, sha256 {digest}"


def _from_web(url: str, folder: Path) -> Path:
    import requests
    from tqdm import tqdm

    path = folder / url.rsplit("/", 1)[1]
    # "identity": the bytes of the file itself, so that their number is known beforehand
    headers = {"Accept-Encoding": "identity"}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
            answer.raise_for_status()
            size = int(answer.headers.get("Content-Length", 0)) or None
            with open(path, "wb") as file, tqdm(total=size, unit="B", unit_scale=True,
                                                desc=path.name, disable=None) as bar:
                for chunk in answer.iter_content(1 << 16):
                    bar.update(file.write(chunk))
    except requests.HTTPError as error:
        answer = error.response
        raise ConnectionError(f"the server says {answer.status_code} {answer.reason}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(f"no connection to {url.split('/')[2]}") from error
    except requests.RequestException as error:
        raise ConnectionError("the transfer broke off") from error
    return path


def _from_hub(repository: str, name: str, folder: Path) -> Path:
    import requests
    from huggingface_hub import constants, hf_hub_download

    try:  # offline is told at once; the Hub's own client would first retry for 20 seconds
        requests.head(constants.ENDPOINT, timeout=30)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise ConnectionError(f"no connection to {constants.ENDPOINT}") from error
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", local_dir=folder))
    except Exception as error:  # the Hub client raises many kinds; each means "did not come"
        raise ConnectionError("did not come from the Hub "
                              f"({first_line(error).rstrip('.')})") from error


def listing() -> str:
    """What there is, for the terminal."""
    lines = []
    for data_set in DATA_SETS:
        lines.append(f"{data_set.name}  (licence: {data_set.licence or 'unknown'}; "
                     f"{data_set.source})")
        for file in data_set.files:
            lines.append(f"    {file.name:<31} {_count(file):>7} records  "
                         f"sha256 {file.sha256[:12] + '...' if file.sha256 else 'unknown'}")
    return "\n".join([*lines, "", "Fetch some: python scripts/download_data.py "
                      f"{DATA_SETS[0].name} {DATA_SETS[2].name}"])


def readme_text() -> str:
    """data/README.md, from the table."""
    return "\n".join([README_TOP, *map(_section, DATA_SETS)])


def _section(data_set: DataSet) -> str:
    rows = [f"| [{file.name}]({file.url}) | {_count(file)} | "
            f"{f'`{file.sha256}`' if file.sha256 else 'unknown'} |" for file in data_set.files]
    return "\n".join([
        f"## {data_set.name}", "", data_set.about, "",
        f"- Source: <{data_set.source}>",
        f"- Licence: {data_set.licence or 'unknown; see the source'}",
        f"- Schema: {data_set.schema}", "",
        "| file | records | sha256 |", "| --- | --- | --- |", *rows, ""])


def _count(file: DataFile) -> str:
    return "unknown" if file.records is None else str(file.records)


if __name__ == "__main__":
    run(main)
