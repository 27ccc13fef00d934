"""SelfJudgeTrainer: what is sampled, judged, left out and learnt, however a step is split.

    python -m pytest tests/test_self_judge_trainer.py

The judge here is a script, except where a test says so; the real one has tests of its own.
"""

import hashlib
import inspect
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from packaging.version import Version
from peft import LoraConfig
from training_runs import in_two_processes
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, DPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

import self_judge.inputs
import self_judge.metrics
import self_judge.pairs
from lm import packing
from lm.generation import Response, generate
from lm.models import load_model
from lm.records import InputError
from lm.templates import prompt_ids, response_ids
from lm.trainers import NonFiniteLoss
from self_judge import on_policy
from self_judge.inputs import training_arguments
from self_judge.metrics import PER_PAIR
from self_judge.pairs import part_of
from self_judge.sampling import sampling_of, unchanged_base
from self_judge.self_training import collapse
from self_judge.trainer import PeftSavingCallback, SelfJudgeTrainer

TEMPLATE = "{context}\nResponse A: {response_a}\nResponse B: {response_b}\nThe better response is"
EOS = 0
# In other batches probabilities round otherwise, which would change a sample now and then: among
# the 300 near equal tokens of a random model's nucleus, two may even change places.
FEW_ROUNDINGS = {"top_p": 1.0, "max_new_tokens": 6}
ROWS = [{"query": f"the cat number {index} sat", "context": f"User: the cat number {index}",
         "chosen": "on the mat", "rejected": "and then the other cat"} for index in range(11)]


def worth(text):
    """What the scripted judge thinks of a response."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 16 ** 4


def judgment(pair, tie=False, cut=False):
    score_a, score_b = worth(pair.response_a), worth(pair.response_b)
    identical = pair.response_a == pair.response_b
    winner = None if tie or identical else "A" if score_a > score_b else "B"
    return SimpleNamespace(score_a=score_a, score_b=score_b, margin=score_a - score_b, cut=cut,
                           winner=winner, identical=identical, consistent=not tie)


@pytest.fixture
def script(monkeypatch):
    """Replaces the judge; `script(function)` sets what it says of a pair, and notes what it saw."""
    seen = []

    def use(verdict=judgment, watch=lambda model: None):
        def judge(model, tokenizer, pairs, judge_templates, **options):
            watch(model)
            seen.extend(pairs)
            return [verdict(pair) for pair in pairs]
        monkeypatch.setattr(on_policy, "judge_pairs", judge)
        return seen

    use()
    return use


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"],
                         "task_type": "CAUSAL_LM", **settings})


def arguments(folder, kind=DPOConfig, **settings):
    defaults = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "logging_steps": 1,
                "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "seed": 3,
                "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False,
                "disable_tqdm": True, "dataloader_pin_memory": False, "max_steps": 2,
                "gradient_checkpointing": False}
    return kind(output_dir=str(folder), **defaults | settings)


@pytest.fixture
def make(tiny_llama, tmp_path, script):
    """A trainer on the tiny model; keywords of the trainer, and of its arguments in `args`."""
    def make(args=(), model=None, **settings):
        defaults = {"train_dataset": ROWS, "judge_templates": TEMPLATE, "peft_config": lora(),
                    "max_length": 200, "max_new_tokens": 10}
        return SelfJudgeTrainer(
            model or AutoModelForCausalLM.from_pretrained(tiny_llama),
            tokenizer=AutoTokenizer.from_pretrained(tiny_llama),
            args=arguments(tmp_path, **dict(args)), **defaults | settings)
    return make


def steps(trainer):
    """The log lines of the steps; trains first."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def steps_and_evaluation(trainer):
    """The same, and at last the log line of an evaluation."""
    log = steps(trainer)
    trainer.evaluate()
    return [*log, trainer.state.log_history[-1]]


def first_batch(trainer, queries=4):
    """A micro-batch of pairs as training sees it, before any step."""
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    trainer._train_batch_size = trainer.args.per_device_train_batch_size = queries
    trainer.args.train_sampling_strategy = "sequential"
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1,
                                               trainer.args.device)
    assert count == queries
    del batches[0]["parts"]
    return batches[0]


def moved(model):
    """Make LoRA's update non-zero, so that policy and reference differ."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)


# --- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("average", [False, True])
def test_losses_are_those_of_the_papers(make, loss_type, average):
    """In float64, token by token: m = log-ratio of chosen - of rejected, summed or averaged.

    sigmoid -log s(b m) (DPO eq. 7), hinge max(0, 1 - b m) (SLiC), ipo (m - 1 / 2b)^2 (IPO eq. 17).
    """
    trainer = make(loss_type=loss_type, average_log_prob=average, beta=0.3)
    moved(trainer.model)
    batch = first_batch(trainer)

    def log_probs():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        taken = logits.double()[:, :-1].log_softmax(-1).gather(
            -1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        mask = batch["completion_mask"][:, 1:]
        total = (taken * mask).sum(1)
        return total / mask.sum(1) if average else total

    trainer.model.eval()
    with torch.no_grad():
        ratio = log_probs()
        with trainer.model.disable_adapter():
            ratio = ratio - log_probs()
    margin = ratio[:4] - ratio[4:]
    assert margin.abs().max() > 0.01
    expected = {"sigmoid": (1 + (-0.3 * margin).exp()).log(),
                "hinge": (1 - 0.3 * margin).clamp(min=0),
                "ipo": (margin - 1 / 0.6) ** 2}[loss_type].mean()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_loss_and_gradient_are_trls_own_on_the_same_ids(make, tiny_llama, tmp_path):
    ours = make()
    moved(ours.model)
    batch = first_batch(ours)
    loss = ours.compute_loss(ours.model.train(), dict(batch), num_items_in_batch=4)
    loss.backward()

    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]  # trl wants a dataset
    from datasets import Dataset
    theirs = DPOTrainer(AutoModelForCausalLM.from_pretrained(tiny_llama),
                        args=arguments(tmp_path), train_dataset=Dataset.from_list(pairs),
                        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
                        peft_config=lora())
    moved(theirs.model)
    theirs.model.load_state_dict(ours.model.state_dict())
    del batch["present"]
    expected = theirs.compute_loss(theirs.model.train(), batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        if other.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


def test_pairs_left_out_have_a_constant_loss_and_no_gradient(make, script):
    """Of four queries two tie: their loss is log 2, and the gradient is that of the other two."""
    kept = {ROWS[0]["context"], ROWS[2]["context"]}
    script(lambda pair: judgment(pair, tie=pair.context not in kept))
    trainer = make()
    moved(trainer.model)
    batch = first_batch(trainer)
    assert batch["completion_mask"].any(1).tolist() == [True, False, True, False] * 2
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=4)
    gradient = torch.autograd.grad(loss, trainer.model.base_model.model.model.layers[0]
                                   .mlp.up_proj.lora_A["default"].weight)[0]

    real = {name: value[batch["completion_mask"].any(1)] for name, value in batch.items()
            if name != "present"}
    alone = trainer.compute_loss(trainer.model, {**real, "present": batch["present"][:2]},
                                 num_items_in_batch=2)
    expected = torch.autograd.grad(alone, trainer.model.base_model.model.model.layers[0]
                                   .mlp.up_proj.lora_A["default"].weight)[0]
    assert loss.item() == pytest.approx((alone.item() + math.log(2)) / 2, rel=1e-5)
    torch.testing.assert_close(gradient, expected / 2)


def test_any_split_of_a_batch_gives_the_same_training(make, script, monkeypatch):
    """4 x 1 = 2 x 2 = 1 x 4, in parts or whole, over 11 rows, a third of the pairs left out."""
    script(lambda pair: judgment(pair, tie=worth(pair.response_a) < 0.33))
    runs = []
    for micro, accumulation, budget in ((4, 1, 1000), (2, 2, 1000), (1, 4, 1000), (4, 1, 50)):
        monkeypatch.setitem(packing.TOKENS_PER_FORWARD, "cpu", budget)
        trainer = make({"per_device_train_batch_size": micro, "max_steps": -1,
                        "gradient_accumulation_steps": accumulation, "num_train_epochs": 1},
                       **FEW_ROUNDINGS)
        log = steps(trainer)
        runs.append([[entry["loss"], entry["grad_norm"], entry["judge/pairs"],
                      entry["rewards/margins"], entry["logps/chosen"]] for entry in log])
        assert len(log) == 3
    first = torch.tensor(runs[0])
    assert 0 < first[:, 2].min() < 1  # some pairs are left out
    assert first[:, 0].max() - first[:, 0].min() > 1e-3  # training did something
    for other in runs[1:]:
        torch.testing.assert_close(torch.tensor(other), first, rtol=1e-3, atol=1e-5)


def test_parts_are_pairs_of_like_length_without_needless_padding():
    """Pairs 0 and 2 of three, whose longest row has four tokens; no pairs give an absent one."""
    ids = torch.arange(1, 31).view(6, 5)
    lengths = torch.tensor([3, 5, 4, 2, 5, 3])
    mask = (torch.arange(5) < lengths[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask,
             "present": torch.tensor([True, True, False])}
    part = part_of(batch, [0, 2])
    assert part["input_ids"].tolist() == ids[[0, 2, 3, 5], :4].tolist()
    assert part["attention_mask"].sum(1).tolist() == [3, 4, 2, 3]
    assert part["present"].tolist() == [True, False]
    filled = part_of(batch, [0, None])
    assert filled["input_ids"][[0, 2]].tolist() == ids[[0, 3], :3].tolist()
    assert filled["attention_mask"].sum(1).tolist() == [3, 2, 2, 2]
    assert not filled["completion_mask"][[1, 3]].any()
    assert filled["present"].tolist() == [True, False]
    empty = part_of(batch, [None])
    assert empty["input_ids"].shape == (2, 2) and not empty["completion_mask"].any()
    assert empty["attention_mask"].all() and empty["present"].tolist() == [False]


def test_every_trained_parameter_moves_and_no_other(make):
    trainer = make({"learning_rate": 0.05, "max_steps": 3})
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


# --- responses -> judgment -> pair -----------------------------------------------------------


def test_gradient_that_is_no_number_never_reaches_the_weights(make, script):
    trainer = make()
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    trained[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLoss, match="the gradient is not finite at step 1"):
        trainer.train()
    assert all(map(torch.equal, trained, before))


def test_trains_on_the_sampled_ids_and_eos_only_where_it_was_sampled(make, script, tiny_llama):
    """The rows' ids are those that `generate` draws; a response that was cut has no EOS."""
    seen = script()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    trainer = make(max_new_tokens=40)
    trainer.engine.settings = trainer.engine.settings.__class__(40, 2.0, 1.0)  # ends now and then
    batch = first_batch(trainer, 8)
    tokenizer = trainer.processing_class
    prompts = {2 * index + k: prompt_ids(tokenizer, ROWS[index]["query"])
               for index in range(8) for k in (0, 1)}
    drawn = dict(generate(model, tokenizer, prompts, max_new_tokens=40, temperature=2.0,
                          seed="3 0"))
    ends = set()
    for index in range(8):
        a, b = drawn[2 * index], drawn[2 * index + 1]
        assert (seen[index].response_a, seen[index].response_b) == (a.text.strip(), b.text.strip())
        chosen, rejected = (a, b) if worth(a.text.strip()) > worth(b.text.strip()) else (b, a)
        for row, response in ((index, chosen), (8 + index, rejected)):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            mask = batch["completion_mask"][row][batch["attention_mask"][row].bool()].tolist()
            assert ids == prompts[2 * index] + list(response.token_ids)
            assert sum(mask) == len(response.token_ids) and mask[-1] == 1
            assert (ids[-1] == EOS) == (response.finish_reason == "stop")
            ends.add(response.finish_reason)
    assert ends == {"stop", "length"}


def test_identical_responses_never_become_a_pair(make, script, monkeypatch):
    """Not even where ties are kept."""
    trainer = make(ties="keep", cut="keep")
    engine = trainer.engine.responses
    monkeypatch.setattr(trainer.engine, "responses", lambda prompts, seed: {
        key: engine(prompts, seed)[key - key % 2] for key in prompts})
    assert not first_batch(trainer)["completion_mask"].any()
    assert trainer.pairs_in_step == 0


def test_an_empty_query_is_named_by_its_row(make, script):
    rows = [*ROWS[:2], {**ROWS[2], "query": ""}, *ROWS[3:]]
    with pytest.raises(InputError, match=r"^train row 2: query is empty$"):
        make(train_dataset=rows).train()


def test_a_policy_that_has_come_to_say_nothing_is_told(make, script, monkeypatch):
    trainer = make({"max_steps": 1}, show_every=0)
    engine = trainer.engine.responses
    monkeypatch.setattr(trainer.engine, "responses", lambda prompts, seed: {
        key: response if key == 0 else Response("", (EOS,), "stop")
        for key, response in engine(prompts, seed).items()})
    log = steps(trainer)
    assert log[0]["response_empty_rate"] == 7 / 8
    assert "88% of the last sampled responses are empty" in collapse(trainer.state.log_history)
    assert not collapse([{"response_empty_rate": 0.9}, {"response_empty_rate": 0.1}, {"loss": 1}])
    assert not collapse([])


@pytest.mark.parametrize("ties", ["drop", "keep"])
@pytest.mark.parametrize("cut", ["drop", "keep"])
def test_ties_and_cut_pairs_are_handled_as_told(make, script, ties, cut):
    """Rows 0 and 1 tie, row 2 was cut, row 3 is neither; a kept tie chooses B."""
    seen = script(lambda pair: judgment(pair, tie=pair.context[-1] in "01",
                                        cut=pair.context[-1] == "2"))
    trainer = make(ties=ties, cut=cut)
    batch = first_batch(trainer)
    kept = batch["completion_mask"][:4].any(1).tolist()
    assert kept == [ties == "keep"] * 2 + [cut == "keep", True]
    if ties == "keep":
        ids = batch["input_ids"][0][batch["completion_mask"][0].bool()]
        text = trainer.processing_class.decode(ids, skip_special_tokens=True)
        assert text.strip() == seen[0].response_b
    means = trainer.means["train"].take(trainer.accelerator)
    assert means["judge/tie_rate"] == 0.5 and means["judge/cut_rate"] == 0.25
    assert means["judge/pairs"] == sum(kept) / 4 and means["judge/consistency"] == 0.5
    assert means["judge/identical_rate"] == 0


def test_a_step_without_pairs_changes_nothing_and_says_so(make, script, capsys):
    """Not even by weight decay; the next step with pairs does."""
    script(lambda pair: judgment(pair, tie=trainer.state.global_step < 2))
    trainer = make({"max_steps": 3, "weight_decay": 0.5, "gradient_accumulation_steps": 2,
                    "per_device_train_batch_size": 2})
    states = []
    trainer.add_callback(watch_steps(lambda: states.append(
        [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])))
    log = steps(trainer)
    same = [all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            for one, other in itertools.pairwise(states)]
    assert same == [True, True, False]
    assert [entry["skipped_batches"] for entry in log] == [1, 1, 0]
    assert log[0]["loss"] == pytest.approx(math.log(2)) and "rewards/chosen" not in log[0]
    assert log[0]["judge/pairs"] == 0 and log[2]["judge/pairs"] > 0
    assert capsys.readouterr().out.count("no pair among") == 1


def watch_steps(function):
    """A callback that calls `function` at the beginning, and after each step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            function()

        def on_step_end(self, *args, **kwargs):
            function()

    return Watch()


def test_metrics_are_means_over_the_real_pairs(make, script):
    """One of four queries makes a pair: its numbers are the log's, not a quarter of them."""
    script(lambda pair: judgment(pair, tie=pair.context[-1] != "2"))
    trainer = make(beta=0.5)
    moved(trainer.model)
    batch = first_batch(trainer)
    trainer.means["train"].take(trainer.accelerator)
    trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=4)
    means = trainer.means["train"].take(trainer.accelerator)
    real = {name: value[[2, 6]] for name, value in batch.items() if name != "present"}
    with torch.no_grad():
        mask = real.pop("completion_mask")
        labels = real["input_ids"].masked_fill(mask == 0, -100)
        policy = trainer.model(**real, labels=labels, fused_lm_head=True).log_probs.sum(1)
        with trainer.model.disable_adapter():
            reference = trainer.model(**real, labels=labels, fused_lm_head=True).log_probs.sum(1)
    chosen, rejected = (0.5 * (policy - reference)).tolist()
    expected = [chosen, rejected, chosen - rejected, float(chosen > rejected), *policy.tolist()]
    assert [means[name] for name in PER_PAIR] == pytest.approx(expected, abs=1e-4)
    assert not set(PER_PAIR) & set(trainer._metrics["train"])  # trl's means over all rows


@pytest.mark.parametrize("judge", ["reference", "policy"])
def test_the_judge_is_the_frozen_reference_or_the_live_policy(make, script, judge):
    ids = torch.arange(5, 15)[None]
    logits = []

    def watch(model):
        assert not torch.is_grad_enabled()
        logits.append(model(ids).logits[0, -1])

    script(watch=watch)
    trainer = make({"max_steps": 3, "learning_rate": 0.1}, judge=judge)
    with torch.no_grad():
        before = trainer.model.eval()(ids).logits[0, -1]
    trainer.train()
    same = [torch.allclose(seen, before, atol=1e-5) for seen in logits]
    assert same == ([True, True, True] if judge == "reference" else [True, False, False])


def test_sampling_follows_the_policy_and_differs_by_step_and_seed(make, script):
    """The same row in two steps, under two seeds, and under weights that have moved."""
    seen = script()
    for seed in (3, 4):
        trainer = make({"seed": seed, "num_train_epochs": 2, "max_steps": -1,
                        "learning_rate": 0.0}, train_dataset=ROWS[:1])
        trainer.train()
    assert len({(pair.response_a, pair.response_b) for pair in seen}) == 4
    trainer = make({"learning_rate": 0.0, "num_train_epochs": 2, "max_steps": -1},
                   train_dataset=ROWS[:1])
    moved(trainer.model)
    trainer.train()
    assert (seen[4].response_a, seen[4].response_b) != (seen[0].response_a, seen[0].response_b)


def test_long_queries_lose_their_start_and_are_counted(make, script):
    rows = [{**ROWS[0], "query": "the dog ran. " * 40 + "the cat sat"}, *ROWS[1:]]
    trainer = make(train_dataset=rows, max_length=60, max_new_tokens=20)
    batch = first_batch(trainer)
    whole = prompt_ids(trainer.processing_class, rows[0]["query"])
    prompt = batch["input_ids"][0][~batch["completion_mask"][0].bool()
                                   & batch["attention_mask"][0].bool()].tolist()
    assert len(whole) > 60 and prompt == whole[-40:]
    assert batch["input_ids"].shape[1] <= 60
    assert trainer.means["train"].take(trainer.accelerator)["query_cut_rate"] == 0.25
    with pytest.raises(InputError, match="leaves no room"):
        make(max_length=60, max_new_tokens=60)


# --- reference, evaluation, notebooks --------------------------------------------------------


def test_full_fine_tuning_compares_with_the_weights_in_memory(make, tiny_llama):
    """Not with those of the folder that they came from: here they were changed meanwhile."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    trainer = make({"learning_rate": 0.01, "max_steps": 2}, model=model, peft_config=None)
    log = steps(trainer)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy = reference at first
    assert abs(log[1]["rewards/chosen"]) > 1e-4

    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    trainer = make({"max_steps": 1}, peft_config=None, ref_model=reference)
    assert trainer.ref_model is reference
    assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_second_trainer_of_the_same_models_has_the_same_loss(make, tiny_llama, loss_type):
    """A notebook's cell is run again, or several losses share a reference."""
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    moved(model)
    common = {"model": model, "ref_model": reference, "peft_config": None, "pairs": "given",
              "eval_dataset": ROWS[:3]}
    found = []
    for kind in (loss_type, "ipo", loss_type):
        trainer = make(loss_type=kind, average_log_prob=kind == "sigmoid", **common)
        found.append(trainer.evaluate()["eval_loss"])
    assert found[2] == pytest.approx(found[0], rel=1e-6)
    assert trainer.predict(ROWS[:3]).metrics["test_loss"] == pytest.approx(found[0], rel=1e-6)


def test_a_second_full_fine_tuning_compares_with_the_weights_of_its_start(make, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for _ in range(2):
        trainer = make({"max_steps": 1}, model=model, peft_config=None, pairs="given")
        assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert trainer.evaluate(ROWS[:3])["eval_loss"] != pytest.approx(math.log(2), abs=1e-5)


def test_evaluation_scores_the_given_pairs_and_samples_nothing(make, script):
    seen = script()
    trainer = make(eval_dataset=ROWS[:3])
    moved(trainer.model)
    metrics = trainer.evaluate()
    assert not seen
    tokenizer = trainer.processing_class
    row = trainer.eval_dataset[0]
    assert row == {"prompt_ids": prompt_ids(tokenizer, ROWS[0]["query"]),
                   "chosen_ids": response_ids(tokenizer, "on the mat"),
                   "rejected_ids": response_ids(tokenizer, "and then the other cat")}
    assert row["chosen_ids"][-1] == EOS
    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {f"eval_{name}" for name in PER_PAIR} <= set(trainer.state.log_history[-1])
    assert trainer.evaluate(ROWS[3:5])["eval_loss"] != metrics["eval_loss"]  # rows given late


# --- offline: pairs that are given -----------------------------------------------------------

GIVEN = [{**row, "chosen": f" on the mat {index}", "rejected": " and then" * (1 + index % 4)}
         for index, row in enumerate(ROWS)]
OFFLINE = {"pairs": "given", "judge_templates": None, "train_dataset": GIVEN,
           "eval_dataset": GIVEN[:5]}


def test_offline_training_is_trls_own_dpo(make, script, tiny_llama, tmp_path):
    """trl tokenizes the same texts itself: losses, gradients and adapter agree over an epoch."""
    from datasets import Dataset
    args = {"num_train_epochs": 1, "max_steps": -1, "dataloader_drop_last": True,
            "learning_rate": 1e-3, "max_length": 200}
    ours = make(args | {"include_num_input_tokens_seen": "non_padding"}, **OFFLINE)
    moved(ours.model)
    theirs = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_llama), args=arguments(tmp_path, **args),
        train_dataset=Dataset.from_list([
            {"prompt": row["query"], "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in GIVEN]),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama), peft_config=lora())
    theirs.model.load_state_dict(ours.model.state_dict())
    log, expected = steps(ours), steps(theirs)
    assert not script() and len(log) == len(expected) == 2
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert [entry[name] for entry in log] == pytest.approx(
            [entry[name] for entry in expected], rel=1e-4, abs=1e-5), name
    assert ours.state.num_input_tokens_seen == expected[-1]["num_tokens"]
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_any_split_of_a_batch_gives_the_same_offline_training(make, script, monkeypatch):
    """11 rows, so that the last step has three; whole or in parts; nothing is sampled or judged."""
    seen, runs = script(), []
    for micro, accumulation, budget in ((4, 1, 1000), (1, 4, 1000), (4, 1, 50)):
        monkeypatch.setitem(packing.TOKENS_PER_FORWARD, "cpu", budget)
        log = steps(make({"per_device_train_batch_size": micro, "max_steps": -1,
                          "gradient_accumulation_steps": accumulation, "num_train_epochs": 1},
                         **OFFLINE))
        runs.append([[entry["loss"], entry["grad_norm"], entry["rewards/margins"],
                      entry["logps/rejected"], entry["response_length/rejected"]]
                     for entry in log])
        assert len(log) == 3 and not any(name.startswith("judge") for name in log[0])
    for other in runs[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(runs[0]), rtol=1e-3,
                                   atol=1e-5)
    assert not seen


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "every weight"])
def test_offline_training_goes_on_to_the_same_bits(make, tmp_path, adapter):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    given = OFFLINE | ({} if adapter else {"peft_config": None})
    whole, resumed = make(settings, **given), make(settings, **given)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    before = make(settings, **given).model.parameters()
    for one, other, start in zip(whole.model.parameters(), resumed.model.parameters(), before,
                                 strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, start) != one.requires_grad


def test_given_pairs_are_cut_in_training_as_in_evaluation(make):
    """A long query loses its start to leave room for a response, a longer response its end."""
    row = {**GIVEN[0], "query": "the dog ran. " * 40, "chosen": "the mat " * 30}
    trainer = make(max_length=60, max_new_tokens=20, **OFFLINE | {
        "train_dataset": [row] * 4, "eval_dataset": [row]})
    batch = first_batch(trainer)
    expected = trainer.data_collator(list(trainer.eval_dataset))
    assert batch["input_ids"].shape == (8, 60) and batch["completion_mask"][0].sum() == 20
    for name in ("input_ids", "completion_mask"):
        assert torch.equal(batch[name][[0, 4]], expected[name])


@pytest.mark.parametrize("pairs", ["sampled", "given"])
def test_the_rows_of_training_can_be_those_of_evaluation(pairs, make, script):
    """The same object: numbered for training, given pairs for evaluation."""
    from datasets import Dataset
    rows = Dataset.from_list(GIVEN[:4])
    trainer = make(pairs=pairs, train_dataset=rows, eval_dataset=rows)
    assert "index" in trainer.train_dataset.column_names
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2))


def test_given_pairs_are_never_longer_than_the_models_context(make):
    """The tiny model's table ends at 1024 positions; max_length 2048 is the published default."""
    trainer = make(max_length=2048, eval_dataset=[{**ROWS[0], "chosen": "on the mat " * 600}])
    batch = trainer.data_collator(list(trainer.eval_dataset))
    assert batch["input_ids"].shape == (2, 1024)


def test_works_as_a_notebook_expects(tiny_llama, tmp_path, script):
    """A folder's name, plain TrainingArguments, `processing_class=`, defaults."""
    args = arguments(tmp_path, TrainingArguments, max_steps=1)
    trainer = SelfJudgeTrainer(str(tiny_llama), args=args, train_dataset=ROWS, max_new_tokens=5,
                               processing_class=AutoTokenizer.from_pretrained(tiny_llama),
                               judge_templates=TEMPLATE, peft_config=lora())
    assert isinstance(trainer.args, DPOConfig) and trainer.args.per_device_train_batch_size == 4
    assert trainer.row_length == 1024  # the model's context, less than max_length 2048
    assert len(steps(trainer)) == 1


def test_needs_no_arguments(tiny_llama, tmp_path, script, monkeypatch):
    """On any machine; trl's own default is bf16, which a CPU refuses."""
    monkeypatch.chdir(tmp_path)
    trainer = SelfJudgeTrainer(str(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama),
                               train_dataset=ROWS, max_new_tokens=5, judge_templates=TEMPLATE,
                               peft_config=lora())
    assert trainer.args.output_dir == "self_judge"
    assert trainer.args.bf16 == torch.cuda.is_available() != trainer.args.use_cpu


def test_values_of_a_dpo_config_count_where_the_arguments_are_left_alone(tmp_path):
    def values(args, **given):
        args = training_arguments(args, **{"disable_dropout": True, "max_length": 2048,
                                           "loss_type": "sigmoid", "beta": 0.1, **given})
        return args.loss_type, args.beta, args.max_length, args.disable_dropout

    given = arguments(tmp_path, loss_type="ipo", beta=0.3, max_length=300, disable_dropout=False)
    assert values(arguments(tmp_path)) == (["sigmoid"], 0.1, 2048, True)
    assert values(given) == (["ipo"], 0.3, 300, False)
    assert values(given, beta=0.5, loss_type="hinge") == (["hinge"], 0.5, 300, False)
    assert given.beta == 0.3  # the caller's own are left as they are
    assert values(arguments(tmp_path, beta=1, max_length=None))[1:3] == (1, 2048)
    with pytest.raises(InputError, match="loss_type is robust; expected one of sigmoid"):
        values(arguments(tmp_path), loss_type="robust")
    for beta in (-1, 0, math.nan):
        with pytest.raises(InputError, match=f"beta is {beta}; expected more than 0"):
            values(arguments(tmp_path), beta=beta)
        with pytest.raises(InputError, match=f"beta is {beta}"):
            values(arguments(tmp_path, beta=beta))
    with pytest.raises(InputError, match="precompute_ref_log_probs"):
        values(arguments(tmp_path, precompute_ref_log_probs=True))
    with pytest.raises(InputError, match="use_weighting"):
        values(arguments(tmp_path, use_weighting=True))


@pytest.mark.parametrize(("settings", "message"), [
    ({"ties": "toss"}, "ties is 'toss'"), ({"judge": "gpt"}, "judge is 'gpt'"),
    ({"pairs": "none"}, "pairs is 'none'; expected sampled or given"),
    ({"pairs": "given", "train_dataset": [{"query": "a", "context": "b"}]},
     "train rows lack chosen, rejected"),
    ({"judge_templates": None}, "judge_templates is missing"),
    ({"temperature": 0.0}, "temperature is 0"), ({"top_p": 0.0}, "top_p is 0"),
    ({"train_dataset": [{"query": "a"}]}, "train rows lack context; they have query"),
    ({"eval_dataset": [{"query": "a"}]}, "eval rows lack chosen, rejected"),
    ({"train_dataset": []}, "there are no train rows; give at least one"),
    ({"eval_dataset": []}, "there are no eval rows"),
    ({"eval_dataset": {"hh": ROWS, "uf": []}}, "there are no uf rows"),
    ({"generation": {"engine": "tgi"}}, "engine is 'tgi'"),
    ({"generation": {"tokens": 3}}, "tokens unknown to engine hf"),
    ({"generation": {"engine": "vllm_server", "gpu_memory_utilisation": 0.3}},
     "generation: unknown key 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'"),
    ({"generation": {"engine": "vllm_colocate", "top_p": 0.3}}, "unknown key 'top_p'")])
def test_what_cannot_be_meant_is_one_line(make, settings, message):
    with pytest.raises(InputError, match=message) as error:
        make(**settings)
    assert "\n" not in str(error.value)


# --- engines, memory, checkpoints ------------------------------------------------------------


def test_gradient_checkpointing_is_off_while_sampling_and_on_while_training(make, monkeypatch):
    trainer = make({"gradient_checkpointing": True, "max_steps": 1})
    noted = []
    generate_ = self_judge.sampling.generate

    def watched(model, *args, **kwargs):
        noted.append(trainer.model.is_gradient_checkpointing)
        return generate_(model, *args, **kwargs)

    monkeypatch.setattr(self_judge.sampling, "generate", watched)
    step = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: (
        noted.append(trainer.model.is_gradient_checkpointing), step(*args, **kwargs))[1])
    trainer.train()
    assert noted == [False, True]


def test_vllm_that_is_missing_is_named(make):
    with pytest.raises(InputError, match="vllm_server needs vllm, which is not installed"):
        make(generation={"engine": "vllm_server"})


def test_vllm_gets_the_settings_and_its_ids_are_trained_on(make, script, monkeypatch):
    """trl's helper replaced: weights are sent before each step, two samples a query asked for."""
    calls = []

    class Fake:
        __signature__ = inspect.signature(VLLMGeneration)

        def __init__(self, model, accelerator, processing_class, **options):
            self.options = options

        def sync_weights(self):
            calls.append("sync")

        def generate(self, prompts, images, num_generations):
            calls.append(len(prompts))
            assert num_generations == 2 and prompts[0::2] == prompts[1::2]
            ids = [[20 + number, 30, EOS] if number % 2 else [40 + number] * 10
                   for number in range(len(prompts))]
            return prompts, ids, None, None

    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", Fake)
    monkeypatch.setattr("self_judge.sampling.is_vllm_available", lambda: True)
    trainer = make({"max_steps": 2}, generation={"engine": "vllm_server",
                                                 "server_base_url": "http://host:8000"})
    assert trainer.engine.vllm.options == {
        "mode": "server", "temperature": 1.0, "top_p": 0.9, "max_completion_length": 10,
        "max_model_length": 200, "server_base_url": "http://host:8000"}
    beside = make(generation={"engine": "vllm_colocate"}).engine.vllm.options
    assert beside["gpu_memory_utilization"] == 0.3  # the weights in training are there too
    log = steps(trainer)
    assert calls == ["sync", 8, "sync", 8]
    assert log[0]["response_cut_rate"] == 0.5
    lengths = [log[0]["response_length/chosen"], log[0]["response_length/rejected"]]
    assert sum(lengths) == 13


def test_sending_the_policy_leaves_the_base_as_it_was(make):
    """As trl sends it; in bf16, adding the adapter and taking it away again rounds."""
    model = make().model.to(torch.bfloat16)
    adapted = [module for module in model.modules() if hasattr(module, "base_layer")]
    for module in adapted:
        torch.nn.init.normal_(module.lora_B["default"].weight)
    before = [module.base_layer.weight.clone() for module in adapted]
    with unchanged_base(model):
        model.merge_adapter()
        model.unmerge_adapter()
        sent = [module.base_layer.weight.clone() for module in adapted]
    assert not all(map(torch.equal, sent, before))
    assert before and all(torch.equal(module.base_layer.weight, old)
                          for module, old in zip(adapted, before, strict=True))


def test_vllm_in_process_cannot_load_an_adapters_folder(make, tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setattr("self_judge.sampling.is_vllm_available", lambda: True)
    (tmp_path / "adapter_config.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.name_or_path = str(tmp_path)  # as load_base leaves it
    with pytest.raises(InputError, match=r"vllm_colocate loads .* is an adapter.*merge\.py"):
        make(model=model, generation={"engine": "vllm_colocate"})


def test_vllm_would_change_a_quantized_reference(make, tiny_llama, monkeypatch):
    """peft rounds packed weights anew each time that an adapter is added and taken away."""
    monkeypatch.setattr("self_judge.sampling.is_vllm_available", lambda: True)
    with pytest.raises(InputError, match="vllm_server changes weights in 8 or 4 bits"):
        make(model=load_model(str(tiny_llama), "8bit"), generation={"engine": "vllm_server"})


def test_settings_of_the_sampling_engine():
    common = {"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9}
    assert sampling_of(None, **common).engine == "hf"
    assert sampling_of({"token_budget": 99}, **common).token_budget == 99


def test_checkpoints_hold_the_adapter_alone(make, tmp_path):
    trainer = make({"max_steps": 1, "save_strategy": "steps", "save_steps": 1},
                   callbacks=[PeftSavingCallback()])
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not list(folder.glob("model*.safetensors")) and not list(folder.glob("pytorch_model*"))
    (folder / "pytorch_model.bin").write_bytes(b"")
    PeftSavingCallback().on_save(trainer.args, trainer.state, trainer.control)
    assert not (folder / "pytorch_model.bin").exists()
    assert (folder / "adapter_model.safetensors").is_file()


def test_responses_and_verdict_are_shown_every_so_many_steps(make, capsys):
    make({"max_steps": 3}, show_every=2).train()
    out = capsys.readouterr().out
    assert out.count("is chosen") == 2 and "step 1\n... the cat number" in out
    assert "step 3\n" in out and "step 2\n" not in out


# --- several processes -----------------------------------------------------------------------

# transformers loads an optimizer's state to cpu:0 there, which older versions of torch refuse
CPU_RESUMES = Version(torch.__version__) >= Version("2.13")
SCRIPT = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import test_self_judge_trainer as tests
from lm import packing
from self_judge import on_policy, trainer as module
packing.TOKENS_PER_FORWARD["cpu"] = 100  # the processes' parts differ in number and size
on_policy.judge_pairs = lambda model, tokenizer, pairs, *rest, **options: [
    tests.judgment(pair, tie=tests.worth(pair.response_a) < 0.33) for pair in pairs]

def make(**settings):
    return module.SelfJudgeTrainer(
        tests.AutoModelForCausalLM.from_pretrained({model!r}),
        tokenizer=tests.AutoTokenizer.from_pretrained({model!r}),
        args=tests.arguments({out!r}, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                             num_train_epochs=1, max_steps=-1, ddp_find_unused_parameters=False,
                             save_strategy="steps", save_steps=2),
        **dict(train_dataset=tests.ROWS, judge_templates=tests.TEMPLATE) | settings,
        peft_config=tests.lora(), max_length=200, **tests.FEW_ROUNDINGS)

whole, resumed = make(), make()
log, last = tests.steps(whole), None
if tests.CPU_RESUMES:
    resumed.train(resume_from_checkpoint={out!r} + "/checkpoint-2")
    last = [entry for entry in resumed.state.log_history if "loss" in entry][-1]
offline = tests.steps_and_evaluation(make(**tests.OFFLINE))
if whole.accelerator.is_main_process:
    print("LOG" + json.dumps([whole.accelerator.num_processes, log, last, offline]))
"""


def test_two_processes_train_as_one_does(make, script, tiny_llama, tmp_path):
    """11 rows at batch 4: the last step has three, of which one process would repeat some.

    So it would where a run goes on after the second step: accelerate then counts no rows.
    """
    script(lambda pair: judgment(pair, tie=worth(pair.response_a) < 0.33))
    epoch = {"num_train_epochs": 1, "max_steps": -1}
    one = steps(make(epoch, **FEW_ROUNDINGS))
    alone = steps_and_evaluation(make(epoch, **FEW_ROUNDINGS, **OFFLINE))
    path = tmp_path / "run.py"
    path.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), model=str(tiny_llama),
                                  out=str(tmp_path)))
    done = in_two_processes(path)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOG"))
    processes, two, last, offline = json.loads(line.removeprefix("LOG"))
    assert processes == 2 and len(two) == len(one) == 3
    for name in ("loss", "grad_norm", "judge/pairs", "judge/margin", "rewards/margins",
                 "response_length/chosen", "logps/rejected"):
        assert [entry[name] for entry in two] == pytest.approx(
            [entry[name] for entry in one], rel=1e-3, abs=1e-5), name
        assert last is None or last[name] == two[-1][name], name
    assert len({entry["judge/pairs"] for entry in one}) > 1
    for name in ("loss", "grad_norm", "rewards/margins", "response_length/chosen"):
        assert [entry[name] for entry in offline[:-1]] == pytest.approx(
            [entry[name] for entry in alone[:-1]], rel=1e-3, abs=1e-5), name
    for name in ("loss", *PER_PAIR):  # of five pairs
        assert offline[-1][f"eval_{name}"] == pytest.approx(alone[-1][f"eval_{name}"], rel=1e-3)
