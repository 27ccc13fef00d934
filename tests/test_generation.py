"""Batched generation: the same answers as one at a time, on relative and absolute positions."""

from pathlib import Path

import pytest
import torch
from tiny_judge import tiny_model, tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessorList

from lm.cache import can_share
from lm.generation import Sampler, generate, left_pad, token_budget_batches
from lm.models import add_lora, load_model, load_tokenizer
from lm.records import InputError
from lm.templates import prompt_ids

PROMPTS = ["the cat", "Write one or two short sentences.\n\n### Response:\n", "a",
           "Name three colours of the rainbow. " * 5, "0123456789", "### Instruction:\nthe dog"]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


def load(folder: Path):
    return load_model(str(folder)), load_tokenizer(str(folder))


def by_index(results) -> dict:
    results = list(results)
    assert len(dict(results)) == len(results)  # no prompt twice
    return dict(results)


def test_greedy_answer_is_that_of_one_prompt_at_a_time(folder):
    """Compared with a plain loop of argmax without padding, cache or batches."""
    model, tokenizer = load(folder)
    alone = {index: greedy_by_hand(model, tokenizer, prompt, 20)
             for index, prompt in enumerate(PROMPTS)}
    for budget in (1, 100, 10_000):
        batched = by_index(generate(model, tokenizer, PROMPTS, max_new_tokens=20,
                                    token_budget=budget))
        assert {index: list(found.token_ids) for index, found in batched.items()} == alone
    assert len({tuple(ids) for ids in alone.values()}) > 1  # or the test could not fail


@torch.no_grad()
def greedy_by_hand(model, tokenizer, prompt: str, count: int) -> list[int]:
    ids = prompt_ids(tokenizer, prompt)
    new: list[int] = []
    while len(new) < count and tokenizer.eos_token_id not in new:
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def test_samples_do_not_depend_on_the_batch(folder):
    model, tokenizer = load(folder)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    whole = by_index(generate(model, tokenizer, PROMPTS, **settings))
    single = by_index(generate(model, tokenizer, PROMPTS, token_budget=1, **settings))
    left = by_index(generate(model, tokenizer, {i: PROMPTS[i] for i in (4, 1)}, **settings))
    assert whole == single and left == {i: whole[i] for i in (4, 1)}
    assert whole != by_index(generate(model, tokenizer, PROMPTS, seed=1, **settings))
    same = by_index(generate(model, tokenizer, [PROMPTS[0]] * 4, **settings))
    assert len(set(same.values())) == 4  # each copy of a prompt has a sample of its own


def test_a_prompt_that_comes_several_times_is_read_once(folder):
    """All but its last token, which each of its samples starts with."""
    model, tokenizer = load(folder)
    long, short = PROMPTS[3], PROMPTS[0]
    prompts = [short, long, short, long, long]
    read = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: read.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9}
    together = by_index(generate(model, tokenizer, prompts, **settings))
    assert read[:3] == [(2, len(prompt_ids(tokenizer, long)) - 1), (5, 1), (5, 1)]
    assert len(read) <= 1 + settings["max_new_tokens"]
    assert together == by_index(generate(model, tokenizer, prompts, token_budget=1, **settings))


def test_prompts_of_one_token_may_come_several_times_too(folder):
    """Read without their last tokens nothing would be left of them."""
    model, tokenizer = load(folder)
    prompts = [[5]] * 2 + [[7, 8, 9]] * 3
    together = by_index(generate(model, tokenizer, prompts, max_new_tokens=4))
    assert together == by_index(generate(model, tokenizer, prompts, max_new_tokens=4,
                                         token_budget=1))
    assert together[0] == together[1]


@pytest.mark.parametrize("prompts", [PROMPTS * 4, PROMPTS[:2] * 12], ids=["read", "read once"])
def test_rows_that_have_ended_are_left_out(folder, prompts):
    """Once they are half of the batch; what the others say does not change by it."""
    model, tokenizer = load(folder)
    model.generation_config.eos_token_id = list(range(60))  # of 450: most rows end early
    run = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: run.append(len(kwargs["input_ids"])),
        with_kwargs=True)
    settings = {"max_new_tokens": 50, "temperature": 1.0}
    together = by_index(generate(model, tokenizer, prompts, **settings))
    if run[0] == 2:  # the different prompts
        del run[0]
    assert run[0] == 24 and run == sorted(run, reverse=True) and run[-1] <= 12
    lengths = sorted(len(found.token_ids) for found in together.values())
    assert lengths[0] < 16 < lengths[-1]  # or the test could not fail
    assert together == by_index(generate(model, tokenizer, prompts, token_budget=1, **settings))


def test_a_row_that_has_ended_keeps_no_other_waiting(folder):
    """The passes are those of the longest answer, though the short one stays in the batch."""
    model, tokenizer = load(folder)
    run = []
    model.register_forward_hook(lambda *_: run.append(1))
    prompts, settings = [[7, 8, 9], [9, 8, 7], [8, 7, 9]], {"max_new_tokens": 40, "temperature": 1}
    found = by_index(generate(model, tokenizer, prompts, **settings))
    model.generation_config.eos_token_id = [
        found[row].token_ids[end] for row, end in enumerate((3, 20, 20))]
    run.clear()
    found = by_index(generate(model, tokenizer, prompts, **settings))
    lengths = sorted(len(answer.token_ids) for answer in found.values())
    assert lengths[0] < 16 < lengths[1] and len(run) == lengths[-1] < 32
    assert found == by_index(generate(model, tokenizer, prompts, token_budget=1, **settings))


@pytest.mark.parametrize("name", ["mistral", "mamba"])
def test_models_that_remember_otherwise_read_every_prompt(name):
    """A sliding window forgets, a recurrence sums up."""
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    assert not can_share(model)
    prompts = [PROMPTS[3]] * 2
    together = by_index(generate(model, tokenizer, prompts, max_new_tokens=12))
    assert together == by_index(generate(model, tokenizer, prompts, max_new_tokens=12,
                                         token_budget=1))


def test_sampler_draws_from_the_nucleus_of_the_tempered_distribution():
    """Probabilities 0.5, 0.3, 0.15, 0.05 at temperature 1; top_p 0.75 leaves 5/8 and 3/8."""
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().mul(2).expand(2000, 4)
    sampler = Sampler(range(2000), 3, 1, temperature=2.0, top_p=0.75, seed=0)
    processed = sampler(torch.zeros(2000, 3, dtype=torch.long), scores)
    assert (processed.isfinite().sum(-1) == 1).all()
    share = torch.bincount(processed.argmax(-1), minlength=4) / 2000
    torch.testing.assert_close(share, torch.tensor([0, 5 / 8, 0, 3 / 8]), atol=0.04, rtol=0)

    everything = Sampler(range(2000), 3, 1, temperature=2.0, top_p=1.0, seed=0)
    chosen = everything(torch.zeros(2000, 3, dtype=torch.long), scores).argmax(-1)
    share = torch.bincount(chosen, minlength=4) / 2000
    torch.testing.assert_close(share, torch.tensor([0.15, 0.5, 0.05, 0.3]), atol=0.04, rtol=0)


def test_sampler_finds_a_nucleus_larger_than_its_first_look():
    """5000 equal probabilities: a nucleus of 0.9 holds about 4500, of which 500 draws take 474."""
    sampler = Sampler(range(500), 3, 1, temperature=1.0, top_p=0.9, seed=0)
    chosen = sampler(torch.zeros(500, 3, dtype=torch.long), torch.zeros(500, 5000)).argmax(-1)
    assert len(set(chosen.tolist())) > 440  # from the first 1024 they would take about 395


def test_ends_are_found_and_cut(tiny_llama):
    """Bias the head to EOS after a while: some rows stop early, and are padded with that EOS."""
    model, tokenizer = load(tiny_llama)
    model.generation_config.eos_token_id = [7]  # an end of the model's own, beside the EOS
    texts = by_index(generate(model, tokenizer, PROMPTS * 8, max_new_tokens=40, temperature=2.0))
    stopped = [r for r in texts.values() if r.finish_reason == "stop"]
    assert stopped and len(stopped) < len(texts)
    for response in texts.values():
        ends = [t for t in response.token_ids if t in (0, 7)]
        if response.finish_reason == "stop":
            assert len(ends) == 1 and response.token_ids[-1] in (0, 7)
        else:
            assert not ends and len(response.token_ids) == 40
        assert "</s>" not in response.text
    assert {r.token_ids[-1] for r in stopped} == {0, 7}


def test_defaults_of_chat_models_do_not_leak(tiny_llama, recwarn):
    model, tokenizer = load(tiny_llama)
    plain = by_index(generate(model, tokenizer, PROMPTS, max_new_tokens=10))
    chatty = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, top_p=0.3, eos_token_id=0,
                              repetition_penalty=9.0, no_repeat_ngram_size=1)
    model.generation_config = chatty
    model.train()
    assert by_index(generate(model, tokenizer, PROMPTS, max_new_tokens=10)) == plain
    assert model.generation_config is chatty and model.training
    assert not [w for w in recwarn if "temperature" in str(w.message)]


def test_adapter_is_used_and_its_base_left_as_it_was(tiny_llama):
    model, tokenizer = load(tiny_llama)
    before = model.generation_config
    plain = by_index(generate(model, tokenizer, PROMPTS, max_new_tokens=10))
    torch.manual_seed(0)
    adapted = add_lora(model, 4, 64, 0.5, ["up_proj"])
    assert by_index(generate(adapted, tokenizer, PROMPTS, max_new_tokens=10)) == plain  # B is zero
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert by_index(generate(adapted, tokenizer, PROMPTS, max_new_tokens=10)) != plain
    with adapted.disable_adapter():
        assert by_index(generate(adapted, tokenizer, PROMPTS, max_new_tokens=10)) == plain
    assert model.generation_config is before


def test_batches_hold_the_budget_and_every_index_once():
    lengths = {index: (index * 37) % 50 + 1 for index in range(40)}
    batches = list(token_budget_batches(lengths, max_new_tokens=10, token_budget=150))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    for batch in batches:
        assert len(batch) * (max(lengths[i] for i in batch) + 10) <= 150
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)
    assert list(token_budget_batches({0: 99, 1: 98}, 10, 1)) == [[0], [1]]  # never an empty batch


def test_token_ids_are_prompts_too(tiny_llama):
    model, tokenizer = load(tiny_llama)
    ids = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    assert by_index(generate(model, tokenizer, ids, max_new_tokens=5)) == by_index(
        generate(model, tokenizer, PROMPTS, max_new_tokens=5))


def test_messages_are_prompts_too(tiny_llama):
    model, tokenizer = load(tiny_llama)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    with pytest.raises(InputError, match="has no chat template"):
        generate(model, tokenizer, [messages], max_new_tokens=5)
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }}!{% endfor %}"
                               "{{ 'Go:' if add_generation_prompt }}")
    assert by_index(generate(model, tokenizer, [messages], max_new_tokens=5)) == by_index(
        generate(model, tokenizer, ["S!hi!Go:"], max_new_tokens=5))
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"cannot write the turns system, user \(no system role\)"):
        generate(model, tokenizer, [messages], max_new_tokens=5)


def test_bad_requests_are_one_clear_line_before_any_work(tiny_llama):
    model, tokenizer = load(tiny_llama)
    with pytest.raises(InputError, match=r"prompt 7: 1000 tokens .* context of 1024"):
        generate(model, tokenizer, {3: [5], 7: [5] * 1000}, max_new_tokens=25)
    with pytest.raises(InputError, match="prompt 1: is empty"):
        generate(model, tokenizer, ["a", ""], max_new_tokens=5)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}):
        with pytest.raises(InputError):
            generate(model, tokenizer, ["a"], **{"max_new_tokens": 5, **wrong})


def test_processor_is_what_transformers_expects():
    ids, _ = left_pad([[1, 2]], 0)
    sampler = Sampler([0], 2, 3, temperature=1.0, top_p=1.0, seed=0)
    assert LogitsProcessorList([sampler])(ids, torch.zeros(1, 5)).argmax() in range(5)


def test_one_text_is_no_list_of_texts(tiny_llama):
    with pytest.raises(InputError, match="prompts is one text; give a list"):
        generate(load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama)), "Hello",
                 max_new_tokens=2)
