"""Query -> responses -> judgment -> pair -> batch: what a step of self-training is made of.

All queries of an optimizer step are sampled and judged together, so that both run in large batches
whatever the micro-batch is, and every process knows what the whole step came to before its first
forward pass. Pairs that are given (offline DPO) take the same way, without the first two steps.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from lm.generation import Response, token_budget_batches
from lm.packing import tokens_per_forward
from lm.records import InputError
from lm.templates import prompt_ids
from lm.trainers import present_rows
from self_judge.judgment import Pair, judge_pairs
from self_judge.metrics import count_lengths, count_step, counted_tokens
from self_judge.pairs import Comparison, Row, empty_row, keep_end, part_of


class OnPolicy:
    """Before `InParts` and `DPOTrainer` among the parents of `SelfJudgeTrainer`."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Micro-batches of queries -> micro-batches of pairs, and the queries in the step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # a stream has ended
            return [], None
        present = self._present(batches)
        rows = (self._given if self.pairs == "given" else self._own)(batches, present)
        empty = empty_row(self.processing_class.eos_token_id)
        micro = list(self._micro_batches(batches, [row or empty for row in rows], present))
        return micro, self._agree(micro, sum(row is not None for row in rows))

    def _given(self, batches: list[dict], present: Sequence[bool]) -> list[Row | None]:
        """The dataset's own pairs."""
        rows = [row if here else None for row, here in zip(
            (row for batch in batches for row in batch["given"]), present, strict=True)]
        count_lengths(self.means["train"], [(row["chosen_ids"], row["rejected_ids"])
                                            for row in rows if row])
        return rows

    def _own(self, batches: list[dict], present: Sequence[bool]) -> list[Row | None]:
        """Pairs of the policy's own responses; None for a query that gives none."""
        compared = self._judged(*self._sampled(batches, present))
        winners = [comparison.winner(self.ties, self.cut) if here else None
                   for comparison, here in zip(compared, present, strict=True)]
        count_step(self.means["train"],
                   [pair for pair, here in zip(compared, present, strict=True) if here],
                   [winner for winner, here in zip(winners, present, strict=True) if here])
        self.show(compared[0], winners[0])
        return [pair.row(winner) if winner else None
                for pair, winner in zip(compared, winners, strict=True)]

    def parts(self, inputs: dict) -> list[dict[str, Tensor]]:
        """A micro-batch as forward passes over pairs of like length."""
        return [part_of(inputs, pairs) for pairs in inputs["parts"]]

    def _present(self, batches: list[dict]) -> list[bool]:
        """False for rows that accelerate repeats so that all processes end with equal batches."""
        *before, last = (len(batch["index"]) for batch in batches)
        return [True] * sum(before) + present_rows(self, last)

    def _sampled(self, batches: list[dict], present: Sequence[bool]
                 ) -> tuple[list[dict], list[tuple[Response, Response]]]:
        """The step's queries, and two responses to each."""
        queries = [
            {"query": query, "context": context, "index": int(index)} for batch in batches
            for query, context, index in zip(batch["queries"], batch["contexts"], batch["index"],
                                             strict=True)]
        tokenizer = self.processing_class
        prompts = {}
        for place, query in enumerate(queries):
            ids = prompt_ids(tokenizer, query["query"])
            if not ids:
                raise InputError(f"train row {query['index']}: query is empty")
            query["ids"] = keep_end(ids, self.query_length, tokenizer.bos_token_id)
            query["cut"] = len(query["ids"]) < len(ids)
            number = query["index"] if present[place] else -1 - place  # a row never comes twice
            query["keys"] = (2 * number, 2 * number + 1)
            prompts |= dict.fromkeys(query["keys"], query["ids"])
        with self.timed("sample") as work:
            found = self.engine.responses(prompts, f"{self.args.seed} {self.state.global_step}")
            work.tokens = sum(len(response.token_ids) for response in found.values())
        return queries, [tuple(found[key] for key in query["keys"]) for query in queries]

    def _judged(self, queries: list[dict], responses: list[tuple[Response, Response]]
                ) -> list[Comparison]:
        """What the judge says of each query's two responses; it reads their texts."""
        pairs = [Pair(query["context"], *(response.text.strip() for response in both))
                 for query, both in zip(queries, responses, strict=True)]
        with (self.timed("judge") as work, torch.no_grad(), self.accelerator.autocast(),
              self._judging_model() as model, counted_tokens(model, work)):
            judgments = judge_pairs(
                model, self.processing_class, pairs, **self.judge_options,
                max_length=self.row_length, judge_batch_size=self.judge_batch_size)
        return [Comparison(query["query"], query["ids"], query["cut"], *both, judgment)
                for query, both, judgment in zip(queries, responses, judgments, strict=True)]

    @contextlib.contextmanager
    def _judging_model(self) -> Iterator[torch.nn.Module]:
        """The frozen reference, or the policy as it is now."""
        if self.judge == "reference" and self.ref_model is not None:
            yield self.ref_model
            return
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.judge == "policy":
                yield self.model
                return
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                yield self.model

    def _micro_batches(self, batches: list[dict], rows: list[dict],
                       present: list[bool]) -> Iterator[dict]:
        """Rows in the micro-batches of their queries, as trl's loss takes them, and their parts."""
        start = 0
        for batch in batches:
            end = start + len(batch["index"])
            pairs = self.data_collator.pairs(rows[start:end])
            yield {**pairs, "present": torch.tensor(present[start:end]),
                   "parts": self._parts(pairs["attention_mask"].sum(1))}
            start = end

    def _parts(self, lengths: Tensor) -> list[list[int]]:
        """Pairs of like length, few enough for a forward pass; [2B] lengths of their rows."""
        longer = lengths.view(2, -1).amax(0)
        if self.is_sharded():
            return [list(range(len(longer)))]
        budget = tokens_per_forward(self.args.device, self.unpadded)
        return list(token_budget_batches(dict(enumerate((2 * longer).tolist())), 0, budget))

    def _agree(self, micro: list[dict], pairs: int) -> int:
        """Queries in the step, over all processes, which note its pairs and even out their parts.

        trl gathers its metrics in each forward pass, a number a pair. So every process runs as
        many parts of as many pairs; where one has fewer, empty ones fill the place.
        """
        own = [sum(int(batch["present"].sum()) for batch in micro), pairs,
               *(len(batch["parts"]) for batch in micro)]
        counts = self._gathered(own)
        for batch, most in zip(micro, counts[:, 2:].amax(0).tolist(), strict=True):
            batch["parts"] += [[] for _ in range(most - len(batch["parts"]))]
        parts = [part for batch in micro for part in batch["parts"]]
        for part, most in zip(parts, self._gathered(list(map(len, parts))).amax(0).tolist(),
                              strict=True):
            part += [None] * (most - len(part))
        queries, self.pairs_in_step = counts[:, :2].sum(0).tolist()
        if not self.pairs_in_step:
            self.note_skip()
        return queries

    def _gathered(self, numbers: list[int]) -> Tensor:
        """The numbers of each process, a row a process."""
        return self.accelerator.gather(torch.tensor([numbers], device=self.args.device))
