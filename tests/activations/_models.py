"""Small random models of the families that memopt promises, each called as its users call it.

No builder passes `use_cache=False` or turns anything off: the defaults of the libraries are part of the promise.
Batches differ from step to step (data, and in the text models the padding), so that nothing may be remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from _bitwise import Program, quiet
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 96
TOKENS = 16  # two sequences of 16: 32 tokens
TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
KV = {"num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 64}


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def ids(step: int, *, rows: int = 2, tokens: int = TOKENS) -> Tensor:
    """Token ids of one step."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=_generator(step))


def padding(step: int) -> Tensor:
    """An attention mask whose second row ends earlier, at another place in every step."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, TOKENS - 2 - step :] = 0
    return mask


def _causal(model: nn.Module, step: int) -> Tensor:
    batch = ids(step)
    return model(input_ids=batch, attention_mask=padding(step), labels=batch).loss


def _plain_causal(model: nn.Module, step: int) -> Tensor:
    batch = ids(step)
    return model(input_ids=batch, labels=batch).loss


def _llama(p: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, **KV, attention_dropout=p))


def _qwen3(p: float) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(**TEXT, **KV, head_dim=8, attention_dropout=p, tie_word_embeddings=True)
    )


def _gemma3(p: float) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **TEXT, **KV, head_dim=8, sliding_window=8, layer_types=kinds, attention_dropout=p
        )
    )


def _mistral(p: float) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**TEXT, **KV, sliding_window=8, attention_dropout=p))


def _gpt2(p: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            resid_pdrop=p,
            embd_pdrop=p,
            attn_pdrop=p,
        )
    )


def _gpt_neox(p: float) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            **TEXT,
            intermediate_size=56,
            max_position_embeddings=64,
            attention_dropout=p,
            hidden_dropout=p,
        )
    )


def mixtral(p: float, experts: str = "grouped_mm") -> nn.Module:
    """Mixtral with the experts' implementation chosen: the op list of `eager` depends on the routing."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **TEXT,
        **KV,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_dropout=p,
        output_router_logits=True,
    )
    model = MixtralForCausalLM._from_config(config, experts_implementation=experts)
    with torch.no_grad():  # the default initialisation routes all tokens alike
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_()
    return model


def _t5(p: float) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=p,
                 decoder_start_token_id=0)
    )  # fmt: skip


def _t5_loss(model: nn.Module, step: int) -> Tensor:
    labels = ids(step + 50, tokens=9)
    return model(input_ids=ids(step), attention_mask=padding(step), labels=labels).loss


def _bert(p: float) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(**TEXT, intermediate_size=56, max_position_embeddings=64, hidden_dropout_prob=p,
                   attention_probs_dropout_prob=p)
    )  # fmt: skip


def _vit(p: float) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, image_size=16,
                  patch_size=4, num_labels=5, hidden_dropout_prob=p, attention_probs_dropout_prob=p)
    )  # fmt: skip


def _vit_loss(model: nn.Module, step: int) -> Tensor:
    pixels = torch.randn(2, 3, 16, 16, generator=_generator(step))
    return model(pixel_values=pixels, labels=torch.tensor([step % 5, 2])).loss


def lora(p: float) -> nn.Module:
    """A frozen Llama with trainable LoRA adapters on two projections."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=p,
        target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    with quiet():  # peft reads attributes that transformers deprecates
        model = get_peft_model(_llama(0.0), config)
    with torch.no_grad():  # B starts at zero, which hides errors in A's gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


class Lstm(nn.Module):
    """Embedding, a list of LSTM layers with dropout between, and a head."""

    class Layer(nn.Module):
        """One bidirectional LSTM with its residual."""

        def __init__(self, width: int, p: float) -> None:
            super().__init__()
            self.lstm = nn.LSTM(width, width // 2, batch_first=True, bidirectional=True)
            self.drop = nn.Dropout(p)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.lstm(x)
            return x + self.drop(out)

    def __init__(self, p: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList([Lstm.Layer(16, p) for _ in range(3)])
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _lstm_loss(model: nn.Module, step: int) -> Tensor:
    batch = ids(step, tokens=8)
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def _cnn(p: float) -> nn.Module:
    """A flat Sequential: no list of blocks anywhere, batch norms, an in-place ReLU, a pooling with indices."""

    def stage(width_in: int, width: int) -> list[nn.Module]:
        return [
            nn.Conv2d(width_in, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]

    return nn.Sequential(
        *stage(3, 8), *stage(8, 8), nn.MaxPool2d(2), nn.Dropout2d(p), *stage(8, 12), *stage(12, 12),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(p), nn.Linear(48, 5),
    )  # fmt: skip


def _cnn_loss(model: nn.Module, step: int) -> Tensor:
    images = torch.randn(4, 3, 12, 12, generator=_generator(step))
    return F.cross_entropy(model(images), torch.tensor([0, 1, 2, step % 5]))


def _transformer_encoder(p: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=p, batch_first=True)
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
        nn.Linear(32, 1),
    )


def _encoder_loss(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(2, TOKENS, 8, generator=_generator(step))).square().mean()


Loss = Callable[[nn.Module, int], Tensor]
MODELS: dict[str, tuple[Callable[[float], nn.Module], Loss]] = {
    "llama": (_llama, _causal),
    "qwen3": (_qwen3, _plain_causal),
    "gemma3": (_gemma3, _causal),
    "mistral": (_mistral, _plain_causal),
    "gpt2": (_gpt2, _causal),
    "gpt_neox": (_gpt_neox, _plain_causal),
    "mixtral": (mixtral, _causal),
    "t5": (_t5, _t5_loss),
    "bert": (_bert, _causal),
    "vit": (_vit, _vit_loss),
    "lora": (lora, _plain_causal),
    "lstm": (Lstm, _lstm_loss),
    "cnn": (_cnn, _cnn_loss),
    "encoder": (_transformer_encoder, _encoder_loss),
}


@functools.cache
def model_program(name: str, *, dropout: bool = False, autocast: bool = False) -> Program:
    """The training program of one model of `MODELS`."""
    build, loss_of = MODELS[name]

    def step(model: nn.Module, i: int) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, i)
        loss.backward()
        return loss

    return Program(build=functools.partial(build, 0.1 if dropout else 0.0), step=step)
