"""experiments/baselines.py: each algorithm on a problem whose answer can be computed otherwise."""

import itertools
import json
import sys

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from tensordict import TensorDict

from data import load_trajectories
from experiments import algorithms, baselines
from experiments.algorithms import (
    CHOICES,
    NUMBERS,
    SHORT_NUMBERS,
    Chosen,
    conservative,
    make_learner,
)
from experiments.baselines import SCALED, rewards_of, sample_transitions
from plumbing import UserError
from windows import Trajectories

VERSION = itertools.count()


def settings_of(algo, rows, **other):
    return rows[algo] | dict(algo=algo, discount=0.9, steps=1000) | other


def transitions(obs, act, reward, following, terminated):
    """A batch as sample_transitions gives it."""
    terminated = terminated[:, None]
    after = {"observation": following, "reward": reward[:, None]}
    after |= {"terminated": terminated, "done": terminated}
    return TensorDict({"observation": obs, "action": act, "next": after}, [len(obs)])


@pytest.fixture
def small(monkeypatch):
    """Networks of 64 units, and Adam's usual epsilon: these problems are small, and so is time."""
    monkeypatch.setattr(algorithms, "HIDDEN", 64)
    monkeypatch.setattr(algorithms, "ADAM_EPS", dict.fromkeys(CHOICES, 1e-8))


# --- data ----------------------------------------------------------------------------------------


def numbered(lengths, cut, frames):
    """Trajectories whose observations are their own running numbers from 1."""
    n, E = sum(lengths), len(lengths)
    timestep = torch.cat([torch.arange(T) for T in lengths])
    ends = np.cumsum(lengths)
    end = torch.cat([torch.full((T,), e) for T, e in zip(lengths, ends.tolist(), strict=True)])
    shape = (n, 84, 84) if frames else (n, 1)
    obs = torch.arange(1, n + 1).view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    last = torch.arange(101, 101 + E).view(-1, *[1] * (len(shape) - 1)).expand(E, *shape[1:])
    kind = torch.uint8 if frames else torch.float32
    terminated = torch.zeros(n, dtype=torch.bool)
    terminated[torch.tensor(ends) - 1] = ~torch.tensor(cut)
    return Trajectories(
        obs=obs.to(kind),
        act=torch.arange(n),
        rtg=torch.zeros(n, 1),
        timestep=timestep,
        end=end,
        obs_mean=torch.zeros(1),
        obs_std=torch.ones(1),
        scale=1.0,
        returns=np.zeros(E),
        lengths=np.array(lengths),
        reward=torch.arange(n) * 10.0,
        terminated=terminated,
        last_obs=last.to(kind).clone(),
    )


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 1000),
)
def test_transitions_are_what_walking_through_the_episodes_gives(episodes, frames, seed):
    lengths, cut = zip(*episodes, strict=True)
    data = numbered(list(lengths), list(cut), frames)
    expected = {}  # of each transition: the four numbers seen, the next four, whether it ended
    n = 0
    for e, T in enumerate(lengths):
        seen = [0, 0, 0, *range(n + 1, n + T + 1), 101 + e]
        for t in range(T):
            expected[n + t] = (seen[t : t + 4], seen[t + 1 : t + 5], t == T - 1 and not cut[e])
        n += T
    batch = sample_transitions(data, data.reward, 40, torch.Generator().manual_seed(seed))
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


@pytest.mark.parametrize("mode", ["normal", "delayed"])
def test_rewards_and_ends_are_the_datasets(mode):
    rng = np.random.default_rng(0)
    cut = [False, True, False]
    episodes = [
        EpisodeBuffer(
            observations=rng.normal(size=(T + 1, 3)).astype(np.float32),
            actions=rng.uniform(-1, 1, size=(T, 2)).astype(np.float32),
            rewards=rng.normal(size=T),
            terminations=(np.arange(T) == T - 1) & (not c),
            truncations=(np.arange(T) == T - 1) & c,
        )
        for T, c in zip((4, 6, 1), cut, strict=True)
    ]
    box = gym.spaces.Box(-1, 1, (2,))
    dataset = minari.create_dataset_from_buffers(
        f"test/ends-v{next(VERSION)}",
        episodes,
        observation_space=gym.spaces.Box(-np.inf, np.inf, (3,)),
        action_space=box,
    )
    data = load_trajectories(dataset, box, 1.0, mode=mode)
    assert data.terminated.tolist() == [0, 0, 0, 1] + [0] * 6 + [1]
    mean, std = data.obs_mean.numpy(), data.obs_std.numpy()
    last = [(e.observations[-1] - mean) / std for e in episodes]
    assert np.allclose(data.last_obs, last, atol=1e-5)
    rewards = [e.rewards for e in episodes]
    if mode == "delayed":
        rewards = [np.append(np.zeros(len(r) - 1), r.sum()) for r in rewards]
    assert np.allclose(data.reward, np.concatenate(rewards), atol=1e-6)
    # with it the return-to-go of a first step is the sum of its episode's rewards
    assert data.rtg[0].item() == pytest.approx(data.reward[:4].sum().item(), abs=1e-5)


def test_rewards_are_scaled_and_clipped_as_asked():
    data = numbered([3, 2], [False, False], frames=False)
    data.returns = np.array([20.0, 70.0])
    plain = dict(return_span=0.0, clip_rewards=False)
    assert torch.equal(rewards_of(data, plain), data.reward)
    scaled = rewards_of(data, plain | {"return_span": 1000.0})
    assert torch.allclose(scaled, data.reward * 20)  # 70 - 20 becomes 1000
    assert rewards_of(data, plain | {"clip_rewards": True}).tolist() == [0, 1, 1, 1, 1]


# --- imitation -----------------------------------------------------------------------------------


def test_bc_learns_a_linear_policy(small):
    torch.manual_seed(0)
    weight = torch.randn(4, 2) * 0.2
    obs = torch.randn(4096, 4)
    act = obs @ weight
    keep = act.abs().amax(-1) < 0.9
    obs, act = obs[keep], act[keep]
    learner = make_learner((4,), 2, False, settings_of("bc", NUMBERS, lr=1e-3))
    none = torch.zeros(256)
    for i in range(1500):
        rows = torch.randint(len(obs), (256,))
        batch = transitions(obs[rows], act[rows], none, obs[rows], none.bool())
        if i == 0:
            by_hand = (learner.policy(obs[rows]) - act[rows]).square().mean().item()
            assert learner.update(batch)["loss_bc"].item() == pytest.approx(by_hand, rel=1e-5)
        loss = learner.update(batch)["loss_bc"].item()
    error = (learner.policy(obs) - act).square().mean().item()
    assert error == pytest.approx(loss, rel=1.0)
    assert error < 1e-3 * act.square().mean()


# --- a chain of five states, choices -------------------------------------------------------------

STATES, LEFT, RIGHT = 5, 0, 1


def chain_step(state, choice):
    """(reward, next state, whether it ended): right of the last state is the end, and pays."""
    if choice == RIGHT:
        return (1.0, state, True) if state == STATES - 1 else (0.0, state + 1, False)
    return 0.01, max(state - 1, 0), False


def chain_values(discount):
    """Q by value iteration: (states, 2)."""
    q = np.zeros((STATES, 2))
    for _ in range(200):
        for state, choice in itertools.product(range(STATES), range(2)):
            reward, following, ended = chain_step(state, choice)
            q[state, choice] = reward + (0 if ended else discount * q[following].max())
    return q


def chain_data(n, right):
    """Transitions of a behaviour that goes right with that probability, everywhere alike."""
    rng = np.random.default_rng(0)
    states, choices = rng.integers(STATES, size=n), (rng.random(n) < right).astype(int)
    steps = [chain_step(s, c) for s, c in zip(states, choices, strict=True)]
    rewards, following, ended = (np.array(x) for x in zip(*steps, strict=True))
    eye = torch.eye(STATES)
    return transitions(
        eye[torch.tensor(states)],
        torch.tensor(choices),
        torch.tensor(rewards, dtype=torch.float32),
        eye[torch.tensor(following)],
        torch.tensor(ended),
    )


def learn(learner, data, steps, batch):
    for _ in range(steps):
        learner.update(data[torch.randint(len(data), (batch,))])


@pytest.mark.parametrize("algo", ["bc", "nfq", "cql", "bcq"])
def test_a_chain_is_solved_but_by_bc(algo, small):
    torch.manual_seed(0)
    data, values = chain_data(4000, right=0.4), chain_values(0.9)
    assert (values.argmax(-1) == RIGHT).all()
    # with the default weight, the pull to what the data choose would be worth four ends
    weight = {"alpha": 0.02} if algo == "cql" else {}
    c = settings_of(algo, CHOICES, lr=1e-3, target_every=50, **weight)
    learner = make_learner((STATES,), 2, True, c)
    learn(learner, data, 200 if algo == "bc" else 1500, 64)
    chosen = learner.policy(torch.eye(STATES)).argmax(-1)
    if algo == "bc":
        assert (chosen == LEFT).all()
        return
    assert (chosen == RIGHT).all()
    table = TensorDict(observation=torch.eye(STATES), batch_size=STATES)
    q = learner.policy.net(table)["action_value"].detach().numpy()
    if algo == "cql":
        assert (q[:, RIGHT] < values[:, RIGHT] + 0.1).all()  # conservative
    else:
        assert np.abs(q - values).max() < 0.1


def test_bcq_never_chooses_what_the_data_hardly_do(small):
    torch.manual_seed(0)
    data = chain_data(4000, right=0.1)  # a ninth of the likeliest, below the threshold
    c = settings_of("bcq", CHOICES, lr=1e-3, target_every=50)
    learner = make_learner((STATES,), 2, True, c)
    learn(learner, data, 600, 64)
    assert (learner.policy(torch.eye(STATES)).argmax(-1) == LEFT).all()


def test_cql_for_choices_holds_on_to_the_data_as_alpha_says(small):
    torch.manual_seed(0)
    data = chain_data(4000, right=0.4)
    c = settings_of("cql", CHOICES, lr=1e-3, target_every=50, alpha=5.0)
    learner = make_learner((STATES,), 2, True, c)
    learn(learner, data, 600, 64)
    assert (learner.policy(torch.eye(STATES)).argmax(-1) == LEFT).all()  # as BC


@pytest.mark.parametrize("algo", ["bc", "bcq"])
def test_beta_keeps_logits_small(algo, small):
    data, sizes = chain_data(2000, right=0.4), []
    for beta in (0.0, 10.0):
        torch.manual_seed(0)
        c = settings_of(algo, CHOICES, lr=1e-3, beta=beta)
        learner = make_learner((STATES,), 2, True, c)
        learn(learner, data, 300, 64)
        if algo == "bc":
            found = learner.policy.net(torch.eye(STATES))
        else:
            table = TensorDict(observation=torch.eye(STATES), batch_size=STATES)
            features = learner.policy.net(table)["features"]
            found = learner.policy.net[2].module.imitation(features)
        sizes.append(found.square().mean().item())
    assert sizes[1] < 0.1 * sizes[0]


def test_bcqs_imitation_is_part_of_the_policy_that_is_saved():
    learner = make_learner((STATES,), 2, True, settings_of("bcq", CHOICES))
    assert any("imitation" in name for name in learner.policy.state_dict())
    trained = {id(p) for p in learner.trained.parameters()}
    assert all(id(p) in trained for p in learner.policy.parameters())


@pytest.mark.parametrize("algo", ["cql", "bcq"])
def test_targets_come_from_the_target_network(algo):
    c = settings_of(algo, CHOICES, target_every=10**6)
    learner = make_learner((STATES,), 2, True, c)
    loss, batch = learner.trained, chain_data(64, 0.5)
    with torch.no_grad():
        for parameter in loss.target_value_network_params.values(True, True):
            parameter.zero_()  # so every value that follows is 0
        q = learner.policy.net(batch.select("observation"))["action_value"]
        q = q.gather(-1, batch["action"][:, None])
        by_hand = nn.functional.smooth_l1_loss(q, batch["next", "reward"])
    assert loss(batch)["loss"].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_choice_is_made_for_good():
    """evaluate.rollout draws from the logits: no other choice may have a chance."""
    policy = Chosen(nn.Identity(), lambda x: x.argmax(-1), 3)
    logits = policy(torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]]))
    assert torch.equal(logits.softmax(-1), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


# --- a bandit: one step, one number --------------------------------------------------------------

BEST, HABIT = 0.5, -0.3


def bandit(n):
    """Steps of a behaviour around HABIT, where BEST would pay most. Observations say nothing."""
    act = (HABIT + 0.4 * torch.randn(n, 1)).clamp(-0.99, 0.99)
    reward = 1 - (act[:, 0] - BEST).square()
    return transitions(torch.ones(n, 1), act, reward, torch.ones(n, 1), torch.ones(n).bool())


def acts(learner):
    return learner.policy(torch.ones(1, 1)).item()


def test_bc_keeps_to_the_habit_in_the_bandit(small):
    torch.manual_seed(0)
    data = bandit(4000)
    learner = make_learner((1,), 1, False, settings_of("bc", NUMBERS, lr=1e-3))
    learn(learner, data, 500, 256)
    assert acts(learner) == pytest.approx(data["action"].mean().item(), abs=0.05)


def test_iql_does_in_the_bandit_what_its_equations_say(small):
    torch.manual_seed(0)
    data = bandit(4000)
    act, reward = data["action"][:, 0].numpy(), data["next", "reward"][:, 0].numpy()
    value = 0.0  # the expectile: where the weighted errors cancel
    for _ in range(2000):
        error = reward - value
        value += 0.1 * (np.where(error < 0, 0.3, 0.7) * error).mean()
    weight = np.exp(3.0 * (reward - value))
    expected = (weight * act).sum() / weight.sum()
    c = settings_of("iql", NUMBERS, lr=1e-3, tau=0.05, steps=1500)
    learner = make_learner((1,), 1, False, c)
    learn(learner, data, 1500, 256)
    assert acts(learner) == pytest.approx(expected, abs=0.06)
    assert expected > HABIT + 0.15


def test_td3bc_does_in_the_bandit_what_its_equations_say(small):
    torch.manual_seed(0)
    data = bandit(4000)
    act = data["action"][:, 0].numpy()
    grid = np.linspace(-1, 1, 2001)
    q = 1 - (grid - BEST) ** 2
    c = settings_of("td3bc", NUMBERS, lr=1e-3)
    learner = make_learner((1,), 1, False, c)
    learn(learner, data, 1500, 256)
    found = acts(learner)
    here = 1 - (found - BEST) ** 2  # the weight is by the size of Q at the policy's own action
    objective = 2.5 / here * q - ((grid[:, None] - act[None, ::8]) ** 2).mean(1)
    assert found == pytest.approx(grid[objective.argmax()], abs=0.08)
    assert found > HABIT + 0.3


def test_cql_finds_the_best_the_data_know(small):
    torch.manual_seed(0)
    data = bandit(4000)
    c = settings_of("cql", NUMBERS, lr=1e-3, actor_lr=1e-3, alpha=0.05, layers=2)
    learner = make_learner((1,), 1, False, c)
    learn(learner, data, 800, 64)
    assert (acts(learner) - BEST) ** 2 < 0.1 * (HABIT - BEST) ** 2  # of what cloning forgoes


FIRST, SECOND = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("algo", ["td3bc", "iql", "cql"])
def test_what_follows_is_worth_what_it_earns_discounted(algo, small):
    """Two steps: the first pays nothing, the second 1 - (a - BEST)^2. A cut one goes on."""
    torch.manual_seed(0)
    n = 2000
    act = (HABIT + 0.4 * torch.randn(2 * n, 1)).clamp(-0.99, 0.99)
    obs = torch.cat([FIRST.expand(n, 2), SECOND.expand(n, 2)])
    reward = torch.cat([torch.zeros(n), 1 - (act[n:, 0] - BEST).square()])
    terminated = torch.arange(2 * n) >= n
    data = transitions(obs, act, reward, SECOND.expand(2 * n, 2), terminated)
    c = settings_of(algo, NUMBERS, lr=1e-3, layers=2, tau=0.05, steps=1200)
    if algo == "cql":
        c |= {"actor_lr": 1e-3, "alpha": 0.02}
    learner = make_learner((2,), 1, False, c)
    learn(learner, data, 700 if algo == "cql" else 1200, 64 if algo == "cql" else 256)
    loss = learner.trained

    def q(state, action):
        with torch.no_grad(), loss.qvalue_network_params[0].to_module(loss.qvalue_network):
            return loss.qvalue_network.module(state[None], action).item()

    if algo == "iql":  # its value is the expectile of what the second step earns
        value, rewards = 0.0, reward[n:].numpy()
        for _ in range(2000):
            error = rewards - value
            value += 0.1 * (np.where(error < 0, 0.3, 0.7) * error).mean()
    elif algo == "cql":  # its value is over the policy's own, random actions
        mean, std = learner.policy.net(SECOND[None])
        actions = (mean + std * torch.randn(2000, 1)).tanh()
        value = (1 - (actions - BEST).square()).mean().item()
    else:
        value = 1 - (learner.policy(SECOND[None]).item() - BEST) ** 2
    assert q(FIRST, torch.tensor([[HABIT]])) == pytest.approx(0.9 * value, abs=0.12)
    assert value > 0.4


def test_cqls_critics_begin_orthogonal():
    learner = make_learner((11,), 3, False, settings_of("cql", NUMBERS))
    weights = learner.trained.qvalue_network_params["module", "net", "2", "weight"]
    assert weights.shape == (2, 256, 256)
    for weight in weights:
        assert torch.allclose(weight @ weight.T, 2 * torch.eye(256), atol=1e-4)
    assert not torch.equal(weights[0], weights[1])


def test_the_conservative_term_is_the_integral_it_estimates(monkeypatch):
    """Of a Q that is linear in the action: log of the integral of exp Q has a closed form."""
    n, slope = 4000, 1.5
    monkeypatch.setattr(algorithms, "CQL_ACTIONS", n)
    learner = make_learner((2,), 1, False, settings_of("cql", NUMBERS))
    loss = learner.trained

    with torch.no_grad():
        learner.policy.net.net[-1].bias[1] = 1.0  # a policy that reaches every action, std 1
    critic = loss.qvalue_network.module
    monkeypatch.setattr(type(critic), "forward", lambda self, observation, action: slope * action)
    act = torch.tensor([[0.2], [-0.4], [0.9]])
    batch = transitions(torch.randn(3, 2), act, torch.zeros(3), torch.randn(3, 2), torch.ones(3))
    integral = np.log(2 * np.sinh(slope) / slope)  # over [-1, 1]
    expected = 2 * (np.log(3 * n) + integral - slope * act.mean().item())
    assert conservative(loss, batch).item() == pytest.approx(expected, abs=0.05)


# --- the command ---------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["baselines", *map(str, arguments)])
    baselines.main()


SHORT = ["--steps", 20, "--eval-every", 10, "--episodes", 2, "--log-every", 5]


@pytest.mark.parametrize("algo", list(NUMBERS))
def test_a_run_is_a_run_like_any_other(algo, monkeypatch, capsys, tmp_path):
    arguments = ["--algo", algo, "--env", "reacher2d", "--batch", 16, *SHORT, "--out", tmp_path]
    command(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    names = {"config.json", "log.jsonl", "ckpt.pt", "best.pt", "result.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    expected = NUMBERS[algo] | SHORT_NUMBERS.get(algo, {}) | {"batch": 16}
    if algo != "bc":
        assert "reacher2d" not in SCALED
        expected |= {"return_span": 0.0, "clip_rewards": False}
    assert {name: config["settings"][name] for name in expected} == expected
    unread = baselines.ALGORITHM_FLAGS - expected.keys()
    assert not unread & config["settings"].keys()
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 10, 15, 20, 20]
    assert f"{folder / 'ckpt.pt'}" in printed
    command(monkeypatch, "--evaluate", folder / "ckpt.pt")
    evaluation = rows[-1]["evaluation"][0]
    expected = f"{evaluation['return_mean']:.1f} ± {evaluation['return_std']:.1f}"
    assert expected in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["target"] is None


@pytest.mark.parametrize("algo", list(CHOICES))
def test_choices_from_frames(algo, monkeypatch, capsys, tmp_path):
    """An Atari game's own observations, a few random steps of it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    import ale_py

    gym.register_envs(ale_py)
    env = gym.make("ALE/Pong-v5")
    pictures, choices, rewards = [env.reset(seed=0)[0]], [], []
    env.action_space.seed(0)
    for _ in range(12):
        choices.append(env.action_space.sample())
        observation, reward, *_ = env.step(choices[-1])
        pictures.append(observation)
        rewards.append(reward)
    end = np.arange(12) == 11
    episode = EpisodeBuffer(
        observations=np.stack(pictures),
        actions=np.array(choices),
        rewards=np.array(rewards, np.float64),
        terminations=np.zeros(12, bool),
        truncations=end,
    )
    minari.create_dataset_from_buffers("atari/pong/expert-v0", [episode], env=env)
    arguments = ["--algo", algo, "--env", "pong", "--batch", 4, "--episode-limit", 10]
    command(monkeypatch, *arguments, *SHORT, "--steps", 3, "--out", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert algo == "bc" or settings["clip_rewards"]
    logged = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["evaluation"][0]
    capsys.readouterr()
    command(monkeypatch, "--evaluate", folder / "ckpt.pt")
    expected = f"{logged['return_mean']:.1f} ± {logged['return_std']:.1f}"
    assert expected in capsys.readouterr().out
    assert np.isfinite(json.loads((folder / "result.json").read_text())["score"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--algo is missing"),
        (["--algo", "sac"], "unknown algo 'sac'"),
        (["--algo", "nfq"], "nfq is not for actions that are numbers; use bc, td3bc, iql, cql"),
        (["--algo", "bc", "--ratio", "2"], "--ratio is 2"),
        (["--algo", "iql", "--discount", "1.5"], "--discount is 1.5, but must be at most 1"),
        (["--algo", "bc", "--tau", "0.1"], "bc has no use for --tau on these numbers"),
        (["--algo", "td3bc", "--clip-rewards", "--expectile", "0.5"], "no use for --expectile"),
        (["--algo", "bc", "--env", "reacher2d", "--quality", "expert"], "--quality does not apply"),
        (["--algo", "bc", "--lr", "-1"], "--lr is -1"),
        (["--algo", "bc", "--env", "hoper"], "Did you mean hopper?"),
        (["--evaluate", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--evaluate", "nowhere.pt", "--lr", "1"], "--lr is for training"),
    ],
)
def test_mistakes_are_one_line(arguments, says, monkeypatch, tmp_path):
    out = ["--ratio", 0.01] * ("--ratio" not in arguments) + ["--out", tmp_path]
    out = [] if "--evaluate" in arguments else out
    with pytest.raises(UserError) as error:
        command(monkeypatch, *arguments, *out)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
