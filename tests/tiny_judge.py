"""Random models whose tokenizer has " A" and " B" as single tokens, for tests of the judge."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

TEMPLATE = ("You compare two answers.\n{context}\n\nAnswer A: {response_a}\n"
            "Answer B: {response_b}\nThe better answer is")
PRINCIPLES = {"help": TEMPLATE, "honesty": TEMPLATE.replace("The better", "More honest")}
TEXT = ["The better answer is A. The better answer is B.", "Answer A: the cat\nAnswer B: the hat",
        "You compare two answers. User: Name three colours. Red, green and blue. More honest"] * 3
VOCABULARY = 400
LLAMA = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 1024, "initializer_range": 0.1, "bos_token_id": None,
         "eos_token_id": 0, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256,
                       initializer_range=0.1, bos_token_id=None, eos_token_id=0),
    # Windows of 16 tokens, a cap on the logits: no ordinary cache
    "gemma2": Gemma2Config(**LLAMA, head_dim=16, sliding_window=16, final_logit_softcapping=2.0),
    "mistral": MistralConfig(**LLAMA, sliding_window=16),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8,
                         initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=0),
}


def tiny_model(name="llama"):
    """The same random weights each time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def tiny_tokenizer():
    """Byte-level BPE; EOS is id 0 and also the pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def save_tiny_judge(folder: Path) -> Path:
    """A model folder, as command lines take it."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
