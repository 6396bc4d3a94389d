"""experiments/baselines.py: each algorithm on a problem whose answer can be computed otherwise."""

import json
import signal
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from runs import call, finish, start, wait_for
from tensordict import TensorDict

from data import Trajectories
from experiments import algorithms, baselines
from experiments.algorithms import conservative, make_learner
from experiments.baselines import CHOICES, NUMBERS, make_transitions, sample_transitions
from utils import UserError


def learner_of(algo, rows, obs, act, **other):
    """A Learner with an algorithm's row, but for `other`, that sees `obs` numbers."""
    c = SimpleNamespace(**rows[algo] | dict(algo=algo, discount=0.9, steps=1000, lr=2e-3) | other)
    return make_learner((obs,), act, rows is CHOICES, c)


def transitions(obs, act, reward, following, terminated):
    """A batch as TorchRL's losses read it."""
    terminated = terminated[:, None].bool()
    after = {"observation": following, "reward": reward[:, None]}
    after |= {"terminated": terminated, "done": terminated}
    return TensorDict({"observation": obs, "action": act, "next": after}, [len(obs)])


def learn(learner, data, steps, batch):
    for _ in range(steps):
        learner.update(data[torch.randint(len(data), (batch,))])


@pytest.fixture
def small(monkeypatch):
    """Networks of 64 units, and Adam's usual epsilon: these problems are small, and so is time."""
    monkeypatch.setattr(algorithms, "HIDDEN", 64)
    monkeypatch.setattr(algorithms, "ADAM_EPS", dict.fromkeys(CHOICES, 1e-8))


def numbered(lengths, cut, frames):
    """Trajectories whose observations are their own running numbers from 1; rewards are tens."""
    n, E, ends = sum(lengths), len(lengths), np.cumsum(lengths)
    shape = (84, 84) if frames else (1,)
    terminated = torch.zeros(n, dtype=torch.bool)
    terminated[torch.tensor(ends) - 1] = ~torch.tensor(cut)

    def seen(first, many):
        numbers = torch.arange(first, first + many, dtype=torch.uint8 if frames else torch.float32)
        return numbers.view(-1, *[1] * len(shape)).expand(many, *shape).clone()

    timestep = torch.cat([torch.arange(T) for T in lengths])
    end = torch.as_tensor(ends).repeat_interleave(torch.tensor(lengths))
    known = [seen(1, n), torch.arange(n), None, timestep, end, None, None, 1.0]
    known += [np.linspace(20, 70, E), np.array(lengths), ""]
    return Trajectories(*known, torch.arange(n) * 10.0, terminated, seen(101, E))


EPISODES = st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(EPISODES, st.booleans(), st.integers(0, 1000))
def test_transitions_are_what_walking_through_the_episodes_gives(episodes, frames, seed):
    lengths, cut = zip(*episodes, strict=True)
    plain = SimpleNamespace(return_span=0.0, clip_rewards=False)
    data = make_transitions(numbered(list(lengths), list(cut), frames), plain)
    expected, n = {}, 0  # of each one: the four numbers seen, the next four, whether it ended
    for e, T in enumerate(lengths):
        seen = [0, 0, 0, *range(n + 1, n + T + 1), 101 + e]
        for t in range(T):
            expected[n + t] = (seen[t : t + 4], seen[t + 1 : t + 5], t == T - 1 and not cut[e])
        n += T
    generator = torch.Generator().manual_seed(seed)
    batch = TensorDict(sample_transitions(data, 40, generator), [40])
    obs, following = batch["observation"], batch["next", "observation"]
    assert obs.shape == following.shape == ((40, 4, 84, 84) if frames else (40, 1))
    for i, number in enumerate(batch["action"].tolist()):
        before, after, ended = expected[number]
        if not frames:
            before, after = before[-1:], after[-1:]
        assert obs[i].reshape(len(before), -1)[:, 0].tolist() == before
        assert following[i].reshape(len(after), -1)[:, 0].tolist() == after
        assert batch["next", "terminated"][i].item() == ended
        assert batch["next", "reward"][i].item() == number * 10


# --- a chain of five states, choices -------------------------------------------------------------

STATES, LEFT, RIGHT = 5, 0, 1
EYE = torch.eye(STATES)


def chain_data(n, right):
    """Transitions of a behaviour that goes right with that probability, everywhere alike.

    Right of the last state is the end, and pays 1; each step to the left pays 0.01.
    """
    rng = np.random.default_rng(0)
    states, choices = rng.integers(STATES, size=n), (rng.random(n) < right).astype(int)
    following = (states + 2 * choices - 1).clip(0, STATES - 1)
    ended = (states == STATES - 1) & (choices == RIGHT)
    rewards = torch.tensor(ended + 0.01 * (choices == LEFT), dtype=torch.float32)
    ended, choices = torch.tensor(ended), torch.tensor(choices)
    return transitions(EYE[states], choices, rewards, EYE[following], ended)


@pytest.mark.parametrize("algo", ["bc", "nfq", "cql", "bcq"])
def test_a_chain_is_solved_but_by_bc(algo, small):
    data, right = chain_data(4000, right=0.4), 0.9 ** np.arange(STATES - 1, -1, -1.0)
    values = np.stack([0.01 + 0.9 * right[[0, 0, 1, 2, 3]], right], axis=1)  # Q, discounted by 0.9
    # with the default weight, the pull to what the data choose would be worth four ends
    weight = {"alpha": 0.02} if algo == "cql" else {}
    learner = learner_of(algo, CHOICES, STATES, 2, target_every=25, **weight)
    learn(learner, data, 100 if algo == "bc" else 700, 64)
    made = EYE[LEFT if algo == "bc" else RIGHT, :2].expand(STATES, 2)
    assert torch.equal(learner.policy(EYE).softmax(-1), made)  # rollouts draw: from no other
    if algo == "bc":
        return
    table = TensorDict(observation=EYE, batch_size=STATES)
    error = learner.policy.net(table)["action_value"].detach().numpy() - values
    assert error[:, RIGHT].max() < 0.1  # all that CQL promises, which is conservative
    assert algo == "cql" or np.abs(error).max() < 0.1


@pytest.mark.parametrize("algo", ["cql", "bcq"])
def test_targets_come_from_the_target_network(algo):
    learner = learner_of(algo, CHOICES, STATES, 2, target_every=10**6)
    loss, batch = learner.trained, chain_data(64, 0.5)
    with torch.no_grad():
        loss.target_value_network_params.zero_()  # so every value that follows is 0
        q = learner.policy.net(batch.select("observation"))["action_value"]
        q = q.gather(-1, batch["action"][:, None])
        by_hand = nn.functional.smooth_l1_loss(q, batch["next", "reward"])
    assert loss(batch)["loss"].item() == pytest.approx(by_hand.item(), rel=1e-5)


BEST, HABIT = 0.5, -0.3
FIRST, SECOND = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("algo", ["bc", "td3bc", "iql", "cql"])
def test_an_algorithm_does_what_its_equations_say(algo, small):
    """The first step pays nothing, the second 1 - (a - BEST)^2, by a behaviour around HABIT."""
    n = 2000
    act = (HABIT + 0.4 * torch.randn(2 * n, 1)).clamp(-0.99, 0.99)
    obs = torch.cat([FIRST.expand(n, 2), SECOND.expand(n, 2)])
    reward = torch.cat([torch.zeros(n), 1 - (act[n:, 0] - BEST).square()])
    data = transitions(obs, act, reward, SECOND.expand(2 * n, 2), torch.arange(2 * n) >= n)
    other = {"actor_lr": 2e-3, "alpha": 0.02} if algo == "cql" else {}
    learner = learner_of(algo, NUMBERS, 2, 1, layers=2, tau=0.05, **other)
    learn(learner, data, 500, 64 if algo == "cql" else 256)
    found = learner.policy(SECOND[None]).item()
    act, reward = act[n:, 0].numpy(), reward[n:].numpy()
    if algo == "bc":
        assert found == pytest.approx(act.mean(), abs=0.06)
        return
    earned = 1 - (found - BEST) ** 2
    if algo == "td3bc":  # the weight is by the size of Q at the policy's own actions
        grid, value = np.linspace(-1, 1, 2001), earned
        pull = ((grid[:, None] - act[None, ::8]) ** 2).mean(1)
        q, size = 1 - (grid - BEST) ** 2, (0.9 * earned + earned) / 2  # over both steps
        expected = grid[(2.5 / size * q - pull).argmax()]
    elif algo == "iql":
        value = 0.0
        for _ in range(2000):  # the expectile: where the weighted errors cancel
            value += 0.1 * (np.where(reward < value, 0.3, 0.7) * (reward - value)).mean()
        weight = np.exp(3.0 * (reward - value))
        expected = (weight * act).sum() / weight.sum()
    else:  # soft: the value is over the policy's own, random actions
        mean, std = learner.policy.net(SECOND[None])
        actions = (mean + std * torch.randn(2000, 1)).tanh()
        value, expected = (1 - (actions - BEST).square()).mean().item(), BEST
    assert found == pytest.approx(expected, abs=0.25 if algo == "cql" else 0.08)
    assert expected > HABIT + 0.15
    loss, habit = learner.trained, torch.tensor([[HABIT]])
    with torch.no_grad(), loss.qvalue_network_params[0].to_module(loss.qvalue_network):
        q = loss.qvalue_network.module(FIRST[None], habit).item()
    assert q == pytest.approx(0.9 * value, abs=0.12)


def test_the_conservative_term_is_the_integral_it_estimates(monkeypatch):
    """Of a Q that is linear in the action: log of the integral of exp Q has a closed form."""
    n, slope = 4000, 1.5
    monkeypatch.setattr(algorithms, "CQL_ACTIONS", n)
    learner = learner_of("cql", NUMBERS, 2, 1)
    with torch.no_grad():
        learner.policy.net.net[-1].bias[1] = 1.0  # a policy that reaches every action, std 1
    critic = learner.trained.qvalue_network.module
    monkeypatch.setattr(type(critic), "forward", lambda self, observation, action: slope * action)
    act = torch.tensor([[0.2], [-0.4], [0.9]])
    batch = transitions(torch.randn(3, 2), act, torch.zeros(3), torch.randn(3, 2), torch.ones(3))
    integral = np.log(2 * np.sinh(slope) / slope)  # over [-1, 1]
    expected = 2 * (np.log(3 * n) + integral - slope * act.mean().item())
    assert conservative(learner.trained, batch).item() == pytest.approx(expected, abs=0.05)


def check_run(folder, capsys):
    """A finished run has train.py's files, and its policy acts as it did. Returns its settings."""
    names = ["best.pt", "ckpt.pt", "config.json", "log.jsonl", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["evaluation"][0]
    assert json.loads((folder / "result.json").read_text())["target"] is None
    capsys.readouterr()
    call(baselines.main, "--evaluate", folder / "ckpt.pt")
    assert f"{last['return_mean']:.1f} ± {last['return_std']:.1f}" in capsys.readouterr().out
    return json.loads((folder / "config.json").read_text())["settings"]


SHORT = ["--steps", 20, "--eval-every", 10, "--episodes", 2, "--log-every", 5, "--name", "run"]


@pytest.mark.parametrize("algo", list(NUMBERS))
def test_a_run_is_a_run_like_any_other(algo, capsys, tmp_path):
    arguments = ["--algo", algo, "--env", "reacher2d", "--batch", 16]
    call(baselines.main, *arguments, *SHORT, "--out", tmp_path)
    found = check_run(tmp_path / "run", capsys)
    expected = NUMBERS[algo] | baselines.SHORT_NUMBERS.get(algo, {}) | {"batch": 16}
    assert {name: found[name] for name in expected} == expected
    assert found["target_every"] is None  # of choices


@pytest.mark.parametrize("algo", list(CHOICES))
def test_choices_from_frames(algo, monkeypatch, capsys, tmp_path):
    """An Atari game's own observations, a few random steps of it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import ale_py

    gym.register_envs(ale_py)
    env = gym.make("ALE/Pong-v5")
    pictures, choices = [env.reset(seed=0)[0]], np.arange(12) % env.action_space.n
    pictures += [env.step(choice)[0] for choice in choices]
    ends = {"terminations": np.zeros(12, bool), "truncations": np.arange(12) == 11}
    what = {"observations": np.stack(pictures), "actions": choices, "rewards": np.ones(12)}
    episode = EpisodeBuffer(**what, **ends)
    minari.create_dataset_from_buffers("atari/pong/expert-v0", [episode], env=env)
    arguments = ["--algo", algo, "--env", "pong", "--batch", 4, "--episode-limit", 10]
    call(baselines.main, *arguments, *SHORT, "--steps", 3, "--out", tmp_path)
    clipped = check_run(tmp_path / "run", capsys)["clip_rewards"]
    assert clipped or algo == "bc"


def test_a_run_that_is_stopped_keeps_its_policy(tmp_path):
    words = "-m experiments.baselines --algo bc --env reacher2d --eval-every 5000 --log-every 1"
    process = start(*words.split(), "--name", "run", "--out", tmp_path)
    wait_for(tmp_path / "run/log.jsonl", process)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    call(baselines.main, "--evaluate", tmp_path / "run" / "ckpt.pt", "--episodes", 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--algo"),
        (["--algo", "nfq"], "bc, td3bc, iql, cql"),
        (["--algo", "bc", "--ratio", "2"], "--ratio"),
        (["--algo", "bc", "--tau", "0.1"], "--tau"),
        (["--evaluate", "nowhere.pt", "--lr", "1"], "--evaluate"),
    ],
)
def test_mistakes_are_one_line(arguments, says):
    ratio = [] if "--evaluate" in arguments else ["--ratio", 0.01]
    with pytest.raises(UserError, match=says):
        call(baselines.main, *ratio, *arguments)
