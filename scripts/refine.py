"""Refine judged responses (ILF): the model writes a better one, given what was wrong.

    python scripts/refine.py --base_model_name_or_path smollm2-135m-instruct \\
        --data_path data/sample/train.jsonl --output_path runs/refined.jsonl
    python finetune_unlikelihood.py --objective ilf_mle --data_path runs/refined.jsonl ...

Writes the records with the refinement in field `i_ans`; those that have one, or whose response is
satisfactory, stay as they are. One that was cut at --max_new_tokens is left blank: to learn from it
would be to learn to stop there. The responses are made by scripts/generate.py, beside the output: a
killed run goes on, a finished one is not made again, torchrun shares the work, and --base_url asks
a server; what it will cost at most is told first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.processes import is_first
from lm.prompts import fill, load_prompt
from lm.records import (
    InputError,
    Record,
    check_fields,
    join_input,
    read_records,
    write_json,
    write_lines,
)
from lm.server import FLAGS
from scripts import generate

HEADING = "\n### "
TEMPLATE = {"prompt": {"instruction", "response", "judgment"}}  # its texts and their fields


def main(base_model_name_or_path: str, data_path: str, output_path: str,
         template: str = "refine", peft_model_path: str = "",
         max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
         batch_tokens: int = 16384, load_in: str = "auto", overwrite: bool = False,
         base_url: str = "", concurrency: int = 8, requests_per_minute: float = 0.0,
         timeout: float = 600.0, attempts: int = 8, max_requests: int = 0, max_cost: float = 0.0,
         price_in: float = -1.0, price_out: float = -1.0, cache: str = "") -> None:
    """Add a refinement to each record with a negative judgment.

    Args:
        base_model_name_or_path: Who refines: model folder, Hub id, smollm2-135m-instruct, or the
            name by which the server knows it.
        data_path: Judged records, .json, .jsonl or .gz.
        output_path: JSON Lines file of the same records with `i_ans`.
        template: prompt, by name in configs/templates or path of a YAML file; its `prompt` holds
            {instruction}, {response} and {judgment}.
        peft_model_path: Adapter to put on the model.
        max_new_tokens: Longest refinement.
        temperature: 0 is greedy.
        top_p: Sample from the most probable tokens that hold this much probability.
        seed: Of the samples.
        batch_tokens: Tokens a batch may hold; lower it if memory is short.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        overwrite: Refine again even if refinements are there.
        base_url: Ask the OpenAI-compatible server at this address, key in OPENAI_API_KEY.
        concurrency: Requests under way at a time.
        requests_per_minute: Send no more than that; 0 is no limit.
        timeout: Seconds to wait for a refinement before asking again.
        attempts: Of each request, before it has failed.
        max_requests: Stop after so many, earlier runs for this output included; 0 is no limit.
        max_cost: Stop before so many dollars are exceeded, counted alike; 0 is no limit.
        price_in: Dollars per million prompt tokens, where configs/prices.yaml does not know them.
        price_out: The same for new tokens.
        cache: Folder that keeps the server's refinements for other runs; empty is none.
    """
    of_server = {name: value for name, value in locals().items() if name in FLAGS}
    check_output(output_path, data_path)
    records = read_records(data_path)
    wanted = to_refine(records, data_path)
    answers: list[str] = []
    ends: list[str] = []
    if wanted:
        frame = load_prompt(template, TEMPLATE)["prompt"]
        prompts, refinements = (Path(f"{output_path}.{name}.json")
                                for name in ("prompts", "refinements"))
        write_json(prompts, [{"instruction": prompt_of(records[index], frame)}
                             for index in wanted])
        generate.main(
            base_model_name_or_path, template="plain", data_path=str(prompts),
            output_path=str(refinements), peft_model_path=peft_model_path,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            batch_tokens=batch_tokens, load_in=load_in, overwrite=overwrite, base_url=base_url,
            **of_server)
        if not is_first():  # the first process writes
            return
        answers = [answer["output"] for answer in read_records(str(refinements))]
        ends = generate.ends(refinements, str(prompts), "plain")
    refined = dict(zip(wanted, map(refinement_in, answers, ends), strict=True))
    write_lines(output_path, [record | ({"i_ans": refined[index]} if index in refined else {})
                              for index, record in enumerate(records)])
    shortened = sum(HEADING in answer for answer in answers)
    print(summary(records, refined, shortened, output_path))


def check_output(output_path: str, data_path: str) -> None:
    """Stop at a file that is none to write to; make the folder of others."""
    output = Path(output_path)
    if output.suffix != ".jsonl":
        raise InputError(f"--output_path {output_path!r}: expected a .jsonl file")
    generate.refuse_same(output, data_path)
    output.parent.mkdir(parents=True, exist_ok=True)


def to_refine(records: list[Record], source: str) -> list[int]:
    """Indices of the records with a negative judgment and no refinement."""
    from cut.data import FIELDS, judgment_of

    check_fields(records, source, **FIELDS)
    return [index for index, record in enumerate(records)
            if judgment_of(record) and record.get("i_ans") is None]


def prompt_of(record: Record, frame: str) -> str:
    """What the model continues."""
    return fill(frame, instruction=join_input(record), response=record["output"],
                judgment=record["judgment"])


def refinement_in(answer: str, end: str) -> str:
    """The answer up to the next heading: small models go on as if another block had to follow.

    Blank where it was cut before it came to an end.
    """
    text, heading, _ = answer.partition(HEADING)
    return text.strip() if heading or end != "length" else ""


def summary(records: list[Record], refined: dict[int, str], shortened: int,
            output_path: str) -> str:
    """How many were refined, and how many of those say nothing, or nothing new."""
    blank = sum(not text for text in refined.values())
    same = sum(text == records[index]["output"].strip() for index, text in refined.items())
    return (f"{output_path}: {len(records)} records, {len(refined)} refined ({blank} blank or cut, "
            f"{same} unchanged, {shortened} ended at a heading); the others are satisfactory, "
            "without a judgment, or had a refinement")


if __name__ == "__main__":
    run(main)
