"""The registry of connectors: a new one, flags included, is one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.model.multimodal_projector.connector import connector, connector_type

ROOT = Path(__file__).parents[4]
SCALED = '''
"""A linear connector whose tokens are scaled."""

from __future__ import annotations

from dataclasses import dataclass, field

from llava.errors import InputError
from llava.model.multimodal_projector.connector import connector
from llava.model.multimodal_projector.plain import LinearConnector


@dataclass
class ScaledSettings:
    factor: float = field(default=2.0, metadata={"help": "What tokens are multiplied by."})

    def __post_init__(self):
        if self.factor == 0:
            raise InputError("scaled_factor is 0, another number is expected")


class ScaledConnector(LinearConnector):
    def __init__(self, in_features, out_features, settings):
        super().__init__(in_features, out_features)
        self.settings = settings

    def forward(self, input, **context):
        return self.settings.factor * super().forward(input)


@connector("scaled", settings=ScaledSettings, base="linear")
def _scaled(config, settings):
    return ScaledConnector(config.mm_hidden_size, config.hidden_size, settings)
'''


def run(folder, argv):
    """llava.train in a process for which the files of a folder are more connectors."""
    code = (
        "import llava.model.multimodal_projector as package\n"
        f"package.__path__.append({str(folder)!r})\n"
        "from llava.train.train import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_connector_with_flags_is_one_file(flags, tiny, tmp_path):
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors/scaled.py").write_text(SCALED)

    def train(**changes):
        argv = flags(data_path=tiny / "a.json", mm_projector_type="scaled", max_steps=2, **changes)
        return run(tmp_path / "connectors", argv)

    done = train(scaled_factor=3)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mm_projector_type"] == "scaled"
    assert config["mm_scaled"] == {"factor": 3.0}
    assert "--scaled_factor" in (tmp_path / "out/run.json").read_text()
    assert "scaled_factor = '3.0', now it is '4.0'" in train(scaled_factor=4).stderr
    assert "scaled_factor is 0, another number" in train(scaled_factor=0, output_dir="x").stderr
    other = run(tmp_path / "connectors", flags(data_path=tiny / "a.json", scaled_factor=3))
    assert "--scaled_factor is for --mm_projector_type scaled" in other.stderr


def test_names_are_matched_whole_and_registered_once():
    assert connector_type("mlp3x_gelu")[1] == ("3",)
    assert connector_type(None)[0].pattern == "linear"
    for name in ("mlp0x_gelu", "mlp2x_gelu2", "Linear", "pilots"):
        with pytest.raises(InputError, match="known are linear, mlp2x_gelu .*, identity, pilot$"):
            connector_type(name)
    with pytest.raises(ValueError, match="twice"):
        connector("linear")(None)
    with pytest.raises(ValueError, match="a plain name is expected"):
        connector("x.y", settings=dict)(None)
