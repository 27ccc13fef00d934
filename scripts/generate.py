"""Generate a model's responses, by default to AlpacaEval's 805 instructions, in its format.

    python scripts/generate.py --base_model_name_or_path saved_models/cut-13b
    python scripts/generate.py --base_model_name_or_path smollm2-135m-instruct \\
        --data_path data/sample/heldout.jsonl --output_path runs/base.json --max_new_tokens 128

Each finished response goes to OUTPUT.partial.jsonl at once; after a stop, even a kill, the same
command goes on where it was. A finished output is kept, with its settings beside it, and reused.
Differs from the released script: batches, resumes, and decodes the new tokens only (it split the
text at the first "### Response:", even one inside an instruction).
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lm.cli import run
from lm.models import find_adapter, load_adapter, load_model, load_tokenizer, resolve_model
from lm.records import InputError, Record, check_fields, read_records, write_json
from lm.templates import load_template

ALPACA_EVAL = "tatsu-lab/alpaca_eval"
# Fields of a record that speak of another response than the one made here.
OF_ANOTHER_RESPONSE = ("input", "output", "judgment", "score", "reason", "i_ans")


def main(base_model_name_or_path: str, template: str = "alpaca", data_path: str = ALPACA_EVAL,
         output_path: str = "", peft_model_path: str = "", generator: str = "",
         max_new_tokens: int = 2048, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
         limit: int = 0, batch_tokens: int = 16384, load_in: str = "auto",
         overwrite: bool = False) -> None:
    """Generate a response to each instruction, batched and resumable.

    Args:
        base_model_name_or_path: model folder, Hub id, or smollm2-135m-instruct.
        template: prompt template, by name or path; `chat` is the model's own chat template.
        data_path: JSON or JSON Lines file with `instruction` (and `input`), or a Hub dataset.
        output_path: file to write, by default alpaca_eval.json in the model's (adapter's) folder.
        peft_model_path: adapter to put on the base model.
        generator: name of the model in the output, by default its folder's.
        max_new_tokens: longest response.
        temperature: 0 is greedy, as in the paper.
        top_p: sample from the most probable tokens that hold this much probability.
        seed: of the samples; they do not depend on batches or stops.
        limit: only the first so many instructions; 0 is all.
        batch_tokens: tokens a batch may hold, prompts and responses; lower it if memory is short.
        load_in: 8bit|4bit|bf16|fp16|fp32|checkpoint; auto is checkpoint on CUDA, fp32 on the CPU.
        overwrite: start again even if an output is there.
    """
    from tqdm import tqdm

    from lm.generation import check_sampling

    check_sampling(max_new_tokens, batch_tokens, temperature, top_p)
    adapter = find_adapter(peft_model_path) if peft_model_path else None
    model_path = Path(resolve_model(base_model_name_or_path))
    records = load_prompts(data_path, limit)
    output = output_file(output_path, adapter or model_path)
    settings = {
        "model": str(model_path), "weights": fingerprint(model_path),
        "adapter": str(adapter or ""), "adapter_weights": fingerprint(adapter),
        "template": template_text(template), "prompts": digest(records),
        "generator": generator or (adapter or model_path).resolve().name, "load_in": load_in,
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if overwrite:
        partial_file(output).unlink(missing_ok=True)
        settings_file(output).unlink(missing_ok=True)
    elif is_done(output, settings):
        print(f"{output}: already there, made with the same settings; --overwrite makes it anew")
        return
    file, done = open_partial(output, settings)
    left = {index: record["instruction"] for index, record in enumerate(records)
            if index not in done}
    with file:
        if left:
            model, tokenizer = load(str(model_path), adapter, load_in)
            lines = respond(model, tokenizer, left, settings, template, batch_tokens)
            for line in tqdm(lines, total=len(records), initial=len(done), unit="response"):
                append(file, line)
                done[line["index"]] = line
    write_output(output, records, done, settings)


def load_prompts(source: str, limit: int) -> list[Record]:
    """Records with the text to answer in `instruction`, and every field that still holds."""
    path = download_alpaca_eval() if source == ALPACA_EVAL else source
    records = read_records(path)
    check_fields(records, source, {"instruction": (str,)}, {"input": (str, NoneType)})
    if limit < 0:
        raise InputError(f"--limit is {limit}; expected 0 (all) or more")
    rows = []
    for record in records[:limit or None]:
        joined = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        kept = {key: value for key, value in record.items() if key not in OF_ANOTHER_RESPONSE}
        rows.append({"dataset": Path(source).stem, **kept, "instruction": joined})
    return rows


def download_alpaca_eval() -> str:
    """The raw file of the evaluation split; the dataset's loading script no longer works."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(ALPACA_EVAL, "alpaca_eval.json", repo_type="dataset")
    except Exception as error:  # the Hub client raises many kinds; each means "not reachable"
        raise InputError(f"{ALPACA_EVAL}: cannot be fetched from the Hub "
                         f"({str(error).strip().splitlines()[0]}); give a file with --data_path"
                         ) from error


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


def fingerprint(folder: Path | None) -> str:
    """Changes when the weights in a folder are written again; empty for a model on the Hub."""
    if folder is None or not folder.is_dir():
        return ""
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    return digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def partial_file(output: Path) -> Path:
    return output.with_name(output.name + ".partial.jsonl")


def settings_file(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def is_done(output: Path, settings: dict) -> bool:
    """Whether the whole output is there; one of other settings is an error, never a loss."""
    if partial_file(output).exists() or not output.exists():
        return False
    if not settings_file(output).exists():
        raise InputError(f"{output}: is there already, and not known to be made by this script; "
                         "choose another --output_path, or --overwrite")
    check_settings(output, json.loads(settings_file(output).read_text(encoding="utf-8")), settings)
    return True


def check_settings(path: Path, found: dict, wanted: dict) -> None:
    changed = [f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}"
               for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if changed:
        raise InputError(f"{path}: was made with other settings ({'; '.join(changed)}); "
                         "choose another --output_path, or --overwrite")


def open_partial(output: Path, settings: dict) -> tuple[IO[str], dict[int, Record]]:
    """The file to append responses to, and those that a stopped run finished, by prompt index.

    The first line holds the settings, each further one a response. A last line without its newline
    was being written when the run was killed; it is cut off.
    """
    path = partial_file(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    whole = path.read_bytes().rpartition(b"\n")[0]
    os.truncate(path, len(whole) + 1 if whole else 0)
    lines = read_records(path) if whole else []
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    if lines:
        check_settings(path, lines[0], settings)
        print(f"{output}: going on after {len(lines) - 1} finished responses")
    else:
        append(file, settings)
    return file, {line["index"]: line for line in lines[1:]}


def append(file: IO[str], line: Record) -> None:
    """A line that is on the disk when this returns."""
    file.write(json.dumps(line) + "\n")
    file.flush()
    os.fsync(file.fileno())


def load(model_path: str, adapter: Path | None, load_in: str) -> tuple[object, object]:
    import torch

    if load_in == "auto":
        load_in = "checkpoint" if torch.cuda.is_available() else "fp32"
    tokenizer = load_tokenizer(model_path)
    model = load_model(model_path, load_in)
    return (load_adapter(model, adapter) if adapter else model), tokenizer


def respond(model: object, tokenizer: object, instructions: dict[int, str], settings: dict,
            template: str, batch_tokens: int) -> Iterator[Record]:
    """Responses, as they are finished, in the form of a partial file's lines."""
    from lm.generation import generate

    prompts = {index: render(tokenizer, template, text) for index, text in instructions.items()}
    sampling = {key: settings[key] for key in ("max_new_tokens", "temperature", "top_p", "seed")}
    for index, response in generate(model, tokenizer, prompts, token_budget=batch_tokens,
                                    **sampling):
        yield {"index": index, "output": response.text.strip(),
               "finish_reason": response.finish_reason}


def render(tokenizer: object, template: str, instruction: str) -> str | list[int]:
    if template != "chat":
        return load_template(template).render(instruction)
    if tokenizer.chat_template is None:
        raise InputError("--template chat: this model's tokenizer has no chat template")
    return tokenizer.apply_chat_template([{"role": "user", "content": instruction}],
                                         add_generation_prompt=True, return_dict=False)


def write_output(output: Path, records: list[Record], done: dict[int, Record],
                 settings: dict) -> None:
    """The whole output, or none of it; only then does the partial file go."""
    write_json(output, [
        {"instruction": record["instruction"], "output": done[index]["output"],
         "generator": settings["generator"], **{key: value for key, value in record.items()
                                                if key not in ("instruction", "generator")}}
        for index, record in enumerate(records)])
    write_json(settings_file(output), settings)
    partial_file(output).unlink()
    cut = sum(line["finish_reason"] == "length" for line in done.values())
    print(f"{output}: {len(records)} responses, {cut} of them cut at max_new_tokens")


if __name__ == "__main__":
    run(main)
