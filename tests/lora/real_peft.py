"""What real PEFT does with an adapter. Runs where torch, transformers and peft are installed.

    python tests/lora/real_peft.py make MODEL FOLDER SPEC    an adapter with random weights
    python tests/lora/real_peft.py train MODEL FOLDER        a few steps of training
    python tests/lora/real_peft.py logits MODEL FOLDER OUT   logits with an adapter, as .npy

Everything is computed in float32 on `TOKENS`.
"""

import json
import sys

TOKENS = [[43, 274, 288, 470, 34, 7, 99, 512, 3, 801]]

#: Adapters that differ in how PEFT says rank and scale.
SPECS = {
    "mixed": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": r".*layers\.[0-2]\..*(q_proj|v_proj|down_proj)",
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 3, "down_proj": 5},
    },
    "rslora": {"r": 3, "lora_alpha": 6, "target_modules": ["k_proj", "o_proj"], "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"], "use_dora": True},
}


def base(model):
    import torch  # pyright: ignore
    from transformers import AutoModelForCausalLM  # pyright: ignore

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def make(model, folder, spec):
    import torch  # pyright: ignore
    from peft import LoraConfig, get_peft_model  # pyright: ignore

    wrapped = get_peft_model(base(model), LoraConfig(task_type="CAUSAL_LM", **SPECS[spec]))
    generator = torch.Generator().manual_seed(7)
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + noise * 0.1 if "magnitude" in name else noise * 0.05
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    wrapped.to(torch.bfloat16).save_pretrained(folder)


def train(model, folder):
    import torch  # pyright: ignore
    from peft import LoraConfig, get_peft_model  # pyright: ignore

    wrapped = get_peft_model(base(model), LoraConfig(task_type="CAUSAL_LM", **SPECS["mixed"]))
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.tensor(TOKENS)
    for _ in range(8):
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(folder)


def logits(model, folder, out):
    import numpy as np
    import torch  # pyright: ignore
    from peft import PeftModel  # pyright: ignore

    wrapped = PeftModel.from_pretrained(base(model), folder)
    wrapped = wrapped.to(torch.float32).eval()
    with torch.no_grad():
        np.save(out, wrapped(torch.tensor(TOKENS)).logits.float().numpy())
    adapted = {n: tuple(p.shape) for n, p in wrapped.named_parameters() if "lora_" in n}
    print(json.dumps({"adapted": len(adapted)}))


if __name__ == "__main__":
    {"make": make, "train": train, "logits": logits}[sys.argv[1]](*sys.argv[2:])
