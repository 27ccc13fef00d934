"""The judge against the plain computation, and what follows from judging in both orders.

    python -m pytest tests/test_judgment.py

Random models judge, except where a test says that the judge is a script.
"""

import copy

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from tiny_judge import PRINCIPLES, TEMPLATE, tiny_model, tiny_tokenizer
from training_runs import in_two_processes

from lm.records import InputError
from self_judge import next_token
from self_judge.judgment import (
    Pair,
    Probabilities,
    debias,
    get_batch_judgments,
    judge_metrics,
    judge_pairs,
    judge_preferences,
    judgment_of,
    vote,
)
from self_judge.templates import decision_ids, judge_prompt_ids

CONTEXT = "User: Name three colours of the rainbow, in {} words."
TEXTS = ("Red, green and blue.", "The cat sat on the hat, and so did the other cat; it was blue.",
         "Red.", "No {context} here: I will not name any {colours}.", "")
PAIRS = [Pair(CONTEXT.format("seven " * repeats), a, b)
         for repeats, a, b in ((1, TEXTS[0], TEXTS[1]), (1, TEXTS[0], TEXTS[2]),
                               (5, TEXTS[3], TEXTS[1]), (2, TEXTS[2], TEXTS[4]),
                               (1, TEXTS[1], TEXTS[2]))]
ALWAYS_FIRST = Probabilities(A_ab=0.9, B_ab=0.1, A_ba=0.9, B_ba=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def numbers(judgments):
    """All probabilities, [pairs, principles, 4]."""
    return torch.tensor([list(map(list, found.probabilities.values())) for found in judgments])


def plain(model, tokenizer, pairs=PAIRS, templates=PRINCIPLES, max_length=2048):
    """The same numbers, one prompt at a time, from the full logits."""
    def both(text, pair, a, b):
        ids, _ = judge_prompt_ids(tokenizer, text, pair.context, a, b, max_length)
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits
        return logits[0, -1].softmax(-1)[list(decision_ids(tokenizer, text))]

    return torch.stack([torch.stack([
        torch.cat([both(text, pair, pair.response_a, pair.response_b),
                   both(text, pair, pair.response_b, pair.response_a)])
        for text in templates.values()]) for pair in pairs])


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def swapped(pairs):
    return [Pair(pair.context, pair.response_b, pair.response_a) for pair in pairs]


# --- the arithmetic --------------------------------------------------------------------------


def test_scores_are_means_over_both_places():
    # score_a = (p(A | a,b) + p(B | b,a)) / 2 = (0.6 + 0.7) / 2, score_b = (0.3 + 0.1) / 2
    scores = debias(Probabilities(A_ab=0.6, B_ab=0.3, A_ba=0.1, B_ba=0.7))
    assert scores == pytest.approx((0.65, 0.2))


@pytest.mark.parametrize(("scores", "winner"), [
    ([(0.6, 0.4)], "A"),
    ([(0.4, 0.6)], "B"),
    ([(0.5, 0.5)], None),
    ([(0.6, 0.4), (0.6, 0.4), (0.0, 1.0)], "A"),  # two of three, though the mean says B
    ([(0.4, 0.6), (0.4, 0.6), (1.0, 0.0)], "B"),
    ([(0.6, 0.4), (0.1, 0.9)], "B"),  # one each: the mean
    ([(0.6, 0.4), (0.4, 0.6)], None),  # one each and equal means
    ([(0.6, 0.4), (0.5, 0.5), (0.5, 0.5)], "A"),  # a win of three is no majority: the mean
])
def test_vote(scores, winner):
    assert vote(scores) == winner
    other = {"A": "B", "B": "A", None: None}[winner]
    assert vote([(b, a) for a, b in scores]) == other


def test_judgment_says_whether_both_orders_agree():
    pair = Pair("", "x", "y")
    agree = judgment_of(pair, {"p": Probabilities(0.6, 0.3, 0.2, 0.7)})
    assert (agree.winner, agree.consistent) == ("A", True)
    assert agree.margin == pytest.approx(0.65 - 0.25)
    torn = judgment_of(pair, {"p": Probabilities(0.9, 0.1, 0.6, 0.4)})  # the first one, both times
    assert (torn.winner, torn.consistent) == ("A", False)


def test_always_first_judge_gives_only_ties(llama, tokenizer, monkeypatch):
    """The judge is a script: no real one has exactly the same probabilities in both orders."""
    monkeypatch.setattr(next_token, "next_token_probabilities",
                        lambda model, rows, tokens, **settings: [[0.9, 0.1]] * len(rows))
    judgments = judge_pairs(llama, tokenizer, PAIRS, PRINCIPLES)
    assert [found.winner for found in judgments] == [None] * len(PAIRS)
    assert not any(found.consistent for found in judgments)
    assert judge_metrics(judgments, PAIRS)["accuracy"].share == 0.5
    assert judge_metrics(judgments, PAIRS)["chose_first"].share == 1
    texts = [[getattr(pair, name) for pair in PAIRS]
             for name in ("context", "response_a", "response_b")]
    assert get_batch_judgments(llama, tokenizer, *texts, TEMPLATE) == ["B"] * len(PAIRS)
    assert get_batch_judgments(llama, tokenizer, *texts, TEMPLATE, ties="drop") == [None] * 5


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("saving", [0, next_token.LEAST_SAVING, 9], ids=["all", "some", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "mamba"])
def test_equals_the_full_logits(name, saving, tokenizer, monkeypatch):
    """Whatever is shared: GPT-2's positions are absolute, Gemma-2 caps its logits."""
    monkeypatch.setattr(next_token, "LEAST_SAVING", saving)
    model = tiny_model(name)
    found = numbers(judge_pairs(model, tokenizer, PAIRS, PRINCIPLES))
    expected = plain(model, tokenizer)
    assert expected.std() > 1e-5 * 10  # the texts make a difference that 1e-5 would not hide
    close(found, expected)


def test_a_judge_in_half_precision_does_not_round_its_logits(llama):
    """In bf16 logits near 20 are eighths: A and B would tie that are none."""
    model = copy.deepcopy(llama).to(torch.bfloat16)
    kept = []
    hook = model.get_decoder().register_forward_hook(
        lambda module, arguments, output: kept.append(output.last_hidden_state))
    with torch.no_grad():
        logits, _ = next_token.last_logits(model, torch.tensor([[5, 6, 7], [8, 9, 0]]),
                                           torch.tensor([3, 2]), use_cache=False)
    hook.remove()
    hidden = kept[0][torch.arange(2), torch.tensor([2, 1])]
    expected = hidden.double() @ model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert (logits.bfloat16().double() - expected).abs().max() > 1e-4  # what rounding does


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batch_size_and_padding_change_nothing(name, tokenizer):
    model = tiny_model(name)
    expected = plain(model, tokenizer)
    for budget in (1, 150, 400, 10**6):
        close(numbers(judge_pairs(model, tokenizer, PAIRS, PRINCIPLES, token_budget=budget)),
              expected)
    for side in ("left", "right"):
        other = tiny_tokenizer()
        other.padding_side = other.truncation_side = side
        close(numbers(judge_pairs(model, other, PAIRS, PRINCIPLES)), expected)
    alone = [judge_pairs(model, tokenizer, [pair], PRINCIPLES)[0] for pair in PAIRS]
    close(numbers(alone), expected)


def test_shared_beginnings_are_run_once(llama, tokenizer, monkeypatch):
    """One context, four matches: without sharing each of the 8 prompts holds all of it."""
    context = "User: " + "Name three colours. " * 20
    pairs = [Pair(context, f"Red {number}.", "Green and blue.") for number in range(4)]

    def tokens_run(saving):
        monkeypatch.setattr(next_token, "LEAST_SAVING", saving)
        seen = []
        hook = llama.get_input_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0].numel()))
        found = judge_pairs(llama, tokenizer, pairs, TEMPLATE)
        hook.remove()
        return sum(seen), found

    shared, found = tokens_run(1 / 8)
    whole, expected = tokens_run(9)
    close(numbers(found), numbers(expected))
    length = len(tokenizer(context)["input_ids"])
    assert length > 60 and whole - shared > 6 * length


def test_principles_share_the_pair_in_its_order():
    """Two questions about two long answers: the answers are shared, not the context alone."""
    rows = [[1, 5, 5, 5, 6, 6, 6, question] for question in (8, 9)] + \
        [[1, 6, 6, 6, 5, 5, 5, question] for question in (8, 9)]
    saved, groups = next_token.best_groups(rows, range(4))
    assert saved == 14 and [(group.rows, group.length) for group in groups] == [
        ([0, 1], 7), ([2, 3], 7)]


def test_row_that_begins_another_keeps_an_end_of_its_own():
    rows = [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]
    _, groups = next_token.best_groups(rows, [0, 1, 2])
    assert all(group.length < len(rows[row]) for group in groups for row in group.rows)


def test_adapter_is_judged_in_the_state_that_it_is_in(tokenizer):
    base = plain(tiny_model(), tokenizer)
    model = get_peft_model(tiny_model(), LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    adapted = numbers(judge_pairs(model, tokenizer, PAIRS, PRINCIPLES))
    assert (adapted - base).abs().max() > 1e-4
    with model.disable_adapter():
        close(numbers(judge_pairs(model, tokenizer, PAIRS, PRINCIPLES)), base)
    close(numbers(judge_pairs(model, tokenizer, PAIRS, PRINCIPLES)), adapted)


def test_wrapped_in_ddp(llama, tokenizer, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(tiny_model())
        found = numbers(judge_pairs(wrapped, tokenizer, PAIRS, PRINCIPLES))
    finally:
        torch.distributed.destroy_process_group()
    close(found, plain(llama, tokenizer))


def test_dropout_is_off_and_training_goes_on(tokenizer):
    model = tiny_model("gpt2")
    expected = plain(model, tokenizer)
    assert model.config.resid_pdrop > 0
    model.train()
    close(numbers(judge_pairs(model, tokenizer, PAIRS, PRINCIPLES)), expected)
    assert model.training
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks


def test_sampling_settings_do_not_filter(llama, tokenizer, monkeypatch):
    expected = plain(llama, tokenizer)
    monkeypatch.setattr(llama.generation_config, "top_k", 1)
    monkeypatch.setattr(llama.generation_config, "temperature", 0.01)
    close(numbers(judge_pairs(llama, tokenizer, PAIRS, PRINCIPLES)), expected)
    assert (expected > 0).all()


@pytest.mark.parametrize("templates", [TEMPLATE, PRINCIPLES])
def test_swapped_inputs_swap_the_verdict(llama, tokenizer, templates):
    there = judge_pairs(llama, tokenizer, PAIRS, templates)
    back = judge_pairs(llama, tokenizer, swapped(PAIRS), templates)
    for one, other in zip(there, back, strict=True):
        assert {one.winner, other.winner} == {"A", "B"}
        assert one.margin == pytest.approx(-other.margin, abs=1e-6)
        assert one.consistent == other.consistent


def test_identical_responses_are_a_tie_and_run_once(llama, tokenizer):
    lengths = []
    hook = llama.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[0]))
    same, other = judge_pairs(llama, tokenizer, [Pair("c", "x", "x"), PAIRS[0]], TEMPLATE,
                              token_budget=1)
    hook.remove()
    assert same.identical and same.winner is None and same.margin == 0
    assert not other.identical and other.winner
    assert sum(lengths) <= 4  # two orders of one pair, one prompt of the other, a shared beginning


def test_cut_prompts_are_told_and_still_judged(llama, tokenizer):
    long = Pair("User: " + "seven cats " * 100, TEXTS[0], TEXTS[2])
    found = judge_pairs(llama, tokenizer, [PAIRS[0], long], TEMPLATE, max_length=120)
    assert [judged.cut for judged in found] == [False, True]
    texts = columns([PAIRS[0], long])
    kept, dropped = (get_batch_judgments(llama, tokenizer, *texts, TEMPLATE, max_length=120,
                                         cut=cut) for cut in ("keep", "drop"))
    assert kept == [judged.winner for judged in found] and dropped == [kept[0], None]
    close(numbers(found), plain(llama, tokenizer, [PAIRS[0], long], {"default": TEMPLATE}, 120))


def test_models_context_limits_the_prompt(tokenizer):
    """GPT-2's table ends at 256 positions; max_length 2048 is a default."""
    model = tiny_model("gpt2")
    long = Pair("User: " + "seven cats " * 200, *TEXTS[:2])
    [found] = judge_pairs(model, tokenizer, [long], TEMPLATE)
    assert found.cut
    close(numbers([found]), plain(model, tokenizer, [long], {"default": TEMPLATE}, 256))


def test_processes_with_sharded_weights_wait_for_each_other(tmp_path):
    """Two real processes under FSDP2: one has five pairs to judge, the other none."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = in_two_processes(script, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "5 pairs as expected" in done.stdout and "0 pairs as expected" in done.stdout


SHARDED = """
import torch
import torch.distributed as dist
from test_judgment import PAIRS, PRINCIPLES, close, numbers, plain
from tiny_judge import tiny_model, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from self_judge.judgment import judge_pairs

dist.init_process_group("gloo")
model, tokenizer = tiny_model(), tiny_tokenizer()
pairs = PAIRS if dist.get_rank() == 0 else []
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
found = judge_pairs(model, tokenizer, pairs, PRINCIPLES, token_budget=150)
if pairs:
    close(numbers(found), plain(tiny_model(), tokenizer))
print(f"{len(found)} pairs as expected", flush=True)
dist.destroy_process_group()
"""


# --- the published function ------------------------------------------------------------------


def columns(pairs):
    return ([pair.context for pair in pairs], [pair.response_a for pair in pairs],
            [pair.response_b for pair in pairs])


def test_batch_judgments_are_letters_whatever_the_batch(llama, tokenizer):
    expected = [found.winner for found in judge_pairs(llama, tokenizer, PAIRS, TEMPLATE)]
    for size in (1, 3, 64):
        assert get_batch_judgments(llama, tokenizer, *columns(PAIRS), [TEMPLATE],
                                   judge_batch_size=size) == expected
    assert get_batch_judgments(llama, tokenizer, [], [], [], TEMPLATE) == []


def test_given_token_ids_are_used(llama, tokenizer):
    a, b = decision_ids(tokenizer, TEMPLATE)
    given = judge_pairs(llama, tokenizer, PAIRS, TEMPLATE, token_id_a=b, token_id_b=a)
    own = judge_pairs(llama, tokenizer, PAIRS, TEMPLATE)
    close(numbers(given), numbers(own)[..., [1, 0, 3, 2]])
    for wrong in ({"token_id_a": 5}, {"token_id_a": 5, "token_id_b": 5},
                  {"token_id_a": 5, "token_id_b": len(tokenizer)}):
        with pytest.raises(InputError, match="two different ids, or neither"):
            judge_pairs(llama, tokenizer, PAIRS, TEMPLATE, **wrong)


def test_a_judge_whose_weights_are_not_numbers_gives_no_verdict(tokenizer):
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(InputError, match="the judge's logits are not numbers"):
        judge_pairs(model, tokenizer, PAIRS, TEMPLATE)


@pytest.mark.parametrize(("change", "message"), [
    ({"contexts": ["c"]}, "1 contexts, 2 responses_a and 2 responses_b"),
    ({"ties": "A"}, "ties is 'A'; expected keep or drop"), ({"cut": "A"}, "cut is 'A'; expected"),
    ({"judge_templates": {}}, "judge_templates is empty"),
    ({"judge_templates": 5}, "judge_templates is of type int; expected what"),
    ({"judge_templates": [TEMPLATE, None]}, r"'1' is of type NoneType; expected a text with \{con"),
    ({"contexts": "cd"}, "contexts is a text; expected a list of texts"),
    ({"responses_b": ["y", None]}, "responses_b: row 1 is None; expected a text"),
    ({"judge_batch_size": 0}, "judge_batch_size is 0; expected 1 or more"),
    ({"judge_templates": "no fields"}, r"'default' has \{context\} 0 times"),
])
def test_bad_arguments_are_one_line(llama, tokenizer, change, message):
    arguments = {"contexts": ["c", "d"], "responses_a": ["x", "y"], "responses_b": ["y", "z"],
                 "judge_templates": TEMPLATE}
    with pytest.raises(InputError, match=message) as error:
        get_batch_judgments(llama, tokenizer, **arguments | change)
    assert "\n" not in str(error.value)


# --- preferences and metrics -----------------------------------------------------------------


def test_a_preferences_principle_chooses_its_template(llama, tokenizer):
    pair = PAIRS[0]
    record = {"context": pair.context, "chosen": pair.response_a, "rejected": pair.response_b}
    records = [{**record, "principle": "honesty"}, record, {**record, "principle": "help"}]
    judgments, pairs = judge_preferences(llama, tokenizer, records, PRINCIPLES)
    assert pairs == [pair] * 3
    assert [list(found.probabilities) for found in judgments] == [
        ["honesty"], ["help", "honesty"], ["help"]]
    [both] = judge_pairs(llama, tokenizer, [pair], PRINCIPLES)
    close(numbers([judgments[1]]), numbers([both]))
    close(numbers(judgments[:1])[:, 0], numbers([both])[:, 1])
    with pytest.raises(InputError, match=r"pair 1: principle 'honest' has no judge template; .*"):
        judge_preferences(llama, tokenizer, [record, {**record, "principle": "honest"}], PRINCIPLES)


def test_metrics_by_hand():
    """Judgments are made up; A is the better response. Lengths: longer, shorter, equal, shorter."""
    cases = [
        (Pair("", "long text", "short"), Probabilities(0.6, 0.3, 0.2, 0.7)),  # A, both orders
        (Pair("", "short", "long text"), Probabilities(0.3, 0.6, 0.7, 0.2)),  # B, both orders
        (Pair("", "same", "size"), Probabilities(0.9, 0.1, 0.6, 0.4)),  # A, first both times
        (Pair("", "x", "xy"), ALWAYS_FIRST),  # a tie
    ]
    judgments = [judgment_of(pair, {"p": probabilities}, cut=place == 0)
                 for place, (pair, probabilities) in enumerate(cases)]
    found = judge_metrics(judgments, [pair for pair, _ in cases])
    counted = {name: (share.hits, share.total) for name, share in found.items()}
    assert counted == {
        "accuracy": (2.5, 4), "consistency": (2, 4),
        "chose_first": (6, 8),  # A then B; B then A; A, A; A, A
        "chose_longer": (2, 2), "longer_is_better": (1, 2),
        "accuracy_longer": (1, 1), "accuracy_shorter": (0.5, 2),
        "ties": (1, 4), "identical": (0, 4), "cut": (1, 4)}
    assert judge_metrics([], []) == {}
    only_even = judge_metrics(judgments[2:3], [cases[2][0]])
    assert "chose_longer" not in only_even and "accuracy_shorter" not in only_even
