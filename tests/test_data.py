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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from scipy.stats import chisquare

import data
from data import (
    Trajectories,
    check_text,
    find_dataset,
    find_text,
    get_encoding,
    load_trajectories,
    parquet_to_text,
    read_dataset,
    returns_to_go,
    sample_text,
    sample_windows,
    tokenise,
)
from plumbing import UserError
from tasks import TASKS, make_env

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
    flat = load_trajectories(dataset, OBS, ACT, scale=10.0, mode=mode)
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
        flat = load_trajectories(dataset, OBS, ACT, 1.0, ratio, seed=seed)
        again = load_trajectories(dataset, OBS, ACT, 1.0, ratio, seed=seed)
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
    flat = load_trajectories(make_dataset("windows", episodes), OBS, ACT, scale=10.0, mode=mode)
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
        load_trajectories(make_dataset("spoilt", episodes), OBS, ACT, 1.0)


def test_an_empty_episode_is_refused(five_episodes):
    dataset, _ = five_episodes
    with h5py.File(Path(dataset.spec.data_path) / "main_data.hdf5", "r+") as file:
        group = file["episode_1"]  # Minari itself does not write such a one
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            values = group[key][: key == "observations"]
            del group[key]
            group[key] = values
    with pytest.raises(UserError, match="episode 1 is empty"):
        load_trajectories(dataset, OBS, ACT, 1.0)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (gym.spaces.Box(-1, 1, (4,)), ACT, r"observations are Box\(.*\(3,\).*\(4,\)"),
        (OBS, gym.spaces.Box(-1, 1, (1,)), r"actions are Box\(.*\(2,\).*\(1,\)"),
        (OBS, gym.spaces.Discrete(2), r"actions are Box\(.*the env's are Discrete\(2\)"),
    ],
)
def test_spaces_that_differ_from_the_environments_are_refused(
    five_episodes, observation_space, action_space, message
):
    with pytest.raises(UserError, match=message):
        load_trajectories(five_episodes[0], observation_space, action_space, 1.0)


# --- which dataset -------------------------------------------------------------------------------

HOPPER = TASKS["hopper"]


def test_bundled_set_is_what_it_says_and_serves_small_ratios_only():
    dataset, share, note = find_dataset(HOPPER, 0.01)
    assert share == 0.01
    assert "bundled lamo/hopper/medium-1pct-v0" in note
    assert "no network" in note
    about = json.loads((data.BUNDLED / HOPPER.bundled / "about.json").read_text())
    env = make_env(HOPPER)
    spaces = env.observation_space, env.action_space
    flat = load_trajectories(dataset, *spaces, HOPPER.scale, 0.01 / share)
    assert len(flat) == about["steps"]
    assert len(flat.lengths) == about["episodes"]
    assert flat.returns.mean() == pytest.approx(about["return_mean"], rel=1e-5)
    half = load_trajectories(dataset, *spaces, HOPPER.scale, 0.005 / share)
    assert len(half.lengths) == about["episodes"] // 2
    with pytest.raises(UserError, match="--steps 1000000") as caught:
        find_dataset(HOPPER, 0.02)
    assert "ratios up to 0.01, not 0.02" in str(caught.value)
    for name in (HOPPER.bundled, str(data.BUNDLED / HOPPER.bundled)):  # by name too
        assert find_dataset(HOPPER, 0.01, name)[1] == 0.01
        with pytest.raises(UserError, match=r"ratios up to 0\.01"):
            find_dataset(HOPPER, 1.0, name)


def test_bundled_set_replays_in_the_environment():
    """The recorded actions, from the recorded seeds, give the recorded rewards again."""
    dataset, _, _ = find_dataset(HOPPER, 0.01)
    env = make_env(HOPPER)
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
    for name in (HOPPER.collected, HOPPER.dataset):
        minari.create_dataset_from_buffers(
            name,
            [random_episode(rng, 3)],
            observation_space=OBS,
            action_space=ACT,
            ref_min_score=0.0,
        )
        dataset, share, note = find_dataset(HOPPER, 1.0)
        assert dataset.spec.dataset_id == name  # and the task's own before the recorded one
        assert share == 1.0
        assert name in note


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
    assert [p for p in local.rglob("*") if p.is_file()] == []
    partial = local / "test" / "set-v0" / "data"  # what an older interrupted download left
    partial.mkdir(parents=True)
    (partial / "metadata.json").write_text("{}")
    monkeypatch.setattr(minari, "download_dataset", lambda name: download(name, whole=True))
    folder = data.download_dataset("test/set-v0", local)
    assert read_dataset(folder).total_episodes == 1
    assert os.environ["MINARI_DATASETS_PATH"] == str(local)
    assert not list(local.glob(".download-*"))


def test_a_dataset_asked_for_by_name_is_found_or_an_error(five_episodes):
    dataset, _ = five_episodes
    found, share, note = find_dataset(HOPPER, 1.0, dataset.spec.dataset_id)
    assert found.spec.dataset_id == dataset.spec.dataset_id
    folder = Path(dataset.spec.data_path).parent
    found, share, note = find_dataset(HOPPER, 1.0, str(folder))
    assert (share, note) == (1.0, f"{folder} in {folder}, as asked")
    with pytest.raises(UserError, match="minari download mujoco/hopper/expert-v0"):
        find_dataset(HOPPER, 0.01, "mujoco/hopper/expert-v0")
    (folder / "data" / "main_data.hdf5").write_bytes(b"not HDF5")
    with pytest.raises(UserError, match="no readable Minari dataset"):
        load_trajectories(find_dataset(HOPPER, 1.0, str(folder))[0], OBS, ACT, 1.0)


# --- text ----------------------------------------------------------------------------------------


@given(st.text())
def test_byte_tokens_are_the_bytes(text):
    encoding = get_encoding(257)
    assert bytes(encoding.encode_ordinary(text)) == text.encode()
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == 257


def test_gpt2_bpe_gives_the_published_token_ids(shared, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken")))
    encoding = get_encoding(50257)
    for case in json.loads(shared("gpt2/golden_logits.json").read_text()):
        assert encoding.encode_ordinary(case["prompt"]) == case["token_ids"]


def test_gpt2_bpe_from_the_hub_is_the_same(shared, monkeypatch, tmp_path):
    files = {"merges.txt": data.TIKTOKEN_FILES[0], "vocab.json": data.TIKTOKEN_FILES[1]}
    repository = tmp_path / "models--openai-community--gpt2"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name, tiktoken_name in files.items():
        shutil.copy(shared("tiktoken") / tiktoken_name, repository / "snapshots" / "abc" / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    from_hub = get_encoding(50257)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken")))
    text = shared("text/wikitext-2-test.txt").read_text()[:50_000] + " 123 naïve 日本"
    assert from_hub.encode_ordinary(text) == get_encoding(50257).encode_ordinary(text)
    assert from_hub.n_vocab == 50257


def test_gpt2_bpe_without_its_files_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        get_encoding(50257)
    with pytest.raises(UserError, match=r"known: 50257 \(GPT-2\), 257 \(bytes\)"):
        get_encoding(1000)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(min_size=1, max_size=300), chunk=st.integers(1, 50))
def test_a_token_file_holds_the_whole_text(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(data, "CHUNK", chunk)
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    tokens = tokenise(path, get_encoding(257))
    assert tokens.dtype == np.uint16
    assert bytes(tokens.astype(np.uint8)) == text.encode()


def test_tokens_are_cached_by_content(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("hello " * 10)
    first = tokenise(path, get_encoding(257))
    cached = data.cache_folder() / "tokens"
    files = set(cached.iterdir())
    assert np.array_equal(tokenise(path, get_encoding(257)), first)
    assert set(cached.iterdir()) == files
    path.write_text("hallo " * 10)  # same length, another text
    assert not np.array_equal(tokenise(path, get_encoding(257)), first)


def test_texts_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("café ".encode("latin-1") * 10)
    (tmp_path / "empty.txt").write_bytes(b"")
    encoding = get_encoding(257)
    for name, message in (
        ("latin1.txt", "is not UTF-8"),
        ("empty.txt", "is empty"),
        ("absent.txt", "cannot read the text"),
    ):
        with pytest.raises(UserError, match=message):
            tokenise(tmp_path / name, encoding)
    with pytest.raises(UserError, match="has 10 tokens, but a block needs 11"):
        check_text(np.zeros(10, np.uint16), 10)
    check_text(np.zeros(11, np.uint16), 10)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 5), st.integers(0, 100))
def test_blocks_of_text_and_their_targets(n, batch, seed):
    tokens = np.arange(n, dtype=np.uint16)
    length = max(1, n // 3)
    x, y = sample_text(tokens, batch, length, torch.Generator().manual_seed(seed))
    assert x.shape == y.shape == (batch, length)
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(length).expand(batch, -1))
    assert y.max() <= n - 1


def test_every_block_can_be_drawn():
    x, y = sample_text(np.arange(5, dtype=np.uint16), 200, 3, torch.Generator().manual_seed(0))
    assert set(x[:, 0].tolist()) == {0, 1}
    assert y.max() == 4


def test_default_text_without_a_network_is_the_python_manual():
    path, note = find_text("auto", byte_level=True)
    text = path.read_text(encoding="utf-8")
    assert "The Python manual" in f"The {note.removeprefix('the ')}"
    assert "no network" in note
    assert "exception" in text
    assert find_text("english", byte_level=False)[0] == path
    for corpus, byte_level in (("auto", False), ("wikitext", True)):
        with pytest.raises(UserError, match="--corpus FILE"):
            find_text(corpus, byte_level)
    with pytest.raises(UserError, match="there is no text"):
        find_text(str(path) + "x", True)


def test_parquet_columns_become_one_text(tmp_path):
    rows = [["", " = Title = \n", " Été . \n"], [" next \n"]]
    files = []
    for i, part in enumerate(rows):
        files.append(tmp_path / f"{i}.parquet")
        pq.write_table(pa.table({"text": part}), files[-1])
    with open(tmp_path / "out.txt", "wb") as out:
        parquet_to_text(files, out)
    assert (tmp_path / "out.txt").read_bytes().decode() == "".join(rows[0] + rows[1])
