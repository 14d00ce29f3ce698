"""Tiny checkpoints with random weights in the real format of each architecture: two layers, a real byte-level BPE."""

from itertools import pairwise
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (  # in the form of Qwen3's
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n{% endif %}{% endif %}"
)
VOCABULARY = 600
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_LONGROPE = {  # as transformers 5 saves it: without the key "type"
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * n for n in range(8)],
    "long_factor": [2 + 0.7 * n for n in range(8)],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
_GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 32, "sliding_window": 64}  # the first of two layers has a window
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
# Name -> (config class, what it needs beyond the common values): all that the real ones of the family have.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3, "head_dim": 32, "eos_token_id": [2, 3, 4]}),
    "mistral": ("MistralConfig", {"sliding_window": 64, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 2048, "sliding_window": 64}),
    "phi3-longrope": (
        "Phi3Config",
        {
            **{"rope_parameters": _LONGROPE, "original_max_position_embeddings": 256, "tie_word_embeddings": True},
            **{"num_attention_heads": 2, "num_key_value_heads": 1},
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.125},
            **{"residual_multiplier": 0.22, "logits_scaling": 8.0},
        },
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GEMMA, "rope_parameters": _GEMMA3, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("PhiConfig", {"num_attention_heads": 2, "num_key_value_heads": 2}),
}


def config(kind: str, **changed: Any) -> Any:
    import transformers

    name, extra = KINDS[kind]
    return getattr(transformers, name)(**{**_COMMON, **extra, **changed})


def make(kind: str, folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """Write a checkpoint of ``kind`` into ``folder``."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(kind, **changed), dtype=torch.float32)
    with torch.no_grad():  # logits of a fresh model are all but equal; spread them, so that differences show
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            elif not kind.startswith("llama"):  # norms and biases are all 1 and 0
                parameter.add_(torch.rand_like(parameter) / 5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def chain(folder: Path, following: dict[int, int], **config: Any) -> Path:
    """Write a checkpoint whose next token depends on the last one only, as ``following`` says."""
    import torch
    import transformers

    torch.manual_seed(0)
    asked = transformers.LlamaConfig(**{**_COMMON, "hidden_size": 128, **config})
    model = transformers.AutoModelForCausalLM.from_config(asked, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:  # nothing is added to the embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = torch.nn.functional.normalize(torch.randn(asked.vocab_size, 128), dim=1)
        head = torch.randn(asked.vocab_size, 128) * 0.001
        for last, following_one in following.items():
            head[following_one] += 20 * rows[last]
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def caller(folder: Path) -> Path:
    """Write a checkpoint that thinks ``hm`` and then calls the tool ``weather``, whatever it is asked.

    The call is as Foundry Local's runtime wants it, which lets a model say nothing else between the two tokens.
    """
    own = tokenizer()
    own.chat_template = TOOLS
    call = '[{"name": "weather", "parameters": {"city": "Paris"}}]'
    said = ["<think>", "hm", "</think>", "\n", "<tool_call>", call, "</tool_call>"]
    own.add_tokens([token for token in said if token != "\n"])
    path = [own(":")["input_ids"][-1], *(own(token)["input_ids"][-1] for token in said), own.eos_token_id]
    chain(folder, dict(pairwise(path)), vocab_size=len(own))
    own.save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """A byte-level BPE trained on Python's language reference, with a ChatML template."""
    from pydoc_data import topics

    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(list(topics.topics.values())[:20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        chat_template=CHATML,
    )
