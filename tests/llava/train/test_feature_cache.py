import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llava.mm_utils import image_pixels, open_image
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.pictures import READING
from llava.train.feature_cache import FeatureCache
from llava.train.sample_format import SampleFormat
from llava.train.session import make_feature_cache

PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def preprocess(path):
    return image_pixels(open_image(path), PROCESSOR, None)


class Tower:
    """Features (B, 4, 3) by simple sums; remembers the batches that it was given."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.batches = []

    def __call__(self, pixels):
        self.batches.append(len(pixels))
        return pixels.unflatten(2, (4, 4)).sum(dim=(3, 4)).transpose(1, 2).to(self.dtype)


def draw(path, number):
    image = Image.effect_noise((20, 20), 10 + number)
    image.save(path)
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    return [draw(tmp_path / f"{i}.png", i) for i in range(5)]


@pytest.fixture(params=["memory", "disk"])
def directory(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "cache"


def make(directory, tower=None, limit=10**6, key="k"):
    return FeatureCache(tower or Tower(), preprocess, key, limit, directory)


def test_features_are_computed_once_and_are_the_towers(pictures, directory):
    tower = Tower()
    cache = make(directory, tower)
    assert cache.get(pictures[0]) is None
    assert pictures[0] not in cache
    cache.prefetch([*pictures, pictures[0]], batch_size=2)
    assert tower.batches == [2, 2, 2]  # the last one filled up
    for path in pictures:
        assert cache.get(path).equal(Tower()(preprocess(path)[None])[0])
        assert path in cache
    cache.prefetch(pictures, batch_size=2)
    assert len(tower.batches) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_the_towers_and_nothing_needs_a_gradient(pictures, directory, dtype):
    weight = torch.ones(3, requires_grad=True)
    cache = make(directory, lambda pixels: Tower(dtype)(pixels) * weight.to(dtype))
    cache.prefetch(pictures[:1])
    features = cache.get(pictures[0])
    assert features.dtype == dtype
    assert not features.requires_grad
    assert (features.float() @ weight).requires_grad  # a projector can learn from it


def test_a_changed_picture_is_another_picture(pictures, directory):
    cache = make(directory)
    cache.prefetch(pictures[:1])
    before = cache.get(pictures[0])
    draw(pictures[0], 50)
    os.utime(pictures[0], ns=(1, 1))
    assert cache.get(pictures[0]) is None
    cache.prefetch(pictures[:1])
    assert not cache.get(pictures[0]).equal(before)


def test_two_names_of_a_picture_are_one(tmp_path, pictures, directory):
    link = tmp_path / "link.png"
    link.symlink_to(pictures[0])
    tower = Tower()
    cache = make(directory, tower)
    cache.prefetch([pictures[0], str(link)], batch_size=1)
    cache.prefetch([str(link)])
    assert len(tower.batches) == 1
    assert cache.get(str(link)).equal(cache.get(pictures[0]))


def test_what_cannot_be_read_is_left_out(tmp_path, pictures, directory):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    cache = make(directory)
    cache.prefetch([str(bad), str(tmp_path / "gone.png"), pictures[0]])
    assert cache.get(str(bad)) is None
    assert cache.get(str(tmp_path / "gone.png")) is None
    assert cache.get(pictures[0]) is not None


def test_an_error_of_the_program_is_not_swallowed(pictures):
    cache = FeatureCache(Tower(), lambda path: 1 / 0, "k", 10**6)
    with pytest.raises(ZeroDivisionError):
        cache.prefetch(pictures)


def test_at_its_limit_it_says_so_once_and_keeps_what_it_has(pictures, directory):
    probe = make(directory, key="probe")
    probe.prefetch(pictures[:1])
    size = probe._store.used
    cache = make(directory, limit=3 * size)
    with pytest.warns(UserWarning, match="limit") as said:  # noqa: PT031 (one for both)
        cache.prefetch(pictures, batch_size=2)
        cache.prefetch(pictures, batch_size=2)
    assert len(said) == 1
    assert [path in cache for path in pictures] == [True, True, True, False, False]
    if directory is not None:  # a new process finds the disk as full as it is
        with pytest.warns(UserWarning, match="limit"):
            make(directory, limit=3 * size).prefetch(pictures)


def test_the_disk_serves_later_processes_under_the_same_key_only(tmp_path, pictures):
    make(tmp_path / "cache").prefetch(pictures)
    tower = Tower()
    later = make(tmp_path / "cache", tower)
    later.prefetch(pictures)
    assert tower.batches == []
    assert later.get(pictures[3]).shape == (4, 3)
    other = make(tmp_path / "cache", tower, key="other tower")
    assert other.get(pictures[3]) is None


def test_a_damaged_file_is_computed_again(tmp_path, pictures):
    make(tmp_path / "cache").prefetch(pictures)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 5
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(whole[0][:-1])
    files[1].write_bytes(b"")
    files[2].write_bytes(whole[2][:-1] + bytes([whole[2][-1] ^ 1]))  # one bit of one number
    tower = Tower()
    cache = make(tmp_path / "cache", tower)
    assert sum(cache.get(path) is None for path in pictures) == 3
    cache.prefetch(pictures)
    assert len(tower.batches) == 1
    assert [file.read_bytes() for file in files] == whole


def fill(folder, pictures):
    """For a process of its own: fill a cache, give the sums of its features."""
    torch.set_num_threads(1)
    cache = make(folder)
    for _ in range(5):
        cache.prefetch(pictures, batch_size=2)
    return [float(cache.get(path).sum()) for path in pictures]


def test_several_processes_share_a_folder(tmp_path, pictures):
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        runs = [pool.submit(fill, tmp_path / "cache", pictures) for _ in range(3)]
        sums = [run.result() for run in runs]
    assert sums[0] == sums[1] == sums[2]
    assert all(sums[0])
    assert len(list((tmp_path / "cache").rglob("*"))) == 1 + 5 + len(
        {file.parent for file in (tmp_path / "cache").rglob("*.safetensors")}
    )


def test_pictures_that_are_read_otherwise_have_another_key(pictures, tiny, tmp_path, monkeypatch):
    """What an earlier version made of a 16-bit picture is not taken for its features."""
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower=str(tiny / "vision_tower")))
    tower.load_model()
    sample_format = SampleFormat(
        "plain", image_aspect_ratio="pad", image_processor=tower.image_processor
    )
    make_feature_cache(tower, sample_format, str(tmp_path / "cache"), 1).prefetch(pictures)
    assert pictures[0] in make_feature_cache(tower, sample_format, str(tmp_path / "cache"))
    monkeypatch.setattr("llava.train.session.READING", READING + 1)
    assert pictures[0] not in make_feature_cache(tower, sample_format, str(tmp_path / "cache"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_order_nor_on_company(pictures, dtype):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
    )
    model = CLIPVisionModel(config).eval().to(dtype)

    def encode(pixels):
        return model(pixel_values=pixels.to(dtype)).last_hidden_state[:, 1:]

    together, alone = make(None, encode), make(None, encode)
    together.prefetch(pictures, batch_size=8)
    for path in reversed(pictures):
        alone.prefetch([path], batch_size=8)
    assert all(together.get(path).equal(alone.get(path)) for path in pictures)
