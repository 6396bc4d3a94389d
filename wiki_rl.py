"""Wiki-RL's pull of trajectory tokens towards words (Reid et al. 2022, arXiv 2201.12122).

Wiki-RL trains all of GPT-2 on trajectories and, early in training, rewards trajectory tokens for
lying in the direction of some cluster of word embeddings:

    - similarity * a(step) * mean over tokens of max over clusters of cos(token, centre)

with 1000 clusters of wte by cosine, found once by k-means, and a weight that fades,
a(step) = sigmoid((5000 - step) / 500 - 5). A token is what the embedding's LayerNorm gives, before
its time is added (model.Objective). Figures and formula are those of the authors' code.
"""

import hashlib
import math

import torch
import torch.nn.functional as F

from files import locked, write_atomically
from plumbing import UserError
from text import cache_folder

CLUSTERS = 1000  # of word embeddings
FADE = (5000, 500, 5)  # a(step) = sigmoid((5000 - step) / 500 - 5)


def fading(step):
    """a(step): how much of the pull is left, 0.99 at first and half at step 2500."""
    middle, width, shift = FADE
    return 1 / (1 + math.exp(min(700.0, shift - (middle - step) / width)))


def find_centres(wte):
    """Directions of CLUSTERS clusters of word embeddings, by k-means of their directions.

    wte (V, C). A vocabulary that is no larger has each word for a cluster of its own. Returns
    (centres (k, C) of length 1, a line on where they are from); they are kept in the cache, under
    the hash of wte. Raises UserError without scikit-learn.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    words = F.normalize(wte.detach().float().cpu(), dim=-1)  # (V, C)
    if len(words) <= CLUSTERS:
        return words, f"the {len(words)} word embeddings themselves, for there are no more"
    digest = hashlib.sha256(words.numpy().tobytes()).hexdigest()[:32]
    file = cache_folder() / "centres" / f"{digest}-{CLUSTERS}.safetensors"
    with locked(file):
        if not file.is_file():
            try:
                from sklearn.cluster import KMeans
            except ImportError as error:
                raise UserError("clusters need a package: pip install scikit-learn") from error
            print(f"clustering {len(words)} word embeddings, once; it takes minutes", flush=True)
            found = KMeans(CLUSTERS, n_init=1, random_state=0).fit(words.numpy())
            centres = F.normalize(torch.from_numpy(found.cluster_centers_).float(), dim=-1)
            write_atomically(file, lambda out: out.write(save({"centres": centres})))
    try:
        centres = load_file(file)["centres"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{file} is damaged; delete it, and it is made again") from error
    if centres.shape != (CLUSTERS, words.shape[1]):
        raise UserError(f"{file} is damaged; delete it, and it is made again")
    return centres, f"{CLUSTERS} clusters of {len(words)} word embeddings, in {file}"
