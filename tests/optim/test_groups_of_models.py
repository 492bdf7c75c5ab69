"""`frugal_groups` on published architectures: what is split, what always keeps its state."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from memopt.optim import Frugal, frugal_groups
from memopt.optim.presets import scale

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 32,
}  # fmt: skip
MOE = {**SMALL, "num_key_value_heads": 1, "num_local_experts": 4}
LLAMA = r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
# Name: (class, settings, what is split, tensors of it)
MODELS = {
    "llama": ("Llama", "ForCausalLM", SMALL, LLAMA, 14),
    "llama, tied": ("Llama", "ForCausalLM", {**SMALL, "tie_word_embeddings": True}, LLAMA, 14),
    "llama of one layer": ("Llama", "ForCausalLM", {**SMALL, "num_hidden_layers": 1}, LLAMA, 7),
    "gpt2": (
        "GPT2", "LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 8},
        r"transformer\.h\.\d\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight", 8,
    ),
    "t5": (
        "T5", "ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32},
        r"(en|de)coder\.block\.\d\.layer\.\d\.(SelfAttention|EncDecAttention|DenseReluDense)\.\w+\.weight", 32,
    ),
    "mixtral": (
        "Mixtral", "ForCausalLM", MOE,
        r"model\.layers\.\d\.(self_attn\.[qkvo]_proj\.weight|mlp\.gate\.weight|mlp\.experts\.\w+_proj)", 14,
    ),
    "gpt-oss": (
        "GptOss", "ForCausalLM", {**MOE, "head_dim": 8},
        r"model\.layers\.\d\.(self_attn\.[qkvo]_proj\.weight|mlp\.router\.weight|mlp\.experts\.\w+_proj)", 14,
    ),
    "bert": (
        "Bert", "ForSequenceClassification", SMALL,
        r"bert\.encoder\.layer\.\d\.(attention\.self\.\w+|((attention\.)?output|intermediate)\.dense)\.weight", 12,
    ),
    "vit": (
        "ViT", "ForImageClassification", {**SMALL, "image_size": 8, "patch_size": 4},
        r"vit\.(encoder\.)?layers?\.\d\..*\.weight", 12,
    ),
}  # fmt: skip


def build(name):
    family, kind, settings, *_ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}{kind}")(config)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_split(name):
    groups = frugal_groups(build(name))
    pattern, count = MODELS[name][3:]
    found = [a.name for a in groups.assignments if a.split]
    assert all(re.fullmatch(pattern, one) for one in found), found
    assert len(found) == count
    full = [a for a in groups.assignments if not a.split]
    assert any(a.role == "embedding" for a in full) or name == "vit"
    assert not any(re.fullmatch(pattern, a.name) and a.role == "linear in a block" for a in full)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_adapters_are_split_and_what_is_saved_whole_is_not():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    groups = frugal_groups(peft.get_peft_model(build("llama"), config))
    split = [a.name for a in groups.assignments if a.split]
    assert len(split) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in split)
    assert [a.role for a in groups.assignments if not a.split] == ["output head or other"]


def test_norms_and_biases_of_several_dimensions_are_not_split():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm([3, 4, 5])
            self.linear = nn.Linear(5, 5)
            self.up, self.up_bias = (
                nn.Parameter(torch.ones(2, 5, 5)),
                nn.Parameter(torch.ones(2, 5)),
            )
            self.relative_position_bias_table = nn.Parameter(torch.ones(9, 2))

    model = nn.Sequential(nn.Linear(5, 5), nn.ModuleList([Block(), Block()]))
    split = {a.name for a in frugal_groups(model).assignments if a.split}
    assert split == {f"1.{i}.{name}" for i in (0, 1) for name in ("linear.weight", "up")}


def test_scale_normalizes_by_output_unit_however_a_weight_is_stored():
    model = build("gpt2")
    optimizer = scale(model, lr=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):  # (in, out)
            moved = (before[name] - p.detach()).norm(dim=0)
            torch.testing.assert_close(moved, torch.full_like(moved, 0.5))


@pytest.mark.parametrize("selection", ["blocks", "columns", "rows", "coordinates", "svd"])
def test_experts_of_three_dimensions_are_matrices_of_a_row_each(selection):
    model = build("mixtral")
    optimizer = Frugal(frugal_groups(model, 0.5, selection=selection), lr=1e-3, update_gap=2)
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    experts = model.model.layers[0].mlp.experts.down_proj
    if selection == "rows":  # whole experts
        mask = optimizer.state_full_mask(experts).flatten(1)
        assert mask.all(dim=1).sum() == 2
        assert mask.any(dim=1).sum() == 2
