"""A transformers model with gradient accumulation, evaluation and generation inside the loop."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memopt

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prompt = torch.tensor([list(b"memory ")])

with memopt.optimize(model, optimizer, budget=memopt.Budget(device="30MiB")) as run:
    for step in range(3):
        for _ in range(2):  # two micro-batches make one step
            tokens = torch.randint(256, (4, 128))
            (model(input_ids=tokens, labels=tokens).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

        with torch.no_grad():  # not part of the step: memopt stays out of the way
            model.eval()
            loss = model(input_ids=tokens, labels=tokens).loss
            text = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
            model.train()
        print(f"step {step}: evaluation loss {loss.item():.3f}, generated {text[0, -4:].tolist()}")

print(run.report())
