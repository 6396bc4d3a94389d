"""experiments/: what D4RL and DQN-replay files hold, written here, comes back from Minari."""

import gzip
import json

import h5py
import minari
import numpy as np
import pytest
import torch
from runs import call

from data import load_trajectories
from experiments import collect
from tasks import TASKS, find_environment, make_env
from utils import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def write_d4rl(path, lengths, obs_dim=11, act_dim=3, following=False, tail=0, **other):
    """A file in D4RL's layout: episodes of these lengths, ended in turn by terminal and timeout."""
    rng, N, ends = np.random.default_rng(0), sum(lengths) + tail, np.cumsum(lengths) - 1
    arrays = dict(
        observations=rng.normal(size=(N, obs_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(N, act_dim)).astype(np.float32),
        rewards=rng.normal(size=N).astype(np.float32),
        terminals=np.isin(np.arange(N), ends[::2]),
        timeouts=np.isin(np.arange(N), ends[1::2]),
    )
    if following:
        arrays["next_observations"] = rng.normal(size=(N, obs_dim)).astype(np.float32)
    arrays |= other
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
        file["infos/qpos"] = np.zeros((N, 2))  # D4RL's files hold more than transitions
    return arrays


@pytest.mark.parametrize("following", [True, False])
def test_d4rl_episodes_are_cut_at_terminals_and_timeouts(tmp_path, home, following):
    lengths = [5, 1, 8, 3]
    arrays = write_d4rl(tmp_path / "x.hdf5", lengths, following=following, tail=4)
    call(collect.main, "--import-d4rl", tmp_path / "x.hdf5", "--env", "hopper")
    dataset = minari.MinariDataset(home / "d4rl/hopper/medium-v2/data")
    episodes = list(dataset.iterate_episodes())
    assert [len(e) for e in episodes] == lengths
    for i, (episode, end) in enumerate(zip(episodes, np.cumsum(lengths), strict=True)):
        T = lengths[i]
        part = slice(end - T, end)
        np.testing.assert_array_equal(episode.observations[:T], arrays["observations"][part])
        last = arrays["next_observations" if following else "observations"][end - 1]
        np.testing.assert_array_equal(episode.observations[T], last)
        np.testing.assert_array_equal(episode.actions, arrays["actions"][part])
        np.testing.assert_array_equal(episode.rewards, arrays["rewards"][part])
        np.testing.assert_array_equal(episode.terminations, arrays["terminals"][part])
        np.testing.assert_array_equal(episode.truncations, arrays["timeouts"][part])
    about = json.loads((home / "d4rl/hopper/medium-v2/about.json").read_text())
    assert (about["left_out"], about["episodes"], about["steps"]) == (4, 4, 17)
    environment, _ = find_environment(TASKS["hopper"], dataset)
    assert environment.spec.id == "Hopper-v5"
    assert len(load_trajectories(dataset, environment.action_space)) == sum(lengths)


def test_d4rl_ants_contact_forces_are_zero_and_are_left_out(tmp_path, home):
    observations = np.tile(np.arange(111) < 27, (6, 1)).astype(np.float32)
    write_d4rl(tmp_path / "x.hdf5", [3, 3], act_dim=8, observations=observations)
    call(collect.main, "--import-d4rl", tmp_path / "x.hdf5", "--env", "ant")
    dataset = minari.MinariDataset(home / "d4rl/ant/medium-v2/data")
    environment, _ = find_environment(TASKS["ant"], dataset)
    assert environment.observation_space.shape == (27,)
    assert make_env(environment.spec).observation_space.shape == (27,)


def write_dqn(folder, number, pieces, n_actions=4):
    """One checkpoint in DQN-replay's layout, from pieces of episodes.

    pieces: a list of (T, starts, ends): how long, whether from an episode's start, where Dopamine
    puts three blank transitions, and whether to its end. Returns {key: a list, by piece}.
    """
    rng = np.random.default_rng(number)
    found = {"observation": [], "action": [], "reward": [], "terminal": []}
    for T, _, ends in pieces:
        found["observation"].append(rng.integers(1, 256, (T, 84, 84), np.uint8))
        found["action"].append(rng.integers(0, n_actions, T, np.int32))
        found["reward"].append(rng.normal(size=T).astype(np.float32))
        found["terminal"].append(((np.arange(T) == T - 1) & ends).astype(np.uint8))
    folder.mkdir(exist_ok=True)
    for key, arrays in found.items():
        blank = [np.zeros((3 * s, *arrays[0].shape[1:]), arrays[0].dtype) for _, s, _ in pieces]
        whole = [x for pair in zip(blank, arrays, strict=True) for x in pair]
        with gzip.open(folder / f"$store$_{key}_ckpt.{number}.gz", "wb") as file:
            np.save(file, np.concatenate(whole))
    return found


@pytest.mark.parametrize("at_a_time", [4, 4096])
def test_dqn_replay_comes_back_as_it_was(tmp_path, home, monkeypatch, at_a_time):
    monkeypatch.setattr(collect, "AT_A_TIME", at_a_time)
    pieces = [(3, True, True), (4, True, True), (2, True, False)]  # the last goes on in the next
    first = write_dqn(tmp_path / "logs", 2, pieces)
    pieces = [(5, False, True), (1, True, True), (2, True, True)]
    second = write_dqn(tmp_path / "logs", 10, pieces)  # after 2, not before it
    call(collect.main, "--import-dqn-replay", tmp_path / "logs", "--env", "breakout")
    dataset = minari.MinariDataset(home / "dqn-replay/breakout/logged-v0/data")
    expected = [(first, 0), (first, 1), (second, 1), (second, 2)]
    for episode, (arrays, i) in zip(dataset.iterate_episodes(), expected, strict=True):
        np.testing.assert_array_equal(episode.observations[:-1], arrays["observation"][i])
        np.testing.assert_array_equal(episode.actions, arrays["action"][i])
        np.testing.assert_array_equal(episode.rewards, arrays["reward"][i])
        np.testing.assert_array_equal(episode.terminations, arrays["terminal"][i])
    about = json.loads((home / "dqn-replay/breakout/logged-v0/about.json").read_text())
    assert (about["episodes"], about["steps"], about["checkpoints"]) == (4, 10, 2)
    assert about["left_out"] == 10  # 3 blank and 2 of the first, 5 of the second
    environment, _ = find_environment(TASKS["breakout"], dataset)
    flat = load_trajectories(dataset, environment.action_space)
    assert torch.equal(flat.obs[:3], torch.tensor(first["observation"][0]))  # lossless
    assert environment.spec.id == "ALE/Breakout-v5"


@pytest.mark.parametrize("spoilt", ["cut", "last byte", "no gzip", "absent", "another game's"])
def test_a_damaged_dqn_file_leaves_nothing(tmp_path, home, spoilt):
    write_dqn(tmp_path / "logs", 0, [(3, True, True)] * 2, 18 if "game" in spoilt else 4)
    path = tmp_path / "logs" / "$store$_action_ckpt.0.gz"
    whole = path.read_bytes()
    parts = {"cut": whole[: len(whole) // 2], "last byte": whole[:-1], "no gzip": b"text"}
    path.write_bytes(parts.get(spoilt, whole))
    if spoilt == "absent":
        path.unlink()
    with pytest.raises(UserError, match="action"):
        call(collect.main, "--import-dqn-replay", tmp_path / "logs", "--env", "breakout")
    assert not [p for p in home.rglob("*") if p.is_file()]


@pytest.mark.parametrize("env", ["walker2d", "pong"])
def test_a_file_of_another_task_is_refused(tmp_path, home, env):
    write_d4rl(tmp_path / "x.hdf5", [5, 3])
    with pytest.raises(UserError, match=env):
        call(collect.main, "--import-d4rl", tmp_path / "x.hdf5", "--env", env)
