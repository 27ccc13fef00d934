"""bitsandbytes' 8-bit layers as CUDA runs them, but on a CPU: what they hold, their gradients."""

import bitsandbytes.autograd._functions as bnb
import pytest
import torch
from conftest import ROOT

from lm.log_probs import supervised_log_probs
from lm.models import add_lora, load_model
from lm.quantized import forget_inputs


@pytest.fixture
def as_on_cuda(monkeypatch):
    """On a CPU bitsandbytes runs another function. And none of this for other tests."""
    plain = bnb.MatMul8bitLt.forward
    plain = getattr(plain, "__wrapped__", plain)
    monkeypatch.setattr(bnb.MatMul8bitLt, "forward", staticmethod(plain))
    monkeypatch.setattr(bnb, "MatMul8bitFp", bnb.MatMul8bitLt)
    return plain


def held_by(loss: torch.Tensor) -> int:
    """Bytes that the graph's 8-bit products hold."""
    nodes, seen, storages = [loss.grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        if type(node).__name__ == "MatMul8bitLtBackward":
            storages |= {held.data_ptr(): held.untyped_storage().nbytes()
                         for held in node.tensors if held is not None}
    return sum(storages.values())


def loss_of(folder: str) -> tuple[torch.Tensor, torch.nn.Module]:
    torch.manual_seed(0)
    model = add_lora(load_model(folder, "8bit"), 4, 4, 0.0, ["gate_proj", "down_proj"],
                     gradient_checkpointing=True).train()
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.02)
    ids = torch.arange(3, 35).view(2, 16)
    supervised = torch.ones_like(ids).bool()
    supervised[:, 0] = False
    with torch.autocast("cpu", torch.bfloat16):
        return -supervised_log_probs(model, ids, supervised).mean(), model


def gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor]:
    loss.backward()
    return [weights.grad for weights in model.parameters() if weights.requires_grad]


def test_frozen_layers_hold_no_inputs_and_pass_the_same_gradients(tiny_llama, as_on_cuda,
                                                                  monkeypatch):
    loss, model = loss_of(str(tiny_llama))
    assert bnb.MatMul8bitLt.forward.__wrapped__ is as_on_cuda
    assert held_by(loss) == 0
    ours = gradients(loss, model)

    monkeypatch.setattr("lm.quantized.forget_inputs", lambda: None)
    monkeypatch.setattr(bnb.MatMul8bitLt, "forward", staticmethod(as_on_cuda))
    loss, model = loss_of(str(tiny_llama))
    assert held_by(loss) > 0
    for mine, theirs in zip(ours, gradients(loss, model), strict=True):
        assert torch.equal(mine, theirs)


def test_the_layer_is_changed_once(as_on_cuda):
    forget_inputs()
    once = bnb.MatMul8bitLt.forward
    forget_inputs()
    assert bnb.MatMul8bitLt.forward is once


def test_self_judges_4bit_layers_keep_passing_gradients_after_sampling(tiny_llama, monkeypatch):
    """Where a CPU has AVX512-BF16, the first forward in evaluation mode would pack them."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    from bitsandbytes.nn import Linear4bit

    from self_judge.config import load_config
    from self_judge.launch import load_model as load_base_model

    config = load_config(str(ROOT / "configs" / "sample_self_judge.yaml"), [
        f"model.pretrained_model_name_or_path={tiny_llama}", "model.load_in=4bit"])
    layers = [module for module in load_base_model(config, seed=0).modules()
              if isinstance(module, Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
