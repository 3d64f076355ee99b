"""site.yaml: what may be in it, and what is said of what may not."""

from __future__ import annotations

import pytest

from fed.remote.site_yaml import read_site
from llava.errors import InputError
from tests.fed.remote.sites import site_yaml


def read(tmp_path, tiny, **changes):
    return read_site(site_yaml(tmp_path, tiny, "a", "spool", **changes))


def test_paths_are_relative_to_the_file(tmp_path, tiny, monkeypatch):
    (tmp_path / "there").mkdir()
    config = read(
        tmp_path,
        tiny,
        flags={"bf16": True, "learning_rate": 1e-3},
        allow=["seed", "version"],
        gpus=[0, 2],
        command="bash x.sh",
        cwd="there",
        vision_tower="openai/clip-vit-large-patch14",
    )
    assert config.work == tmp_path / "work-a"
    assert config.folder == str(tmp_path / "spool")
    assert config.flags == {"bf16": "True", "learning_rate": "0.001"}
    assert config.allowed == {"seed", "version"}
    assert config.process.gpus == ("0", "2")
    assert config.process.command == ("bash", "x.sh")
    assert config.vision_tower == "openai/clip-vit-large-patch14"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_pth": "x"}, r"unknown key 'data_pth' \(did you mean data_path"),
        ({"name": None}, "name is missing"),
        ({"name": 7}, "name is 7; letters.*put it in quotes"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"data_path": None}, "data_path is missing"),
        ({"data_path": "x.json"}, "data_path .*/x.json does not exist"),
        ({"image_folder": "x"}, "image_folder .*/x does not exist"),
        ({"model_name_or_path": "./x"}, "model_name_or_path .*/x does not exist"),
        ({"model_name_or_path": "x"}, "model_name_or_path .*/x does not exist"),
        ({"vision_tower": None}, "vision_tower is missing"),
        ({"courier": None}, "courier is missing"),
        ({"folder": None}, "courier folder needs folder"),
        ({"kit": "kit"}, "kit .*/kit does not exist"),
        ({"flags": {"output_dir": "x"}}, "flags has 'output_dir', which a site does not set"),
        ({"flags": ["bf16"]}, "flags is \\['bf16'\\]"),
        ({"allow": ["lerning_rate"]}, "allow has 'lerning_rate', .*did you mean learning_rate"),
        ({"allow": ["data_path"]}, "allow has 'data_path', which no run sets"),
        ({"allow": "seed"}, "allow is 'seed', a list"),
        ({"gpus": "x y"}, "gpus is 'x y'"),
        ({"command": ""}, "command is ''"),
    ],
)
def test_bad_input_is_named(tmp_path, tiny, changes, message):
    with pytest.raises(InputError, match=f"a.yaml: .*{message}"):
        read(tmp_path, tiny, **changes)


@pytest.mark.parametrize(
    ("text", "message"), [("[", "not YAML"), ("- a", "keys and values"), ("", "keys and values")]
)
def test_what_is_no_site_yaml(tmp_path, text, message):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(InputError, match=f"site.yaml: .*{message}"):
        read_site(tmp_path / "site.yaml")
    with pytest.raises(InputError, match="none.yaml: No such file"):
        read_site(tmp_path / "none.yaml")
