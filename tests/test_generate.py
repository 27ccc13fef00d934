"""scripts/generate.py: AlpacaEval's format, and no prompt repeated or lost whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fault_server import FaultServer

import lm.generation
from lm.journal import append, open_journal
from lm.models import add_lora, load_model
from lm.processes import part_of, parts, share
from lm.records import InputError, write_json
from lm.stages import fingerprint
from scripts import generate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    records = [{"instruction": f"Name {number} cats. " * (1 + number % 3), "id": f"p{number}"}
               for number in range(12)]
    write_json(tmp_path / "prompts.json", records)
    return tmp_path / "prompts.json"


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())


def test_output_has_alpaca_evals_fields(tiny_llama, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(map(json.dumps, [
        {"instruction": "Translate {this}:", "input": "the cat", "output": "old", "judgment": "bad",
         "score": 3},
        {"instruction": "Sing.", "input": "", "id": "x", "dataset": "helpful_base"}])))
    output = tmp_path / "new" / "out.json"
    generate.main(str(tiny_llama), data_path=str(data), output_path=str(output),
                  max_new_tokens=5, generator="tiny")
    first, second = read(output)
    assert list(first) == ["instruction", "output", "generator", "dataset"]
    assert first["instruction"] == "Translate {this}:\nthe cat"
    assert first["dataset"] == "mine" and first["generator"] == "tiny"
    assert first["output"] != "old" and first["output"] == first["output"].strip()
    assert second["instruction"] == "Sing." and second["id"] == "x"
    assert second["dataset"] == "helpful_base"
    assert not list(output.parent.glob("*.responses.?.jsonl"))


def test_killed_run_goes_on_where_it_was(tiny_llama, prompts, tmp_path, monkeypatch, capsys):
    flags = {"data_path": str(prompts), "max_new_tokens": 60, "temperature": 1.0,
             "batch_tokens": 1}
    reference, output = tmp_path / "reference.json", tmp_path / "out.json"
    generate.main(str(tiny_llama), output_path=str(reference), **flags)
    finished = kill_after_responses(3, output, tiny_llama, flags)
    assert not output.exists()  # the final file is whole or absent
    with open(generate.journal_file(output), "a") as file:
        file.write('{"index": 5, "outp')  # what a kill in the middle of a line leaves

    asked = record_prompts(monkeypatch)
    capsys.readouterr()
    generate.main(str(tiny_llama), output_path=str(output), **flags)
    assert f"after {len(finished)} finished" in capsys.readouterr().out
    assert set(asked) == set(range(12)) - finished and len(asked) == 12 - len(finished)
    assert read(output) == read(reference)
    assert len({record["output"] for record in read(output)}) == 12  # distinct samples


def kill_after_responses(count: int, output: Path, model: Path, flags: dict) -> set[int]:
    """Start the real command, kill -9 it in the middle; returns the finished prompts."""
    command = [sys.executable, "scripts/generate.py", "--base_model_name_or_path", str(model),
               "--output_path", str(output),
               *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    journal = generate.journal_file(output)
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < count + 1:
        assert process.poll() is None and time.monotonic() < deadline, "ended before the kill"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines = [json.loads(line) for line in journal.read_text().split("\n")[1:-1]]
    assert count <= len(lines) < 12
    return {line["index"] for line in lines}


def record_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices that the model is asked from now on."""
    asked: list[int] = []
    original = lm.generation.generate

    def recording(model, tokenizer, prompts, **settings):
        asked.extend(prompts)
        return original(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(lm.generation, "generate", recording)
    return asked


def test_finished_output_is_reused_or_defended(tiny_llama, prompts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    flags = {"data_path": str(prompts), "output_path": str(output), "limit": 3}
    generate.main(str(tiny_llama), max_new_tokens=5, **flags)
    asked = record_prompts(monkeypatch)
    generate.main(str(tiny_llama), max_new_tokens=5, batch_tokens=77, **flags)
    assert not asked and "already there" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"\(max_new_tokens was 5, is 6\); .*--overwrite"):
        generate.main(str(tiny_llama), max_new_tokens=6, **flags)
    write_json(tmp_path / "others.json", [{"instruction": "Sing."}])
    with pytest.raises(InputError, match=r"\(prompts was '\w+', is '\w+'\); .*--overwrite"):
        generate.main(str(tiny_llama), max_new_tokens=5,
                      **flags | {"data_path": str(tmp_path / "others.json")})
    generate.main(str(tiny_llama), max_new_tokens=6, overwrite=True, **flags)
    assert len(asked) == 3 == len(read(output))
    generate.settings_file(output).unlink()
    generate.journal_file(output).unlink()  # now it could be anyone's
    with pytest.raises(InputError, match="not known to be made by this script"):
        generate.main(str(tiny_llama), max_new_tokens=6, **flags)


def test_only_new_prompts_are_answered_wherever_the_others_stand(tiny_llama, tmp_path, monkeypatch):
    """Added, removed, moved; a prompt that is there three times gets three different samples."""
    data, output = tmp_path / "data.json", tmp_path / "out.json"
    flags = {"data_path": str(data), "output_path": str(output), "max_new_tokens": 20,
             "temperature": 1.0}
    asked, found = record_prompts(monkeypatch), []
    for prompts in ("ABAC", "CDAAAB", "CDAAAB"):
        write_json(data, [{"instruction": f"Name {word} cats.", "id": place}
                          for place, word in enumerate(prompts)])
        generate.main(str(tiny_llama), **flags)
        found.append([record["output"] for record in read(output)])
    assert asked == [0, 1, 2, 3, 1, 4]
    before, after, again = found
    assert after == [before[3], after[1], before[2], before[0], after[4], before[1]]
    assert len(set(after)) == 6 and again == after
    assert [record["id"] for record in read(output)] == list(range(6))


def test_a_second_run_on_an_output_is_told_so(tiny_llama, prompts, tmp_path):
    flags = {"data_path": str(prompts), "output_path": str(tmp_path / "out.json"), "limit": 1,
             "max_new_tokens": 3}
    file, _ = open_journal(generate.journal_file(tmp_path / "out.json"), {"seed": 5})
    with file:
        for change in ({}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"out\.json.*: another run is writing it; the "
                                                 "same command goes on"):
                generate.main(str(tiny_llama), **flags, **change)
    generate.main(str(tiny_llama), **flags)


def test_the_budget_counts_failed_requests_of_earlier_runs_too(prompts, tmp_path):
    """Half replies may have been charged; without an answer there is no other trace of them."""
    flags = {"data_path": str(prompts), "output_path": str(tmp_path / "out.json"), "limit": 2,
             "max_new_tokens": 1000, "price_in": 10.0, "price_out": 30.0, "concurrency": 1}
    with FaultServer({"cats": ["half!"]}) as server:
        for _ in range(3):
            with pytest.raises(InputError, match="--max_cost goes on"):
                generate.main("m", base_url=server.url, max_cost=0.04, **flags)
        assert len(server.asked) == 1
        server.plan.clear()
        generate.main("m", base_url=server.url, max_cost=1.0, **flags)
        assert len(server.asked) == 3
    assert [record["output"] for record in read(tmp_path / "out.json")] == ["perfect"] * 2


def test_an_interrupt_notes_what_it_gives_up(prompts, tmp_path, monkeypatch):
    """A request under way may be charged, though nobody waits for its reply."""
    output = tmp_path / "out.json"
    monkeypatch.setattr(generate, "append",
                        lambda file, line: stop() if "index" in line else append(file, line))
    with FaultServer({"Name 1": ["hang"]}) as server, pytest.raises(KeyboardInterrupt):
        generate.main("m", data_path=str(prompts), output_path=str(output), limit=2,
                      max_new_tokens=100, base_url=server.url, price_in=1.0, price_out=1000.0)
    assert json.loads(generate.journal_file(output).read_text().split("\n")[-2])["cost"] > 0.1


def test_requests_that_fail_for_ever_are_left_out_up_to_a_share(prompts, tmp_path, capsys):
    output = tmp_path / "out.json"
    flags = {"data_path": str(prompts), "output_path": str(output), "limit": 6}
    with FaultServer({"Name 3": ["400!"]}) as server:
        for share_of_failed in (0.0, 0.1):
            with pytest.raises(InputError, match=r"1 of . requests failed .*asks only for those"):
                generate.main("m", base_url=server.url, max_failed=share_of_failed, **flags)
            assert not output.exists()
        for _ in range(2):
            capsys.readouterr()
            generate.main("m", base_url=server.url, max_failed=0.2, **flags)
            told = capsys.readouterr().out
            assert "1 of 6 prompts are left out: 1 of 1 requests failed" in told
            assert [record["id"] for record in read(output)] == ["p0", "p1", "p2", "p4", "p5"]
        server.plan.clear()
        generate.main("m", base_url=server.url, **flags)
        assert len(read(output)) == 6 and len(server.asked) == 6 + 3 + 1
        generate.main("m", base_url=server.url, **flags)
        assert len(server.asked) == 10


def test_a_share_of_failed_requests_covers_neither_all_of_them_nor_a_spent_budget(prompts,
                                                                                  tmp_path):
    flags = {"data_path": str(prompts), "output_path": str(tmp_path / "out.json"), "limit": 3,
             "max_failed": 1.0}
    with FaultServer({"Name": ["400!"]}) as server:
        with pytest.raises(InputError, match="3 of 3 requests failed"):
            generate.main("m", base_url=server.url, max_requests=3, **flags)
        server.plan.clear()
        with pytest.raises(InputError, match="the budget of 5 requests is spent"):
            generate.main("m", base_url=server.url, max_requests=5, **flags)
    assert not (tmp_path / "out.json").exists()


def test_the_cost_is_told_before_the_first_request(prompts, tmp_path, capsys):
    """What the cache holds costs nothing: the requests told are those that are sent."""
    flags = {"data_path": str(prompts), "cache": str(tmp_path / "cache"), "temperature": 1.0,
             "max_new_tokens": 1000, "price_in": 10.0, "price_out": 30.0}
    with FaultServer() as server:
        for limit, said in ((4, "4 requests,"), (12, "8 requests,")):
            generate.main("m", base_url=server.url, limit=limit,
                          output_path=str(tmp_path / f"{limit}.json"), **flags)
            told = capsys.readouterr().out
            assert said in told and "at most $" in told.split("responses")[0]
    assert "4 more are answered in the cache" in told and len(server.asked) == 12


def test_overwrite_loses_nothing_to_an_error(tiny_llama, prompts, tmp_path, monkeypatch):
    """No price, no model, a prompt that is too long: all are found before anything is deleted."""
    output = tmp_path / "out.json"
    flags = {"data_path": str(prompts), "output_path": str(output), "limit": 2}
    with FaultServer() as server:
        generate.main("m", base_url=server.url, **flags)
    files = [output, generate.journal_file(output), generate.settings_file(output)]
    before = [file.read_bytes() for file in files]
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    for model, change, message in (
            ("m", {"base_url": "https://localhost.example/v1", "max_cost": 1.0}, "price of m"),
            (str(tiny_llama), {"max_new_tokens": 5000}, "1024"),
            (str(tiny_llama), {"template": "chat"}, "has no chat template")):
        with pytest.raises(InputError, match=message):
            generate.main(model, overwrite=True, **flags, **change)
        assert [file.read_bytes() for file in files] == before


def test_the_journal_has_the_token_ids(tiny_llama, prompts, tmp_path):
    output = tmp_path / "out.json"
    flags = {"data_path": str(prompts), "output_path": str(output), "max_new_tokens": 5}
    generate.main(str(tiny_llama), **flags)
    tokenizer = generate.load_tokenizer(str(tiny_llama))
    settings, *lines = map(json.loads, generate.journal_file(output).read_text().splitlines())
    for line in lines:
        assert tokenizer.decode(line["ids"], skip_special_tokens=True).strip() == line["output"]
        del line["ids"]
    outputs = read(output)
    output.unlink()  # now from a journal of before there were any
    generate.settings_file(output).unlink()
    generate.journal_file(output).write_text("".join(
        json.dumps(line) + "\n" for line in (settings, *lines)))
    generate.main(str(tiny_llama), **flags)
    assert read(output) == outputs


def test_journal_of_other_settings_is_an_error(tiny_llama, prompts, tmp_path):
    output = tmp_path / "out.json"
    generate.journal_file(output).write_text('{"seed": 5}\n{"index": 0, "output": "keep"}\n')
    with pytest.raises(InputError, match=r"seed was 5, is 0"):
        generate.main(str(tiny_llama), data_path=str(prompts), output_path=str(output))
    assert "keep" in generate.journal_file(output).read_text()


def test_kill_before_the_last_rename_loses_nothing(tiny_llama, prompts, tmp_path, monkeypatch):
    """All responses finished, final file not written: no model is needed any more."""
    output = tmp_path / "out.json"
    flags = {"data_path": str(prompts), "output_path": str(output), "max_new_tokens": 3}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "write_json", stop)
        generate.main(str(tiny_llama), **flags)
    monkeypatch.setattr(generate, "load", stop)
    generate.main(str(tiny_llama), **flags)
    assert len(read(output)) == 12


def stop(*_, **__):
    raise KeyboardInterrupt


def test_any_number_of_processes_goes_on_where_another_number_was_stopped(
        tiny_llama, prompts, tmp_path, monkeypatch):
    """Three were killed, the last of them in a line: one is asked for the rest, and no more."""
    flags = {"data_path": str(prompts), "max_new_tokens": 5}
    reference, output = tmp_path / "reference.json", tmp_path / "out.json"
    generate.main(str(tiny_llama), output_path=str(reference), **flags)
    settings, *lines = generate.journal_file(reference).read_text().splitlines()
    of_index = {json.loads(line)["index"]: line for line in lines}
    for place, indices in enumerate([(0, 4), (7,), (8,)]):
        part_of(generate.journal_file(output), place).write_text("".join(
            f"{line}\n" for line in [settings, *(of_index[index] for index in indices)]))
    with open(part_of(generate.journal_file(output), 2), "a") as file:
        file.write('{"index": 11, "outp')
    asked = record_prompts(monkeypatch)
    generate.main(str(tiny_llama), output_path=str(output), **flags)
    assert set(asked) == set(range(12)) - {0, 4, 7, 8} and len(asked) == 8
    assert read(output) == read(reference)
    assert parts(generate.journal_file(output)) == [generate.journal_file(output)]
    generate.main(str(tiny_llama), output_path=str(output), **flags)
    assert len(asked) == 8


def test_shares_hold_each_prompt_once_and_are_of_like_length():
    lengths = [7 * number % 12 for number in range(12)]
    shares = [share(lengths, place, 3) for place in range(3)]
    assert sorted(index for mine in shares for index in mine) == list(range(12))
    totals = [sum(lengths[index] for index in mine) for mine in shares]
    assert max(totals) - min(totals) <= 8 and [len(mine) for mine in shares] == [4, 4, 4]


def test_two_processes_give_what_one_gives(tiny_llama, prompts, warm_venv, tmp_path):
    flags = {"data_path": str(prompts), "max_new_tokens": 30, "temperature": 1.0}
    reference, output = tmp_path / "reference.json", tmp_path / "out.json"
    generate.main(str(tiny_llama), output_path=str(reference), **flags)
    result = subprocess.run(
        [warm_venv / "bin/torchrun", "--standalone", "--nproc_per_node=2",
         "scripts/generate.py", "--base_model_name_or_path", str(tiny_llama),
         "--output_path", str(output), *(f"--{name}={value}" for name, value in flags.items())],
        cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("12 responses") == 1 and "processes: 2" in result.stdout
    assert read(output) == read(reference)
    assert parts(generate.journal_file(output)) == [generate.journal_file(output)]


def test_a_launcher_is_refused_where_one_process_asks_for_all(tiny_llama, prompts, tmp_path,
                                                             monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without a launcher"):
        generate.main("m", data_path=str(prompts), output_path=str(tmp_path / "out.json"),
                      base_url="http://127.0.0.1:9/v1")


def test_weights_written_anew_are_another_model(tiny_llama, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert fingerprint(tmp_path) != before


def test_another_chat_template_is_other_settings(tiny_llama, prompts, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    flags = {"data_path": str(prompts), "output_path": str(tmp_path / "out.json"), "limit": 1,
             "template": "chat", "max_new_tokens": 3}
    generate.main(str(model), **flags)
    (model / "chat_template.jinja").write_text("Say: {{ messages[0]['content'] }}")
    with pytest.raises(InputError, match=r"weights was '.*--overwrite"):
        generate.main(str(model), **flags)


def test_adapter_answers_and_output_goes_beside_it(tiny_llama, prompts, tmp_path):
    torch.manual_seed(0)
    model = add_lora(load_model(str(tiny_llama)), 4, 64, 0.0, ["up_proj", "down_proj"])
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path / "adapter")
    flags = {"data_path": str(prompts), "limit": 4, "max_new_tokens": 8}
    generate.main(str(tiny_llama), output_path=str(tmp_path / "base.json"), **flags)
    generate.main(str(tiny_llama), peft_model_path=str(tmp_path / "adapter"), **flags)
    adapted = read(tmp_path / "adapter" / "alpaca_eval.json")
    assert {record["generator"] for record in adapted} == {"adapter"}
    assert [r["output"] for r in adapted] != [r["output"] for r in read(tmp_path / "base.json")]


def test_templates_are_texts_and_chat_is_a_message():
    records = [{"instruction": "hi"}, {"instruction": "ho"}]
    assert generate.prompts_of(records, "chat")[1] == [{"role": "user", "content": "ho"}]
    assert "### Instruction:\nhi\n" in generate.prompts_of(records, "alpaca")[0]


@pytest.mark.parametrize(("change", "message"), [
    ({"data_path": "none.json"}, r"none\.json: no such file"),
    ({"template": "alpaka"}, "alpaka: unknown template"),
    ({"data_path": "tatsu-lab/alpaca_eval"}, "cannot be fetched from the Hub .* --data_path"),
    ({"limit": -1}, "--limit is -1"),
    ({"max_failed": 1.5}, r"--max_failed is 1\.5; expected a share"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"peft_model_path": "./none"}, "no such adapter"),
    ({"engine": "tgi"}, "--engine 'tgi': expected one of hf, vllm"),
    ({"engine": "vllm", "load_in": "bfloat16"}, "as --load_in auto, checkpoint, bf16"),
    ({"engine": "vllm"}, "vllm is not installed here; .* --engine hf"),
])
def test_bad_input_is_one_line(change, message, tiny_llama, prompts, tmp_path):
    flags = {"data_path": str(prompts), "output_path": str(tmp_path / "out.json"), **change}
    with pytest.raises(InputError, match=message) as error:
        generate.main(str(tiny_llama), **flags)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_the_prompts_are_not_written_over(tiny_llama, prompts):
    before = prompts.read_bytes()
    with pytest.raises(InputError, match="--output_path is --data_path"):
        generate.main(str(tiny_llama), data_path=str(prompts), overwrite=True,
                      output_path=str(prompts.parent / "." / prompts.name))
    assert prompts.read_bytes() == before


def test_wrong_field_is_named(tiny_llama, tmp_path):
    write_json(tmp_path / "bad.json", [{"instruction": "a"}, {"instruction": 7}])
    with pytest.raises(InputError, match=r"bad\.json: record 1: field 'instruction' is a number"):
        generate.main(str(tiny_llama), data_path=str(tmp_path / "bad.json"))


@pytest.mark.parametrize(("name", "counts"), [
    *((name, True) for name in (
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "chat_template.jinja", "adapter_model.safetensors", "adapter_config.json")),
    *((name, False) for name in ("README.md", "merge.json", "training_args.bin"))])
def test_a_model_is_another_one_once_a_file_that_answers_depend_on_has_changed(name, counts,
                                                                               tmp_path):
    (tmp_path / name).write_text("a")
    before = fingerprint(tmp_path)
    (tmp_path / name).write_text("bc")
    assert (fingerprint(tmp_path) != before) == counts
