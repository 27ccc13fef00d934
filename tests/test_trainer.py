"""The trainer: a step is the mean over its examples, however they are split.

    python -m pytest tests/test_trainer.py
"""

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    default_data_collator,
)

from cut import trainer as trainer_module
from cut.data import Row, Rows, collate
from cut.dpo import PairTrainer
from cut.trainer import (
    PADDING,
    CutSettings,
    CutTrainer,
    EpochSampler,
    PaddedExamples,
    cut_losses,
)
from lm import packing
from lm.records import InputError
from lm.trainers import FiniteGradients, NonFiniteLoss

SETTINGS = CutSettings(threshold=1.02, weight_unlike=0.5, gamma=0.5)
VOCABULARY = 450  # of the tiny models
POISON = 449  # a token that only one example holds


def random_rows(count, seed=0, first="record"):
    """Examples of many lengths, two of three of them pairs."""
    draw = random.Random(seed)

    def ids(least, most):
        return [draw.randrange(1, POISON) for _ in range(draw.randint(least, most))]

    examples = []
    for index in range(count):
        response = ids(2, 9)
        rows = [Row(ids(2, 30) + response, len(response)) for _ in range(2)]
        examples.append(Rows(f"{first} {index}", rows[0], rows[1] if index % 3 else None,
                             len(response)))
    return examples


def with_lora(folder, targets=("up_proj", "q_proj")):
    """A tiny model with LoRA whose B is not zero, the same one every time."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False,
        fan_in_fan_out="llama" not in model.config.model_type))


def make_trainer(model, examples, folder, *, micro=4, accumulation=2, settings=SETTINGS,
                 evaluate=None, group_by_length=False, **arguments):
    defaults = {"learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 1, "seed": 3,
                "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no",
                "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    return CutTrainer(
        model=model, train_dataset=examples, eval_dataset=evaluate, settings=settings, pad_id=0,
        group_by_length=group_by_length,
        args=TrainingArguments(output_dir=str(folder), per_device_train_batch_size=micro,
                               gradient_accumulation_steps=accumulation, **defaults | arguments))


def steps(trainer):
    """The log lines of the steps; trains first."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def one_by_one(model, examples, settings=SETTINGS):
    """The loss of each example, run alone."""
    model.eval()
    with torch.no_grad():
        return [cut_losses(model, collate([example], 0), settings) for example in examples]


def mean(values):
    values = [float(value) for value in values]
    return sum(values) / len(values)


# --- the loss of a step ---------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "accumulation"), [(8, 1), (2, 4)])
def test_step_is_the_mean_of_its_examples_and_so_is_the_last_partial_one(
        tiny_llama, tmp_path, micro, accumulation):
    """20 examples at batch 8: two whole steps and one of the four that are left."""
    model, examples = with_lora(tiny_llama), random_rows(20)
    trainer = make_trainer(model, examples, tmp_path, micro=micro, accumulation=accumulation)
    order = [index for index in trainer._get_train_sampler() if index != PADDING]
    alone = [losses.loss.item() for losses in one_by_one(model, examples)]
    expected = [mean(alone[index] for index in order[start:start + 8]) for start in (0, 8, 16)]
    assert sorted(order) == list(range(20))
    logged = [entry["loss"] for entry in steps(trainer)]
    assert logged == pytest.approx(expected, abs=1e-5)


def test_any_split_of_a_batch_gives_the_same_trajectory(tiny_llama, tmp_path, monkeypatch):
    """1 x 8 = 8 x 1 = 2 x 4, in one forward pass or in several; 20 examples, two epochs."""
    runs = []
    for micro, accumulation, budget, unpadded in (
            (1, 8, 1024, True), (8, 1, 1024, True), (2, 4, 1024, True), (8, 1, 60, True),
            (8, 1, 1024, False), (8, 1, 60, False)):
        monkeypatch.setitem(packing.TOKENS_PER_FORWARD, "cpu", budget)
        model = with_lora(tiny_llama)
        trainer = make_trainer(model, random_rows(20), tmp_path, micro=micro, learning_rate=0.01,
                               accumulation=accumulation, num_train_epochs=2)
        assert trainer.unpadded
        trainer.unpadded = unpadded
        log = steps(trainer)
        runs.append([(entry["loss"], entry["grad_norm"], entry["mle"], entry["p_ratio"])
                     for entry in log])
        assert len(log) == 6 == trainer.state.global_step
    first = torch.tensor(runs[0])
    assert first[:, 0].max() - first[:, 0].min() > 0.01  # training did something
    for other in runs[1:]:
        torch.testing.assert_close(torch.tensor(other), first, rtol=1e-5, atol=1e-5)


def test_a_micro_batch_is_run_in_parts_of_the_token_budget(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(packing.TOKENS_PER_FORWARD, "cpu", 100)
    passes = []
    original = trainer_module.cut_losses

    def noting(model, batch, settings, unpadded):
        passes.append(int(batch.lengths.sum()))
        return original(model, batch, settings, unpadded)

    monkeypatch.setattr(trainer_module, "cut_losses", noting)
    examples = random_rows(16)
    trainer = make_trainer(with_lora(tiny_llama), examples, tmp_path, micro=16, accumulation=1)
    trainer.train()
    assert len(passes) > 4 and max(passes) <= 100
    assert sum(passes) == sum(example.tokens for example in examples)


def test_examples_without_weight_change_nothing(tiny_llama, tmp_path):
    """Five examples in micro-batches of four: three padding examples, which do not count."""
    examples = random_rows(5)
    runs = []
    for micro in (4, 1):
        model = with_lora(tiny_llama)
        trainer = make_trainer(model, examples, tmp_path, micro=micro, accumulation=8 // micro,
                               learning_rate=0.01, num_train_epochs=3)
        assert len(list(trainer._get_train_sampler())) == (8 if micro == 4 else 5)
        log = steps(trainer)
        runs.append([[entry[key] for key in ("loss", "mle", "unlikelihood", "inappropriate_share",
                                             "p_ratio", "grad_norm")] for entry in log])
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-5, atol=1e-5)


def test_pairs_do_not_care_for_their_neighbours(tiny_llama):
    """One forward over a mixed batch gives every example the values it has alone."""
    model, examples = with_lora(tiny_llama), random_rows(7)
    longer = examples[1]
    examples[1] = replace(longer, aligned=replace(longer.aligned,  # as --train_on_inputs
                                                  supervised=len(longer.aligned.ids) - 1))
    model.eval()
    with torch.no_grad():
        together = cut_losses(model, collate(examples, 0), SETTINGS)
    for index, alone in enumerate(one_by_one(model, examples)):
        for name in ("loss", "mle", "contrast"):
            torch.testing.assert_close(getattr(together, name)[index], getattr(alone, name)[0])
        response = examples[index].response
        for name in ("inappropriate", "log_ratio"):
            torch.testing.assert_close(getattr(together, name)[index, -response:],
                                       getattr(alone, name)[0, -response:], rtol=0, atol=1e-5)
            assert not getattr(together, name)[index, :-response].any()
    assert together.inappropriate.any()


def test_log_ratio_compares_the_same_tokens_with_and_without_judgment(tiny_llama):
    """log p(y|x,j) - log p(y|x), from plain full logits of the two rows."""
    model, example = with_lora(tiny_llama).eval(), random_rows(2)[1]

    def log_probs(row):
        ids = torch.tensor([row.ids])
        scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(-1, ids[0, 1:, None])[-row.supervised:, 0]

    with torch.no_grad():
        expected = log_probs(example.aligned) - log_probs(example.misaligned)
    got = one_by_one(model, [example])[0].log_ratio[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_evaluation_is_the_mean_over_the_examples(tiny_llama, tmp_path):
    """Seven examples in batches of three: the last batch of one does not count thrice."""
    model, held_out = with_lora(tiny_llama), random_rows(7, seed=5)
    trainer = make_trainer(model, random_rows(4), tmp_path, evaluate=held_out,
                           per_device_eval_batch_size=3)
    expected = mean(losses.loss for losses in one_by_one(model, held_out))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_logs_say_what_the_loss_is_made_of(tiny_llama, tmp_path):
    model, examples = with_lora(tiny_llama), random_rows(8)
    alone = one_by_one(model, examples)
    pairs = [losses for losses, rows in zip(alone, examples, strict=True) if rows.misaligned]
    tokens = sum(losses.log_ratio.numel() for losses in pairs)
    ratio = math.exp(sum(float(losses.log_ratio.sum()) for losses in pairs) / tokens)
    flagged = sum(int(losses.inappropriate.sum()) for losses in pairs)
    entry, = steps(make_trainer(model, examples, tmp_path))
    assert 0 < flagged < tokens
    assert entry["loss"] == pytest.approx(mean(losses.loss for losses in alone), abs=1e-5)
    assert entry["mle"] == pytest.approx(mean(losses.mle for losses in alone), abs=1e-5)
    assert entry["unlikelihood"] == pytest.approx(mean(x.contrast for x in pairs), abs=1e-5)
    assert entry["inappropriate_share"] == pytest.approx(flagged / tokens, abs=1e-6)
    assert entry["p_ratio"] == pytest.approx(ratio, abs=1e-5)
    assert entry["tokens_per_second"] > 0 and entry["grad_norm"] > 0
    assert entry["learning_rate"] == 0


def test_logs_start_anew_and_hold_for_positives_alone(tiny_llama, tmp_path):
    """A step without pairs has no unlikelihood, whatever the steps before it had."""
    positives = [replace(rows, misaligned=None) for rows in random_rows(8)]
    trainer = make_trainer(with_lora(tiny_llama), positives, tmp_path)
    trainer.statistics.sums += 1.0
    trainer.statistics.take(trainer.accelerator)
    entry, = steps(trainer)
    assert entry["mle"] == pytest.approx(entry["loss"], abs=1e-5)
    assert entry["unlikelihood"] == entry["inappropriate_share"] == 0
    assert entry["p_ratio"] == 1


# --- what trains ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_lora_weight_moves_and_the_base_does_not(architecture, request, tmp_path):
    llama = architecture == "llama"
    model = with_lora(request.getfixturevalue(f"tiny_{architecture}"),
                      ["up_proj", "down_proj"] if llama else ["c_fc", "c_attn"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(model, random_rows(16), tmp_path, learning_rate=0.01, num_train_epochs=2).train()
    moved = {name for name, value in model.state_dict().items()
             if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 8


def test_training_lowers_the_loss(tiny_llama, tmp_path):
    log = steps(make_trainer(with_lora(tiny_llama), random_rows(8), tmp_path, learning_rate=0.02,
                             num_train_epochs=15))
    assert log[-1]["loss"] < log[0]["loss"] - 1


# --- what stops a run -----------------------------------------------------------------------


def untied_model():
    """A model in which the embedding of one token can be broken without harm to the others."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0))


def test_loss_that_is_not_finite_names_its_record(tmp_path):
    model, examples = untied_model(), random_rows(12, first="my.json: record")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    aligned = replace(examples[7].aligned, ids=[POISON, *examples[7].aligned.ids[1:]])
    examples[7] = replace(examples[7], aligned=aligned)
    before = model.lm_head.weight.clone()
    trainer = make_trainer(model, examples, tmp_path, accumulation=3, learning_rate=0.1)
    with pytest.raises(NonFiniteLoss, match=r"^my\.json: record 7: the loss is not finite at st"):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)


def test_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    model = untied_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.register_hook(lambda gradient: gradient / 0)
    trainer = make_trainer(model, random_rows(8), tmp_path, learning_rate=0.1)
    with pytest.raises(NonFiniteLoss, match="the gradient is not finite at step 1"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fp16_overflow_is_left_to_the_gradient_scaler():
    """The scaler starts high, skips the steps whose gradients overflow and lowers its scale."""
    model, state = torch.nn.Linear(1, 1), SimpleNamespace(global_step=0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    FiniteGradients().on_pre_optimizer_step(SimpleNamespace(fp16=True), state, None, model=model)
    with pytest.raises(NonFiniteLoss):
        FiniteGradients().on_pre_optimizer_step(SimpleNamespace(fp16=False), state, None,
                                                model=model)


# --- what else a Trainer takes -----------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"train_dataset": []}, "expected a list of at least one `Rows`"),
    ({"train_dataset": ["a text"]}, "expected a list of at least one `Rows`"),
    ({"data_collator": default_data_collator}, "data_collator: CutTrainer has its own"),
    ({"compute_loss_func": max}, "compute_loss_func: CutTrainer has its own"),
    ({"compute_metrics": max}, "compute_metrics: CutTrainer has its own"),
    ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor: the CUT loss has none"),
])
def test_what_would_be_ignored_is_refused(change, message, tiny_llama, tmp_path):
    named = {"args": {}, "train_dataset": random_rows(2)} | change
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **named.pop("args"))
    with pytest.raises(InputError, match=message):
        CutTrainer(with_lora(tiny_llama), args, **named)


def test_rows_beyond_the_models_context_are_refused(tiny_gpt2, tmp_path):
    long, model = Row([5] * 1025, 2), with_lora(tiny_gpt2, ["c_attn"])
    example = Rows("train.json: record 7", Row([5] * 1024, 2), None, 2)
    make_trainer(model, [example], tmp_path)
    for rows in (replace(example, aligned=long), replace(example, misaligned=long)):
        with pytest.raises(InputError, match=r"record 7: its row has 1025 tokens.* 1024 or less"):
            make_trainer(model, [example, rows], tmp_path)
        with pytest.raises(InputError, match="record 7"):
            make_trainer(model, [example], tmp_path, evaluate=[rows])
        with pytest.raises(InputError, match="record 7"):
            PairTrainer(model, None, [rows])


def test_evaluates_alone_and_outside_a_step(tiny_llama, tmp_path):
    rows = random_rows(3)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = CutTrainer(with_lora(tiny_llama), args, eval_dataset=rows)
    expected = torch.cat([found.loss for found in one_by_one(trainer.model, rows, CutSettings())])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    loss, losses = trainer.compute_loss(trainer.model, rows, return_outputs=True)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert losses.loss.shape == (3,)


def test_the_order_is_what_the_arguments_say(tiny_llama, tmp_path):
    def order(**arguments):
        trainer = make_trainer(with_lora(tiny_llama), random_rows(9), tmp_path, micro=1,
                               **arguments)
        return list(trainer._get_train_sampler())

    assert order(train_sampling_strategy="sequential") == list(range(9))
    assert order() != order(data_seed=1) != order(data_seed=2)
    assert order(train_sampling_strategy="group_by_length") == order(group_by_length=True)


# --- the order of the examples --------------------------------------------------------------


def sampler(count=30, seed=0, even=4, accumulation=2, group_by_length=False):
    return EpochSampler(PaddedExamples(random_rows(count)), seed, even, accumulation,
                        "group_by_length" if group_by_length else "random")


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_is_a_shuffle_padded_to_whole_micro_batches(grouped):
    order = sampler(group_by_length=grouped)
    orders = []
    for epoch in range(3):
        order.set_epoch(epoch)
        orders.append(list(order))
        assert len(orders[-1]) == len(order) == 32
        assert sorted(orders[-1][:30]) == list(range(30))
        assert orders[-1][30:] == [PADDING] * 2
    assert len({tuple(each) for each in orders}) == 3
    again = sampler(group_by_length=grouped)
    again.set_epoch(2)
    assert list(again) == orders[2]
    assert list(sampler(seed=1, group_by_length=grouped)) != orders[0]
    assert PADDING not in list(sampler(count=32, group_by_length=grouped))


def test_trainer_orders_as_it_is_told(tiny_llama, tmp_path):
    trainer = make_trainer(with_lora(tiny_llama), random_rows(30), tmp_path, group_by_length=True)
    assert list(trainer._get_train_sampler()) == list(sampler(seed=3, group_by_length=True))


def test_grouping_puts_similar_lengths_together():
    def spread(grouped):
        """Padding that micro-batches of four would need."""
        examples, order = random_rows(64), sampler(count=64, group_by_length=grouped)
        lengths = [examples[index].tokens for index in order]
        return sum(4 * max(lengths[i:i + 4]) - sum(lengths[i:i + 4]) for i in range(0, 64, 4))

    assert spread(True) < 0.5 * spread(False)


def test_padding_example_is_the_shortest_without_weight():
    examples = random_rows(9)
    padded = PaddedExamples(examples)
    shortest = min(examples, key=lambda example: example.tokens)
    assert len(padded) == 9
    assert padded[PADDING] == replace(shortest, weight=0.0)
    assert [padded[index] for index in range(9)] == examples


def test_each_epoch_of_a_run_sees_every_example_once_in_another_order(tiny_llama, tmp_path,
                                                                      monkeypatch):
    seen = []
    original = trainer_module.cut_losses

    def noting(model, batch, settings, unpadded):
        seen.extend(name for name, weight in zip(batch.records, batch.weight, strict=True)
                    if weight)
        return original(model, batch, settings, unpadded)

    monkeypatch.setattr(trainer_module, "cut_losses", noting)
    make_trainer(with_lora(tiny_llama), random_rows(10), tmp_path, num_train_epochs=2).train()
    assert len(seen) == 20 and seen[:10] != seen[10:]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(r.record for r in random_rows(10))
