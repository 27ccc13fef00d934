"""Answer the questions of MT-Bench or VicunaEval, turn after turn.

    python scripts/download_data.py mt_bench vicuna
    python scripts/generate_dialogues.py --base_model_name_or_path runs/cut/model \\
        --output_path runs/cut/mt_bench.json
    python scripts/generate_dialogues.py --base_model_name_or_path runs/cut/model --temperature 0 \\
        --data_path data/downloads/vicuna/question.jsonl --output_path runs/cut/vicuna.json

A question is a record `{question_id, category, turns, reference?}`, `turns` the list of what the
user says; an answer is that record with `outputs`, the model's reply to each, and `generator`. Each
reply goes to OUTPUT.responses.jsonl at once; after a stop, even a kill, the same command goes on
where it was. A reply counts for the dialogue before it wherever that stands now: when some
questions were added, removed or moved, only new ones are answered. A finished output is kept, with
its settings beside it, and reused.

In a dialogue the Alpaca template has its header once, then a block for each instruction and
response, which ends with EOS. The paper has no such dialogues, so this is our choice. A server gets
no EOS, as only its tokenizer knows it: there, --template chat is better.

Cost (estimates, not measured): MT-Bench's 160 replies of a 13B model, 5 minutes on one H100.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.budget import BYTES_PER_TOKEN, noting_costs
from lm.cli import run
from lm.journal import append, by_content, check_settings, digest, discard, open_journal
from lm.models import load_tokenizer, precision
from lm.processes import launched
from lm.records import InputError, Record, check_fields, read_records, write_json
from lm.replies import Request
from lm.server import connect
from lm.templates import load_template
from scripts.generate import (
    bound,
    is_done,
    journal_file,
    read_settings,
    refuse_same,
    settings_file,
)
from self_judge.base import model_settings

if TYPE_CHECKING:
    from lm.generation import Response
    from lm.server import Server
    from self_judge.base import Base

    Message = Mapping[str, str]
    # Dialogues by index, how to sample -> what to say next
    Engine = Callable[..., Iterator[tuple[int, Response]]]

DOWNLOADS = Path("data/downloads")
MT_BENCH = str(DOWNLOADS / "mt_bench" / "question.jsonl")
# MT-Bench's own, from memory; questions of other categories get its default of 0.7.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


def main(base_model_name_or_path: str, output_path: str, data_path: str = MT_BENCH,
         template: str = "alpaca", peft_model_path: str = "", generator: str = "",
         max_new_tokens: int = 1024, temperature: float = -1.0, seed: int = 0, limit: int = 0,
         batch_tokens: int = 16384, load_in: str = "auto", overwrite: bool = False,
         base_url: str = "", concurrency: int = 8, requests_per_minute: float = 0.0,
         timeout: float = 600.0, attempts: int = 8, max_requests: int = 0, max_cost: float = 0.0,
         price_in: float = -1.0, price_out: float = -1.0) -> None:
    """Generate a reply to each turn of each question, batched and resumable.

    Args:
        base_model_name_or_path: model folder, Hub id, or smollm2-135m-instruct; also an adapter's
            folder, which is merged into its base; with --base_url what the server calls the model.
        output_path: JSON file to write.
        data_path: questions; JSON or JSON Lines.
        template: prompt template, by name or path; `chat` is the model's own chat template, and
            a path that ends in .jinja another one, such as SELF-JUDGE's
            configs/templates/chat.jinja.
        peft_model_path: adapter to merge into the model.
        generator: name of the model in the output, by default its folder's.
        max_new_tokens: longest reply.
        temperature: 0 is greedy; below 0 it is MT-Bench's own for each category.
        seed: of the samples; they do not depend on batches or stops.
        limit: only the first so many questions; 0 is all.
        batch_tokens: tokens a batch may hold, prompts and replies; lower it if memory is short.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        overwrite: start again even if an output is there.
        base_url: ask the OpenAI-compatible server at this address; its key, if it wants one, is
            taken from OPENAI_API_KEY. Templates other than chat are completions, chat is a chat.
        concurrency: requests under way at a time.
        requests_per_minute: send no more than that; 0 is no limit.
        timeout: seconds to wait for a reply before asking again.
        attempts: of each request, before it has failed.
        max_requests: stop before more requests than this, earlier runs included; 0 is no limit.
        max_cost: stop before more dollars than this, counted alike; 0 is no limit.
        price_in: dollars per million prompt tokens, where configs/prices.yaml does not know them.
        price_out: the same for new tokens.
    """
    flags = locals()  # before there are other names
    from self_judge.base import find_base

    launched(alone="generate_dialogues.py")
    output = Path(output_path)
    refuse_same(output, data_path)
    questions = read_questions(data_path, limit)
    text = template_text(template)
    if base_url and (peft_model_path or template.endswith(".jinja")):
        raise InputError("--peft_model_path and .jinja templates are for models that run here; let "
                         "the server load them, with --template chat")
    base, server = None, None
    if base_url:
        server = connect(base_model_name_or_path, base_url, flags)
    else:
        base = find_base({"pretrained_model_name_or_path": base_model_name_or_path,
                          "peft_model_name_or_path": peft_model_path})
    name = Path((base.adapters or [base.model])[-1] if base else base_model_name_or_path)
    settings = {**({**model_settings(base), "load_in": load_in} if base else
                   {"model": base_model_name_or_path, "base_url": base_url}),
                "template": text, "questions": digest(questions), "seed": seed,
                "max_new_tokens": max_new_tokens, "temperature": temperature,
                "generator": generator or name.resolve().name}
    if not overwrite and is_done(output, settings):
        print(f"{output}: already there, made with the same settings; --overwrite makes it anew")
        return
    start = functools.cache(lambda: (
        on_server(server, text) if server else in_process(base, load_in, text, batch_tokens)))
    if overwrite:
        start()  # before anything is lost: there may be no such model
        discard(journal_file(output))
        settings_file(output).unlink(missing_ok=True)
    replies = answer(questions, settings, output, start, server)
    write_answers(output, questions, replies, settings)


def read_questions(path: str, limit: int) -> list[Record]:
    """Questions, no number twice, each with at least one turn."""
    if Path(path).parent.parent == DOWNLOADS and not Path(path).is_file():
        raise InputError(f"{path}: not here yet; get it with `python scripts/download_data.py "
                         f"{Path(path).parent.name}`, or give another file")
    if limit < 0:
        raise InputError(f"--limit is {limit}; expected 0 (all) or more")
    questions = read_records(path)[:limit or None]
    check_fields(questions, path, {"question_id": (int, str), "category": (str,),
                                   "turns": (list,)}, {"reference": (list,)})
    seen: set[str] = set()  # 1 is "1" to the judge
    for index, question in enumerate(questions):
        if not question["turns"] or not all(isinstance(turn, str) for turn in question["turns"]):
            raise InputError(f"{path}: record {index}: field 'turns' must be a list of texts, at "
                             "least one")
        if (name := str(question["question_id"])) in seen:
            raise InputError(f"{path}: record {index}: field 'question_id' repeats that of an "
                             "earlier record; keep one of them")
        seen.add(name)
    return questions


def template_text(name: str) -> str:
    """The chat template (Jinja) of a name or path; `chat` itself for the model's own."""
    if name == "chat":
        return name
    if not name.endswith(".jinja"):
        return load_template(name).chat_template()
    if not Path(name).is_file():
        raise InputError(f"{name}: no such chat template")
    return Path(name).read_text(encoding="utf-8")


def answer(questions: list[Record], settings: dict, output: Path, start: Callable[[], "Engine"],
           server: "Server | None" = None) -> dict[tuple[int, int], Record]:
    """The lines of the journal by (question, turn), those missing made by a started engine."""
    from tqdm import tqdm

    file, lines = open_journal(journal_file(output), bound(settings))
    with file:
        done = finished(questions, settings["temperature"], lines)
        if not done and settings_file(output).exists():  # all questions are others: a mistake?
            check_settings(output, read_settings(output), settings)
        if done:
            print(f"{output}: going on after {len(done)} finished replies")
        total = sum(len(question["turns"]) for question in questions)
        if len(done) == total:
            return done
        if server:
            server.budget.go_on_from(lines)
            print(server.estimate(requests_of(questions, settings, done)))
        with (noting_costs(file, server.budget if server else None),
              tqdm(total=total, initial=len(done), unit="reply") as bar):
            for place, line in replies_of(start(), questions, settings, done):
                done[place] = line | (server.budget.spent() if server else {})
                append(file, done[place])
                bar.update()
                if server:
                    bar.set_postfix_str(f"${server.budget.cost:.2f}")
    return done


def replies_of(engine: "Engine", questions: list[Record], settings: dict,
               done: Mapping[tuple[int, int], Record]
               ) -> Iterator[tuple[tuple[int, int], Record]]:
    """((question, turn), line) of each reply that is missing; the caller adds them to `done`."""
    for turn, temperature, group in steps(questions, settings["temperature"], done):
        dialogues = {index: dialogue(questions[index], done, index, turn) for index in group}
        for index, response in engine(dialogues, temperature=temperature,
                                      max_new_tokens=settings["max_new_tokens"],
                                      seed=f"{settings['seed']} turn {turn}"):
            yield (index, turn), {
                "index": index, "turn": turn, "content": digest([dialogues[index], temperature]),
                "output": response.text.strip(), "finish_reason": response.finish_reason}


def finished(questions: list[Record], temperature: float,
             lines: list[Record]) -> dict[tuple[int, int], Record]:
    """A journal's replies to what these questions say, by (question, turn).

    What a later turn says includes the replies before it, so turns are looked up in their order.
    """
    done: dict[tuple[int, int], Record] = {}
    replies = [line for line in lines if "index" in line]
    for turn in range(max(len(question["turns"]) for question in questions)):
        contents = [digest([dialogue(question, done, index, turn),
                            temperature_of(question, temperature)])
                    if turn < len(question["turns"]) and (not turn or (index, turn - 1) in done)
                    else "" for index, question in enumerate(questions)]
        done |= {(index, turn): line for index, line in by_content(replies, contents).items()}
    return done


def requests_of(questions: list[Record], settings: dict,
                done: Mapping[tuple[int, int], Record]) -> dict[int, Request]:
    """What is still to be asked, for an estimate; replies in between are as long as they may be."""
    most = settings["max_new_tokens"]
    longest = {"output": "." * (BYTES_PER_TOKEN * most)}
    every = [(index, turn) for index, question in enumerate(questions)
             for turn in range(len(question["turns"]))]
    said = dict.fromkeys(every, longest) | done
    left = [dialogue(questions[index], said, index, turn) for index, turn in every
            if (index, turn) not in done]
    text = settings["template"]
    return {place: Request(messages if text == "chat" else write(text, messages), most, seed=place)
            for place, messages in enumerate(left)}


def steps(questions: list[Record], temperature: float,
          done: Mapping[tuple[int, int], Record]) -> Iterator[tuple[int, float, list[int]]]:
    """Turns, temperatures, and the questions that still lack a reply to this turn with it.

    A turn's group is made when all before it have their replies.
    """
    for turn in range(max(len(question["turns"]) for question in questions)):
        groups: dict[float, list[int]] = {}
        for index, question in enumerate(questions):
            if turn < len(question["turns"]) and (index, turn) not in done:
                groups.setdefault(temperature_of(question, temperature), []).append(index)
        for value in sorted(groups):
            yield turn, value, groups[value]


def temperature_of(question: Record, temperature: float) -> float:
    """The given one, or below 0 that of the question's category."""
    return temperature if temperature >= 0 else TEMPERATURES.get(question["category"], 0.7)


def dialogue(question: Record, done: Mapping[tuple[int, int], Record], index: int,
             turn: int) -> list["Message"]:
    """What was said up to this turn, the user's question last."""
    messages = []
    for earlier in range(turn):
        messages += [{"role": "user", "content": question["turns"][earlier]},
                     {"role": "assistant", "content": done[index, earlier]["output"]}]
    return [*messages, {"role": "user", "content": question["turns"][turn]}]


def in_process(base: "Base", load_in: str, text: str, batch_tokens: int) -> "Engine":
    """A model that is loaded here, adapters merged."""
    from lm.generation import generate, ids_of
    from self_judge.base import load_base

    tokenizer = load_tokenizer(base.model)
    if text == "chat":
        ids_of(tokenizer, [{"role": "user", "content": "."}])  # stops where it has no template
    model = load_base(base, precision(load_in))

    def reply(dialogues: Mapping[int, list["Message"]], **sampling) -> Iterator:
        prompts = dialogues if text == "chat" else {
            index: tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False,
                                                 add_generation_prompt=True)
            for index, messages in dialogues.items()}
        return generate(model, tokenizer, prompts, token_budget=batch_tokens, **sampling)

    return reply


def on_server(server: "Server", text: str) -> "Engine":
    """A model behind a server: it completes a template's text, or chats."""
    from lm.server import generate_on

    def reply(dialogues: Mapping[int, list["Message"]], **sampling) -> Iterator:
        prompts = dialogues if text == "chat" else {
            index: write(text, messages) for index, messages in dialogues.items()}
        return generate_on(server, prompts, **sampling)

    return reply


def write(chat_template: str, messages: list["Message"], **tokens: str) -> str:
    """A dialogue as a prompt; the tokenizer puts its own special tokens before it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string(chat_template)
    return template.render(messages=messages, **tokens)


def write_answers(output: Path, questions: list[Record], replies: dict[tuple[int, int], Record],
                  settings: dict) -> None:
    """The whole output, or none of it."""
    settings_file(output).unlink(missing_ok=True)  # of other questions
    write_json(output, [
        {**question, "outputs": [replies[index, turn]["output"]
                                 for turn in range(len(question["turns"]))],
         "generator": settings["generator"]} for index, question in enumerate(questions)])
    write_json(settings_file(output), settings)
    cut = sum(line["finish_reason"] == "length" for line in replies.values())
    print(f"{output}: {len(replies)} replies to {len(questions)} questions, {cut} of them cut at "
          "max_new_tokens")


if __name__ == "__main__":
    run(main)
