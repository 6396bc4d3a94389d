"""data.py: trajectories against a slow reference, text against its own bytes and GPT-2's BPE."""

import itertools
import json
import os
import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from scipy.stats import chisquare

import data
from data import (
    BUNDLED,
    find_dataset,
    load_trajectories,
    read_dataset,
    returns_to_go,
)
from embeddings import FrameEncoder
from plumbing import UserError
from spaces import shrink
from tasks import TASKS
from windows import STACK, Trajectories, sample_windows

VERSION = itertools.count()  # a new name for each dataset
OBS, ACT = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-1, 1, (2,))


def random_episode(rng, length, rewards=None):
    return EpisodeBuffer(
        observations=rng.normal(size=(length + 1, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(length, 2)).astype(np.float32),
        rewards=rng.normal(size=length) if rewards is None else np.array(rewards),
        terminations=np.arange(length) == length - 1,
        truncations=np.zeros(length, bool),
    )


def make_dataset(name, episodes, observation_space=OBS, action_space=ACT):
    """A Minari dataset on disk, by Minari's own means."""
    return minari.create_dataset_from_buffers(
        f"test/{name}-v{next(VERSION)}",
        episodes,
        observation_space=observation_space,
        action_space=action_space,
        ref_min_score=0.0,
    )


@pytest.fixture
def five_episodes():
    rng = np.random.default_rng(0)
    lengths = [4, 1, 9, 6, 2]
    episodes = [random_episode(rng, n) for n in lengths]
    return make_dataset("five", episodes), episodes


@pytest.mark.parametrize("mode", ["normal", "delayed"])
def test_flat_tensors_equal_the_episodes(five_episodes, mode):
    dataset, episodes = five_episodes
    flat = load_trajectories(dataset, ACT, scale=10.0, mode=mode)
    observations = np.concatenate([e.observations[:-1] for e in episodes]).astype(np.float64)
    mean, std = observations.mean(0), observations.std(0) + 1e-6
    i = 0
    for e in episodes:
        T = len(e.rewards)
        for t in range(T):
            expected_obs = (e.observations[t] - mean) / std
            np.testing.assert_allclose(flat.obs[i], expected_obs, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(flat.act[i], e.actions[t])
            delayed = sum(e.rewards)
            expected = delayed if mode == "delayed" else sum(e.rewards[t:])
            assert flat.rtg[i, 0].item() == pytest.approx(expected / 10, rel=1e-5, abs=1e-6)
            assert flat.timestep[i] == t
            assert flat.end[i] == i - t + T
            i += 1
    assert i == len(flat)
    np.testing.assert_allclose(flat.returns, [sum(e.rewards) for e in episodes])
    np.testing.assert_array_equal(flat.lengths, [4, 1, 9, 6, 2])
    np.testing.assert_allclose(flat.obs_mean, mean, rtol=1e-5, atol=1e-6)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_returns_to_go(rewards):
    rewards = np.array(rewards)
    normal, delayed = returns_to_go(rewards), returns_to_go(rewards, delayed=True)
    for t in range(len(rewards)):
        assert normal[t] == pytest.approx(sum(rewards[t:]), abs=1e-6)
        moved = [0.0] * (len(rewards) - 1) + [sum(rewards)]
        assert delayed[t] == pytest.approx(sum(moved[t:]), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "kept"), [(1.0, 5), (0.99, 4), (0.4, 2), (0.39, 1), (0.01, 1), (0.6, 3)]
)
def test_ratio_keeps_whole_trajectories_drawn_by_the_seed(five_episodes, ratio, kept):
    dataset, _ = five_episodes
    seen = set()
    for seed in range(60):
        flat = load_trajectories(dataset, ACT, 1.0, ratio, seed=seed)
        again = load_trajectories(dataset, ACT, 1.0, ratio, seed=seed)
        assert torch.equal(flat.obs, again.obs)
        assert len(flat.lengths) == kept
        assert set(flat.lengths.tolist()) <= {4, 1, 9, 6, 2}
        assert len(set(flat.lengths.tolist())) == kept  # without replacement
        assert len(flat) == flat.lengths.sum()
        assert flat.obs.mean(0).abs().max() < 1e-4  # normalised by the kept part's own statistics
        seen |= set(flat.lengths.tolist())
    assert seen == {4, 1, 9, 6, 2}


def flat_numbers(lengths):
    """Trajectories whose every number tells its episode and step, from episode lengths."""
    n = sum(lengths)
    timestep = torch.cat([torch.arange(T) for T in lengths])
    end = torch.cat([torch.full((T,), sum(lengths[: i + 1])) for i, T in enumerate(lengths)])
    number = torch.arange(n, dtype=torch.float32)
    one = torch.ones(1)
    return Trajectories(
        obs=number[:, None] * 10,
        act=number[:, None] * 100,
        rtg=number[:, None],
        timestep=timestep,
        end=end,
        obs_mean=one,
        obs_std=one,
        scale=1.0,
        returns=np.zeros(len(lengths)),
        lengths=np.array(lengths),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(1, 15),
    st.integers(1, 20),
    st.integers(0, 1000),
)
def test_windows_equal_a_loop_over_samples(lengths, context, batch, seed):
    flat = flat_numbers(lengths)
    rtg, obs, act, timestep, valid = sample_windows(
        flat, batch, context, torch.Generator().manual_seed(seed)
    )
    assert rtg.shape == obs.shape == act.shape == (batch, context, 1)
    episode = [i for i, T in enumerate(lengths) for _ in range(T)]
    for b in range(batch):
        first = int(rtg[b, 0, 0])  # the number says which transition was drawn
        for k in range(context):
            inside = first + k < len(flat) and episode[first + k] == episode[first]
            assert valid[b, k] == inside
            if inside:
                assert rtg[b, k, 0] == first + k
            assert episode[int(rtg[b, k, 0])] == episode[first]  # padding stays inside too
            assert obs[b, k, 0] == 10 * rtg[b, k, 0]
            assert act[b, k, 0] == 100 * rtg[b, k, 0]
            assert timestep[b, k] == flat.timestep[int(rtg[b, k, 0])]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from(["normal", "delayed"]),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_windows_of_a_dataset_hold_what_its_episodes_say(rewards, mode, context, seed):
    """From Minari's files to a batch, returns-to-go included, against a loop over samples."""
    rng = np.random.default_rng(seed)
    episodes = [random_episode(rng, len(r), r) for r in rewards]
    flat = load_trajectories(make_dataset("windows", episodes), ACT, scale=10.0, mode=mode)
    generator = torch.Generator().manual_seed(seed)
    rtg, obs, act, timestep, valid = sample_windows(flat, 16, context, generator)
    obs = obs * flat.obs_std + flat.obs_mean
    for b in range(16):
        (e,) = (i for i, x in enumerate(episodes) if (x.actions == act[b, 0].numpy()).all(1).any())
        first, T = int(timestep[b, 0]), len(rewards[e])
        assert valid[b].tolist() == [first + k < T for k in range(context)]
        for k in range(min(context, T - first)):
            t = first + k
            earned = rewards[e] if mode == "normal" else [0.0] * (T - 1) + [sum(rewards[e])]
            assert rtg[b, k, 0].item() == pytest.approx(sum(earned[t:]) / 10, rel=1e-4, abs=1e-4)
            np.testing.assert_allclose(obs[b, k], episodes[e].observations[t], atol=1e-4)
            np.testing.assert_array_equal(act[b, k], episodes[e].actions[t])
            assert timestep[b, k] == t


def test_first_steps_are_uniform_over_transitions():
    flat = flat_numbers([1, 30, 3, 16])
    rng = torch.Generator().manual_seed(0)
    drawn = sample_windows(flat, 50_000, 4, rng)[0][:, 0, 0].long()
    counts = torch.bincount(drawn, minlength=50).numpy()
    assert chisquare(counts).pvalue > 1e-3
    skewed = counts + np.where(np.arange(50) == 0, 300, 0)  # the test itself can fail
    assert chisquare(skewed).pvalue < 1e-3


# --- pictures ------------------------------------------------------------------------------------

PICTURES = gym.spaces.Box(0, 255, (40, 50, 3), np.uint8)


def picture_episode(rng, length):
    return EpisodeBuffer(
        observations=rng.integers(0, 256, (length + 1, 40, 50, 3), np.uint8),
        actions=rng.integers(0, 3, length),
        rewards=rng.normal(size=length),
        terminations=np.arange(length) == length - 1,
        truncations=np.zeros(length, bool),
    )


def picture_dataset(lengths, **how):
    rng = np.random.default_rng(0)
    episodes = [picture_episode(rng, n) for n in lengths]
    made = minari.create_dataset_from_buffers(
        f"test/pictures-v{next(VERSION)}",
        episodes,
        observation_space=PICTURES,
        action_space=gym.spaces.Discrete(3),
        ref_min_score=0.0,
        **how,
    )
    return read_dataset(Path(made.spec.data_path).parent), episodes


@pytest.mark.parametrize("part", [1, 4, 256])
@pytest.mark.parametrize("how", [{}, {"jpeg_encoding": False}, {"data_format": "arrow"}], ids=str)
def test_frames_are_the_pictures_made_small(monkeypatch, part, how):
    monkeypatch.setattr(data, "PICTURES_AT_A_TIME", part)
    dataset, written = picture_dataset([5, 1, 9], **how)
    flat = load_trajectories(dataset, gym.spaces.Discrete(3))
    assert flat.obs.dtype == torch.uint8
    assert flat.obs_mean.shape == flat.obs_std.shape == (0,)
    n = 0
    for episode, original in zip(dataset.iterate_episodes(), written, strict=True):
        T = len(episode)
        if how == {"jpeg_encoding": False}:
            np.testing.assert_array_equal(episode.observations, original.observations)
        assert torch.equal(flat.obs[n : n + T], shrink(episode.observations[:T]))
        assert flat.act[n : n + T].tolist() == original.actions.tolist()
        n += T
    assert n == len(flat)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 1000))
def test_states_of_frames_equal_a_loop_over_stacks(lengths, context, seed):
    """Frame i shows i + 1; a state is the frame and the three before it, black before a start."""
    flat = flat_numbers(lengths)
    flat.obs = torch.arange(1, len(flat) + 1, dtype=torch.uint8)[:, None, None].expand(-1, 2, 2)
    rtg, obs, _, timestep, valid = sample_windows(
        flat, 8, context, torch.Generator().manual_seed(seed)
    )
    assert obs.shape == (8, context + STACK - 1, 2, 2)
    for b in range(8):
        for k in range(context):
            if valid[b, k]:
                number, t = int(rtg[b, k, 0]), int(timestep[b, k])
                stack = [number - back + 1 if back <= t else 0 for back in (3, 2, 1, 0)]
                assert obs[b, k : k + STACK, 0, 0].tolist() == stack
                assert (obs[b, k : k + STACK] == obs[b, k : k + STACK, :1, :1]).all()


def test_the_model_reads_the_states_of_overlapping_frames():
    """FrameEncoder on a window equals its layers on one stack at a time."""
    encoder = FrameEncoder(16, "mlp")
    frames = torch.randint(0, 256, (2, 6 + STACK - 1, 84, 84), dtype=torch.uint8)
    together = encoder(frames)
    assert together.shape == (2, 6, 16)
    for k in range(6):
        stack = frames[:, k : k + STACK].float() / 255  # (2, STACK, 84, 84)
        assert torch.allclose(together[:, k], encoder.mlp(encoder.conv(stack)), atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------


def nan_observation(e):
    e.observations[2, 1] = np.nan


def infinite_reward(e):
    e.rewards[1] = np.inf


def nan_action(e):
    e.actions[0, 0] = np.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan_observation, "episode 1 has a NaN or infinite observation"),
        (infinite_reward, "episode 1 has a NaN or infinite reward"),
        (nan_action, "episode 1 has a NaN or infinite action"),
    ],
)
def test_values_that_are_not_finite_are_refused(spoil, message):
    rng = np.random.default_rng(0)
    episodes = [random_episode(rng, 4), random_episode(rng, 5)]
    spoil(episodes[1])
    with pytest.raises(UserError, match=message):
        load_trajectories(make_dataset("spoilt", episodes), ACT, 1.0)


def test_an_empty_episode_is_refused(five_episodes):
    dataset, _ = five_episodes
    with h5py.File(Path(dataset.spec.data_path) / "main_data.hdf5", "r+") as file:
        group = file["episode_1"]  # Minari itself does not write such a one
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            values = group[key][: key == "observations"]
            del group[key]
            group[key] = values
    with pytest.raises(UserError, match="episode 1 is empty"):
        load_trajectories(dataset, ACT, 1.0)


# --- which dataset -------------------------------------------------------------------------------

HOPPER = TASKS["hopper"]


def test_bundled_set_is_what_it_says_and_serves_small_ratios_only():
    dataset, share, note = find_dataset("hopper", HOPPER, 0.01)
    assert share == 0.01
    assert "bundled lamo/hopper/medium-1pct-v0" in note
    assert "no network" in note
    about = json.loads((data.BUNDLED / HOPPER.bundled / "about.json").read_text())
    space = dataset.action_space
    flat = load_trajectories(dataset, space, HOPPER.scale, 0.01 / share)
    assert len(flat) == about["steps"]
    assert len(flat.lengths) == about["episodes"]
    assert flat.returns.mean() == pytest.approx(about["return_mean"], rel=1e-5)
    half = load_trajectories(dataset, space, HOPPER.scale, 0.005 / share)
    assert len(half.lengths) == about["episodes"] // 2
    with pytest.raises(UserError, match="--steps 1000000") as caught:
        find_dataset("hopper", HOPPER, 0.02)
    assert "--ratio 0.02 asks for more than the 0.01 of" in str(caught.value)
    for name in (HOPPER.bundled, str(data.BUNDLED / HOPPER.bundled)):  # by name too
        assert find_dataset("hopper", HOPPER, 0.01, name)[1] == 0.01
        with pytest.raises(UserError, match=r"more than the 0\.01 of"):
            find_dataset("hopper", HOPPER, 1.0, name)


def test_bundled_set_replays_in_the_environment():
    """The recorded actions, from the recorded seeds, give the recorded rewards again."""
    dataset, _, _ = find_dataset("hopper", HOPPER, 0.01)
    env = gym.make(HOPPER.env_id)
    metadata = list(dataset.storage.get_episode_metadata(range(2)))
    for episode, about in zip(dataset.iterate_episodes(range(2)), metadata, strict=True):
        observation, _ = env.reset(seed=int(about["seed"]))
        np.testing.assert_allclose(observation, episode.observations[0], rtol=1e-5, atol=1e-6)
        for t in range(100):
            observation, reward, *_ = env.step(episode.actions[t])
            assert reward == pytest.approx(episode.rewards[t], rel=1e-6)
            np.testing.assert_allclose(
                observation, episode.observations[t + 1], rtol=1e-4, atol=1e-5
            )


def test_a_recorded_set_is_preferred_to_the_bundled_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    for name in (HOPPER.recorded, HOPPER.dataset.format(quality="medium")):
        minari.create_dataset_from_buffers(
            name,
            [random_episode(rng, 3)],
            observation_space=OBS,
            action_space=ACT,
            ref_min_score=0.0,
        )
        dataset, share, note = find_dataset("hopper", HOPPER, 1.0)
        assert dataset.spec.dataset_id == name  # and the task's own before the recorded one
        assert share == 1.0
        assert name in note


def test_a_short_recording_does_not_stand_before_the_bundled_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded = tmp_path / HOPPER.recorded
    shutil.copytree(BUNDLED / HOPPER.bundled, recorded)
    (recorded / "about.json").write_text('{"share": 0.005}')
    for ratio, expected in ((0.005, HOPPER.recorded), (0.01, HOPPER.bundled)):
        _, _, note = find_dataset("hopper", HOPPER, ratio)
        assert expected in note.split(", since")[0]
    with pytest.raises(UserError, match=r"asks for more than the 0.005 .* record a full one"):
        find_dataset("hopper", HOPPER, 0.02)


def test_a_download_is_whole_or_absent(tmp_path, monkeypatch):
    """Minari's downloader puts file after file in place; here it fails, then is repeated."""
    local = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(local))
    rng = np.random.default_rng(0)

    def download(name, whole):
        create = minari.create_dataset_from_buffers
        spaces = dict(observation_space=OBS, action_space=ACT, ref_min_score=0.0)
        made = create(name, [random_episode(rng, 3)], **spaces)
        if not whole:
            (Path(made.spec.data_path) / "main_data.hdf5").unlink()
            raise ConnectionError("gone")

    monkeypatch.setattr(minari, "download_dataset", lambda name: download(name, whole=False))
    with pytest.raises(ConnectionError):
        data.download_dataset("test/set-v0", local)
    assert [p for p in local.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    partial = local / "test" / "set-v0" / "data"  # what an older interrupted download left
    partial.mkdir(parents=True)
    (partial / "metadata.json").write_text("{}")
    killed = local / "test" / ".set-v0.abcd1234" / "test"  # what a killed one left
    killed.mkdir(parents=True)
    (killed / "main_data.hdf5").write_bytes(b"a part")
    monkeypatch.setattr(minari, "download_dataset", lambda name: download(name, whole=True))
    folder = data.download_dataset("test/set-v0", local)
    assert read_dataset(folder).total_episodes == 1
    assert os.environ["MINARI_DATASETS_PATH"] == str(local)
    assert [path.name for path in (local / "test").iterdir() if path.is_dir()] == ["set-v0"]


def test_a_dataset_asked_for_by_name_is_found_or_an_error(five_episodes):
    dataset, _ = five_episodes
    found, share, note = find_dataset("hopper", HOPPER, 1.0, dataset.spec.dataset_id)
    assert found.spec.dataset_id == dataset.spec.dataset_id
    folder = Path(dataset.spec.data_path).parent
    found, share, note = find_dataset("hopper", HOPPER, 1.0, str(folder))
    assert (share, note) == (1.0, f"{folder}, as asked")
    with pytest.raises(UserError, match="minari download mujoco/hopper/expert-v0"):
        find_dataset("hopper", HOPPER, 0.01, "mujoco/hopper/expert-v0")
    (folder / "data" / "main_data.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(UserError, match="no readable Minari dataset"):
        load_trajectories(find_dataset("hopper", HOPPER, 1.0, str(folder))[0], ACT, 1.0)
