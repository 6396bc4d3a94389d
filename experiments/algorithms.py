"""The baselines' networks and losses: BC, TD3+BC, IQL, CQL; for choices BC, CQL, BCQ, NFQ.

Losses are TorchRL's, but for three parts, which are ours: CQL's conservative term, because TorchRL
0.14 takes its log-sum-exp over three sampled actions, however many are asked for; that of CQL for
choices, because TorchRL's DiscreteCQLLoss computes targets without its target network; and BCQ's
filter, which TorchRL lacks. Every algorithm is one function that returns a Learner.

Hyperparameters are CORL's for numbers (github.com/tinkoff-ai/CORL: configs/offline/*/hopper/
medium_v2.yaml, defaults of algorithms/offline/*.py; CORL has no kitchen, which takes the same), and
d3rlpy's for choices (github.com/takuseno/d3rlpy: reproductions/offline, and DiscreteBCConfig for
BC). Where d3rlpy predicts 200 quantiles of a value, here it is one number. SHORT_NUMBERS are ours.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.modules import IndependentNormal, ProbabilisticActor, QValueModule, TanhNormal
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives import (
    BCLoss,
    CQLLoss,
    DQNLoss,
    HardUpdate,
    IQLLoss,
    SoftUpdate,
    TD3BCLoss,
)

from embeddings import FrameEncoder

# TorchRL's word on losses that have no target networks, of no use to anyone here.
warnings.filterwarnings("ignore", r"The name target_\w+ wasn't part of the annotations")

NUMBERS = {  # CORL's; an algorithm reads what its row names, and nothing else
    "bc": dict(lr=3e-4, batch=256, layers=2),
    "td3bc": dict(lr=3e-4, batch=256, layers=2, discount=0.99, tau=0.005, alpha=2.5),
    "iql": dict(lr=3e-4, batch=256, layers=2, discount=0.99, tau=0.001, beta=3.0, expectile=0.7),
    "cql": dict(lr=3e-4, batch=256, layers=3, discount=0.99, tau=0.005, alpha=10.0, actor_lr=3e-5),
}
SPAN = dict(iql=1000.0, cql=1000.0)  # what these have rewards scaled to in MuJoCo's tasks
SHORT_NUMBERS = {  # for the 5000 steps of the short preset, where CORL has a million
    "td3bc": dict(tau=0.1),  # or values would not have come a tenth of the way to what is earned
    "cql": dict(tau=0.1, actor_lr=3e-4, batch=64),
    # IQL stays: on 1 % of hopper, the better its values the worse its policy (see the README)
}
CHOICES = {  # d3rlpy's
    "bc": dict(lr=1e-3, batch=100, layers=2, beta=0.5),
    "cql": dict(lr=5e-5, batch=32, layers=2, discount=0.99, target_every=2000, alpha=4.0),
    "bcq": dict(lr=5e-5, batch=32, layers=2, discount=0.99, target_every=2000, beta=0.01),
    "nfq": dict(lr=5e-5, batch=32, layers=2, discount=0.99),
}
ADAM_EPS = dict(cql=1e-2 / 32, bcq=1e-2 / 32, nfq=1e-8)  # Adam's epsilon, for choices
HIDDEN = 256  # units of a layer
POLICY_NOISE, NOISE_CLIP, ACTOR_EVERY = 0.2, 0.5, 2  # TD3's
IQL_STD = 0.5**0.5  # of a fixed Gaussian: its log-likelihood is CORL's squared error
CQL_ACTIONS = 10  # sampled from each of three distributions for the conservative term
LOG_STD_OFFSET, LOG_STD_RANGE = -1.0, (-20.0, 2.0)  # of CQL's policy
BCQ_THRESHOLD = 0.3  # of the likeliest choice's probability: what is less likely is never chosen
FRAME_FEATURES = 512  # what the convolutions end in (Mnih et al. 2015)


@dataclass
class Learner:
    trained: nn.Module  # all that is trained (target networks are its buffers)
    policy: nn.Module  # observations (B, O) or (B, 4, 84, 84) -> actions (B, A) or logits (B, n)
    update: Callable  # a batch, see baselines.sample_transitions -> a dictionary of loss tensors


# --- networks ------------------------------------------------------------------------------------


def mlp(n_in, n_out, layers):
    """(B, n_in) -> (B, n_out), with `layers` hidden layers of HIDDEN rectified units."""
    widths = [n_in] + [HIDDEN] * layers
    hidden = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], n_out))


class Critic(nn.Module):
    """Q(s, a): observations (B, O), actions (B, A) -> (B, 1)."""

    def __init__(self, obs, act, layers, orthogonal=False):
        super().__init__()
        self.net = mlp(obs + act, 1, layers)
        if orthogonal:  # CORL's CQL starts its critics so
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight, gain=2**0.5)
                    nn.init.zeros_(layer.bias)
            nn.init.orthogonal_(self.net[-1].weight, gain=1e-2)

    def forward(self, observation, action):
        return self.net(torch.cat([observation, action], dim=-1))


class Gaussian(nn.Module):
    """CQL's policy before its tanh: observations (B, O) -> mean and standard deviation (B, A)."""

    def __init__(self, obs, act, layers):
        super().__init__()
        self.net = mlp(obs, 2 * act, layers)
        nn.init.xavier_uniform_(self.net[-1].weight, gain=1e-2)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, observation):
        loc, log_std = self.net(observation).chunk(2, dim=-1)
        return loc, (log_std + LOG_STD_OFFSET).clamp(*LOG_STD_RANGE).exp()


def features(obs_shape, layers):
    """A network of an observation's features, for choices, and how many: (B, ..) -> (B, n)."""
    if len(obs_shape) == 2:  # frames
        encoder = FrameEncoder(FRAME_FEATURES, "linear")  # (B, 4, 84, 84) -> (B, 1, 512)
        return nn.Sequential(encoder, nn.Flatten(), nn.ReLU()), FRAME_FEATURES
    return nn.Sequential(*mlp(*obs_shape, HIDDEN, layers - 1), nn.ReLU()), HIDDEN


class Likeliest(nn.Module):
    """BCQ's filter: the best of the choices that an imitation of the data finds likely enough.

    values (B, n) and features (B, F) -> the choice (B,) and its value (B, 1).
    """

    def __init__(self, n_features, n_act):
        super().__init__()
        self.imitation = nn.Linear(n_features, n_act)

    def forward(self, values, features):
        log_probability = self.imitation(features).log_softmax(-1)  # (B, n)
        least = log_probability.amax(-1, keepdim=True) + math.log(BCQ_THRESHOLD)
        best = values.masked_fill(log_probability < least, -torch.inf).max(-1, keepdim=True)
        return best.indices[..., 0], best.values


class Chosen(nn.Module):
    """The likeliest choice as logits that leave no other: choose(observations) (B,) -> (B, n)."""

    def __init__(self, net, choose, n):
        super().__init__()
        self.net, self.choose, self.n = net, choose, n

    def forward(self, observation):
        return F.one_hot(self.choose(observation), self.n).float().log()  # 0 and -inf


def adam(parameters, lr, eps=1e-8):
    return torch.optim.Adam(list(parameters), lr=lr, eps=eps)


def step(optimiser, loss):
    """One step of an optimiser along a loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


# --- actions that are numbers --------------------------------------------------------------------


def clone(obs_shape, n_act, c):
    """BC: mean squared error of actions."""
    policy = nn.Sequential(mlp(*obs_shape, n_act, c["layers"]), nn.Tanh())
    actor = TensorDictModule(policy, ["observation"], ["action"])
    loss = BCLoss(actor, loss_function="mse")
    optimiser = adam(loss.parameters(), c["lr"])

    def update(batch):
        value = loss(batch)["loss_bc"]
        step(optimiser, value)
        return {"loss_bc": value}

    return Learner(loss, policy, update)


def td3bc(obs_shape, n_act, c):
    """TD3+BC (Fujimoto and Gu 2021): the actor climbs Q, held to the data's actions."""
    policy = nn.Sequential(mlp(*obs_shape, n_act, c["layers"]), nn.Tanh())
    actor = TensorDictModule(policy, ["observation"], ["action"])
    critic = Critic(*obs_shape, n_act, c["layers"])
    critic = TensorDictModule(critic, ["observation", "action"], ["state_action_value"])
    loss = TD3BCLoss(
        actor,
        critic,
        bounds=(-1.0, 1.0),
        policy_noise=POLICY_NOISE,
        noise_clip=NOISE_CLIP,
        alpha=c["alpha"],
        loss_function="l2",
    )
    loss.make_value_estimator(gamma=c["discount"])
    targets = SoftUpdate(loss, tau=c["tau"])
    critics = adam(loss.qvalue_network_params.parameters(), c["lr"])
    actors = adam(loss.actor_network_params.parameters(), c["lr"])
    updates = 0

    def update(batch):
        nonlocal updates
        updates += 1
        losses = {"loss_critic": loss.qvalue_loss(batch)[0]}
        step(critics, losses["loss_critic"])
        if updates % ACTOR_EVERY == 0:
            losses["loss_actor"] = loss.actor_loss(batch)[0]
            step(actors, losses["loss_actor"])
            targets.step()
        return losses

    return Learner(loss, policy, update)


def iql(obs_shape, n_act, c):
    """IQL (Kostrikov et al. 2021): an expectile of Q for a value, and cloning in its proportion."""
    policy = nn.Sequential(mlp(*obs_shape, n_act, c["layers"]), nn.Tanh())

    def around(loc):
        return loc, torch.full_like(loc, IQL_STD)

    actor = ProbabilisticActor(
        TensorDictSequential(
            TensorDictModule(policy, ["observation"], ["mean"]),
            TensorDictModule(around, ["mean"], ["loc", "scale"]),
        ),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    critic = Critic(*obs_shape, n_act, c["layers"])
    critic = TensorDictModule(critic, ["observation", "action"], ["state_action_value"])
    value = TensorDictModule(mlp(*obs_shape, 1, c["layers"]), ["observation"], ["state_value"])
    loss = IQLLoss(
        actor,
        critic,
        value,
        loss_function="l2",
        temperature=c["beta"],
        expectile=c["expectile"],
    )
    loss.make_value_estimator(gamma=c["discount"])
    targets = SoftUpdate(loss, tau=c["tau"])
    values = adam(loss.value_network_params.parameters(), c["lr"])
    critics = adam(loss.qvalue_network_params.parameters(), c["lr"])
    actors = adam(loss.actor_network_params.parameters(), c["lr"])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(actors, c["steps"])

    def update(batch):
        all_losses = loss(batch)
        losses = {name: all_losses[name] for name in ("loss_value", "loss_qvalue", "loss_actor")}
        for optimiser, value in zip((values, critics, actors), losses.values(), strict=True):
            step(optimiser, value)
        cosine.step()
        targets.step()
        return losses

    return Learner(loss, policy, update)


def conservative(loss, batch):
    """CQL's conservative term (Kumar et al. 2020, equation 4, "CQL(H)"), ours: a scalar.

    For both critics, mean over the batch of log sum exp of Q over sampled actions, each less the
    log-density it was sampled with, minus Q of the data's action; summed over the critics. Sampled
    are CQL_ACTIONS uniformly, from the policy here, and from the policy at the next observation.
    """
    obs, n_act = batch["observation"], batch["action"].shape[-1]
    size = (CQL_ACTIONS, len(obs))
    actions = [torch.rand(*size, n_act, device=obs.device) * 2 - 1]
    densities = [torch.full(size, n_act * math.log(0.5), device=obs.device)]
    with torch.no_grad(), loss.actor_network_params.to_module(loss.actor_network):
        for state in (batch, batch["next"]):
            policy = loss.actor_network.get_dist(state.select("observation"))
            action, density = rsample_and_log_prob(policy, size[:1])
            actions.append(action)
            densities.append(density)
    actions = torch.cat([*actions, batch["action"][None]])  # (3 n + 1, B, A), the data's last
    densities = torch.cat(densities)  # (3 n, B)
    total = 0.0
    for i in range(2):
        with loss.qvalue_network_params[i].to_module(loss.qvalue_network):
            critic = loss.qvalue_network.module
            q = critic(obs.expand(len(actions), *obs.shape), actions)[..., 0]  # (3 n + 1, B)
        total = total + ((q[:-1] - densities).logsumexp(0) - q[-1]).mean()
    return total


def cql(obs_shape, n_act, c):
    """CQL (Kumar et al. 2020) on soft actor-critic, entropy tuned, not backed up."""
    net = Gaussian(*obs_shape, n_act, c["layers"])
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critics = [  # two at once, for TorchRL would draw the second one, and the first anew
        TensorDictModule(
            Critic(*obs_shape, n_act, c["layers"], orthogonal=True),
            ["observation", "action"],
            ["state_action_value"],
        )
        for _ in range(2)
    ]
    loss = CQLLoss(actor, critics, loss_function="l2", target_entropy=-float(n_act))
    loss.make_value_estimator(gamma=c["discount"])
    targets = SoftUpdate(loss, tau=c["tau"])
    critics = adam(loss.qvalue_network_params.parameters(), c["lr"])
    actors = adam(loss.actor_network_params.parameters(), c["actor_lr"])
    temperatures = adam([loss.log_alpha], c["actor_lr"])

    def update(batch):
        actor_loss, about = loss.actor_loss(batch)
        losses = {
            "loss_alpha": loss.alpha_loss(about, mask_tensordict=batch)[0],
            "loss_actor": actor_loss,
            "loss_critic": loss.q_loss(batch)[0],
            "loss_conservative": conservative(loss, batch),
        }
        step(temperatures, losses["loss_alpha"])
        step(actors, losses["loss_actor"])
        step(critics, losses["loss_critic"] + c["alpha"] * losses["loss_conservative"])
        targets.step()
        return losses

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, observation):
            return self.net(observation)[0].tanh()

    return Learner(loss, Mean(), update)


# --- actions that are choices --------------------------------------------------------------------


def clone_choices(obs_shape, n_act, c):
    """BC: cross-entropy of choices, and beta times the mean square of the logits."""
    encoder, n = features(obs_shape, c.get("layers"))
    net = nn.Sequential(encoder, nn.Linear(n, n_act))
    actor = TensorDictModule(net, ["observation"], ["action"])
    loss = BCLoss(actor, loss_function="cross_entropy")
    optimiser = adam(loss.parameters(), c["lr"])

    def update(batch):
        losses = {"loss_bc": loss(batch)["loss_bc"]}
        losses["loss_logits"] = net(batch["observation"]).square().mean()
        step(optimiser, losses["loss_bc"] + c["beta"] * losses["loss_logits"])
        return losses

    return Learner(loss, Chosen(net, lambda x: net(x).argmax(-1), n_act), update)


def q_learning(obs_shape, n_act, c):
    """NFQ, CQL and BCQ for choices: Q-learning, which they keep to the data in their own ways.

    NFQ (Riedmiller 2005): by nothing, and without a target network. CQL: double Q-learning
    (van Hasselt et al. 2016), and the conservative term, which for choices needs no samples. BCQ
    (Fujimoto et al. 2019, arXiv 1910.01708): double Q-learning that takes only choices at least
    BCQ_THRESHOLD as likely as the likeliest, by an imitation that shares the features.
    """
    algo, delayed = c["algo"], c["algo"] != "nfq"
    encoder, n = features(obs_shape, c.get("layers"))
    value, likeliest = nn.Linear(n, n_act), Likeliest(n, n_act)
    parts = [
        TensorDictModule(encoder, ["observation"], ["features"]),
        TensorDictModule(value, ["features"], ["action_value"]),
        QValueModule("categorical"),
    ]
    if algo == "bcq":
        out_keys = ["action", "chosen_action_value"]
        parts[2] = TensorDictModule(likeliest, ["action_value", "features"], out_keys)
    net = TensorDictSequential(*parts)
    loss = DQNLoss(
        net,
        action_space="categorical",
        loss_function="smooth_l1",  # as d3rlpy's Q function, Huber's
        delay_value=delayed,
        double_dqn=delayed,
    )
    loss.make_value_estimator(gamma=c["discount"])
    targets = None
    if delayed:  # TorchRL's counter starts at 0: it copies one step later than it is told
        targets = HardUpdate(loss, value_network_update_interval=c["target_every"] - 1)
    optimiser = adam(loss.parameters(), c["lr"], ADAM_EPS[algo])

    def update(batch):
        losses = {"loss_critic": loss(batch)["loss"]}
        total = losses["loss_critic"]
        if algo == "cql":
            q = value(encoder(batch["observation"]))  # (B, n)
            chosen = q.gather(-1, batch["action"][:, None])[:, 0]
            losses["loss_conservative"] = (q.logsumexp(-1) - chosen).mean()
            total = total + c["alpha"] * losses["loss_conservative"]
        if algo == "bcq":
            logits = likeliest.imitation(encoder(batch["observation"]))
            losses["loss_imitation"] = F.cross_entropy(logits, batch["action"])
            losses["loss_imitation"] += c["beta"] * logits.square().mean()
            total = total + losses["loss_imitation"]
        step(optimiser, total)
        if targets is not None:
            targets.step()
        return losses

    def choose(observation):
        return net(TensorDict(observation=observation, batch_size=len(observation)))["action"]

    return Learner(loss, Chosen(net, choose, n_act), update)


def make_learner(obs_shape, n_act, discrete, settings):
    """The Learner of settings["algo"]. obs_shape and n_act as LaMo's, and discrete likewise."""
    if discrete:
        make = clone_choices if settings["algo"] == "bc" else q_learning
    else:
        make = {"bc": clone, "td3bc": td3bc, "iql": iql, "cql": cql}[settings["algo"]]
    return make(obs_shape, n_act, settings)
