"""Rows -> batch: padding, labels, and a plain Trainer that learns from them.

    python -m pytest tests/test_collators.py
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import self_judge
from lm.records import InputError
from self_judge.collators import (
    IGNORED,
    JudgeAugmentedSFTCollator,
    SelfJudgeCollator,
    get_conditional_labels,
)

TOKENIZER = SimpleNamespace(pad_token_id=2, eos_token_id=2)  # the EOS is the padding, as often
ROWS = [{"input_ids": [5, 6, 7, 2], "completion_mask": [0, 0, 1, 1], "kind": "sft"},
        {"input_ids": [5, 8], "completion_mask": [0, 1], "kind": "judgment"}]


def test_a_learnt_eos_keeps_its_label_and_padding_has_none():
    batch = JudgeAugmentedSFTCollator(TOKENIZER)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 8, 2, 2]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 2], [IGNORED, 8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("multiple, width", [(None, 4), (1, 4), (2, 4), (4, 4), (3, 6), (8, 8)])
def test_a_length_that_fits_the_multiple_is_not_padded_further(multiple, width):
    batch = JudgeAugmentedSFTCollator(TOKENIZER, pad_to_multiple_of=multiple)(ROWS)
    assert {tensor.shape for tensor in batch.values()} == {(2, width)}


def test_max_length_cuts_the_end_of_a_row():
    batch = JudgeAugmentedSFTCollator(TOKENIZER, max_length=3)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 2]]
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, 7]


def test_a_tokenizer_without_padding_pads_with_its_eos():
    tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=9)
    assert JudgeAugmentedSFTCollator(tokenizer)(ROWS)["input_ids"][1].tolist() == [5, 8, 9, 9]


def test_a_plain_trainer_learns_the_learnt_tokens_only(tiny_llama, tmp_path):
    """What the mask leaves out may be anything: its labels change no gradient."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=2, learning_rate=3e-3,
        use_cpu=True, report_to="none", remove_unused_columns=False, save_strategy="no")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = [{"input_ids": [40, 41, 42, 0], "completion_mask": [0, 0, 1, 1]},
            {"input_ids": [50, 51], "completion_mask": [0, 1]}]
    Trainer(model, arguments, train_dataset=rows,
            data_collator=JudgeAugmentedSFTCollator(tokenizer)).train()
    with torch.no_grad():
        logits = model(torch.tensor([[40, 41, 42]])).logits[0]
    assert logits[1:].argmax(-1).tolist() == [42, 0]  # the learnt tokens, the EOS with them
    assert logits[0].argmax() != 41


def test_rows_that_trainer_took_the_mask_from_say_so():
    with pytest.raises(InputError, match="remove_unused_columns=False"):
        JudgeAugmentedSFTCollator(TOKENIZER)([{"input_ids": [1]}])


def test_self_judge_rows_stay_texts():
    rows = [{"query": "Hi", "context": "User: Hi", "chosen": "a", "rejected": "b", "index": 3},
            {"query": "Yo", "context": "User: Yo", "chosen": "c", "rejected": "d", "index": 1}]
    batch = SelfJudgeCollator(TOKENIZER)(rows)
    assert batch["queries"] == ["Hi", "Yo"] and batch["contexts"] == ["User: Hi", "User: Yo"]
    assert batch["index"].tolist() == [3, 1]
    assert (batch["chosen"], batch["rejected"]) == (["a", "c"], ["b", "d"])


def test_without_an_index_rows_are_numbered_and_pairs_are_not_needed():
    batch = SelfJudgeCollator()([{"query": "Hi", "context": "x"}] * 2)
    assert batch["index"].tolist() == [0, 1] and set(batch) == {"queries", "contexts", "index"}


def test_a_row_without_text_is_named():
    with pytest.raises(InputError, match="row 4: field 'context' is missing; expected text"):
        SelfJudgeCollator()([{"query": "Hi", "context": None, "index": 4}])


def test_conditional_labels_lie_between_the_markers():
    ids = [1, 7, 5, 8, 9, 6, 2, 7, 4, 8, 9, 3]
    found = get_conditional_labels(torch.tensor(ids), assistant_ids=[8, 9], user_ids=[7])
    assert [token for token in found if token != IGNORED] == [6, 2, 3]
    assert len(found) == len(ids)
    assert get_conditional_labels(ids, [8, 9], ignore_index=0)[5:] == [6, 2, 7, 4, 0, 0, 3]
    assert set(get_conditional_labels(ids, [77])) == {IGNORED}


def test_import_of_the_package_is_quick_and_lazy():
    """Without deepspeed, vllm or flash-attn, and before torch is needed."""
    code = ("import sys, time; start = time.time(); import self_judge; "
            "print(time.time() - start, *(m for m in ('torch', 'trl', 'deepspeed', 'vllm', "
            "'flash_attn') if m in sys.modules))")
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True,
                            capture_output=True).stdout.split()
    assert float(output[0]) < 3 and output[1:] == []


def test_the_package_exports_the_published_names():
    assert self_judge.SelfJudgeCollator is SelfJudgeCollator
    assert {"SelfJudgeTrainer", "PeftSavingCallback", "get_batch_judgments",
            "tournament_rejection_sampling", "get_conditional_labels",
            "JudgeAugmentedSFTCollator", "SelfJudgeCollator"} == set(self_judge.__all__)
    assert set(self_judge.__all__) <= set(dir(self_judge))
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = self_judge.Trainer
