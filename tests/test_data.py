"""data.py: trajectories against slow loops, text against its own bytes and GPT-2's BPE."""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import tiktoken
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer
from scipy.stats import chisquare

import data
from data import BUNDLED, find_dataset, get_encoding, load_trajectories, sample_windows, tokenise
from tasks import TASKS, shrink
from utils import UserError

VERSION = itertools.count()  # a new name for each dataset
OBS, ACT = Box(-np.inf, np.inf, (3,)), Box(-1, 1, (2,))
PICTURES, CHOICE = Box(0, 255, (40, 50, 3), np.uint8), Discrete(3)
HOPPER = TASKS["hopper"]
refused = partial(pytest.raises, UserError)


def random_episode(rng, length, rewards=None, pictures=False):
    observations = rng.normal(size=(length + 1, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, size=(length, 2)).astype(np.float32)
    if pictures:
        observations = rng.integers(0, 256, (length + 1, 40, 50, 3), np.uint8)
        actions = rng.integers(0, 3, length)
    last = np.arange(length) == length - 1
    return EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=rng.normal(size=length) if rewards is None else np.array(rewards),
        terminations=last & (length % 2 == 0),  # the others were cut
        truncations=last & (length % 2 == 1),
    )


def make_dataset(episodes, obs=OBS, act=ACT, name=None, **how):
    """A Minari dataset on disk, by Minari's own means."""
    how |= dict(observation_space=obs, action_space=act, ref_min_score=0.0)
    name = name or f"test/set-v{next(VERSION)}"
    return minari.create_dataset_from_buffers(name, episodes, **how)


def folder_of(dataset):
    return Path(dataset.spec.data_path).parent


@pytest.fixture
def five():
    """A dataset of five episodes of different lengths, and what was written."""
    rng = np.random.default_rng(0)
    episodes = [random_episode(rng, n) for n in (4, 1, 9, 6, 2)]
    return make_dataset(episodes), episodes


# --- from a dataset to windows -------------------------------------------------------------------


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
    flat = load_trajectories(make_dataset(episodes), ACT, scale=10.0, mode=mode)
    before = np.concatenate([e.observations[:-1] for e in episodes]).astype(np.float64)
    std = before.std(0) + 1e-6 if len(before) > 1 else np.ones(3)  # what never varies is unscaled
    np.testing.assert_allclose(flat.obs_mean, before.mean(0), atol=1e-5)
    np.testing.assert_allclose(flat.obs_std, std, rtol=1e-5)
    np.testing.assert_allclose(flat.returns, [sum(r) for r in rewards], atol=1e-9)
    assert flat.lengths.tolist() == [len(r) for r in rewards]
    last = torch.tensor(np.stack([e.observations[-1] for e in episodes])) - flat.obs_mean
    np.testing.assert_allclose(flat.last_obs, last / flat.obs_std, rtol=1e-4, atol=1e-4)
    assert flat.terminated.tolist() == np.concatenate([e.terminations for e in episodes]).tolist()
    generator = torch.Generator().manual_seed(seed)
    rtg, obs, act, timestep, valid = sample_windows(flat, 16, context, generator)
    for b in range(16):
        (e,) = (i for i, x in enumerate(episodes) if (x.actions == act[b, 0].numpy()).all(1).any())
        first, T = int(timestep[b, 0]), len(rewards[e])
        assert valid[b].tolist() == [first + k < T for k in range(context)]
        earned = rewards[e] if mode == "normal" else [0.0] * (T - 1) + [sum(rewards[e])]
        for k in range(min(context, T - first)):
            t = first + k
            assert rtg[b, k, 0].item() == pytest.approx(sum(earned[t:]) / 10, rel=1e-4, abs=1e-4)
            seen = (episodes[e].observations[t] - before.mean(0)) / std
            np.testing.assert_allclose(obs[b, k], seen, atol=1e-4, rtol=1e-4)
            np.testing.assert_array_equal(act[b, k], episodes[e].actions[t])
            assert timestep[b, k] == t


def test_a_number_that_never_varies_is_centred_and_unscaled():
    """A goal or a task's id: 0.01 beside it, in evaluation, must not become 10,000."""
    episode = random_episode(np.random.default_rng(0), 9)
    episode.observations[:, 1] = 0.3
    flat = load_trajectories(make_dataset([episode]), ACT)
    assert flat.obs_mean[1].item() == pytest.approx(0.3)
    assert flat.obs_std[1].item() == 1
    assert flat.obs[:, 1].abs().max() < 1e-6
    expected = episode.observations[:-1, [0, 2]].std(0) + 1e-6
    np.testing.assert_allclose(flat.obs_std[[0, 2]], expected, rtol=1e-5)


@pytest.mark.parametrize(("ratio", "kept"), [(1.0, 5), (0.99, 4), (0.4, 2), (0.01, 1), (0.6, 3)])
def test_ratio_keeps_whole_trajectories_drawn_by_the_seed(five, ratio, kept):
    seen = set()
    for seed in range(40):
        flat = load_trajectories(five[0], ACT, 1.0, ratio, seed=seed)
        lengths = set(flat.lengths.tolist())
        assert len(lengths) == kept  # without replacement
        assert len(flat) == flat.lengths.sum()
        assert flat.obs.mean(0).abs().max() < 1e-4  # normalised by the kept part's own statistics
        seen |= lengths
    assert seen == {4, 1, 9, 6, 2}
    assert load_trajectories(five[0], ACT, 1.0, ratio, seed=seed).digest() == flat.digest()
    assert (load_trajectories(five[0], ACT).digest() == flat.digest()) == (kept == 5)


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e6), st.booleans())
def test_the_scale_makes_the_largest_return_1_to_10(largest, negative):
    episode = random_episode(np.random.default_rng(0), 2, [-largest if negative else largest, 0.0])
    scale = load_trajectories(make_dataset([episode]), ACT).scale
    assert largest / scale >= 1 - 1e-9
    assert largest / scale < 10
    assert f"{scale:e}".startswith("1.000000e")


def flat_numbers(lengths):
    """Trajectories whose every number tells which transition it is of, from episode lengths."""
    number = torch.arange(sum(lengths), dtype=torch.float32)[:, None]
    ends = itertools.accumulate(lengths)
    end = torch.cat([torch.full((T,), end) for T, end in zip(lengths, ends, strict=True)])
    timestep = torch.cat([torch.arange(T) for T in lengths])
    stats = torch.zeros(1), torch.ones(1), 1.0, np.zeros(len(lengths)), np.array(lengths)
    return data.Trajectories(number, number, number, timestep, end, *stats)


def test_first_steps_are_uniform_over_transitions():
    rng = torch.Generator().manual_seed(0)
    drawn = sample_windows(flat_numbers([1, 30, 3, 16]), 50_000, 4, rng)[0][:, 0, 0].long()
    counts = torch.bincount(drawn, minlength=50).numpy()
    assert chisquare(counts).pvalue > 1e-3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 7), st.integers(0, 99))
def test_states_of_frames_equal_a_loop_over_stacks(lengths, context, seed):
    """Frame i shows i + 1; a state is the frame and the three before it, black before a start."""
    flat, generator = flat_numbers(lengths), torch.Generator().manual_seed(seed)
    flat.obs = torch.arange(1, len(flat) + 1, dtype=torch.uint8)[:, None, None].expand(-1, 2, 2)
    rtg, obs, _, timestep, valid = sample_windows(flat, 8, context, generator)
    assert obs.shape == (8, context + data.STACK - 1, 2, 2)
    for b, k in valid.nonzero().tolist():
        number, t = int(rtg[b, k, 0]), int(timestep[b, k])
        stack = [number - back + 1 if back <= t else 0 for back in (3, 2, 1, 0)]
        assert obs[b, k : k + data.STACK, 0, 0].tolist() == stack
        assert (obs[b, k : k + data.STACK] == obs[b, k : k + data.STACK, :1, :1]).all()


@pytest.mark.parametrize("how", [{}, {"jpeg_encoding": False}, {"data_format": "arrow"}], ids=str)
def test_frames_are_the_pictures_made_small(how):
    rng = np.random.default_rng(0)
    written = [random_episode(rng, n, pictures=True) for n in (5, 1, 300)]  # read in parts of 256
    made = folder_of(make_dataset(written, PICTURES, CHOICE, **how))
    dataset, _, _ = find_dataset("x", HOPPER, 1.0, str(made))
    flat, n = load_trajectories(dataset, CHOICE), 0
    assert flat.obs_mean.shape == flat.obs_std.shape == (0,)
    for i, (episode, e) in enumerate(zip(dataset.iterate_episodes(), written, strict=True)):
        T = len(e.actions)
        frames = e.observations if how == {"jpeg_encoding": False} else episode.observations
        frames = torch.as_tensor(shrink(frames))
        assert torch.equal(flat.obs[n : n + T], frames[:T])
        assert torch.equal(flat.last_obs[i], frames[T])
        assert flat.act[n : n + T].tolist() == e.actions.tolist()
        n += T
    assert n == len(flat)


# --- which dataset, and what is refused ----------------------------------------------------------


def test_which_dataset_is_taken(tmp_path, monkeypatch):
    """The task's own before the recorded one before the bundled part, of those large enough."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def taken(ratio):
        dataset, share, note = find_dataset("hopper", HOPPER, ratio)
        assert str(folder_of(dataset)).removeprefix(f"{BUNDLED}/") in note
        return folder_of(dataset), share

    bundled, recorded = BUNDLED / HOPPER.bundled, tmp_path / HOPPER.recorded
    assert taken(0.01) == (bundled, 0.01)
    with refused(match="--ratio 0.02.*experiments.collect --env hopper --steps 1000000"):
        taken(0.02)
    shutil.copytree(bundled, recorded)
    (recorded / "about.json").write_text('{"share": 0.005}')
    assert taken(0.005) == (recorded, 0.005)
    assert taken(0.01) == (bundled, 0.01)
    with refused(match="--ratio 0.02"):
        taken(0.02)
    (recorded / "about.json").unlink()
    assert taken(0.02) == (recorded, 1.0)
    own = HOPPER.minari.format(quality="medium")
    make_dataset([random_episode(np.random.default_rng(0), 3)], name=own)
    assert taken(0.01) == (tmp_path / own, 1.0)


def test_a_dataset_asked_for_is_found_or_an_error(five, tmp_path):
    folder = folder_of(five[0])
    copied = shutil.copytree(folder, tmp_path / "dätä 数据")
    for name in (five[0].spec.dataset_id, str(folder), str(copied)):
        found, share, _ = find_dataset("hopper", HOPPER, 1.0, name)
        assert (folder_of(found), share) == (copied if name == str(copied) else folder, 1.0)
        assert len(load_trajectories(found, ACT)) == 22
    for name in (HOPPER.bundled, str(BUNDLED / HOPPER.bundled)):
        assert find_dataset("hopper", HOPPER, 0.01, name)[1] == 0.01
        with refused(match="--ratio 1"):
            find_dataset("hopper", HOPPER, 1.0, name)
    for name in ("mujoco/nothing/medium-v0", str(tmp_path), str(tmp_path / "absent")):
        with refused(match=name):
            find_dataset("hopper", HOPPER, 0.01, name)


@pytest.mark.parametrize("kind", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("spoil", [np.nan, np.inf, "short", "gone"])
def test_data_that_cannot_be_learnt_from_are_refused(five, kind, spoil):
    dataset, key = five[0], f"episode_1/{kind}"
    with h5py.File(folder_of(dataset) / "data" / "main_data.hdf5", "r+") as file:
        values = file[key][()]
        del file[key]
        if spoil != "gone":
            file[key] = values[:-1] if spoil == "short" else np.full_like(values, spoil)
    with refused(match=dataset.spec.dataset_id):
        load_trajectories(dataset, ACT, 1.0)


def test_a_dataset_without_an_episode_is_refused(five):
    with refused(match=five[0].spec.dataset_id):
        load_trajectories(five[0].filter_episodes(lambda episode: False), ACT)


# --- text ----------------------------------------------------------------------------------------


def hub_cache(repository, files):
    """Lay files out in a repository's folder as huggingface_hub caches them: name -> bytes."""
    laid_out = {"refs/main": b"abc"} | {f"snapshots/abc/{k}": x for k, x in files.items()}
    for name, content in laid_out.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(content)


def test_gpt2s_bpe_gives_the_published_token_ids(shared, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with refused(match="openai-community/gpt2 merges.txt"):
        get_encoding(50257)
    with refused(match="--lm-coef 0"):
        get_encoding(1000)
    folder = shared("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    theirs = get_encoding(50257)
    for case in json.loads(shared("gpt2/golden_logits.json").read_text()):
        assert theirs.encode_ordinary(case["prompt"]) == case["token_ids"]
    names = {  # as tiktoken names what it fetches
        "merges.txt": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "vocab.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    files = {name: (folder / cached).read_bytes() for name, cached in names.items()}
    hub_cache(tmp_path / "models--openai-community--gpt2", files)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    ours = get_encoding(50257)  # from the hub's files: the same
    text = shared("text/wikitext-2-test.txt").read_text()[:50_000] + " 123 naïve 日本 <|endoftext|>"
    tokens = ours.encode_ordinary(text)
    assert tokens == theirs.encode_ordinary(text)
    assert ours.decode(tokens) == text
    assert ours.n_vocab == 50257


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=300), many=st.sampled_from([1, 1, 1, 5000]))
def test_byte_tokens_are_the_bytes_of_the_whole_text(tmp_path, text, many):
    path, encoding = tmp_path / "text.txt", get_encoding(257)
    path.write_bytes(text.encode() * many)  # in pieces of a million characters
    tokens = tokenise(path, encoding, length=0)
    assert tokens.dtype == np.uint16
    assert bytes(tokens.astype(np.uint8)) == text.encode() * many
    assert encoding.decode(tokens[: len(text.encode())].tolist()) == text


def test_tokens_are_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("LAMO_CACHE", str(tmp_path / "cache"))
    path, found = tmp_path / "text.txt", []
    for text, files in (("hello", 1), ("hello", 1), ("hallo", 2)):
        path.write_text(text)
        found.append(bytes(tokenise(path, get_encoding(257)).astype(np.uint8)).decode())
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == files
    assert found == ["hello", "hello", "hallo"]


@pytest.mark.parametrize("content", ["café ".encode("latin-1") * 10, b"", b"0123456789", None])
def test_texts_that_cannot_be_used_are_refused(tmp_path, content):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with refused(match=str(path)):
        tokenise(path, get_encoding(257), length=10)
    if content:
        path.write_bytes(content.replace(b"\xe9", b"e") + b".")  # one token more, and UTF-8
        assert len(tokenise(path, get_encoding(257), length=10)) == len(content) + 1


def test_tokens_of_a_large_vocabulary_are_kept_whole(tmp_path):
    ranks = {bytes([i]): 70_000 + i for i in range(256)}
    large = tiktoken.Encoding("large", pat_str=".+", mergeable_ranks=ranks, special_tokens={})
    (tmp_path / "text.txt").write_text("abc")
    assert tokenise(tmp_path / "text.txt", large).tolist() == [70_097, 70_098, 70_099]


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 5), st.integers(0, 100))
def test_blocks_of_text_and_their_targets(n, batch, seed):
    tokens, length = torch.arange(n).to(torch.uint16), max(1, n // 3)
    x, y = data.sample_text(tokens, batch, length, torch.Generator().manual_seed(seed))
    assert x.shape == y.shape == (batch, length)
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(length).expand(batch, -1))
    assert y.max() <= n - 1
