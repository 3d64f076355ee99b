"""Clusters of pictures: a vision tower's features, mini-batch k-means, the nearest centroid.

A picture's feature is the mean of its patches as LLaVA sees them (CLIP's and SigLIP's last layer
but one), of length 1. The centroids are fitted on a bounded draw of pictures; then all pictures
stream by.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from fed.clients.slices import seed_of
from fed.data.cutting import LEFT_OUT, Column
from fed.data.samples import Sample, SampleSource, name_of
from llava.errors import InputError, reason

if TYPE_CHECKING:
    import torch

    from llava.model.multimodal_encoder.tower import VisionTower


@dataclass
class Centroids:
    """Means of clusters, (K, C) float32, and the fingerprint of the tower they belong to."""

    means: np.ndarray
    tower: str

    def nearest(self, features: np.ndarray) -> np.ndarray:
        """(N, C) → the number of the nearest mean, (N,)."""
        distances = (self.means**2).sum(1) - 2 * features @ self.means.T
        return distances.argmin(1)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save

        from llava.atomic import atomic_write

        with atomic_write(path) as file:
            file.write(save({"means": self.means}, {"tower": self.tower}))

    @classmethod
    def load(cls, path: str) -> Centroids:
        """`InputError` if the file is not what `save` writes."""
        import safetensors

        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return cls(file.get_tensor("means"), (file.metadata() or {})["tower"])
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            raise InputError(f"--centroids {path}: no centroids there ({reason(error)})") from None


class Encoder:
    """Pictures to features, by a tower of a local path or hub name."""

    def __init__(self, tower: str, device: str, batch_size: int) -> None:
        from llava.model.multimodal_encoder.builder import build_vision_tower

        choice = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
        self.tower: VisionTower = build_vision_tower(
            SimpleNamespace(mm_vision_tower=tower, **choice)
        )
        self.fingerprint = self.tower.fingerprint()
        try:
            self.tower.to(device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {device}: {reason(error)}") from None
        self.batch_size = batch_size

    def stream(
        self, source: SampleSource, wanted: np.ndarray, count_faults: bool
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Numbers of the `wanted` samples (a bool for each) and their features (N, C) float32.

        A picture that does not decode is passed over; with `count_faults` it goes to `left_out`.
        """
        with ThreadPoolExecutor() as pool:
            for batch in _batches(source, wanted, self.batch_size):
                decoded = list(pool.map(self._pixels, [picture for _, _, picture in batch]))
                numbers, pixels = [], []
                for (number, name, _), found in zip(batch, decoded, strict=True):
                    if not isinstance(found, str):
                        numbers.append(number)
                        pixels.append(found)
                    elif count_faults:
                        source.left_out.add(name, found)
                if pixels:
                    yield numbers, self._features(pixels)

    def _pixels(self, picture: str | bytes) -> torch.Tensor | str:
        """(3, H, W), or what is wrong with the picture."""
        from llava.mm_utils import image_pixels
        from llava.pictures import open_image

        try:
            image = open_image(picture, name_of(picture))
        except InputError as error:
            return str(error)
        return image_pixels(image, self.tower.image_processor, SimpleNamespace())

    def _features(self, pixels: list[torch.Tensor]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            patches = self.tower(torch.stack(pixels)).float()
            return torch.nn.functional.normalize(patches.mean(1), dim=-1).cpu().numpy()


def _batches(
    source: SampleSource, wanted: np.ndarray, size: int
) -> Iterator[list[tuple[int, str, str | bytes]]]:
    """Number, name and (first) picture of wanted samples."""
    batch = []
    for number, sample in enumerate(source.read(check=False)):
        if wanted[number] and isinstance(sample, Sample):
            batch.append((number, sample.name, sample.pictures()[0]))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def fit(
    encoder: Encoder, source: SampleSource, used: np.ndarray, clusters: int, samples: int, seed: int
) -> Centroids:
    """Centroids of at most `samples` pictures, drawn by `seed`; 4 C bytes each are held."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError:
        raise InputError("scikit-learn is missing: pip install 'fedllava[data]'") from None
    there = np.flatnonzero(used)
    if not 1 <= clusters <= min(len(there), samples):
        raise InputError(
            f"--clusters {clusters}: 1 to {min(len(there), samples)} are possible with "
            f"{len(there)} samples and --fit_samples {samples}"
        )
    chosen = np.zeros(len(used), dtype=bool)
    draw = np.random.RandomState(seed_of(seed, "make_clients", "fit"))
    chosen[draw.permutation(there)[:samples]] = True
    stream = tqdm(encoder.stream(source, chosen, False), desc="fitting", disable=None)
    features = [rows for _, rows in stream]
    if sum(map(len, features)) < clusters:
        raise InputError(f"--clusters {clusters}: too few pictures can be read")
    means = MiniBatchKMeans(
        clusters, n_init=3, random_state=seed_of(seed, "make_clients", "k-means")
    )
    means.fit(np.concatenate(features))
    return Centroids(means.cluster_centers_.astype(np.float32), encoder.fingerprint)


def assign(
    encoder: Encoder, source: SampleSource, used: np.ndarray, centroids: Centroids
) -> Column:
    """The nearest centroid of every sample; one whose picture does not decode is left out."""
    codes = np.full(len(used), LEFT_OUT, dtype=np.int32)
    stream = tqdm(encoder.stream(source, used, True), desc="clustering", disable=None)
    for numbers, features in stream:
        codes[numbers] = centroids.nearest(features)
    width = len(str(len(centroids.means) - 1))
    return Column(codes, [f"cluster-{i:0{width}d}" for i in range(len(centroids.means))])
