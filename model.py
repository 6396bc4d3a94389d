"""GPT-2 written by hand, and LaMo: the same transformer reading trajectories instead of text.

GPT is OpenAI's GPT-2 (Radford et al. 2019), its parts named as OpenAI named them. LaMo (Shi et al.
2024, arXiv 2310.20587) is the Decision Transformer (Chen et al. 2021, arXiv 2106.01345) on that
body: three tokens for each environment step, return-to-go R, state s and action a,

    R_0 s_0 a_0 R_1 s_1 a_1 ...  ->  GPT-2's blocks  ->  the hidden state over s_t predicts a_t

A window shorter than the context is padded on the right, and nothing needs a mask: attention is
causal, and trajectory tokens carry no position embedding, only a learned embedding of the
environment's time step, so what stands behind a token cannot change it. Only the loss is masked.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # C, the width of the residual stream
    vocab_size: int = 50257  # V, GPT-2's byte-pair vocabulary; 257 for bytes
    block_size: int = 1024  # positions wpe knows
    dropout: float = 0.1  # on embeddings, attention weights and residual branches


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # Q, K and V side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, C/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """The feed-forward half of a block: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """GPT-2. The output head is wte itself (tied), so it has no parameter of its own."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.reset_parameters()

    def reset_parameters(self):
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layer) ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def blocks(self, x):
        """Dropout, all blocks and ln_f on embeddings that are already made: (B, T, C) -> (B, T, C).

        No wpe is added, so T may be any length.
        """
        x = self.drop(x)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def forward(self, tokens, targets=None):
        """Next-token logits of text.

        tokens (B, T) int, T at most block_size; targets (B, T) int or None, the token that follows
        each one. Returns (logits (B, T, V), mean cross-entropy in nats or None).
        Raises ValueError for more tokens than block_size.
        """
        T = tokens.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens, but the model knows {self.config.block_size} positions")
        x = self.wte(tokens) + self.wpe.weight[:T]  # (B, T, C)
        logits = F.linear(self.blocks(x), self.wte.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Append n sampled tokens to tokens (B, T); temperature 0 takes the likeliest each time.

        Raises ValueError for an empty prompt. A text longer than block_size is read from its end.
        """
        if tokens.shape[1] == 0:
            raise ValueError("an empty prompt: give at least one token")
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size :])[0][:, -1].float()  # (B, V)
            if temperature == 0:
                following = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < smallest, -torch.inf)
                probabilities = (logits / temperature).softmax(-1)
                following = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
        return tokens


@torch.no_grad()
def text_loss(gpt, tokens, batch=4):
    """Mean next-token cross-entropy of a text, in nats a token; exp of it is the perplexity.

    tokens (N,) integers, a NumPy array, memory-mapped or not. Read in consecutive blocks of
    block_size: each token but the first is predicted once, from those before it in its block.
    Runs in evaluation mode and leaves the mode as it was. Raises ValueError below 2 tokens.
    """
    if len(tokens) < 2:
        raise ValueError("a loss needs at least 2 tokens")
    device, length, training = gpt.wte.weight.device, gpt.config.block_size, gpt.training
    gpt.eval()
    total = 0.0
    for i in range(0, len(tokens) - 1, batch * length):
        piece = torch.as_tensor(tokens[i : i + batch * length + 1].astype("int64"), device=device)
        whole = (len(piece) - 1) // length * length
        blocks = [(piece[:whole].view(-1, length), piece[1 : whole + 1].view(-1, length))]
        blocks.append((piece[whole:-1][None], piece[whole + 1 :][None]))  # what is left, if any
        for x, y in blocks:
            if x.numel():
                total += gpt(x, y)[1].item() * x.numel()
    gpt.train(training)
    return total / (len(tokens) - 1)


class ResidualMLP(nn.Module):
    """LaMo's embedding: fc2(GELU(fc1 x)) + fc1 x. The residual is the authors' code's."""

    def __init__(self, n_in, n_embd):
        super().__init__()
        self.fc1 = nn.Linear(n_in, n_embd)
        self.fc2 = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h)) + h


def action_head(embed, n_embd, act_dim):
    """Hidden state over s_t (.., C) -> action (.., A): tanh-bounded for `linear` only."""
    if embed == "linear":
        return nn.Sequential(nn.Linear(n_embd, act_dim), nn.Tanh())
    return nn.Sequential(nn.Linear(n_embd, n_embd), nn.GELU(), nn.Linear(n_embd, act_dim))


class LaMo(nn.Module):
    """A GPT that reads trajectories and predicts actions: the paper's policy.

    gpt: the body, used for language too; obs_dim O; act_dim A; embed "linear" or "mlp", how return,
    state and action become tokens; max_ep_len, rows of the time embedding.
    """

    def __init__(self, gpt, obs_dim, act_dim, embed="mlp", max_ep_len=1000):
        super().__init__()
        if embed not in ("linear", "mlp"):
            raise ValueError(f"embed is {embed!r}, but must be 'linear' or 'mlp'")
        C = gpt.config.n_embd
        make_embedding = nn.Linear if embed == "linear" else ResidualMLP
        self.embed_return = make_embedding(1, C)
        self.embed_state = make_embedding(obs_dim, C)
        self.embed_action = make_embedding(act_dim, C)
        self.embed_time = nn.Embedding(max_ep_len, C)
        nn.init.normal_(self.embed_time.weight, std=0.02)  # as wpe starts: N(0, 1) drowns the rest
        self.embed_ln = nn.LayerNorm(C, eps=1e-5)
        self.head = action_head(embed, C, act_dim)
        self.gpt = gpt

    def forward(self, rtg, obs, act, timestep):
        """Predict the action of every step from all that came before it.

        rtg (B, K, 1) returns-to-go over the task's scale; obs (B, K, O) normalised; act (B, K, A),
        where act[:, t] is read only by later steps; timestep (B, K) int, clipped to the time
        embedding. Padding stands on the right, and what it holds does not matter.
        Returns actions (B, K, A).
        """
        B, K = timestep.shape
        tokens = (self.embed_return(rtg), self.embed_state(obs), self.embed_action(act))
        x = torch.stack(tokens, dim=2)  # (B, K, 3, C): R_t, s_t, a_t
        time = self.embed_time(timestep.clamp(max=self.embed_time.num_embeddings - 1))  # (B, K, C)
        x = self.embed_ln(x) + time.unsqueeze(2)  # (B, K, 3, C)
        h = self.gpt.blocks(x.flatten(1, 2))  # (B, 3K, C)
        return self.head(h.view(B, K, 3, -1)[:, :, 1])  # over s_t: (B, K, A)
