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


# llava.train again and again in one process, for which a folder's files are more connectors.
TRAIN = """
import json, sys
import llava.model.multimodal_projector as package
folder, commands = json.loads(sys.argv[1])
package.__path__.append(folder)
from llava.train.train import main

for argv in commands:
    sys.argv = ["train", *argv]
    try:
        main()
    except SystemExit as end:
        print("ended with", end.code, file=sys.stderr)
    print("----", file=sys.stderr)
"""


def run(folder, *commands) -> list[str]:
    """What each command says on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps([str(folder), commands])],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, _ = done.stderr.split("----\n")
    return said


def test_a_connector_with_flags_is_one_file(flags, tiny, tmp_path):
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors/scaled.py").write_text(SCALED)

    def scaled(**changes):
        return flags(data_path=tiny / "a.json", mm_projector_type="scaled", max_steps=2, **changes)

    done, changed, zero, other = run(
        tmp_path / "connectors",
        scaled(scaled_factor=3),
        scaled(scaled_factor=4),
        scaled(scaled_factor=0, output_dir="x"),
        flags(data_path=tiny / "a.json", scaled_factor=3),
    )
    assert "ended with" not in done, done
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mm_projector_type"] == "scaled"
    assert config["mm_scaled"] == {"factor": 3.0}
    assert "--scaled_factor" in (tmp_path / "out/run.json").read_text()
    assert "scaled_factor = '3.0', now it is '4.0'" in changed
    assert "scaled_factor is 0, another number" in zero
    assert "--scaled_factor is for --mm_projector_type scaled" in other
    assert all("ended with 2" in said for said in (changed, zero, other))


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
