"""What bench.py compares with: LaMo as one would put it together from transformers and peft.

transformers' DecisionTransformerModel has GPT-2's blocks, and peft's LoRA goes into their c_attn.
That has one factor A for Q, K and V together, where ours has three, so ours has a little more work
to do. Its embeddings are linear, as ours are in the benchmark.
"""

import torch.nn as nn


class AddLoRA(nn.Module):
    """LoRA on transformers' Conv1D, for where peft is missing or older than transformers."""

    def __init__(self, layer, rank=16, alpha=32, dropout=0.1):
        super().__init__()
        n_in, n_out = layer.weight.shape
        self.layer, self.drop, self.scaling = layer, nn.Dropout(dropout), alpha / rank
        self.A, self.B = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False)

    def forward(self, x):
        return self.layer(x) + self.B(self.A(self.drop(x))) * self.scaling


def peer_model(config, n_obs, n_act):
    """The model to train on windows, its body for text, and what to call it.

    config: model.GPTConfig; n_obs, n_act: numbers of an observation and an action.
    """
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    sizes = {"hidden_size": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head}
    sizes |= {
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "max_ep_len": 1000,
    }
    dropout = {k: config.dropout for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    special = {"bos_token_id": config.vocab_size - 1, "eos_token_id": config.vocab_size - 1}
    model = DecisionTransformerModel(
        DecisionTransformerConfig(state_dim=n_obs, act_dim=n_act, **sizes, **dropout, **special)
    )
    body = model.encoder
    trained = ["embed_timestep", "embed_return", "embed_state", "embed_action", "embed_ln"]
    trained += ["predict_action"]
    try:
        from peft import LoraConfig, get_peft_model

        where = {"target_modules": ["c_attn"], "modules_to_save": trained, "fan_in_fan_out": True}
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, bias="lora_only", **where)
        )
        return model.train(), body, "transformers + peft"
    except ImportError:
        model.requires_grad_(False)
        for name in trained:
            getattr(model, name).requires_grad_(True)
        for block in body.h:
            block.attn.c_attn = AddLoRA(block.attn.c_attn)
        return model.train(), body, "transformers + LoRA by hand"
