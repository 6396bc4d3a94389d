"""The baselines' networks and losses: BC, TD3+BC, IQL, CQL; for choices BC, CQL, BCQ, NFQ.

The losses are TorchRL's, except for three parts: CQL's conservative term, because TorchRL 0.14
takes its log-sum-exp over three sampled actions, however many are asked for; that of CQL for
choices, because TorchRL's DiscreteCQLLoss computes targets without its target network; and BCQ's
filter, which TorchRL lacks. Where d3rlpy predicts 200 quantiles of a value, here it is one number.

Every algorithm is a function (obs_shape, n_act, c) that returns a Learner; c: baselines.Config, or
what has its hyperparameters.
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
from torch.optim import Adam
from torchrl.modules import IndependentNormal, ProbabilisticActor, QValueModule, TanhNormal
from torchrl.modules.distributions.utils import rsample_and_log_prob
from torchrl.objectives import BCLoss, CQLLoss, DQNLoss, HardUpdate, IQLLoss, SoftUpdate, TD3BCLoss

from model import FrameEncoder

# TorchRL warns of every loss without target networks.
warnings.filterwarnings("ignore", r"The name target_\w+ wasn't part of the annotations")

ADAM_EPS = dict(cql=1e-2 / 32, bcq=1e-2 / 32, nfq=1e-8)  # Adam's epsilon for choices, d3rlpy's
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
    update: Callable  # a batch, see baselines.sample_transitions -> {name: loss}, after one step


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


def make_critic(*sizes, orthogonal=False):
    """A Critic as TorchRL's losses call it."""
    critic = Critic(*sizes, orthogonal)
    return TensorDictModule(critic, ["observation", "action"], ["state_action_value"])


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
    if len(obs_shape) == 3:  # frames
        encoder = FrameEncoder(obs_shape[0], FRAME_FEATURES, "linear")  # to (B, 1, 512)
        return nn.Sequential(encoder, nn.Flatten(), nn.ReLU()), FRAME_FEATURES
    return nn.Sequential(*mlp(*obs_shape, HIDDEN, layers - 1), nn.ReLU()), HIDDEN


class Likeliest(nn.Module):
    """BCQ's filter: the best of the choices that an imitation of the data finds likely enough.
    values (B, n) and features (B, F) -> the choice (B,) and its value (B, 1)."""

    def __init__(self, n_features, n_act):
        super().__init__()
        self.imitation = nn.Linear(n_features, n_act)

    def forward(self, values, features):
        log_probability = self.imitation(features).log_softmax(-1)  # (B, n)
        least = log_probability.amax(-1, keepdim=True) + math.log(BCQ_THRESHOLD)
        best = values.masked_fill(log_probability < least, -torch.inf).max(-1, keepdim=True)
        return best.indices[..., 0], best.values


class Policy(nn.Module):
    """act: observations (B, ..) -> actions (B, A), or logits (B, n); net: holds its weights."""

    def __init__(self, net, act):
        super().__init__()
        self.net, self.forward = net, act


def certain(choices, n):
    """Logits (B, n) of one choice each (B,), for rollouts draw from logits."""
    return F.one_hot(choices, n).float().log()


def step(optimiser, loss):
    """One step of an optimiser along a loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


# --- actions that are numbers --------------------------------------------------------------------


def clone(obs_shape, n_act, c):
    """BC: mean squared error of actions."""
    policy = nn.Sequential(mlp(*obs_shape, n_act, c.layers), nn.Tanh())
    actor = TensorDictModule(policy, ["observation"], ["action"])
    loss = BCLoss(actor, loss_function="mse")
    optimiser = Adam(loss.parameters(), c.lr)

    def update(batch):
        value = loss(batch)["loss_bc"]
        step(optimiser, value)
        return {"loss_bc": value}

    return Learner(loss, policy, update)


def td3bc(obs_shape, n_act, c):
    """TD3+BC (Fujimoto and Gu 2021): the actor maximises Q and is pulled to the data's actions."""
    policy = nn.Sequential(mlp(*obs_shape, n_act, c.layers), nn.Tanh())
    actor = TensorDictModule(policy, ["observation"], ["action"])
    critic = make_critic(*obs_shape, n_act, c.layers)
    noise = {"policy_noise": POLICY_NOISE, "noise_clip": NOISE_CLIP, "bounds": (-1.0, 1.0)}
    loss = TD3BCLoss(actor, critic, alpha=c.alpha, loss_function="l2", **noise)
    loss.make_value_estimator(gamma=c.discount)
    targets = SoftUpdate(loss, tau=c.tau)
    critics = Adam(loss.qvalue_network_params.parameters(), c.lr)
    actors = Adam(loss.actor_network_params.parameters(), c.lr)
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
    """IQL (Kostrikov et al. 2021): V is an expectile of Q; cloning is weighted by Q - V."""
    policy = nn.Sequential(mlp(*obs_shape, n_act, c.layers), nn.Tanh())

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
    critic = make_critic(*obs_shape, n_act, c.layers)
    value = TensorDictModule(mlp(*obs_shape, 1, c.layers), ["observation"], ["state_value"])
    weights = {"temperature": c.beta, "expectile": c.expectile}
    loss = IQLLoss(actor, critic, value, loss_function="l2", **weights)
    loss.make_value_estimator(gamma=c.discount)
    targets = SoftUpdate(loss, tau=c.tau)
    values = Adam(loss.value_network_params.parameters(), c.lr)
    critics = Adam(loss.qvalue_network_params.parameters(), c.lr)
    actors = Adam(loss.actor_network_params.parameters(), c.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(actors, c.steps)

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
    """CQL's conservative term (Kumar et al. 2020, equation 4, "CQL(H)"): a scalar.

    For both critics, mean over the batch of log sum exp of Q over sampled actions, each less the
    log-density it was sampled with, minus Q of the data's action; summed over the critics. Of the
    actions CQL_ACTIONS each are uniform, from the policy, and from it at the next observation.
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
    """CQL (Kumar et al. 2020) on soft actor-critic: entropy weight tuned, no entropy in targets."""
    net = Gaussian(*obs_shape, n_act, c.layers)
    actor = ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    # Two critics, because TorchRL draws the weights anew if it is given one.
    critics = [make_critic(*obs_shape, n_act, c.layers, orthogonal=True) for _ in range(2)]
    loss = CQLLoss(actor, critics, loss_function="l2", target_entropy=-float(n_act))
    loss.make_value_estimator(gamma=c.discount)
    targets = SoftUpdate(loss, tau=c.tau)
    critics = Adam(loss.qvalue_network_params.parameters(), c.lr)
    actors = Adam(loss.actor_network_params.parameters(), c.actor_lr)
    temperatures = Adam([loss.log_alpha], c.actor_lr)

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
        step(critics, losses["loss_critic"] + c.alpha * losses["loss_conservative"])
        targets.step()
        return losses

    return Learner(loss, Policy(net, lambda observation: net(observation)[0].tanh()), update)


# --- actions that are choices --------------------------------------------------------------------


def clone_choices(obs_shape, n_act, c):
    """BC: cross-entropy of choices, and beta times the mean square of the logits."""
    encoder, n = features(obs_shape, c.layers)
    net = nn.Sequential(encoder, nn.Linear(n, n_act))
    actor = TensorDictModule(net, ["observation"], ["action"])
    loss = BCLoss(actor, loss_function="cross_entropy")
    optimiser = Adam(loss.parameters(), c.lr)

    def update(batch):
        losses = {"loss_bc": loss(batch)["loss_bc"]}
        losses["loss_logits"] = net(batch["observation"]).square().mean()
        step(optimiser, losses["loss_bc"] + c.beta * losses["loss_logits"])
        return losses

    return Learner(loss, Policy(net, lambda x: certain(net(x).argmax(-1), n_act)), update)


def q_learning(obs_shape, n_act, c):
    """NFQ, CQL and BCQ for choices: Q-learning, and what keeps it to the data.

    NFQ (Riedmiller 2005): nothing does, and there is no target network. CQL: double Q-learning
    (van Hasselt et al. 2016) and the conservative term, which needs no samples for choices. BCQ
    (Fujimoto et al. 2019, arXiv 1910.01708): double Q-learning among choices at least BCQ_THRESHOLD
    as likely as the likeliest, by an imitation of the data that shares the features.
    """
    algo, delayed = c.algo, c.algo != "nfq"
    encoder, n = features(obs_shape, c.layers)
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
    loss.make_value_estimator(gamma=c.discount)
    if delayed:  # TorchRL's counter starts at 0, so it copies one step late
        targets = HardUpdate(loss, value_network_update_interval=c.target_every - 1)
    optimiser = Adam(loss.parameters(), c.lr, eps=ADAM_EPS[algo])

    def update(batch):
        losses = {"loss_critic": loss(batch)["loss"]}
        total = losses["loss_critic"]
        if algo == "cql":
            q = value(encoder(batch["observation"]))  # (B, n)
            chosen = q.gather(-1, batch["action"][:, None])[:, 0]
            losses["loss_conservative"] = (q.logsumexp(-1) - chosen).mean()
            total = total + c.alpha * losses["loss_conservative"]
        if algo == "bcq":
            logits = likeliest.imitation(encoder(batch["observation"]))
            losses["loss_imitation"] = F.cross_entropy(logits, batch["action"])
            losses["loss_imitation"] += c.beta * logits.square().mean()
            total = total + losses["loss_imitation"]
        step(optimiser, total)
        if delayed:
            targets.step()
        return losses

    def act(observation):
        found = net(TensorDict(observation=observation, batch_size=len(observation)))
        return certain(found["action"], n_act)

    return Learner(loss, Policy(net, act), update)


def make_learner(obs_shape, n_act, discrete, c):
    """The Learner of c.algo. The sizes are those of tasks.Environment.sizes()."""
    if discrete:
        make = clone_choices if c.algo == "bc" else q_learning
    else:
        make = {"bc": clone, "td3bc": td3bc, "iql": iql, "cql": cql}[c.algo]
    return make(obs_shape, n_act, c)
