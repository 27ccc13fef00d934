"""Generate responses in batches: longest prompts first, as many at once as a token budget holds.

    for index, response in generate(model, tokenizer, prompts, max_new_tokens=256):
        ...

Results come a few tokens after their end, with the prompt's index, so that a caller can save them
and go on after a stop. What a prompt gets does not depend on the batch that it is in: greedy
answers are those of one prompt at a time, and a sample follows from the seed and the prompt's
index. (So in fp32, but for near ties in the order of a `top_p` nucleus; in half precision another
batch shape can round a near tie of greedy answers the other way too.)

Of prompts that come several times each is read once a batch, the cache grows in place
(lm/cache.py), and a CPU multiplies a few rows in its faster order (lm/skinny.py): on two cores 16
responses of 64 tokens to 8 prompts of 150 to 300 took 0.63 of the time without, with the same ids.
Rows that have ended leave the batch once they are half of it: 480 samples of 5 to 48 tokens took
0.66 of the time.

transformers' continuous batching (`generate_batch`) took 1.2 to 1.7 times as long per token on a
CPU, and was not measured on a GPU; for those there is vLLM (lm/vllm_engine.py, or a server).
"""

import contextlib
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm.cache import GrowingCache, can_share
from lm.models import context_of, evaluating, without_adapter
from lm.records import InputError
from lm.skinny import skinny_products
from lm.templates import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STRETCH = 16  # tokens after which rows that have ended are left out, where they are half of a batch

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # a text, token ids, or messages


@dataclass(frozen=True)
class Response:
    """What the model said. `token_ids` hold the EOS where the model gave one, and no padding."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": the model ended it; "length": max_new_tokens did


def generate(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase",
             prompts: Sequence[Prompt] | Mapping[Hashable, Prompt], *, max_new_tokens: int,
             token_budget: int = 16384, temperature: float = 0.0, top_p: float = 1.0,
             seed: int | str = 0,
             synced_gpus: bool = False) -> Iterator[tuple[Hashable, Response]]:
    """Yield (index, response) for each prompt, in the order in which they end.

    Prompts are texts, token ids, or messages `{role, content}`, which the model's own chat
    template writes; a mapping gives them keys of their own in place of indices, as after a stop.
    For several samples of one prompt, give it several times. `temperature` 0 is greedy. A batch
    holds `token_budget` tokens, prompts and new ones, padding included; at least one prompt.

    `synced_gpus` is for weights that FSDP or ZeRO-3 shards over the processes, where each forward
    pass needs them all: all prompts of a process make one batch, and every process runs until the
    last sequence of any of them has ended. Each must have a prompt.
    """
    check_sampling(max_new_tokens, token_budget, temperature, top_p)
    if isinstance(prompts, str):
        raise InputError("prompts is one text; give a list of them")
    if not isinstance(prompts, Mapping):
        prompts = dict(enumerate(prompts))
    rows = {index: ids_of(tokenizer, prompt) for index, prompt in prompts.items()}
    check_lengths(rows, context_of(model), max_new_tokens)
    decoder = Decoder(model, tokenizer, max_new_tokens, temperature, top_p, seed, synced_gpus)
    lengths = {index: len(row) for index, row in rows.items()}
    batches = [list(rows)] if synced_gpus else token_budget_batches(lengths, max_new_tokens,
                                                                    token_budget)
    return (found for batch in batches
            for found in decoder.responses({index: rows[index] for index in batch}))


def ids_of(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """The token ids that a prompt stands for."""
    import jinja2

    if isinstance(prompt, str):
        return prompt_ids(tokenizer, prompt)
    if not prompt or not isinstance(prompt[0], Mapping):
        return list(prompt)
    if tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template, so it cannot read messages; "
                         "use a chat model, or a --template that is one text")
    try:
        return tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True,
                                             return_dict=False)
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in prompt)
        raise InputError(f"the model's chat template cannot write the turns {roles} ({error}); "
                         "use another model, or a --template that is one text") from error


def check_sampling(max_new_tokens: int, token_budget: int, temperature: float,
                   top_p: float) -> None:
    """Stop at numbers that cannot be meant."""
    if max_new_tokens < 1 or token_budget < 1:
        raise InputError("max_new_tokens and the batch's token budget must be at least 1, not "
                         f"{max_new_tokens} and {token_budget}")
    if temperature < 0:
        raise InputError(f"temperature is {temperature}; expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; expected more than 0 and at most 1")


def token_budget_batches(lengths: Mapping[Hashable, int], max_new_tokens: int,
                         token_budget: int) -> Iterator[list[Hashable]]:
    """Indices in batches of like length, the longest first: if memory is short, it shows at once.

    >>> list(token_budget_batches({0: 2, 1: 9, 2: 3, 3: 8}, max_new_tokens=1, token_budget=20))
    [[1, 3], [2, 0]]
    """
    batch: list[Hashable] = []
    for index in sorted(lengths, key=lengths.get, reverse=True):
        if batch and (len(batch) + 1) * (lengths[batch[0]] + max_new_tokens) > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) and attention mask (B, T) with every row's last token in the last column.

    >>> left_pad([[5, 6], [7]], pad_id=0)
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


class Sampler:
    """A logits processor that leaves one token a row: the one its row's random numbers choose.

    A number in [0, 1) is drawn for each row and step from the seed and the row's index alone, and
    looked up in the cumulative probabilities of the `top_p` nucleus.
    """

    def __init__(self, indices: Sequence[Hashable], prompt_length: int, max_new_tokens: int,
                 temperature: float, top_p: float, seed: int | str):
        # Python's generator hashes a text seed whole; torch's takes 32 bits of a number.
        streams = [random.Random(f"{seed} {index}") for index in indices]
        self.uniform = torch.tensor([[stream.random() for _ in range(max_new_tokens)]
                                     for stream in streams], dtype=torch.float64)  # (B, new)
        self.prompt_length, self.temperature, self.top_p = prompt_length, temperature, top_p

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.uniform = self.uniform[rows.cpu()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) -> the same shape, 0 at the chosen token and -inf elsewhere."""
        step = input_ids.shape[1] - self.prompt_length
        if step == 0 and scores.isnan().any():
            raise InputError("the model's next-token scores are not numbers: training diverged, or "
                             "half precision overflowed; try a lower learning rate, or fp32")
        probabilities = (scores.double() / self.temperature).softmax(-1)
        chosen = self._chosen(probabilities, self.uniform[:, step, None].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    def _chosen(self, probabilities: Tensor, uniform: Tensor) -> Tensor:
        """Probabilities (B, V) and numbers in [0, 1) (B, 1) -> a token of each nucleus (B, 1)."""
        if self.top_p == 1:
            return find_place(probabilities, uniform)
        # A nucleus is seldom large, and to sort 49k probabilities costs half a step on a CPU.
        mass, tokens = probabilities.topk(min(1024, probabilities.shape[-1]))
        chosen = tokens.gather(-1, find_place(self._nucleus(mass), uniform))
        large = mass.sum(-1) < self.top_p
        if large.any():
            mass, tokens = probabilities[large].sort(dim=-1, descending=True)
            chosen[large] = tokens.gather(-1, find_place(self._nucleus(mass), uniform[large]))
        return chosen

    def _nucleus(self, mass: Tensor) -> Tensor:
        """Descending probabilities (B, K) with 0 outside the nucleus."""
        return mass * (mass.cumsum(-1) - mass < self.top_p)


def find_place(mass: Tensor, uniform: Tensor) -> Tensor:
    """Where a number in [0, 1) (B, 1) falls in the cumulative mass (B, K), scaled to its sum."""
    below = mass.cumsum(-1) <= uniform * mass.sum(-1, keepdim=True)
    return below.sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)


def check_lengths(rows: Mapping[Hashable, list[int]], context: int | None,
                  max_new_tokens: int) -> None:
    """Stop at a prompt that is empty, or too long for the model's context of so many tokens."""
    for index, row in rows.items():
        if not row:
            raise InputError(f"prompt {index}: is empty")
        if context and len(row) + max_new_tokens > context:
            raise InputError(f"prompt {index}: {len(row)} tokens and max_new_tokens "
                             f"{max_new_tokens} exceed the model's context of {context}; shorten "
                             "the prompt or lower max_new_tokens")


class Decoder:
    """Completes one batch of prompts after the other, a stretch of tokens at a time.

    After a stretch rows that have ended leave the batch, once they are half of it: to let go of
    fewer would not be worth the copy of the others' cache.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase",
                 max_new_tokens: int, temperature: float, top_p: float, seed: int | str,
                 synced_gpus: bool):
        from transformers import GenerationConfig

        self.model, self.tokenizer = without_adapter(model), tokenizer
        self.runner = model if synced_gpus else self.model  # FSDP gathers for its outermost module
        self.stops = stop_ids(self.model, tokenizer)
        self.max_new_tokens, self.sampling = max_new_tokens, (temperature, top_p, seed)
        self.synced_gpus = synced_gpus
        # Sharded weights want as many passes on every process: there a batch is one stretch
        self.own_cache = not synced_gpus and can_share(self.model)
        self.stretch = STRETCH if self.own_cache else max_new_tokens
        self.config = GenerationConfig(do_sample=False, eos_token_id=self.stops,
                                       pad_token_id=tokenizer.eos_token_id)

    def responses(self, rows: Mapping[Hashable, list[int]]) -> Iterator[tuple[Hashable, Response]]:
        """Complete a batch; yields each response after the stretch in which it ends."""
        device, indices = self.model.device, list(rows)
        ids, mask = (part.to(device) for part in left_pad(
            list(rows.values()), self.tokenizer.eos_token_id))
        width, length = ids.shape[1], ids.shape[1] + self.max_new_tokens
        options = {"past_key_values": GrowingCache(length)} if self.own_cache else {}
        if self.own_cache:
            self._read(list(map(tuple, rows.values())), ids, mask, **options)
        if self.sampling[0]:
            sampler = Sampler(indices, width, self.max_new_tokens, *self.sampling)
            options["logits_processor"] = [sampler]
        stops = torch.tensor(self.stops, device=device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=device)
        while indices:
            ids = self._continue(ids, mask, min(self.stretch, length - ids.shape[1]), **options,
                                 stopping_criteria=[lambda ids, scores, ended=ended: ended])
            mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
            before, ended = ended, torch.isin(ids[:, width:], stops).any(1) | (
                ids.shape[1] == length)
            for row in (ended & ~before).nonzero().flatten().tolist():
                yield indices[row], response_of(self.tokenizer, ids[row, width:].tolist(),
                                                self.stops)
            if 2 * ended.sum() < len(indices):
                continue
            left = (~ended).nonzero().flatten()
            indices = [indices[row] for row in left.tolist()]
            ids, mask, ended = ids[left], mask[left], ended[left]
            if self.sampling[0]:
                sampler.keep(left)
            if self.own_cache:
                options["past_key_values"].batch_select_indices(left)

    def _read(self, prompts: Sequence[tuple[int, ...]], ids: Tensor, mask: Tensor,
              past_key_values: GrowingCache) -> None:
        """Put prompts that come several times into the cache, but for their last tokens.

        Each is read once. Where all are different `generate` reads them.
        """
        first: dict[tuple[int, ...], int] = {}
        which = [first.setdefault(prompt, len(first)) for prompt in prompts]
        if len(first) == len(prompts) or min(map(len, first)) == 1:  # no mask may be all zeros
            return
        rows = [which.index(prompt) for prompt in range(len(first))]
        self._continue(ids[rows, :-1], mask[rows, :-1], 1,  # a token that is of no use
                       past_key_values=past_key_values)
        past_key_values.batch_select_indices(torch.tensor(which))

    def _continue(self, ids: Tensor, mask: Tensor, new: int, **options) -> Tensor:
        """The ids and at most `new` more of each row."""
        with self._settings():
            return self.runner.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new,
                                        synced_gpus=self.synced_gpus, **options)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Evaluation mode, and none of the sampling defaults that chat models bring with them.

        A config passed to `generate` would be filled up from the model's, so it is replaced.
        """
        saved = self.model.generation_config
        self.model.generation_config = self.config
        try:
            with evaluating(self.model), skinny_products(self.model):
                yield
        finally:
            self.model.generation_config = saved


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokenizer's EOS and the model's own ends (chat models may have several)."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({tokenizer.eos_token_id, *ends} - {None})


def response_of(tokenizer: "PreTrainedTokenizerBase", new_ids: list[int],
                stops: list[int]) -> Response:
    """Cut the padding that follows a row's end; ids alone tell it, as the pad may be the EOS."""
    end = next((place for place, token in enumerate(new_ids) if token in stops), None)
    token_ids = new_ids if end is None else new_ids[:end + 1]
    text = tokenizer.decode(token_ids, skip_special_tokens=True,
                            clean_up_tokenization_spaces=False)
    return Response(text, tuple(token_ids), "length" if end is None else "stop")
