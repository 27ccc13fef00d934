"""Each objective against its equation, written out token by token; refinements; DPO on pairs.

    python -m pytest tests/test_objectives.py
"""

import inspect
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fault_server import FaultServer
from training_runs import assert_one_line, in_this_process, losses, watched, write_records
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
)

import finetune_unlikelihood
from cut import finetune
from cut.data import Example, collate, examples_of, rows_of
from cut.finetune import cut_settings
from cut.loss import cut_loss
from cut.objectives import (
    OBJECTIVES,
    PARTS,
    higher_scores_preferred,
    learnt,
    left_out,
    preference_rows,
    refinements_preferred,
)
from cut.trainer import CutSettings, cut_losses
from lm.records import InputError
from lm.server import FLAGS
from lm.templates import load_template, prompt_ids, response_ids
from scripts import generate, refine

ALPACA = load_template("alpaca")
GOOD = {"instruction": "Name a red cat.", "output": "the cat", "judgment": None, "score": 2}
BAD = {"instruction": "Name a dog.", "output": "the mat and the fox", "judgment": "It is no dog.",
       "i_ans": "the dog", "score": 1}
ALSO_BAD = {"instruction": "Name a red cat.", "output": "the dog there", "input": "",
            "judgment": "It is {no} cat.", "i_ans": " the red cat ", "score": 1}
RECORDS = [GOOD, BAD, ALSO_BAD]


@pytest.fixture(scope="module")
def policy(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def log_p(policy, tokenizer):
    """log p of each token of a text, EOS included, after a prompt: from the full logits."""
    def log_p(prompt: str, text: str) -> torch.Tensor:
        before, after = prompt_ids(tokenizer, prompt), response_ids(tokenizer, text)
        with torch.no_grad():
            logits = policy(torch.tensor([before + after])).logits[0, len(before) - 1:-1]
        return -F.cross_entropy(logits, torch.tensor(after), reduction="none")
    return log_p


def the_examples(records=RECORDS) -> list[Example]:
    return examples_of(records, "records.json", contrast=False)[0]


def loss_of(name, policy, tokenizer, records=RECORDS, **settings) -> list[float]:
    """The loss of each example that the objective trains on, as the trainer computes it."""
    examples = learnt(OBJECTIVES[name], the_examples(records))
    rows = [rows_of(example, ALPACA, tokenizer, 512) for example in examples]
    with torch.no_grad():
        return cut_losses(policy, collate(rows, 0), CutSettings(**settings)).loss.tolist()


def nll(log_probs: torch.Tensor) -> float:
    """-1/N sum_t log p_t"""
    return -sum(log_probs.tolist()) / len(log_probs)


# --- the equations --------------------------------------------------------------------------


def test_mle_learns_satisfactory_responses_alone(policy, tokenizer, log_p):
    expected = [nll(log_p(ALPACA.render(GOOD["instruction"]), GOOD["output"]))]
    assert loss_of("mle", policy, tokenizer) == pytest.approx(expected, abs=1e-5)


def test_forward_prediction(policy, tokenizer, log_p):
    """-1/N sum log p(y|x), and -1/M sum log p(j|x,y) where there is a judgment."""
    expected = []
    for record in RECORDS:
        prompt = ALPACA.render(record["instruction"])
        expected.append(nll(log_p(prompt, record["output"])))
        if record["judgment"]:
            after = f"{prompt}{record['output']}\n\n### Judgment:\n"
            expected.append(nll(log_p(after, record["judgment"])))
    assert len(expected) == 5
    assert loss_of("forward", policy, tokenizer) == pytest.approx(expected, abs=1e-5)


def test_hindsight(policy, tokenizer, log_p):
    """-1/N sum log p(y|x,j), without j where y is satisfactory."""
    expected = [nll(log_p(ALPACA.render(r["instruction"], r["judgment"]), r["output"]))
                for r in RECORDS]
    assert loss_of("hindsight", policy, tokenizer) == pytest.approx(expected, abs=1e-5)


def test_ilf_mle(policy, tokenizer, log_p):
    """-1/N sum log p(y^|x), of y itself where it is satisfactory."""
    texts = [GOOD["output"], "the dog", "the red cat"]
    expected = [nll(log_p(ALPACA.render(r["instruction"]), text))
                for r, text in zip(RECORDS, texts, strict=True)]
    assert loss_of("ilf_mle", policy, tokenizer) == pytest.approx(expected, abs=1e-5)


def test_unlikelihood_on_all_tokens(policy, tokenizer, log_p):
    """-1/N sum alpha log(1 - p(y|x)), halved as in CUT; MLE where y is satisfactory."""
    settings = vars_of(objective="unlikelihood", threshold=1.1, weight_unlike=0.5, gamma=1.0)
    prompts = [ALPACA.render(record["instruction"]) for record in RECORDS]
    expected = [nll(log_p(prompts[0], GOOD["output"]))]
    for record, prompt in zip(RECORDS[1:], prompts[1:], strict=True):
        p = log_p(prompt, record["output"]).double().exp()
        expected.append(-0.5 * (1 - p).log().mean().item() / 2)
    got = loss_of("unlikelihood", policy, tokenizer, **settings)
    assert got == pytest.approx(expected, abs=1e-5)


def vars_of(**flags) -> dict:
    """Arguments of the loss that finetune makes of the flags."""
    flags = {"as_in_paper": False, "without": "", **flags}
    flags["without"] = left_out(flags.pop("objective"), flags["without"], flags["gamma"])
    return vars(cut_settings(type("Settings", (), flags)))


# --- ablations ------------------------------------------------------------------------------

# One pair: token 1 is in U, token 2 is not; p(y|x,j) = 1/2, 1/4 and p(y|x) = 1/4, 1/2.
IN_U, NOT_IN_U = math.log(3 / 4), math.log(1 / 2)
L2 = (math.log(2) + math.log(4)) / 2
ALPHA, GAMMA = 0.5, 2.0
WEIGHT = ALPHA * 0.5 ** GAMMA
TERMS = {  # what a pair costs, of L1 + L2
    "": -(WEIGHT * IN_U + NOT_IN_U) / 2 + L2,
    "l1": L2,
    "align_n": -(WEIGHT * IN_U + NOT_IN_U) / 2,
    "detection": -(WEIGHT * IN_U + ALPHA * 0.25 ** GAMMA * math.log(1 - 1 / 2)) / 2 + L2,
    "weight": -(ALPHA * IN_U + NOT_IN_U) / 2 + L2,
    "align_p": -(WEIGHT * IN_U + NOT_IN_U) / 2 + L2,
}


@pytest.mark.parametrize("without", TERMS)
def test_each_ablation_changes_its_term_of_a_pair_and_no_other(without):
    settings = vars_of(objective="cut", threshold=1.1, weight_unlike=ALPHA, gamma=GAMMA,
                       without=without)
    got = cut_loss(torch.tensor([[0.5, 0.25], [0.2, 0.2]]).log(),
                   torch.tensor([[0.25, 0.5], [0.9, 0.9]]).log(), torch.ones(2, 2).bool(),
                   torch.tensor([True, False]), **settings).loss
    torch.testing.assert_close(got, torch.tensor([TERMS[without] / 2, math.log(5)]))
    assert {*TERMS} == {"", *PARTS}


def test_without_detection_a_probability_that_underflows_is_in_u_too():
    got = cut_loss(torch.tensor([[-200.0]]), torch.tensor([[-1.0]]), torch.tensor([[True]]),
                   torch.tensor([True]), threshold=0.0, weight_unlike=1.0)
    assert got.inappropriate.tolist() == [[True]]


def test_without_align_p_the_pairs_alone_are_left():
    examples = the_examples()
    assert learnt(OBJECTIVES["cut"], examples, ["align_p"]) == examples[1:]
    assert learnt(OBJECTIVES["cut"], examples) == examples


@pytest.mark.parametrize(("objective", "without", "gamma", "message"), [
    ("hindsigt", "", 0, "did you mean hindsight"),
    ("cut", "l2", 0, "--without l2: unknown; expected some of l1, align_p"),
    ("mle", "l1", 0, "parts of CUT, not of --objective mle"),
    ("cut", "align_n,l1", 0, "leaves nothing to learn from negative records"),
    ("cut", ["weight"], 0, "none at gamma 0"),
])
def test_what_cannot_be_left_out(objective, without, gamma, message):
    with pytest.raises(InputError, match=message):
        left_out(objective, without, gamma)


def test_a_fake_positive_judgment_stands_in_all_prompts_of_good_responses(tokenizer):
    template = load_template("alpaca_positive")
    texts = {}
    for example in the_examples([GOOD, BAD]):
        rows = rows_of(example, template, tokenizer, 512)
        texts |= {(example.response, bool(rows.misaligned), place): tokenizer.decode(row.ids)
                  for place, row in enumerate(rows.rows)}
    shown = [("### Judgment:\nThe response is satisfactory.\n" in text, "It is no dog." in text)
             for text in texts.values()]
    assert shown == [(True, False), (False, True), (True, False)]  # Align-P, Align-N, Misalign


# --- refinements ----------------------------------------------------------------------------


def test_missing_refinement_names_the_record():
    bad = {**BAD, "i_ans": None}
    for learn in (lambda examples: learnt(OBJECTIVES["ilf_mle"], examples), refinements_preferred):
        with pytest.raises(InputError, match=r"records.json: record 1: field 'i_ans' is missing"):
            learn(the_examples([GOOD, bad]))


def test_blank_and_unchanged_refinements_are_not_learnt():
    blank, same = {**BAD, "i_ans": " "}, {**ALSO_BAD, "i_ans": ALSO_BAD["output"] + "\n"}
    assert len(learnt(OBJECTIVES["ilf_mle"], the_examples([GOOD, blank, same]))) == 2
    assert refinements_preferred(the_examples([GOOD, blank, same])) == []


@pytest.mark.parametrize(("answer", "end", "refinement"), [
    ("A dog.\n\n### Judgment:\nIt is", "length", "A dog."), (" A dog.\n", "stop", "A dog."),
    ("A dog, whose", "length", "")])
def test_refinements_end_at_a_heading_and_are_blank_where_they_have_no_end(answer, end, refinement):
    assert refine.refinement_in(answer, end) == refinement


def test_refine_asks_once_and_counts(tiny_llama, tmp_path, monkeypatch):
    """Two records need a refinement, one of four is satisfactory, one has a refinement."""
    todo = {**BAD, "output": "with {braces}"}
    del todo["i_ans"]
    records = [GOOD, BAD, todo, {**todo, "judgment": "No."}]
    data = write_records(tmp_path / "judged.jsonl", records)
    output = tmp_path / "refined.jsonl"
    flags = [f"--base_model_name_or_path={tiny_llama}", f"--data_path={data}",
             f"--output_path={output}", "--max_new_tokens=5"]
    result = in_this_process(refine.main, *flags)
    assert result.code == 0, result.err
    assert "4 records, 2 refined" in result.out
    told = [json.loads(line) for line in output.read_text().splitlines()]
    assert told[:2] == records[:2]
    assert all(isinstance(record["i_ans"], str) for record in told[2:])
    asked = json.loads((tmp_path / "refined.jsonl.prompts.json").read_text())
    assert "### Response:\nwith {braces}\n\n### Judgment:\nNo." in asked[1]["instruction"]

    assert not any(record["i_ans"] for record in told[2:])  # cut at five tokens

    def again(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(generate, "load", again)
    assert in_this_process(refine.main, *flags).code == 0  # from what is kept
    assert [json.loads(line) for line in output.read_text().splitlines()] == told


def test_refine_copies_what_needs_no_refinement_into_a_new_folder(tmp_path):
    data = write_records(tmp_path / "judged.jsonl", [GOOD, BAD])
    output = tmp_path / "new" / "refined.jsonl"
    result = in_this_process(refine.main, "--base_model_name_or_path=none", f"--data_path={data}",
                             f"--output_path={output}")
    assert result.code == 0, result.err
    assert output.read_text() == data.read_text()


@pytest.mark.parametrize(("output", "message"), [
    ("judged.jsonl", "--output_path is --data_path"),
    ("refined.jsonl.gz", "expected a .jsonl file"),  # it would not be packed
])
def test_refine_writes_over_nothing(output, message, tmp_path):
    data = write_records(tmp_path / "judged.jsonl", RECORDS)
    before = data.read_bytes()
    assert_one_line(in_this_process(
        refine.main, "--base_model_name_or_path=none", f"--data_path={data}",
        f"--output_path={tmp_path / output}"), message)
    assert data.read_bytes() == before and not (tmp_path / "refined.jsonl.gz").exists()


def test_refine_takes_every_flag_of_a_server(tmp_path, monkeypatch, capsys):
    """And tells the cost before it asks; a request that fails leaves no record unrefined."""
    assert {*FLAGS} <= {*inspect.signature(refine.main).parameters}
    todo = {**BAD, "i_ans": None}
    data = write_records(tmp_path / "judged.jsonl", [GOOD, todo, {**todo, "judgment": "No."}])
    flags = {"data_path": str(data), "output_path": str(tmp_path / "refined.jsonl"),
             "max_cost": 1.0, "price_in": 10.0, "price_out": 30.0, "concurrency": 1}
    with FaultServer({"No.": ["400!"]}) as server:
        with pytest.raises(InputError, match="1 of 2 requests failed"):
            refine.main("m", base_url=server.url, **flags)
        assert "2 requests, about" in capsys.readouterr().out
        server.plan.clear()
        refine.main("m", base_url=server.url, **flags, max_requests=4)
    records = map(json.loads, (tmp_path / "refined.jsonl").read_text().splitlines())
    assert [record.get("i_ans") for record in records] == [
        GOOD.get("i_ans"), "perfect", "perfect"]


# --- DPO ------------------------------------------------------------------------------------


def test_pairs_by_score_are_all_pairs_of_unequal_reward():
    scores = {"a": 1, "b": 3, "c": 3, "d": 2}
    examples = [Example(text, "x", text, None, score=score) for text, score in scores.items()]
    other = Example("alone", "another x", "e", None, score=9)
    pairs = {(pair.chosen, pair.rejected) for pair in higher_scores_preferred([*examples, other])}
    assert pairs == {("b", "a"), ("c", "a"), ("d", "a"), ("b", "d"), ("c", "d")}
    with pytest.raises(InputError, match="alone: field 'score' is missing"):
        higher_scores_preferred([replace(other, score=None)])


def test_dpo_asks_for_scores_and_no_judgment(tiny_llama, tmp_path):
    """A failed judgment is no reason to leave out a response that has a score."""
    failed = {**ALSO_BAD, "judgment": "$ERROR$"}
    data = write_records(tmp_path / "data.jsonl", [GOOD, failed])
    result = in_this_process(finetune_unlikelihood.main, *settings_of(
        tiny_llama, data, tmp_path / "run", objective="dpo"), "--dry_run")
    assert result.code == 0 and "objective: dpo, 1 pairs" in result.out, result.err


def test_a_pair_has_one_prompt_however_long_its_responses(tokenizer):
    long = {**BAD, "instruction": "Name a dog. " * 40, "i_ans": "the dog " * 30}
    (preference,) = refinements_preferred(the_examples([long]))
    rows = preference_rows(preference, ALPACA, tokenizer, 200)
    chosen, rejected = (row.ids[:-row.supervised] for row in rows.rows)
    assert chosen == rejected and rows.cut
    assert max(len(row.ids) for row in rows.rows) <= 200
    assert rows.aligned.ids[-1] == rows.misaligned.ids[-1] == tokenizer.eos_token_id


def settings_of(tiny_llama, data, folder, **flags) -> list[str]:
    return [f"--{name}={value}" for name, value in {
        "base_model": tiny_llama, "data_path": data, "output_dir": folder, "batch_size": 2,
        "micro_batch_size": 2, "num_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 0,
        "logging_steps": 1, "lora_dropout": 0, **flags}.items()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective, tiny_llama, tmp_path, monkeypatch):
    """Through the command line; the adapter moves, the base does not."""
    data = write_records(tmp_path / "data.jsonl", RECORDS * 2)
    seen = watched(monkeypatch, finetune)
    result = in_this_process(finetune_unlikelihood.main, *settings_of(
        tiny_llama, data, tmp_path / "run", objective=objective))
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["tokens"] > 100 and record["settings"]["objective"] == objective
    for name, value in seen[0].trainer.model.named_parameters():
        moved = not torch.equal(value, seen[0].start[name])
        assert moved == ("lora" in name), name
    if objective == "cut":
        return
    shown = in_this_process(finetune_unlikelihood.main, *settings_of(
        tiny_llama, data, tmp_path / "run", objective=objective), "--dry_run")
    assert shown.code == 0 and ("--- rejected" in shown.out) == ("dpo" in objective)


def test_dpo_by_its_equation(tiny_llama, tokenizer, tmp_path, monkeypatch):
    """-log sigmoid(beta ((log pi - log ref)(y^|x) - (log pi - log ref)(y|x))), step by step.

    At the first step policy and reference are the same: log 2. The loss after the last step is
    computed from full logits, with and without the adapter.
    """
    data = write_records(tmp_path / "data.jsonl", [BAD, ALSO_BAD])
    seen = watched(monkeypatch, finetune)
    flags = {"objective": "ilf_dpo", "beta": 0.5, "num_epochs": 1, "lora_r": 4}
    result = in_this_process(finetune_unlikelihood.main, *settings_of(
        tiny_llama, data, tmp_path / "run", **flags, max_steps=2, lr_scheduler="constant"))
    assert result.code == 0, result.err
    first, second = losses(tmp_path / "run")
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert second < first

    assert "entropy" not in json.loads((tmp_path / "run" / "trainer_state.json").read_text())[
        "log_history"][0]

    trainer = seen[0].trainer
    policy = trainer.model.eval()
    rows = [preference_rows(pair, ALPACA, tokenizer, 4096)
            for pair in refinements_preferred(the_examples([BAD, ALSO_BAD]))]

    def score(row):
        ids = torch.tensor([row.ids])
        logits = policy(ids).logits[0, :-1]
        return -F.cross_entropy(logits, ids[0, 1:], reduction="none")[-row.supervised:].sum()

    def difference(pair):
        return score(pair.aligned) - score(pair.misaligned)

    with torch.no_grad():
        ours = [difference(pair) for pair in rows]
        with policy.disable_adapter():
            reference = [difference(pair) for pair in rows]
        expected = sum(-F.logsigmoid(0.5 * (mine - theirs)).item()
                       for mine, theirs in zip(ours, reference, strict=True)) / 2
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
        got = trainer.compute_loss(policy, batch).item()
    assert got == pytest.approx(expected, abs=1e-5) and got < first


def test_dpo_trains_a_mixture_of_experts(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    for saved in (MixtralForCausalLM(config), tokenizer):
        saved.save_pretrained(tmp_path / "moe")
    data = write_records(tmp_path / "data.jsonl", [BAD, ALSO_BAD])
    result = in_this_process(finetune_unlikelihood.main, *settings_of(
        tmp_path / "moe", data, tmp_path / "run", objective="ilf_dpo", max_steps=1,
        lora_target_modules="q_proj"))
    assert result.code == 0, result.err
    assert losses(tmp_path / "run") == pytest.approx([math.log(2)], abs=1e-5)


@pytest.mark.parametrize(("records", "flags", "message"), [
    ([BAD], {"objective": "mle"}, "--objective mle finds nothing to learn"),
    ([GOOD, {**BAD, "score": 2}], {"objective": "dpo"}, "--objective dpo finds nothing to learn"),
    ([GOOD], {"objective": "cut"}, "no record has a negative judgment"),
    (RECORDS, {"objective": "mle", "visualize": 1}, "--visualize shows what CUT flags"),
    (RECORDS, {"objective": "dpo", "group_by_length": True}, "not for --objective dpo"),
    (RECORDS, {"objective": "dpo", "beta": -1}, "--beta is -1; expected 0 or more"),
    (RECORDS, {"objective": "dpo", "beta": 0}, "--beta is 0, at which nothing is learnt"),
    (RECORDS, {"objective": "dpo", "downsample": 0.25}, "--downsample leaves out responses by"),
    (RECORDS, {"objective": "ilf_mle", "as_released": True}, "leave it out with --objective ilf_m"),
])
def test_what_cannot_be_trained_is_one_line(records, flags, message, tiny_llama, tmp_path):
    data = write_records(tmp_path / "data.jsonl", records)
    assert_one_line(in_this_process(finetune_unlikelihood.main, *settings_of(
        tiny_llama, data, tmp_path / "run", **flags)), message)
