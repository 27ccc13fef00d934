"""Supervised log-probabilities against the naive computation from full logits.

    python -m pytest tests/test_log_probs.py
"""

import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

from lm import log_probs
from lm.log_probs import check_head, output_head
from lm.packing import enable_packing
from lm.records import InputError

VOCABULARY, HIDDEN = 61, 16
SMALL = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}
ARCHITECTURES = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=64,
                       initializer_range=0.5, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                       bos_token_id=1, eos_token_id=2),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.3),
    "granite": GraniteConfig(**SMALL, logits_scaling=4.0, tie_word_embeddings=False),
}
if hasattr(transformers, "HyperCLOVAXConfig"):  # multiplies by what Granite divides by
    ARCHITECTURES["hyperclovax"] = transformers.HyperCLOVAXConfig(**SMALL, logits_scaling=0.3)
CPU = torch.device("cpu")
TARGETS = {"gpt2": ["c_fc", "c_attn"]}


def supervised_log_probs(model, ids, attention, loss_mask):
    """Ours; right padding needs no attention mask, which only the naive computation gets."""
    return log_probs.supervised_log_probs(model, ids, loss_mask)


def tiny(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[name]).train()


def with_lora(name):
    """LoRA whose B is not zero, so that both factors get gradients."""
    model = get_peft_model(tiny(name), LoraConfig(
        r=2, target_modules=TARGETS.get(name, ["up_proj", "q_proj"]), task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def with_frozen_head(name):
    model = tiny(name)
    model.get_output_embeddings().requires_grad_(False)
    return model


def batch(seed=0, lengths=(12, 7, 9), supervised=(5, 6, 1)):
    """Right-padded rows whose last few tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    place = torch.arange(max(lengths))
    attention = place < torch.tensor(lengths)[:, None]
    loss_mask = attention & (place >= torch.tensor(lengths)[:, None]
                             - torch.tensor(supervised)[:, None])
    return ids.where(attention, 0), attention.long(), loss_mask


def naive(model, ids, attention, loss_mask):
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
    every = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return every[loss_mask[:, 1:]]


def gradients(model, values):
    """Of a weighted sum of the values, for every trained parameter."""
    model.zero_grad()
    (values * torch.linspace(1, 2, len(values))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_as_naive(model):
    inputs = batch()
    ours, theirs = supervised_log_probs(model, *inputs), naive(model, *inputs)
    assert ours.shape == (inputs[2].sum(),) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    got, expected = gradients(model, ours), gradients(model, theirs)
    assert got and all(gradient.any() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(supervised_log_probs(model, *inputs), theirs.detach(),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [256, 5])  # 12 supervised tokens: one chunk, or three
@pytest.mark.parametrize("prepare", [with_lora, tiny, with_frozen_head])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_full_logits_in_values_and_gradients(name, prepare, chunk, monkeypatch):
    """LoRA (frozen head), full fine-tuning (trained head, tied or not), a frozen head alone."""
    monkeypatch.setitem(log_probs.CHUNK, "cpu", chunk)
    assert_as_naive(prepare(name))


class Engine(torch.nn.Module):
    """As DeepSpeed's: its `config` is its own, other names are looked for in the model."""

    def __init__(self, model):
        super().__init__()
        self.module, self.config = model, {"train_batch_size": 8}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("prepare", [with_lora, tiny])
def test_deepspeeds_wrapper_is_looked_through(prepare):
    assert_as_naive(Engine(prepare("granite")))


def test_zero3_sees_a_frozen_heads_backward_pass():
    """It gathers the weights when the head's output gets a gradient; marked by `ds_id`."""
    model, seen = with_lora("llama"), []
    head = output_head(model)
    head.register_full_backward_hook(lambda *_: seen.append(True))
    gradients(model, supervised_log_probs(model, *batch()))
    assert not seen
    head.weight.ds_id = 0
    gradients(model, supervised_log_probs(model, *batch()))
    assert seen == [True]
    assert_as_naive(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prepare", [tiny, with_lora])
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "granite"])
def test_rows_end_to_end_have_the_values_and_gradients_of_padded_ones(name, prepare, checkpointing):
    model = prepare(name).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, attention, loss_mask = batch()
    padded = supervised_log_probs(model, ids, attention, loss_mask)
    expected = gradients(model, padded)
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    assert enable_packing(model, CPU, sharded=False)
    shapes.clear()
    packed = log_probs.supervised_log_probs_unpadded(model, ids, loss_mask)
    assert shapes == [(1, 12 + 7 + 9)]
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)
    got = gradients(model, packed)
    for parameter in expected:
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=1e-5, atol=1e-5,
                                   msg=parameter)


def test_frozen_head_with_a_bias():
    """Not the plain product that has its derivative written out."""
    model = with_lora("llama")
    head = torch.nn.Linear(HIDDEN, VOCABULARY)
    torch.nn.init.normal_(head.bias)
    model.set_output_embeddings(head.requires_grad_(False))
    assert_as_naive(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 0.8])
def test_written_out_derivative_is_that_of_autograd(scale, dtype):
    """Of tokens that are nearly certain as well: 1 - p must not vanish before it is rounded."""
    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype).requires_grad_(False)
    head.weight.normal_()
    rows = scale * torch.randn(9, HIDDEN, dtype=dtype) + head.weight[:9]
    tokens = torch.arange(9)
    scored = log_probs.slopes_of_linear(head.weight.float(), rows, tokens)
    exact = log_probs.slopes_by_autograd(
        lambda rows, tokens: -torch.nn.functional.cross_entropy(
            log_probs.logits_of(head, rows), tokens, reduction="none"), rows, tokens)
    assert scored[1].dtype == exact[1].dtype == dtype and (exact[0] > -0.01).any()
    for ours, theirs in zip(scored, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype == torch.float32 else 0.03,
                                   atol=1e-5)


@pytest.mark.parametrize("prepare", [tiny, with_frozen_head])
@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_logits_are_never_rounded_to_half_precision(half, prepare):
    """Neither by a head in bf16 nor under autocast: log-probs are those of its very weights."""
    model = prepare("llama")
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(8)  # logits near 10, a sixteenth apart in bf16
    model = model.to(torch.bfloat16) if half == "weights" else model
    ids, attention, loss_mask = batch()
    kept = []
    hook = model.get_decoder().register_forward_hook(
        lambda module, arguments, output: kept.append(output.last_hidden_state.detach()))
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        ours = supervised_log_probs(model, ids, attention, loss_mask)
        rounded = naive(model, ids, attention, loss_mask)
    hook.remove()
    exact = (kept[0].double() @ head.weight.double().T)[:, :-1].log_softmax(-1).gather(
        -1, ids[:, 1:, None]).squeeze(-1)[loss_mask[:, 1:]]
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() > 0.01
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(ours.sum(), trained))


def test_a_mask_of_ones_and_zeros_is_a_mask_and_the_first_position_is_refused():
    model, (ids, attention, loss_mask) = tiny("llama"), batch()
    expected = supervised_log_probs(model, ids, attention, loss_mask)
    assert torch.equal(supervised_log_probs(model, ids, attention, loss_mask.long()), expected)
    with pytest.raises(ValueError, match="first position"):
        supervised_log_probs(model, ids, attention, torch.ones_like(loss_mask))


def test_trained_copy_of_the_head_in_an_adapter():
    model = get_peft_model(tiny("llama"), LoraConfig(
        r=2, target_modules=["up_proj"], modules_to_save=["lm_head"], init_lora_weights=False))
    assert_as_naive(model)


@pytest.mark.parametrize("prepare", [with_lora, tiny])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(name, prepare):
    model = prepare(name)
    expected = gradients(model, supervised_log_probs(model, *batch()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    got = gradients(model, supervised_log_probs(model, *batch()))
    for gradient in expected:
        torch.testing.assert_close(got[gradient], expected[gradient], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_changes_nothing(name):
    """GPT-2's positions are absolute: a shifted row would be scored otherwise."""
    model = tiny(name).eval()
    ids, attention, loss_mask = batch()
    wider = [torch.nn.functional.pad(tensor, (0, 9), value=filler)
             for tensor, filler in ((ids, 7), (attention, 0), (loss_mask, False))]
    expected = supervised_log_probs(model, ids, attention, loss_mask)
    torch.testing.assert_close(supervised_log_probs(model, *wider), expected, rtol=0, atol=1e-5)

    alone = [supervised_log_probs(model, ids[row:row + 1, :length], attention[row:row + 1, :length],
                                  loss_mask[row:row + 1, :length])
             for row, length in enumerate(attention.sum(-1).tolist())]
    torch.testing.assert_close(torch.cat(alone), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prepare", [with_lora, tiny])
def test_no_logits_of_a_whole_batch_are_made(prepare, monkeypatch):
    """In forward and backward; the naive computation shows that the recorder would see them."""
    monkeypatch.setitem(log_probs.CHUNK, "cpu", 4)
    model, inputs = prepare("llama"), batch(lengths=(30, 28), supervised=(25, 20))
    with LargestLogits() as ours:
        gradients(model, supervised_log_probs(model, *inputs))
    with LargestLogits() as theirs:
        gradients(model, naive(model, *inputs))
    assert theirs.rows >= 2 * (30 - 1)
    assert ours.rows == HIDDEN  # the head's weight is [HIDDEN, VOCABULARY], a chunk is smaller


@pytest.mark.parametrize("prepare", [with_lora, tiny])
def test_no_logits_are_kept_for_the_backward_pass(prepare, monkeypatch):
    """Small chunks would not help if each of them stayed until the backward pass."""
    monkeypatch.setitem(log_probs.CHUNK, "cpu", 4)
    model, seen = prepare("llama"), []

    def note(tensor):
        if tensor.shape[-1:] == (VOCABULARY,) and tensor.shape != (HIDDEN, VOCABULARY):
            seen.append(weakref.ref(tensor))
        return tensor

    def kept(compute):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            values = compute(model, *batch())
        assert values.requires_grad
        return sum(reference() is not None for reference in seen)

    assert kept(supervised_log_probs) == 0
    assert kept(naive) > 0


class LargestLogits(TorchDispatchMode):
    """Remembers how many rows of entries over the vocabulary the largest tensor held."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                entries = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.rows = max(self.rows, entries // VOCABULARY)
        return result


def test_hook_is_gone_afterwards_even_after_a_failure(monkeypatch):
    model = tiny("llama")
    head = output_head(model)
    supervised_log_probs(model, *batch())
    assert not head._forward_pre_hooks

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(head, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        supervised_log_probs(model, *batch())
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_check_head_knows_the_architecture(name, dtype):
    model = with_lora(name).to(dtype)
    check_head(model, list(range(3, 20)))
    assert model.training  # as it was


@pytest.mark.parametrize("change", [
    lambda logits: logits * 0.9,
    lambda logits: torch.tanh(logits / 8) * 8,
    lambda logits: logits + torch.linspace(0, 0.5, VOCABULARY),
], ids=["scale", "cap", "bias"])
def test_check_head_stops_at_an_unknown_transform(change, monkeypatch):
    model = tiny("llama")
    forward = model.forward

    def changed(*args, **kwargs):
        result = forward(*args, **kwargs)
        result.logits = change(result.logits)
        return result

    monkeypatch.setattr(model, "forward", changed)
    with pytest.raises(InputError, match=r"LlamaForCausalLM .* add it to logit_transform"):
        check_head(model, list(range(3, 20)))
