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
from torch.utils.checkpoint import checkpoint

from embeddings import FrameEncoder, action_head, embed_numbers

SHORT = 256  # tokens up to which a CPU attends faster by hand than in PyTorch's fused kernel
LOSS_ROWS = 512  # tokens whose logits are held at a time: 50 MB of bf16 for GPT-2's vocabulary


@dataclass
class GPTConfig:
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # C, the width of the residual stream
    vocab_size: int = 50257  # V, GPT-2's byte-pair vocabulary; 257 for bytes
    block_size: int = 1024  # positions wpe knows
    dropout: float = 0.1  # on embeddings, attention weights and residual branches
    visual: bool = (
        False  # ImageGPT (Chen et al. 2020): other norms and activation, words are pixels
    )


def norm(config):
    """A LayerNorm; ImageGPT's neither centres nor shifts."""
    return (nn.RMSNorm if config.visual else nn.LayerNorm)(config.n_embd, eps=1e-5)


def dropout(x, p, training):
    """F.dropout: x with a share p of its entries zeroed and the others scaled up by 1 / (1 - p).

    On a CPU PyTorch draws the mask number by number. Here a random 64-bit integer serves four
    entries, each kept unless its 16 bits are among the lowest p of their 65,536 values.
    """
    if x.device.type != "cpu" or not training or not 0 < p < 1 or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    parts = numbers.view(torch.int16)[: x.numel()].view(x.shape)  # -32,768 to 32,767
    lowest = min(round(p * 2**16) - 2**15, 2**15 - 1)  # of those that are kept
    return x * (parts >= lowest) * (1 / (1 - p))


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, x):
        return dropout(x, self.p, self.training)


def attend(q, k, v, p):
    """Causal attention with dropout p of its weights: q, k and v (B, H, T, D) -> (B, H, T, D).

    On a CPU by hand in bf16 if the sequence is short, where that takes a fifth or less of the
    fused kernel's time (rows "attention" of bench.py), and with dropout, for which PyTorch has no
    fused kernel there. Scores are then rounded to bf16 before the softmax, as autocast does.
    """
    B, H, T, D = q.shape
    by_hand = p > 0 or (T <= SHORT and q.dtype == torch.bfloat16)
    if q.device.type != "cpu" or not by_hand:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5)  # (B H, T, T)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (dropout(weights, p, training=True) @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, C) -> (B, T, C), or of it the positions `read`."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # Q, K and V side by side
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, read=slice(None)):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, C/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        p = self.dropout if self.training else 0.0
        y = attend(q, k, v, p).transpose(1, 2)[:, read]
        return self.c_proj(y.flatten(2))  # heads side by side again


class MLP(nn.Module):
    """The feed-forward half of a block: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.visual = config.visual

    def forward(self, x):
        h = self.c_fc(x)  # (B, T, 4 C)
        h = h * (1.702 * h).sigmoid() if self.visual else F.gelu(h, approximate="tanh")
        return self.c_proj(h)


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, C) -> (B, T, C), or of it the positions `read`."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x, read=slice(None)):
        x = x[:, read] + self.drop(self.attn(self.ln_1(x), read))
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
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
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

    def blocks(self, x, read=slice(None)):
        """Dropout, all blocks and ln_f on embeddings that are already made: (B, T, C) -> (B, T, C).

        No wpe is added, so T may be any length. read: the positions wanted, if not all. Only the
        last block can know them: every other one's output is attended to.
        """
        x = self.drop(x)
        *others, last = self.h
        for block in others:
            x = block(x)
        return self.ln_f(last(x, read))

    def forward(self, tokens, targets=None):
        """Next-token logits of text, or the loss.

        tokens (B, T) int, T at most block_size; targets (B, T) int or None, the token that follows
        each one. Returns (logits (B, T, V), None) without targets, and with them (None, mean
        cross-entropy in nats). Raises ValueError for more tokens than block_size.
        """
        T = tokens.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens, but the model knows {self.config.block_size} positions")
        x = self.wte(tokens) + self.wpe.weight[:T]  # (B, T, C)
        h = self.blocks(x)  # (B, T, C)
        if targets is None:
            return F.linear(h, self.wte.weight), None
        h, targets = h.flatten(0, 1).split(LOSS_ROWS), targets.flatten().split(LOSS_ROWS)
        # Logits are larger than all else here: each part's are dropped, and made again in backward.
        once = dict(use_reentrant=False, preserve_rng_state=False)
        parts = [
            checkpoint(self.summed_loss, *part, **once) for part in zip(h, targets, strict=True)
        ]
        return None, torch.stack(parts).sum() / tokens.numel()

    def summed_loss(self, h, targets):
        """Cross-entropy, summed, of what follows hidden states: h (N, C), targets (N,) -> ()."""
        return F.cross_entropy(F.linear(h, self.wte.weight).float(), targets, reduction="sum")

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


class LaMo(nn.Module):
    """A GPT that reads trajectories and predicts actions: the paper's policy.

    gpt: the body, used for language too; obs_shape: (O,) numbers or (84, 84) frames; n_act: A,
    numbers in an action, or, with discrete, how many actions there are to choose from; embed
    "linear", "mlp" or "tokens", how return, state and action become tokens; max_ep_len, rows of
    the time embedding. Raises ValueError for another embed.
    """

    def __init__(self, gpt, obs_shape, n_act, discrete=False, embed="mlp", max_ep_len=1000):
        super().__init__()
        C = gpt.config.n_embd
        wte, frames = gpt.wte.weight, len(obs_shape) == 2
        self.discrete = discrete
        self.embed_return = embed_numbers(embed, 1, wte)
        self.embed_state = (
            FrameEncoder(C, embed) if frames else embed_numbers(embed, *obs_shape, wte)
        )
        self.embed_action = nn.Embedding(n_act, C) if discrete else embed_numbers(embed, n_act, wte)
        self.embed_time = nn.Embedding(max_ep_len, C)
        nn.init.normal_(self.embed_time.weight, std=0.02)  # as wpe starts: N(0, 1) drowns the rest
        self.embed_ln = nn.LayerNorm(C, eps=1e-5)
        self.head = action_head(embed, C, n_act, discrete)
        self.gpt = gpt

    def observe(self, rtg, obs, timestep):
        """The tokens R_t and s_t: (B, K, 2, C). Arguments as forward's."""
        return self.stamp([self.embed_return(rtg), self.embed_state(obs)], timestep)

    def remember(self, act, timestep):
        """The token a_t: (B, K, 1, C). Arguments as forward's."""
        return self.stamp([self.embed_action(act)], timestep)

    def stamp(self, embedded, timestep):
        """Normalise some embeddings of a step, each (B, K, C), and add its time: (B, K, n, C)."""
        time = self.embed_time(timestep.clamp(max=self.embed_time.num_embeddings - 1))  # (B, K, C)
        return self.embed_ln(torch.stack(embedded, dim=2)) + time.unsqueeze(2)

    def timeless(self, rtg, obs, act):
        """The tokens R_t, s_t and a_t as they are before their time is added: (B, K, 3, C)."""
        embedded = [self.embed_return(rtg), self.embed_state(obs), self.embed_action(act)]
        return self.embed_ln(torch.stack(embedded, dim=2))

    def forward(self, rtg, obs, act, timestep):
        """Predict the action of every step from all that came before it.

        rtg (B, K, 1) returns-to-go over the task's scale; obs (B, K, O) normalised, or frames
        (B, K + STACK - 1, 84, 84) as windows.sample_windows gives them; act (B, K, A) numbers or
        (B, K) ids, where act[:, t] is read only by later steps; timestep (B, K) int, clipped to
        the time embedding. Padding stands on the right, and what it holds does not matter.
        Returns actions (B, K, A) or logits (B, K, n).
        """
        tokens = [self.observe(rtg, obs, timestep), self.remember(act, timestep)]
        x = torch.cat(tokens, dim=2).flatten(1, 2)  # (B, 3K, C): R_0 s_0 a_0 R_1 s_1 a_1 ...
        return self.head(self.gpt.blocks(x, read=slice(1, None, 3)))  # over s_t

    def act(self, tokens):
        """Predict one action from tokens that end in its s_t: (B, 3K - 1, C) -> (B, n_act).

        tokens: what observe and remember made of the last K steps; sliding on changes none of them.
        """
        return self.head(self.gpt.blocks(tokens, read=slice(-1, None)))[:, 0]


class Objective(nn.Module):
    """The losses of a step in one call, so that torch.compile and DDP see a step as one graph.

    centres: directions (k, C) of length 1 that Wiki-RL pulls tokens towards, or None.
    """

    def __init__(self, model, centres=None):
        super().__init__()
        self.model = model
        self.register_buffer("centres", centres)

    def forward(self, window, count, text):
        """The action loss, the language loss and the similarity, of which a step makes its loss.

        window: what sample_windows returns; count: what valid_steps returns; text: what sample_text
        returns, or None.
        Returns (mean squared error over valid action entries, or cross-entropy of choices over
        valid steps; mean cross-entropy of the text or 0.0; mean cosine of the valid steps' tokens
        with the centre nearest in direction, or 0.0).
        """
        rtg, obs, act, timestep, valid = window
        predicted = self.model(rtg, obs, act, timestep).float()
        if self.model.discrete:  # (B, K, n) logits
            error = F.cross_entropy(predicted.flatten(0, 1), act.flatten(), reduction="none")
            error = error.view_as(act)  # (B, K)
        else:
            error = ((predicted - act) ** 2).mean(-1)  # (B, K)
        action_loss = (error * valid).sum() / count
        lm_loss = self.model.gpt(*text)[1] if text is not None else torch.zeros_like(action_loss)
        similarity = torch.zeros_like(action_loss)
        if self.centres is not None:
            tokens = F.normalize(self.model.timeless(rtg, obs, act), dim=-1)  # (B, K, 3, C)
            nearest = (tokens @ self.centres.T).float().amax(-1).mean(-1)  # (B, K)
            similarity = (nearest * valid).sum() / count
        return action_loss, lm_loss, similarity
