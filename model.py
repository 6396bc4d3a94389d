"""GPT-2 written by hand, and LaMo: the same transformer reading trajectories instead of text.

GPT is OpenAI's GPT-2 (Radford et al. 2019), its parts named as OpenAI named them. LaMo (Shi et al.
2024, arXiv 2310.20587) is the Decision Transformer (Chen et al. 2021, arXiv 2106.01345) on that
body: three tokens for each environment step, return-to-go R, state s and action a,

    R_0 s_0 a_0 R_1 s_1 a_1 ...  ->  GPT-2's blocks  ->  the hidden state over s_t predicts a_t

A window shorter than the context is padded on the right, and nothing needs a mask: attention is
causal, and trajectory tokens carry no position embedding, only a learned embedding of the
environment's time step, so what stands behind a token cannot change it. Only the loss is masked.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

BINS = 512  # of each number, for the embedding `tokens` (section 5 of the paper, after RT-2)
MU, LARGEST = 100, 1e5  # numbers up to LARGEST have bins, those around 0 the narrowest
SPAN = math.log(MU * LARGEST + 1)
ZERO = {50257: 15, 257: 48, 49152: 32, 128256: 15, 151936: 15}  # vocabularies' "0"; 1 to 9 follow
ACTIVATIONS = {  # of the MLP, by transformers' names; GPT-2's is the first
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),  # ImageGPT's
}


# --- GPT-2 ---------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads a block
    n_embd: int = 768  # C, the width of the residual stream
    vocab_size: int = 50257  # V, GPT-2's byte-pair vocabulary; 257 for bytes
    block_size: int = 1024  # positions wpe knows
    dropout: float = 0.1  # on embeddings, attention weights and residual branches
    visual: bool = False  # ImageGPT (Chen et al. 2020): a norm of its own; its words are pixels
    activation: str = "gelu_new"  # a row of ACTIVATIONS
    norm_eps: float = 1e-5  # added to the variance in every norm
    encoding = None  # no setting: the vocabulary tells the tokeniser, see data.get_encoding


def norm(config):
    """A LayerNorm; ImageGPT's neither centres nor shifts."""
    return (nn.RMSNorm if config.visual else nn.LayerNorm)(config.n_embd, eps=config.norm_eps)


def attend(q, k, v, p):
    """Causal attention with dropout p of its weights: q, k and v (B, H, T, D) -> (B, H, T, D)."""
    B, H, T, D = q.shape
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    # In bf16 on a CPU PyTorch's kernel is slow: with it, a step of the mini LM takes 1.38 times.
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5)  # (B H, T, T)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return (F.dropout(weights, p) @ v).view(B, H, T, D)


class Attention(nn.Module):
    """Causal multi-head self-attention: (B, T, C) -> (B, T, C), or of it the positions `read`."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # Q, K and V side by side
        self.c_attn.splits = 3  # LoRA updates each of them apart, see lora.py
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, read=slice(None)):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, C/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, C/H)
        p = self.dropout if self.training else 0.0
        y = attend(q, k, v, p).transpose(1, 2)[:, read]  # (B, T, H, C/H)
        return self.c_proj(y.flatten(2))  # heads side by side again


class MLP(nn.Module):
    """The feed-forward half of a block: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))  # 4 C wide in between


class Block(nn.Module):
    """Pre-norm transformer block: (B, T, C) -> (B, T, C), or of it the positions `read`."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, read=slice(None)):
        x = x[:, read] + self.drop(self.attn(self.ln_1(x), read))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2. The output head is wte itself (tied), so it has no parameter of its own."""

    lora_targets = ("c_attn",)  # where LaMo puts LoRA: Q, K and V

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        for name, parameter in self.named_parameters():  # GPT-2's initialisation
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * config.n_layer) ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def blocks(self, x, read=slice(None)):
        """Dropout, all blocks and ln_f on embeddings that are already made: (B, T, C) -> (B, T, C).
        No wpe is added, so T may be any length. read: the positions wanted, if not all. Only the
        last block can leave the others out: what earlier blocks make is attended to."""
        x = self.drop(x)
        *others, last = self.h
        for block in others:
            x = block(x)
        return self.ln_f(last(x, read))

    def forward(self, tokens, targets=None):
        """Next-token logits of text, or the loss.

        tokens (B, T) int, T at most block_size; targets (B, T) int or None, the token that follows
        each one. Returns logits (B, T, V), or with targets the mean cross-entropy in nats.
        """
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, C)
        logits = F.linear(self.blocks(x), self.wte.weight)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, tokens, n, temperature=1.0, top_k=None, generator=None):
        """Append n sampled tokens to tokens (B, T); temperature 0 takes the likeliest each time.
        A text longer than block_size is read from its end."""
        for _ in range(n):
            logits = self(tokens[:, -self.config.block_size :])[:, -1].float()  # (B, V)
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
def text_loss(gpt, tokens):
    """Mean next-token cross-entropy of a text, in nats a token; exp of it is the perplexity. tokens
    (N,), at least 2 integers in a NumPy array, are read in consecutive blocks of block_size: each
    token but the first is predicted once, from those before it in its block."""
    device, length, training = gpt.wte.weight.device, gpt.config.block_size, gpt.training
    gpt.eval()
    total, text = 0.0, torch.as_tensor(tokens.astype("int64"), device=device)
    for x, y in zip(text[:-1].split(length), text[1:].split(length), strict=True):
        total += gpt(x[None], y[None]).item() * len(x)
    gpt.train(training)
    return total / (len(tokens) - 1)


# --- from return, state and action to tokens ------------------------------------------------------


class ResidualMLP(nn.Module):
    """LaMo's embedding: fc2(GELU(fc1 x)) + fc1 x. The residual is the authors' code's."""

    def __init__(self, n_in, n_embd):
        super().__init__()
        self.fc1 = nn.Linear(n_in, n_embd)
        self.fc2 = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(F.gelu(h)) + h


def to_bins(x):
    """Which bin each number falls into: int64, 0 to BINS - 1. Numbers beyond LARGEST: the last.
    Bins are equally wide after mu-law companding, as in Gato (Reed et al. 2022, arXiv 2205.06175,
    section 2.1): normalised states, actions and returns of any size then share them."""
    squashed = x.sign() * (x.abs() * MU + 1).log() / SPAN  # -1 to 1
    return ((squashed + 1) / 2 * BINS).long().clamp(0, BINS - 1)


class TokenEmbedding(nn.Module):
    """Numbers, each looked up as a token: (.., n_in) -> (.., C), the mean over the n_in numbers.
    Every dimension has a table of its own, or the mean would not tell which number was whose. A
    bin's row starts as the mean embedding of the three digits of its number, "000" to "511"."""

    def __init__(self, n_in, wte):
        super().__init__()
        number = torch.arange(BINS)
        digits = torch.stack([number // 100, number // 10 % 10, number % 10], dim=1)  # (BINS, 3)
        rows = wte.detach()[ZERO[len(wte)] + digits].mean(1)  # (BINS, C)
        self.table = nn.Embedding.from_pretrained(rows.repeat(n_in, 1), freeze=False)
        self.register_buffer("first", torch.arange(n_in) * BINS, persistent=False)

    def forward(self, x):
        tokens = to_bins(x.float()) + self.first  # (.., n_in)
        found = F.embedding_bag(tokens.flatten(0, -2), self.table.weight, mode="mean")
        return found.view(*x.shape[:-1], -1)


EMBEDDINGS = {  # name: (n_in, wte (V, C)) -> a module (.., n_in) -> (.., C)
    "linear": lambda n_in, wte: nn.Linear(n_in, wte.shape[1]),  # the Decision Transformer's
    "mlp": lambda n_in, wte: ResidualMLP(n_in, wte.shape[1]),  # LaMo's
    "tokens": TokenEmbedding,  # what the paper tried in the manner of RT-2 (arXiv 2307.15818)
}


class FrameEncoder(nn.Module):
    """States of `stack` frames each: (B, K + stack - 1, 84, 84) bytes -> (B, K, C). The
    convolutions of Mnih et al. (2015), as Decision Transformer and LaMo have them for Atari."""

    def __init__(self, stack, n_embd, embed):
        super().__init__()
        self.stack = stack
        self.conv = nn.Sequential(
            nn.Conv2d(stack, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),  # 64 x 7 x 7
            nn.Linear(3136, n_embd),
        )
        self.mlp = ResidualMLP(n_embd, n_embd) if embed == "mlp" else nn.Identity()

    def forward(self, frames):
        states = frames.unfold(1, self.stack, 1).permute(0, 1, 4, 2, 3)  # (B, K, stack, 84, 84)
        x = self.conv(states.flatten(0, 1).float() / 255)  # (B K, C)
        return self.mlp(x).unflatten(0, states.shape[:2])  # (B, K, C)


# --- LaMo ----------------------------------------------------------------------------------------


class LaMo(nn.Module):
    """A GPT that reads trajectories and predicts actions: the paper's policy.

    gpt: the body, used for language too; obs_shape: (O,) numbers, or (4, 84, 84), a stack of
    frames; n_act: A, numbers in an action, or, with discrete, how many actions there are to choose
    from; embed: a row of EMBEDDINGS; max_ep_len: rows of the time embedding.
    """

    def __init__(self, gpt, obs_shape, n_act, discrete=False, embed="mlp", max_ep_len=1000):
        super().__init__()
        C, wte, make = gpt.config.n_embd, gpt.wte.weight, EMBEDDINGS[embed]
        self.discrete = discrete
        self.embed_return = make(1, wte)
        n_obs, *picture = obs_shape  # O, or 4 and (84, 84)
        self.embed_state = FrameEncoder(n_obs, C, embed) if picture else make(n_obs, wte)
        self.embed_action = nn.Embedding(n_act, C) if discrete else make(n_act, wte)
        if discrete and embed == "mlp":  # as the authors' code for Atari
            self.embed_action = nn.Sequential(self.embed_action, ResidualMLP(C, C))
        self.embed_time = nn.Embedding(max_ep_len, C)
        nn.init.normal_(self.embed_time.weight, std=0.02)  # as wpe starts: N(0, 1) drowns the rest
        self.embed_ln = nn.LayerNorm(C, eps=1e-5)
        if discrete:  # logits are free
            self.head = nn.Linear(C, n_act)
        elif embed == "linear":
            self.head = nn.Sequential(nn.Linear(C, n_act), nn.Tanh())
        else:
            self.head = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Linear(C, n_act))
        self.gpt = gpt

    def stamp(self, embedded, timestep):
        """Normalise some embeddings of a step, each (B, K, C), and add its time: (B, K, n, C)."""
        time = self.embed_time(timestep.clamp(max=self.embed_time.num_embeddings - 1))  # (B, K, C)
        return self.embed_ln(torch.stack(embedded, dim=2)) + time.unsqueeze(2)

    def observe(self, rtg, obs, timestep):
        """The tokens R_t and s_t: (B, K, 2, C). Arguments as forward's."""
        return self.stamp([self.embed_return(rtg), self.embed_state(obs)], timestep)

    def remember(self, act, timestep):
        """The token a_t: (B, K, 1, C). Arguments as forward's."""
        return self.stamp([self.embed_action(act)], timestep)

    def forward(self, rtg, obs, act, timestep):
        """Predict the action of every step from all that came before it.

        rtg (B, K, 1) returns-to-go over the task's scale; obs (B, K, O) normalised, or frames
        (B, K + 3, 84, 84) as data.sample_windows gives them; act (B, K, A) numbers or
        (B, K) ids, where act[:, t] is read only by later steps; timestep (B, K) int, clipped to
        the time embedding. Padding stands on the right, and what it holds does not matter.
        Returns actions (B, K, A) or logits (B, K, n).
        """
        tokens = [self.observe(rtg, obs, timestep), self.remember(act, timestep)]
        x = torch.cat(tokens, dim=2).flatten(1, 2)  # (B, 3K, C): R_0 s_0 a_0 R_1 s_1 a_1 ...
        return self.head(self.gpt.blocks(x, read=slice(1, None, 3)))  # over s_t

    def act(self, tokens):
        """Predict one action from tokens that end in its s_t: (B, 3K - 1, C) -> (B, n_act). tokens:
        what observe and remember made of the last K steps; sliding on changes none of them."""
        return self.head(self.gpt.blocks(tokens, read=slice(-1, None)))[:, 0]


class Objective(nn.Module):
    """The losses of a step in one call, so that torch.compile and DDP see a step as one graph.
    centres: directions (k, C) of length 1 that Wiki-RL pulls tokens towards, or None."""

    def __init__(self, model, centres=None):
        super().__init__()
        self.model = model
        self.register_buffer("centres", centres)

    def forward(self, window, count, text):
        """window: what data.sample_windows returns; count: valid steps that the action loss is a
        mean over; text: what data.sample_text returns, or None.

        Returns three scalars: the action loss (mean squared error over valid action entries, or
        cross-entropy of choices over valid steps), the language loss (mean cross-entropy, or 0),
        and Wiki-RL's similarity (mean cosine of valid tokens with the nearest centre, or 0).
        """
        rtg, obs, act, timestep, valid = window
        predicted = self.model(rtg, obs, act, timestep).float()
        if self.model.discrete:  # (B, K, n) logits
            error = F.cross_entropy(predicted.flatten(0, 1), act.flatten(), reduction="none")
            error = error.view_as(act)  # (B, K)
        else:
            error = ((predicted - act) ** 2).mean(-1)  # (B, K)
        action_loss = (error * valid).sum() / count
        lm_loss = torch.zeros_like(action_loss) if text is None else self.model.gpt(*text)
        similarity = torch.zeros_like(action_loss)
        if self.centres is not None:
            m = self.model  # its tokens before their time is added
            embedded = [m.embed_return(rtg), m.embed_state(obs), m.embed_action(act)]
            tokens = F.normalize(m.embed_ln(torch.stack(embedded, dim=2)), dim=-1)  # (B, K, 3, C)
            nearest = (tokens @ self.centres.T).float().amax(-1).mean(-1)  # (B, K)
            similarity = (nearest * valid).sum() / count
        return action_loss, lm_loss, similarity
