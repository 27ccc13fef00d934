"""Rows end to end in one forward pass: nothing is padded, and no row attends to another.

Flash attention finds the rows' bounds by their positions. For torch's own attention (sdpa)
transformers would build a mask over all tokens, so on a CPU `sdpa_by_row` calls it for each row
instead. A training step on real rows took 0.83 of the time of padded passes over rows of like
length, on two cores.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lm.models import evaluating, unwrapped, without_adapter

FLASH = "flash_attention_2"
BY_ROW = "sdpa_by_row"
WINDOWS = ("sliding_window", "attention_chunk_size")  # in a config
BLIND = ("gpt_bigcode", "gptj", "persimmon")  # do not tell flash attention the positions

# Tokens of a forward pass, any padding included. More are no faster on a CPU, and take memory; a
# GPU wants enough to fill its matrix units.
TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 4096}


def tokens_per_forward(device: torch.device, unpadded: bool) -> int:
    """How many a forward pass may have; padded rows, of unlike length, gain less by company."""
    tokens = TOKENS_PER_FORWARD.get(device.type, 4096)
    return tokens if unpadded or device.type != "cpu" else tokens // 2


def sdpa_by_row(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                attention_mask: Tensor | None, **options) -> tuple[Tensor, None]:
    """transformers' sdpa; if the mask is integers, [1, 1, 1, R], they are the lengths of R rows.

    transformers hands any mask of four dimensions to the attention as it is; none of its own, nor
    any that sdpa takes, is of integers.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    lengths = attention_mask.flatten().tolist()
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, *row, None, **options)[0] for row in rows]
    return torch.cat(attended, dim=1), None


AttentionInterface.register(BY_ROW, sdpa_by_row)
AttentionMaskInterface.register(BY_ROW, sdpa_mask)


def enable_packing(model: nn.Module, device: torch.device, sharded: bool) -> bool:
    """Whether the model can run rows end to end from now on, on this device.

    On a CPU a model whose attention is sdpa has it replaced by `sdpa_by_row`, which is the same for
    any other input. It is tried on two rows, unless the weights are sharded.
    """
    plain = without_adapter(unwrapped(model))
    if not may_pack(model):
        return False
    attention = plain.config.get_text_config()._attn_implementation
    if attention == FLASH:
        return plain.config.model_type not in BLIND and (sharded or keeps_rows_apart(plain))
    if device.type != "cpu" or sharded or attention not in ("sdpa", BY_ROW) or any(
            getattr(plain.config.get_text_config(), name, None) for name in WINDOWS):
        return False
    plain.set_attn_implementation(BY_ROW)
    if keeps_rows_apart(plain):
        return True
    plain.set_attn_implementation("sdpa")
    return False


def may_pack(model: nn.Module) -> bool:
    """Whether nothing but attention lets tokens meet, and attention is transformers'."""
    plain = without_adapter(unwrapped(model))
    config = plain.config.get_text_config()
    adapters = getattr(unwrapped(model), "peft_config", {}).values()
    kinds = getattr(config, "layer_types", None) or ()
    return (plain.is_backend_compatible() and not plain._is_stateful
            and all(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds)
            and not getattr(config, "output_router_logits", False)  # balances by the padding mask
            and not any(adapter.is_prompt_learning for adapter in adapters))


@torch.no_grad()
def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether a row's logits are the same behind another row as alone."""
    row = torch.arange(1, 6, device=model.device)[None]
    bounds = row_bounds(model, torch.tensor([5, 5], device=model.device))
    half = model.device.type == "cuda"  # flash attention takes no fp32
    with evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        alone = model(input_ids=row, use_cache=False).logits.float()
        try:
            behind = model(input_ids=torch.cat([row.flip(1), row], dim=1), use_cache=False,
                           **bounds).logits[:, 5:].float()
        except (IndexError, RuntimeError, TypeError, ValueError):  # does not know such input
            return False
    tolerance = 0.05 if half else 1e-3
    return bool((alone - behind).abs().max() <= tolerance * alone.abs().max())


def row_bounds(model: nn.Module, lengths: Tensor) -> dict[str, Tensor]:
    """What the model needs to be told beside the ids of rows that stand end to end, [1, sum].

    For rows of 2 and 3 tokens the `position_ids` are [[0, 1, 0, 1, 2]].
    """
    positions = torch.cat([torch.arange(length, device=lengths.device)
                           for length in lengths.tolist()])[None]
    if unwrapped(model).config.get_text_config()._attn_implementation != BY_ROW:
        return {"position_ids": positions}
    return {"position_ids": positions, "attention_mask": lengths[None, None, None]}
