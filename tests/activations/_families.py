"""Families of models at sizes where activations outweigh what does not scale, for predictions of bytes.

Small enough for a second a step, large enough that generator states and scalars (5 KiB a region) are below 1 %.
Every step has its own data; they are called as users call them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 512
TEXT = {"vocab_size": VOCAB, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "intermediate_size": 352, "max_position_embeddings": 256}
Loss = Callable[[nn.Module], Tensor]


def ids(rows: int, tokens: int) -> Tensor:
    """Token ids."""
    return torch.randint(3, VOCAB, (rows, tokens))


def causal(model: nn.Module) -> Tensor:
    """A language model's own loss."""
    batch = ids(4, 256)
    return model(input_ids=batch, labels=batch).loss


def autocast(model: nn.Module) -> Tensor:
    """The same under bfloat16 autocast: casts of weights are cached until the forward ends."""
    with torch.autocast("cpu", torch.bfloat16):
        return causal(model)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, **KV))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**TEXT, **KV, head_dim=32, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**TEXT, **KV, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
                 decoder_start_token_id=0)
    )  # fmt: skip


def seq2seq(model: nn.Module) -> Tensor:
    """An encoder-decoder's loss: the decoder's blocks share the encoder's output."""
    return model(input_ids=ids(4, 160), labels=ids(4, 80)).loss


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**TEXT, intermediate_size=352, max_position_embeddings=256))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=352,
                  image_size=64, patch_size=4, num_labels=5)
    )  # fmt: skip


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[2, 2, 3, 2], num_labels=5
        )
    )


def images(rows: int, pixels: int, **named: str) -> Loss:
    """A classifier's loss on images; `named`: what transformers calls its arguments."""

    def loss(model: nn.Module) -> Tensor:
        batch, labels = torch.randn(rows, 3, pixels, pixels), torch.randint(0, 5, (rows,))
        if named:
            return model(**{named["images"]: batch}, labels=labels).loss
        return F.cross_entropy(model(batch), labels)

    return loss


class Recurrent(nn.Module):
    """Embedding, a list of recurrent layers with residuals, a head; the loss is outside."""

    class Layer(nn.Module):
        """One layer."""

        def __init__(self, kind: type[nn.Module]) -> None:
            super().__init__()
            self.rnn = kind(128, 128, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.rnn(x)[0]

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 128)
        self.layers = nn.ModuleList([Recurrent.Layer(kind) for _ in range(4)])
        self.head = nn.Linear(128, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def next_token(model: nn.Module) -> Tensor:
    """Cross entropy beside the model."""
    batch = ids(16, 64)
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def cnn() -> nn.Module:
    """A flat Sequential with in-place activations: a region's output is saved by it and by the next."""

    def stage(before: int, after: int) -> list[nn.Module]:
        conv = nn.Conv2d(before, after, 3, padding=1)
        return [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *stage(3, 16), *stage(16, 16), nn.MaxPool2d(2), *stage(16, 32), *stage(32, 32),
        nn.MaxPool2d(2), *stage(32, 48), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 5),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.1, batch_first=True)
    stack = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(8, 128), stack, nn.Linear(128, 1))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "llama": (llama, causal),
    "gpt2": (gpt2, causal),
    "gru": (lambda: Recurrent(nn.GRU), next_token),
    "cnn": (cnn, images(16, 64)),
    "resnet": (resnet, images(8, 128, images="pixel_values")),
    "autocast": (llama, autocast),
    "qwen3": (qwen3, causal),
    "mixtral": (mixtral, causal),
    "t5": (t5, seq2seq),
    "bert": (bert, causal),
    "vit": (vit, images(4, 64, images="pixel_values")),
    "lstm": (lambda: Recurrent(nn.LSTM), next_token),
    "encoder": (encoder, lambda model: model(torch.randn(4, 192, 8)).square().mean()),
}
