"""experiments/: what D4RL and DQN-replay files hold, written here, comes back from Minari."""

import gzip
import json
import sys
import tracemalloc

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

from data import load_trajectories, read_dataset
from experiments import collect
from experiments.import_data import dqn_checkpoints, dqn_episodes
from plumbing import UserError, run_command
from tasks import TASKS, find_environment


@pytest.fixture
def minari_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["collect", *map(str, arguments)])
    collect.main()


def fails(monkeypatch, capsys, home, *arguments):
    """The one line that a mistake gives; nothing may be left in Minari's folder."""
    monkeypatch.setattr(sys, "argv", ["collect", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_command(collect.main)
    assert stop.value.code == 2
    assert not [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"]
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# --- D4RL ----------------------------------------------------------------------------------------


def write_d4rl(path, lengths, obs_dim=11, act_dim=3, following=False, tail=0, **spoilt):
    """A file in D4RL's layout: episodes of these lengths, ended in turn by terminal and timeout."""
    rng = np.random.default_rng(0)
    N = sum(lengths) + tail
    ends = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(N, bool), np.zeros(N, bool)
    terminals[ends[::2]] = True
    timeouts[ends[1::2]] = True
    arrays = dict(
        observations=rng.normal(size=(N, obs_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(N, act_dim)).astype(np.float32),
        rewards=rng.normal(size=N).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
    )
    if following:
        arrays["next_observations"] = rng.normal(size=(N, obs_dim)).astype(np.float32)
    arrays |= spoilt
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            if array is not None:
                file[key] = array
        file["metadata/algorithm"] = "SAC"  # D4RL's files hold more than transitions
        file["infos/qpos"] = np.zeros((N, 2))
    return arrays


@pytest.mark.parametrize("following", [True, False])
def test_d4rl_episodes_are_cut_at_terminals_and_timeouts(
    tmp_path, minari_home, monkeypatch, capsys, following
):
    lengths = [5, 1, 8, 3]
    arrays = write_d4rl(tmp_path / "x.hdf5", lengths, following=following, tail=4)
    call(monkeypatch, "--import-d4rl", tmp_path / "x.hdf5", "--env", "hopper")
    dataset = read_dataset(minari_home / "d4rl/hopper/medium-v2")
    starts = np.cumsum([0, *lengths[:-1]])
    episodes = list(dataset.iterate_episodes())
    assert [len(e) for e in episodes] == lengths
    for i, (episode, start, T) in enumerate(zip(episodes, starts, lengths, strict=True)):
        part = slice(start, start + T)
        np.testing.assert_array_equal(episode.observations[:T], arrays["observations"][part])
        last = arrays["next_observations" if following else "observations"][start + T - 1]
        np.testing.assert_array_equal(episode.observations[T], last)
        np.testing.assert_array_equal(episode.actions, arrays["actions"][part])
        np.testing.assert_array_equal(episode.rewards, arrays["rewards"][part])
        ended = [False] * (T - 1) + [True]
        assert episode.terminations.tolist() == (ended if i % 2 == 0 else [False] * T)
        assert episode.truncations.tolist() == (ended if i % 2 == 1 else [False] * T)
    printed = capsys.readouterr().out
    assert "left out: 4 steps" in printed
    assert "python train.py --env hopper --dataset d4rl/hopper/medium-v2" in printed
    environment, note = find_environment(TASKS["hopper"], dataset)
    assert environment.spec.id == "Hopper-v5"
    assert "as d4rl/hopper/medium-v2 records it" in note
    assert len(load_trajectories(dataset, environment.action_space)) == sum(lengths)


def test_d4rl_ants_contact_forces_are_zero_and_are_left_out(tmp_path, minari_home, monkeypatch):
    observations = np.zeros((6, 111), np.float32)
    observations[:, :27] = np.random.default_rng(0).normal(size=(6, 27))
    write_d4rl(tmp_path / "x.hdf5", [3, 3], act_dim=8, observations=observations)
    call(monkeypatch, "--import-d4rl", tmp_path / "x.hdf5", "--env", "ant", "--quality", "expert")
    dataset = read_dataset(minari_home / "d4rl/ant/expert-v2")
    environment, note = find_environment(TASKS["ant"], dataset)
    assert environment.observation_space.shape == (27,)
    env = gym.make(environment.spec)
    assert env.observation_space.shape == (27,)
    assert "include_cfrc_ext_in_observation" in note


NAN = np.full(4, np.nan, np.float32)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (dict(terminals=None), "lacks terminals; it should hold observations, actions"),
        (dict(timeouts=None, actions=None), "lacks actions, timeouts"),
        (dict(rewards=np.zeros(3, np.float32)), "observations has 4 rows, but rewards has 3"),
        (dict(actions=np.zeros((3, 3), np.float32)), "actions has 3 rows, but rewards has 4"),
        (dict(actions=np.zeros(4, np.float32)), "expected 2 dimensions of numbers"),
        (dict(rewards=np.float32(1)), "expected 1 dimensions of numbers"),
        (dict(rewards=np.array([b"a"] * 4)), "expected 1 dimensions of numbers"),
        (dict(next_observations=np.full((4, 11), np.nan, np.float32)), "next_observations holds"),
        (dict(terminals=np.zeros(4, bool), timeouts=np.zeros(4, bool)), "no episode's end"),
        (dict(rewards=NAN), "rewards holds NaN"),
        (dict(observations=np.zeros((4, 17), np.float32)), "observations are 17 wide, but hopper"),
        (dict(next_observations=np.zeros((4, 9), np.float32)), "another shape"),
    ],
)
def test_a_d4rl_file_that_is_not_right(tmp_path, minari_home, monkeypatch, capsys, spoilt, message):
    write_d4rl(tmp_path / "x.hdf5", [2, 2], **spoilt)
    arguments = ("--import-d4rl", tmp_path / "x.hdf5", "--env", "hopper")
    assert message in fails(monkeypatch, capsys, minari_home, *arguments)


def test_other_mistakes_of_importing(tmp_path, minari_home, monkeypatch, capsys):
    def line(*arguments):
        return fails(monkeypatch, capsys, minari_home, *arguments)

    (tmp_path / "text.hdf5").write_text("text")
    write_d4rl(tmp_path / "x.hdf5", [2, 2])
    assert "no readable HDF5" in line("--import-d4rl", tmp_path / "text.hdf5", "--env", "hopper")
    assert "there is no file" in line("--import-d4rl", tmp_path / "absent.hdf5", "--env", "hopper")
    d4rl = ("--import-d4rl", tmp_path / "x.hdf5")
    assert "not of pong" in line(*d4rl, "--env", "pong")
    assert "--steps and --train do not" in line(*d4rl, "--env", "hopper", "--steps", "5")
    assert "breakout" not in line("--import-dqn-replay", tmp_path, "--env", "hopper")
    assert "there is no folder" in line("--import-dqn-replay", tmp_path / "x", "--env", "pong")
    assert "observation_ckpt.N.gz" in line("--import-dqn-replay", tmp_path, "--env", "pong")


def test_groups_and_names_that_are_not_right(tmp_path, minari_home, monkeypatch, capsys):
    write_d4rl(tmp_path / "x.hdf5", [2, 2], actions=None)
    with h5py.File(tmp_path / "x.hdf5", "r+") as file:
        file["actions/left"] = np.zeros(4)
    arguments = ("--import-d4rl", tmp_path / "x.hdf5", "--env", "hopper")
    assert "actions is <HDF5 group" in fails(monkeypatch, capsys, minari_home, *arguments)
    write_d4rl(tmp_path / "x.hdf5", [2, 2])
    line = fails(monkeypatch, capsys, minari_home, *arguments, "--quality", "../x")
    assert "unknown quality '../x'" in line
    line = fails(monkeypatch, capsys, minari_home, *arguments, "--random")
    assert "are for recording" in line
    observations = np.ones((4, 111), np.float32)
    write_d4rl(tmp_path / "x.hdf5", [2, 2], act_dim=8, observations=observations)
    line = fails(monkeypatch, capsys, minari_home, *arguments[:-1], "Ant")
    assert "contact forces (columns 27 on) are not all zero" in line


def test_an_import_does_not_replace_a_dataset(tmp_path, minari_home, monkeypatch):
    write_d4rl(tmp_path / "x.hdf5", [2, 2])
    arguments = ("--import-d4rl", tmp_path / "x.hdf5", "--env", "hopper")
    call(monkeypatch, *arguments)
    with pytest.raises(UserError, match="exists already"):
        call(monkeypatch, *arguments)


# --- DQN replay ----------------------------------------------------------------------------------


def write_dqn(folder, number, pieces, n_actions=4, seed=0, **spoilt):
    """One checkpoint in DQN-replay's layout, from pieces of episodes.

    pieces: a list of (T, starts, ends): how long, whether from an episode's start, where Dopamine
    puts three blank transitions, and whether to its end. Returns the arrays and where pieces are.
    """
    rng = np.random.default_rng(seed)
    arrays = {"observation": [], "action": [], "reward": [], "terminal": []}
    places, n = [], 0
    for T, starts, ends in pieces:
        blank = 3 if starts else 0
        frames = rng.integers(1, 256, (T, 84, 84), np.uint8)
        arrays["observation"] += [np.zeros((blank, 84, 84), np.uint8), frames]
        arrays["action"] += [np.zeros(blank, np.int32), rng.integers(0, n_actions, T, np.int32)]
        arrays["reward"] += [np.zeros(blank, np.float32), rng.normal(size=T).astype(np.float32)]
        last = np.arange(T) == T - 1
        arrays["terminal"] += [np.zeros(blank, np.uint8), (last & ends).astype(np.uint8)]
        places.append(slice(n + blank, n + blank + T))
        n += blank + T
    arrays = {key: np.concatenate(parts) for key, parts in arrays.items()} | spoilt
    folder.mkdir(exist_ok=True)
    for key, array in arrays.items():
        if array is not None:
            with gzip.open(folder / f"$store$_{key}_ckpt.{number}.gz", "wb") as file:
                np.save(file, array)
    return arrays, places


@pytest.mark.parametrize("at_a_time", [1, 3, 7, 4096])
def test_dqn_replay_comes_back_as_it_was(tmp_path, minari_home, monkeypatch, capsys, at_a_time):
    monkeypatch.setattr("experiments.import_data.AT_A_TIME", at_a_time)
    logs = tmp_path / "logs"
    first = [(3, True, True), (4, True, True), (2, True, False)]  # the last goes on in the next
    first, at = write_dqn(logs, 2, first, seed=1)
    second = [(5, False, True), (1, True, True), (2, True, True)]
    second, then = write_dqn(logs, 10, second, seed=2)  # after 2, not before it
    (logs / "$store$_observation_ckpt.latest.gz").write_text("not a number")
    call(monkeypatch, "--import-dqn-replay", logs, "--env", "breakout")
    dataset = read_dataset(minari_home / "dqn-replay/breakout/logged-v0")
    expected = [(first, at[0]), (first, at[1]), (second, then[1]), (second, then[2])]
    episodes = list(dataset.iterate_episodes())
    assert len(episodes) == len(expected)
    for episode, (arrays, place) in zip(episodes, expected, strict=True):
        T = place.stop - place.start
        np.testing.assert_array_equal(episode.observations[:T], arrays["observation"][place])
        np.testing.assert_array_equal(episode.actions, arrays["action"][place])
        np.testing.assert_array_equal(episode.rewards, arrays["reward"][place])
        assert episode.terminations.tolist() == [False] * (T - 1) + [True]
    printed = capsys.readouterr().out
    assert "left out: 10 steps" in printed  # 3 blank and 2 of the first, 5 of the second
    assert "clipped to [-1, 1]" in printed
    about = json.loads((minari_home / "dqn-replay/breakout/logged-v0/about.json").read_text())
    assert (about["episodes"], about["steps"], about["checkpoints"]) == (4, 10, 2)
    environment, _ = find_environment(TASKS["breakout"], dataset)
    flat = load_trajectories(dataset, environment.action_space)
    assert torch.equal(flat.obs[:3], torch.tensor(first["observation"][at[0]]))  # lossless
    assert environment.spec.id == "ALE/Breakout-v5"


def test_dqn_replay_is_read_in_bounded_memory(tmp_path, monkeypatch):
    """Of 3090 transitions no more than an episode and a part are held at once."""
    monkeypatch.setattr("experiments.import_data.AT_A_TIME", 50)
    write_dqn(tmp_path / "logs", 0, [(100, True, True)] * 30)
    (files,) = dqn_checkpoints(tmp_path / "logs")
    tracemalloc.start()
    about, n = {"left_out": 0}, 0
    for episode in dqn_episodes([files], 4, about):
        n += len(episode["reward"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 3000
    assert peak < 6 * 100 * 84 * 84  # of 3000 * 84 * 84


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (dict(terminal=None), "lacks $store$_terminal_ckpt.0.gz"),
        (dict(observation=np.zeros((5, 80, 80), np.uint8)), "expected (5, 84, 84)"),
        (dict(observation=np.zeros((5, 84, 84), np.float32)), "holds float32"),
        (dict(observation=np.uint8(3)), "holds uint8 ()"),
        (dict(action=np.zeros(3, np.int32)), "holds int32 (3,), but expected (5,)"),
        (dict(action=np.zeros(5)), "holds float64 (5,)"),
        (dict(action=np.full(5, 9, np.int32)), "has actions that the game has not"),
        (dict(reward=np.full(5, np.nan)), "NaN or infinite reward"),
        (dict(reward=np.float32(1)), "holds float32 ()"),
        (dict(terminal=np.array([b"x"] * 5)), "holds |S1 (5,)"),
        (dict(terminal=np.zeros(5, np.uint8)), "no whole episode"),
    ],
)
def test_dqn_files_that_are_not_right(tmp_path, minari_home, monkeypatch, capsys, spoilt, message):
    write_dqn(tmp_path / "logs", 0, [(2, True, True)], **spoilt)
    arguments = ("--import-dqn-replay", tmp_path / "logs", "--env", "breakout")
    assert message in fails(monkeypatch, capsys, minari_home, *arguments)


def test_dqn_checkpoints_may_be_far_apart(tmp_path, capsys):
    """What lies between them is told, not counted one by one."""
    for number in (0, 1, 10**10):
        write_dqn(tmp_path / "logs", number, [(2, True, True)])
    assert len(dqn_checkpoints(tmp_path / "logs")) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert "no checkpoint between 1 and 10000000000" in line


def test_a_dqn_file_without_an_end_is_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.import_data.AT_A_TIME", 50)
    monkeypatch.setattr("experiments.import_data.LONGEST_EPISODE", 120)
    write_dqn(tmp_path / "logs", 0, [(110, True, True), (400, True, False)])
    episodes = dqn_episodes(dqn_checkpoints(tmp_path / "logs"), 4, {"left_out": 0})
    assert len(next(episodes)["reward"]) == 110
    with pytest.raises(UserError, match="no episode ends in 120 steps"):
        next(episodes)


def test_a_damaged_dqn_file_leaves_nothing(tmp_path, minari_home, monkeypatch, capsys):
    """Cut, emptied, or with any of many single bits flipped: never a dataset of other frames."""
    write_dqn(tmp_path / "logs", 0, [(3, True, True)] * 2)
    path = tmp_path / "logs" / "$store$_action_ckpt.0.gz"
    whole = path.read_bytes()
    arguments = ("--import-dqn-replay", tmp_path / "logs", "--env", "breakout")
    spoilt = [whole[: len(whole) // 2], b"", b"no gzip", whole[:-1]]
    header = 10 + len(path.stem) + 1  # gzip's, with the file's name, under no checksum
    for i in range(header, len(whole) - 4, 5):
        spoilt.append(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
    for part in spoilt:
        path.write_bytes(part)
        line = fails(monkeypatch, capsys, minari_home, *arguments)
        assert "action" in line
