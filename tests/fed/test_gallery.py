"""`fed.gallery`: a real run on toy data, and what it draws."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from fed import gallery
from llava.train.train import train


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """A projector that was trained a little."""
    out = tmp_path_factory.mktemp("gallery") / "llava-tiny"
    train(argv=["--model_name_or_path", str(tiny / "llm"), "--version", "plain",
                "--vision_tower", str(tiny / "vision_tower"), "--mm_projector_type", "mlp2x_gelu",
                "--mm_use_im_patch_token", "False", "--mm_vision_select_layer", "-2",
                "--tune_mm_mlp_adapter", "True", "--data_path", str(tiny / "a.json"),
                "--image_folder", str(tiny / "images"), "--output_dir", str(out),
                "--max_steps", "1", "--save_strategy", "no", "--report_to", "none"])  # fmt: skip
    return out


def records(tiny, *images) -> list[dict]:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red picture"}]
    return [{"id": i, "image": image, "conversations": turns} for i, image in enumerate(images)]


def run(tiny, model, tmp_path, found: list[dict], *more: str):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(found))
    gallery.main(["--models", f"one={model}", f"two={model}", "--model-base", str(tiny / "llm"),
                  "--data", str(data), "--image-folder", str(tiny / "images"),
                  "--output", str(tmp_path / "gallery.png"), *more])  # fmt: skip
    return Image.open(tmp_path / "gallery.png")


def test_records_with_one_and_several_pictures_are_drawn(tiny, model, tmp_path, monkeypatch):
    """A red one alone, and a green one beside a blue one."""
    said, captions = [], gallery.captions
    monkeypatch.setattr(gallery, "captions", lambda *args: said.extend(captions(*args)) or said)
    drawn = run(
        tiny, model, tmp_path, records(tiny, "a-0.png", ["a-1.png", "a-2.png"], ["a-0.png"])
    )
    pixels = np.asarray(drawn.convert("RGB")).astype(int)
    assert [len(texts) for texts in said] == [3, 3]
    assert said[0] == said[1]
    for channel in range(3):  # of the three pictures' colours each is seen
        others = pixels[..., [c for c in range(3) if c != channel]].max(-1)
        assert (pixels[..., channel] > others + 80).sum() > 1000


def test_a_record_is_answered_in_company_as_alone(tiny, model):
    folder = tiny / "images"
    one, two = folder / "a-0.png", folder / "a-1.png"
    ((alone, both),) = gallery.captions([str(model)], str(tiny / "llm"), [[one], [one, two]])
    assert gallery.captions([str(model)], str(tiny / "llm"), [[one]]) == [[alone]]
    assert gallery.captions([str(model)], str(tiny / "llm"), [[one, two]]) == [[both]]


def test_pictures_stand_side_by_side_as_high_as_the_first():
    red, blue = Image.new("RGB", (4, 6), (255, 0, 0)), Image.new("RGB", (8, 12), (0, 0, 255))
    row = gallery.beside([red, blue])
    assert row.size == (8, 6)
    assert row.getpixel((3, 5)) == (255, 0, 0)
    assert row.getpixel((4, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("image", "flags", "message"),
    [
        (None, (), "no record has a picture"),
        (["a-0.png", 3], (), "record 0: `image` is .*expected a path or a list of paths"),
        ("no.png", (), "no.png cannot be read"),
        ("a-0.png", ("--pictures", "0"), "--pictures 0: at least 1 is expected"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, model, tmp_path, capsys, image, flags, message):
    with pytest.raises(SystemExit):
        run(tiny, model, tmp_path, records(tiny, image), *flags)
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
    assert not (tmp_path / "gallery.png").exists()
