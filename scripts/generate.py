"""Generate a model's responses, by default to AlpacaEval's 805 instructions, in its format.

    python scripts/generate.py --base_model_name_or_path saved_models/cut-13b
    python scripts/generate.py --base_model_name_or_path smollm2-135m-instruct \\
        --data_path data/sample/heldout.jsonl --output_path runs/base.json --max_new_tokens 128
    torchrun --nproc_per_node=8 scripts/generate.py ...  # or accelerate launch: a share on each GPU
    vllm serve saved_models/cut-13b --generation-config vllm  # or another such server, then
    python scripts/generate.py --base_model_name_or_path saved_models/cut-13b \\
        --base_url http://localhost:8000/v1 --output_path saved_models/cut-13b/alpaca_eval.json

Each finished response goes to OUTPUT.responses.jsonl at once (of further processes, to
OUTPUT.responses.process1.jsonl and so on); after a stop, even a kill, the same command goes on
where it was, with any number of processes. Its lines have the response's token `ids` too, but for a
server's, which gives none. A response counts for its prompt wherever that stands now: when some
prompts were added, removed or moved, only new ones are answered. A finished output is kept, with
its settings beside it, and reused.
Without `--generation-config vllm`, vLLM's server adds the model's own defaults, such as a
repetition penalty, to what it is asked.
Differs from the released script: batches, resumes, and decodes the new tokens only (it split the
text at the first "### Response:", even one inside an instruction).
"""

import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.budget import noting_costs
from lm.cli import run
from lm.journal import append, by_content, check_settings, digest, open_journal
from lm.models import (
    find_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
    precision,
    resolve_model,
)
from lm.processes import (
    discard_parts,
    launched,
    merge_parts,
    part_of,
    parts,
    read_parts,
    share,
    told_share,
    wait,
)
from lm.records import (
    InputError,
    Record,
    check_fields,
    first_line,
    join_input,
    read_records,
    write_json,
)
from lm.server import RequestsFailed, connect, generate_on, requests_of
from lm.stages import fingerprint
from lm.templates import load_template

if TYPE_CHECKING:
    from tqdm import tqdm

    from lm.generation import Prompt, Response
    from lm.server import Server

ALPACA_EVAL = "tatsu-lab/alpaca_eval"
ENGINES = ("hf", "vllm")
# Fields of a record that speak of another response than the one made here.
OF_ANOTHER_RESPONSE = ("input", "output", "judgment", "score", "reason", "i_ans", "completions")


def main(base_model_name_or_path: str, template: str = "alpaca", data_path: str = ALPACA_EVAL,
         output_path: str = "", peft_model_path: str = "", generator: str = "",
         max_new_tokens: int = 2048, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
         limit: int = 0, batch_tokens: int = 16384, load_in: str = "auto",
         overwrite: bool = False, base_url: str = "", concurrency: int = 8,
         requests_per_minute: float = 0.0, timeout: float = 600.0, attempts: int = 8,
         max_requests: int = 0, max_cost: float = 0.0, price_in: float = -1.0,
         price_out: float = -1.0, cache: str = "", engine: str = "hf",
         max_failed: float = 0.0) -> None:
    """Generate a response to each instruction, batched and resumable.

    Args:
        base_model_name_or_path: model folder, Hub id, or smollm2-135m-instruct; with --base_url
            the name by which the server knows the model.
        template: prompt template, by name or path; `chat` is the model's own chat template.
        data_path: JSON or JSON Lines file with `instruction` (and `input`), or a Hub dataset.
        output_path: file to write, by default alpaca_eval.json in the model's (adapter's) folder.
        peft_model_path: adapter to put on the base model.
        generator: name of the model in the output, by default its folder's.
        max_new_tokens: longest response.
        temperature: 0 is greedy, as in the paper.
        top_p: sample from the most probable tokens that hold this much probability.
        seed: of the samples, which follow from it and the place of the prompt in the file (when it
            was answered), not from batches or stops. Servers get a seed for each sample, and
            differ in what they make of it.
        limit: only the first so many instructions; 0 is all.
        batch_tokens: tokens a batch may hold, prompts and responses; lower it if memory is short.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        overwrite: start again even if an output is there.
        base_url: ask the OpenAI-compatible server at this address; its key, if it wants one, is
            taken from OPENAI_API_KEY. Templates other than chat are completions, chat is a chat.
        concurrency: requests under way at a time.
        requests_per_minute: send no more than that; 0 is no limit.
        timeout: seconds to wait for a response before asking again.
        attempts: of each request, before it has failed.
        max_requests: stop after so many, earlier runs for this output included; 0 is no limit.
        max_cost: stop before so many dollars are exceeded, counted alike; 0 is no limit.
        price_in: dollars per million prompt tokens, where configs/prices.yaml does not know them.
        price_out: the same for new tokens.
        cache: folder that keeps the server's responses for other runs; empty is none.
        engine: hf (transformers), or vllm where it is installed, by one process; it makes bf16 of
            a checkpoint in fp32 on a GPU (--load_in fp32 does not).
        max_failed: share of prompts that a server may fail to answer: the output is written
            without these, and the same command asks for them again. With more it is not written.
    """
    flags = locals()  # before there are other names
    from tqdm import tqdm

    from lm.generation import check_sampling

    check_sampling(max_new_tokens, batch_tokens, temperature, top_p)
    check_engine(engine, base_url, peft_model_path, load_in)
    check_share(max_failed)
    adapter = find_adapter(peft_model_path) if peft_model_path else None
    model_path = Path(base_model_name_or_path if base_url else
                      resolve_model(base_model_name_or_path))
    records = load_prompts(data_path, limit)
    output = output_file(output_path, adapter or model_path)
    refuse_same(output, data_path)
    settings = identity(flags, model_path, adapter, records)
    place, processes = launched(alone="--base_url" if base_url else
                                "--engine vllm" if engine == "vllm" else "")
    if not overwrite and is_done(output, settings):
        if place == 0:
            print(f"{output}: already there, made with the same settings; --overwrite makes it "
                  "anew")
        return
    server = connect(base_model_name_or_path, base_url, flags) if base_url else None
    prompts = prompts_of(records, template)
    contents = [digest(prompt) for prompt in prompts]
    mine = share([len(record["instruction"]) for record in records], place, processes)
    sampling = {key: settings[key] for key in ("max_new_tokens", "temperature", "top_p", "seed")}
    reply = functools.partial(ask, server, sampling) if server else functools.partial(
        respond, engine, str(model_path), adapter, load_in, batch_tokens, sampling)
    found = None
    if overwrite:
        found = begin_anew(output, reply, {index: prompts[index] for index in mine}, place,
                           processes)
    file, lines = open_journal(part_of(journal_file(output), place), bound(settings))
    with file:
        done = finished(output, settings, contents)
        if not done and settings_file(output).exists():  # all prompts are others: a mistake?
            check_settings(output, read_settings(output), settings)
        if done and place == 0:
            print(f"{output}: going on after {len(done)} finished responses")
        left = {index: prompts[index] for index in mine if index not in done}
        failure = None
        if left:
            bar = tqdm(found or reply(left), total=len(mine), initial=len(mine) - len(left),
                       unit="response", desc=told_share(processes), disable=place > 0)
            failure = note(bar, contents, file, lines, server)
        wait(processes)
        if place == 0:
            done = finished(output, settings, contents)
            if failure:
                tell_failed(failure, output, len(records) - len(done), len(records), max_failed)
            write_output(output, records, settings, done)
            merge_parts(file, bound(settings))


def check_engine(engine: str, base_url: str, peft_model_path: str, load_in: str) -> None:
    """Stop at what an engine cannot do."""
    if engine not in ENGINES:
        raise InputError(f"--engine {engine!r}: expected one of {', '.join(ENGINES)}")
    if base_url and peft_model_path:
        raise InputError("--peft_model_path is for models that run here; let the server load the "
                         "adapter and name it with --base_model_name_or_path")
    if engine == "vllm":
        from lm.vllm_engine import DTYPES

        if base_url or peft_model_path or load_in not in ("auto", *DTYPES):
            raise InputError("--engine vllm takes a whole model, without --base_url and "
                             "--peft_model_path (merge.py merges an adapter), and as --load_in "
                             f"auto, {', '.join(DTYPES)}")
        if importlib.util.find_spec("vllm") is None:
            raise InputError("--engine vllm: vllm is not installed here; see lm/vllm_engine.py, or "
                             "use --engine hf")


def check_share(max_failed: float) -> None:
    """Stop at what is no share."""
    if not 0 <= max_failed <= 1:
        raise InputError(f"--max_failed is {max_failed}; expected a share between 0 and 1")


def refuse_same(output: Path, data_path: str) -> None:
    """Stop where the output would replace what it is made of."""
    if output.resolve() == Path(data_path).resolve():
        raise InputError("--output_path is --data_path; choose another, so that both are kept")


def identity(flags: Mapping, model_path: Path, adapter: Path | None,
             records: list[Record]) -> dict:
    """What an output is made with."""
    source = {"base_url": flags["base_url"]} if flags["base_url"] else {
        "weights": fingerprint(model_path), "adapter": str(adapter or ""),
        "adapter_weights": fingerprint(adapter), "load_in": flags["load_in"],
        **({} if flags["engine"] == "hf" else {"engine": flags["engine"]})}
    return {
        "model": str(model_path), **source, "template": template_text(flags["template"]),
        "prompts": digest(records),
        "generator": flags["generator"] or (adapter or model_path).resolve().name,
        **{key: flags[key] for key in ("max_new_tokens", "temperature", "top_p", "seed")}}


def load_prompts(source: str, limit: int) -> list[Record]:
    """Records with the text to answer in `instruction`, and every field that still holds."""
    path = download_alpaca_eval() if source == ALPACA_EVAL else source
    records = read_records(path)
    check_fields(records, source, {"instruction": (str,)}, {"input": (str, NoneType)})
    if limit < 0:
        raise InputError(f"--limit is {limit}; expected 0 (all) or more")
    rows = []
    for record in records[:limit or None]:
        kept = {key: value for key, value in record.items() if key not in OF_ANOTHER_RESPONSE}
        rows.append({"dataset": Path(source).stem, **kept, "instruction": join_input(record)})
    return rows


def download_alpaca_eval(instead: str = "--data_path") -> str:
    """The raw file of the evaluation split; the dataset's loading script no longer works.

    `instead` is the flag that takes a file in its place.
    """
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(ALPACA_EVAL, "alpaca_eval.json", repo_type="dataset")
    except Exception as error:  # the Hub client raises many kinds; each means "not reachable"
        raise InputError(f"{ALPACA_EVAL}: cannot be fetched from the Hub "
                         f"({first_line(error)}); give a file with {instead}") from error


def output_file(output_path: str, model: Path) -> Path:
    if output_path:
        return Path(output_path)
    if not model.is_dir():
        raise InputError(f"{model}: is on the Hub, not in a folder here; say where to write the "
                         "responses with --output_path")
    return model / "alpaca_eval.json"


def template_text(name: str) -> str:
    """What tells one template from another, whatever its name."""
    return name if name == "chat" else load_template(name).prompt


def journal_file(output: Path) -> Path:
    return output.with_name(output.name + ".responses.jsonl")


def settings_file(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def read_settings(output: Path) -> dict:
    """Those that a finished output was made with."""
    return json.loads(settings_file(output).read_text(encoding="utf-8"))


def bound(settings: Mapping) -> dict:
    """What a response depends on, whatever the other prompts (or questions) are."""
    return {key: value for key, value in settings.items() if key not in ("prompts", "questions")}


def is_done(output: Path, settings: dict) -> bool:
    """Whether the whole output is there; one of other settings is an error, never a loss.

    One of other prompts is not whole, if the journal still has its responses.
    """
    if not output.exists():
        return False
    journals = parts(journal_file(output))
    if not settings_file(output).exists():  # they are written after it
        if journals:
            return False
        raise InputError(f"{output}: is there already, and not known to be made by this script; "
                         "choose another --output_path, or --overwrite")
    found = read_settings(output)
    if journals and found != settings and bound(found) == bound(settings):
        return False
    check_settings(output, found, settings)
    return True


def finished(output: Path, settings: dict, contents: Sequence[str]) -> dict[int, Record]:
    """The responses in the journals to the prompts with these contents, by place."""
    lines = read_parts(journal_file(output), bound(settings))
    return by_content((line for line in lines if "index" in line), contents)


def ends(output: Path, data_path: str, template: str) -> list[str]:
    """The finish reason of each response of a whole output, which its journal holds."""
    contents = [digest(prompt) for prompt in prompts_of(load_prompts(data_path, 0), template)]
    done = finished(output, read_settings(output), contents)
    if len(done) < len(contents):
        raise InputError(f"{journal_file(output)}: its lines about {len(contents) - len(done)} of "
                         f"{len(contents)} responses are gone, so how these ended is not known; "
                         "--overwrite makes them anew")
    return [done[index]["finish_reason"] for index in range(len(contents))]


def load(model_path: str, adapter: Path | None, load_in: str) -> tuple[object, object]:
    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, precision(load_in))
    return (load_adapter(model, adapter) if adapter else model), tokenizer


def prompts_of(records: list[Record], template: str) -> "list[Prompt]":
    """What the model is asked: a text each, or a message where the template is `chat`."""
    texts = [record["instruction"] for record in records]
    if template == "chat":
        return [[{"role": "user", "content": text}] for text in texts]
    frame = load_template(template)
    return [frame.render(text) for text in texts]


def respond(engine: str, model_path: str, adapter: Path | None, load_in: str, batch_tokens: int,
            sampling: dict, prompts: "dict[int, Prompt]") -> "Iterator[tuple[int, Response]]":
    """(index, response), as they are finished, of a model in this process."""
    if engine == "vllm":
        from lm.vllm_engine import generate_with_vllm

        return generate_with_vllm(model_path, load_tokenizer(model_path), prompts,
                                  load_in=load_in, **sampling)
    from lm.generation import generate

    model, tokenizer = load(model_path, adapter, load_in)
    return generate(model, tokenizer, prompts, token_budget=batch_tokens, **sampling)


def ask(server: "Server", sampling: dict,
        prompts: "dict[int, Prompt]") -> "Iterator[tuple[int, Response]]":
    """The same from a server; tells first what it will cost."""
    print(server.estimate(requests_of(prompts, **sampling)))
    return generate_on(server, prompts, **sampling)


def answers(records: list[Record], texts: list[str], generator: str) -> list[Record]:
    """AlpacaEval's records."""
    return [{"instruction": record["instruction"], "output": text, "generator": generator,
             **{key: value for key, value in record.items()
                if key not in ("instruction", "generator")}}
            for record, text in zip(records, texts, strict=True)]


def begin_anew(output: Path, reply: "Callable[[dict[int, Prompt]], Iterator]",
               prompts: "dict[int, Prompt]", place: int, processes: int) -> Iterator | None:
    """Give up what is there; returns the responses to come, None where a process has no prompts."""
    found = None
    if prompts:  # before anything is lost: no model, a prompt that is too long
        found = reply(prompts)
    wait(processes)
    settings_file(output).unlink(missing_ok=True)  # first: a kill leaves a run that goes on
    discard_parts(journal_file(output), place, processes)
    return found


def note(bar: "tqdm", contents: Sequence[str], file: IO[str], lines: Sequence[Mapping],
         server: "Server | None") -> RequestsFailed | None:
    """Append each (index, response) under a progress bar to the journal as it comes.

    A server's budget goes on from the journal's `lines` so far. Returns what it says at the end of
    single requests that failed.
    """
    if server:
        server.budget.go_on_from(lines)
    with noting_costs(file, server.budget if server else None):
        try:
            for index, response in bar:
                append(file, {"index": index, "content": contents[index],
                              "output": response.text.strip(),
                              **({"ids": list(response.token_ids)} if response.token_ids else {}),
                              "finish_reason": response.finish_reason,
                              **(server.budget.spent() if server else {})})
                if server:
                    bar.set_postfix_str(f"${server.budget.cost:.2f}")
        except RequestsFailed as error:
            return error
    return None


def tell_failed(failure: RequestsFailed, output: Path, failed: int, total: int,
                max_failed: float) -> None:
    """Stop if too many prompts have no response, or all; else say that the output lacks them."""
    if failed > max_failed * total or failed == total:
        raise failure
    print(f"{output}: {failed} of {total} prompts are left out: {failure}")


def write_output(output: Path, records: list[Record], settings: dict,
                 done: dict[int, Record]) -> None:
    """The whole output, or none of it; without prompts whose requests failed.

    Then it has no settings beside it, by which the next run would take it for finished.
    """
    texts = [line["output"] for line in done.values()]
    settings_file(output).unlink(missing_ok=True)  # of other prompts
    write_json(output, answers([records[index] for index in done], texts, settings["generator"]))
    if len(done) == len(records):
        write_json(settings_file(output), settings)
    cut = sum(line["finish_reason"] == "length" for line in done.values())
    print(f"{output}: {len(done)} responses, {cut} of them cut at max_new_tokens")


if __name__ == "__main__":
    run(main)
