"""What is refused with one sentence, and what is warned of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fed.merge import main, merge
from fed.state import load, save
from llava.errors import InputError

FORMS = ("bin", "beside", "projector", "lora", "full", "hf")


def refused(said: str, experts: list, out: Path, **settings) -> None:
    settings.setdefault("method", "linear")
    with pytest.raises(InputError, match=said) as caught:
        merge(experts, out, **settings)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(out.parent.glob(".out*"))


def change(path: Path, **tensors) -> Path:
    """Put tensors into a projector's file; None takes one out."""
    state = load(path) | tensors
    save({n: t for n, t in state.items() if t is not None}, path)
    return path


def set_config(folder: Path, **values) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "out"


@pytest.mark.parametrize("place", ["expert", "base"])
def test_shapes(place, expert, out):
    name = "model.mm_projector.2.weight"
    odd = change(expert("bin", 1), **{name: torch.ones(16, 8)})
    said = rf"{place} .*bin-1.*{name} has shape \(16, 8\), expected \(16, 16\)"
    if place == "base":
        refused(said, [expert("bin", 2), expert("bin", 3)], out, base=str(odd))
    else:
        refused(said, [expert("bin", 2), odd], out)


def test_projector_types(expert, out):
    """As their tensors tell, and as their configs do."""
    deeper = {"model.mm_projector.4.weight": torch.ones(16, 16)}
    paths = [expert("bin", 1), change(expert("bin", 2), **deeper)]
    refused("bin-2.*model.mm_projector.4.weight is not expected, .*bin-1", paths, out)
    refused("bin-1.*model.mm_projector.4.weight is missing, .*bin-2", paths[::-1], out)
    paths = [expert("projector", 1), set_config(expert("projector", 2), mm_projector_type="pilot")]
    refused("projector-2 has mm_projector_type 'pilot', .* has 'mlp2x_gelu'", paths, out)


def test_one_expert(expert, out):
    refused("--experts: 1 given, at least two", [expert("bin", 1)], out)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0], "1 for 2 experts"),
        ([1.0, -1.0], "-1.0 for expert .*bin-2"),
        ([1.0, float("nan")], "nan for expert"),
        ([1.0, float("inf")], "inf for expert"),
        ([0.0, 0.0], "fewer than two experts have any"),
        ([0.0, 1.0], "fewer than two experts have any"),
    ],
)
def test_weights(weights, said, expert, out):
    refused(f"--weights: {said}", [expert("bin", 1), expert("bin", 2)], out, weights=weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan(form, bad, expert, out):
    odd = expert(form, 2)
    folder = odd if odd.is_dir() else odd.parent
    name = "linear_1.weight" if form == "hf" else "mm_projector.0.weight"
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        state = _read(file)
        for key in state:
            if key.endswith(name):
                state[key].view(-1)[5] = bad
        _write(state, file)
    said = f"expert .*{odd.parent.name if odd.is_file() else odd.name}.*mm_projector.0.weight"
    refused(f"{said} has 1 NaN or infinite", [expert(form, 1), odd], out)


@pytest.mark.parametrize(
    ("form", "scope"), [*((f, "projector") for f in FORMS), ("lora", "all"), ("full", "all")]
)
def test_tensors_that_were_not_gathered(form, scope, expert, out):
    """All of them, as where ZeRO-3 wrote; the good one is not blamed."""
    odd = expert(form, 2)
    folder = odd if odd.is_dir() else odd.parent
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        _write({name: torch.empty(0) for name in _read(file)}, file)
    said = f"{folder.name}.* is empty, of shape .*ZeRO-3"
    refused(said, [expert(form, 1), odd], out, scope=scope)
    refused(said, [odd, odd], out, scope=scope)


def _read(file: Path) -> dict:
    from llava.state import read_tensors

    return {k: t.clone() for k, t in read_tensors(file).items()}


def _write(state: dict, file: Path) -> None:
    from safetensors.torch import save_file

    if file.suffix == ".bin":
        torch.save(state, file)
    else:
        save_file(state, file, metadata={"format": "pt"})


def test_nan_in_a_language_model_leaves_nothing(expert, out):
    paths = [expert("full", 1, deep=True), expert("full", 2, deep=True)]
    for file in paths[1].glob("*.safetensors"):
        state = _read(file)
        if "model.norm.weight" in state:
            state["model.norm.weight"][0] = float("nan")
            _write(state, file)
    refused("full-2-deep: tensor model.norm.weight has 1 NaN", paths, out, scope="all")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llava_mistral"),
        ("hidden_size", 32),
        ("num_hidden_layers", 3),
        ("vocab_size", 1300),
        ("_name_or_path", "elsewhere/other-llm"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14"),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_hidden_size", 24),
    ],
)
@pytest.mark.parametrize("role", ["expert", "base"])
def test_other_language_models_and_towers(key, value, role, expert, out):
    odd = set_config(expert("projector", 3), **{key: value})
    paths = [expert("projector", 1), expert("projector", 2)]
    base = str(expert("projector", 0))
    if role == "expert":
        paths[1] = odd
    else:
        base = str(odd)
    refused(f"{role} .*projector-3 has {key} .*--force", paths, out, base=base)
    forced = merge(paths, out, method="linear", base=base, force=True)
    assert key in forced.facts["forced"][0]
    assert "> [!WARNING]\n> Merged by force:" in (out / "README.md").read_text()


def test_the_same_tower_and_llm_in_other_places(expert, out):
    paths = [expert("beside", 1), expert("beside", 2)]
    set_config(paths[1].parent, mm_vision_tower="/elsewhere/tower", _name_or_path="/models/llm/")
    set_config(paths[0].parent, mm_vision_select_feature=None, model_type="llava")
    assert merge(paths, out, method="linear").facts["forced"] == []


def test_experts_that_are_one_or_know_nothing(expert, out, tmp_path, capsys):
    first, base = expert("bin", 1), expert("bin", 0)
    twin = Path(shutil.copy(first, tmp_path / "twin.bin"))
    still = Path(shutil.copy(base, tmp_path / "still.bin"))
    merged = merge([first, twin, still], out, method="linear", base=str(base))
    one, two = merged.facts["warnings"][:2]
    assert "twin.bin is the same as expert" in one
    assert "still.bin is equal to base" in two
    assert f"> [!NOTE]\n> {one}" in (out / "README.md").read_text()
    assert f"warning: {two}" in capsys.readouterr().err
    again = Path(shutil.copy(base, tmp_path / "again.bin"))
    refused("every expert is equal to base", [still, again], tmp_path / "x", base=str(base))


def trained(start: dict, seed: int, step: float) -> dict:
    torch.manual_seed(seed)
    return {n: t + step * torch.randn_like(t) for n, t in start.items()}


def test_a_base_that_is_not_the_common_start(tmp_path, out):
    torch.manual_seed(0)
    shape = {"model.mm_projector.weight": (40, 30)}
    start, other = ({n: torch.randn(s) for n, s in shape.items()} for _ in range(2))
    detour = trained(start, 9, 1.0)
    files = {"start": start, "other": other, "detour": detour}
    files |= {f"e{k}": trained(detour, k, 0.1) for k in range(3)}
    files |= {f"far{k}": trained(start, k, 1.5) for k in range(3)}
    for name, state in files.items():
        save(state, tmp_path / f"{name}.bin")

    def warned(experts: str, base: str) -> list[str]:
        paths = [tmp_path / f"{experts}{k}.bin" for k in range(3)]
        facts = merge(paths, out, method="linear", base=str(tmp_path / f"{base}.bin"),
                      overwrite=True).facts  # fmt: skip
        return [w for w in facts["warnings"] if "common start" in w]

    assert warned("e", "detour") == []
    assert warned("far", "start") == []
    (text,) = warned("e", "start")  # what came before the common start
    assert "cosines of 0.99 to 0.99" in text
    (text,) = warned("far", "other")  # what knows nothing of them
    assert "start.bin" not in text
    assert "is left in the experts" in text
    assert f"> [!NOTE]\n> {text}" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("local", "gives every expert a model of its own"),
        ("fedprox", "changes how clients train in a round"),
        ("scaffold", "changes how clients train in a round"),
        ("regmean", "needs data; name them with --calibration_data"),
        ("tiess", "did you mean ties"),
    ],
)
def test_methods_that_cannot_merge(method, said, expert, out):
    refused(f"{method}.*{said}", [expert("bin", 1), expert("bin", 2)], out, method=method)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(options=["dense=1"]), "no option 'dense' .did you mean density"),
        (dict(options=["density"]), "--options density: expected name=value"),
        (dict(options=["scale=1", "scale=2"]), "--options: scale is given twice"),
        (dict(options={"density": 7.0}), "density.*found 7"),
        (dict(scope="half"), "--scope is 'half'; known are projector, all"),
        (dict(lora="sum"), "--lora is 'sum'"),
        (dict(calibration_data=["x.json"]), "ties makes no use of data"),
        (dict(options=["mode=calibration"], method="pivotmerge"), "mode: expected one of uniform"),
        (
            dict(calibration_data=["x.json"], options=["noise=0"], method="pivotmerge"),
            "noise: expected a positive number",
        ),
        (dict(calibration_data=["x.json"] * 3), "3 files for 2 experts"),
        (dict(calibration_data=["x.json"], scope="all"), "needs --scope projector"),
        (dict(base="/no/base.bin"), "base /no/base.bin: no such file"),
        (dict(base="/no/base"), "base /no/base: no such folder"),
    ],
)
def test_settings(settings, said, expert, out):
    refused(said, [expert("bin", 1), expert("bin", 2)], out, **{"method": "ties", **settings})


def test_calibration_needs_a_language_model(expert, out):
    for form, said in (("bin", "name the language model with --model_base"),
                       ("projector", "name the language model with --model_base")):  # fmt: skip
        refused(said, [expert(form, 1), expert(form, 2)], out, method="regmean",
                calibration_data=["x.json"])  # fmt: skip
    refused("bin-1.* has no config.json; name one by --config", [expert("bin", 1, name="bin-1b"),
            expert("bin", 2, name="bin-2b")], out, method="regmean", model_base="/llm",
            calibration_data=["x.json"])  # fmt: skip


def test_paths_that_are_no_model(expert, out, tmp_path, tiny):
    good = expert("bin", 1)
    refused("expert /no/such.bin: no such file", [good, "/no/such.bin"], out)
    (tmp_path / "empty").mkdir()
    refused("empty: expected mm_projector.bin, adapter_config.json or", [good, tmp_path / "empty"],
            out)  # fmt: skip
    (tmp_path / "cut.bin").write_bytes(good.read_bytes()[:-100])
    refused("cut.bin: empty, cut short", [good, tmp_path / "cut.bin"], out)
    refused("has no projector", [good, tiny / "llm"], out)
    import pickle

    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Path("x")))
    refused("evil.bin: .*(never unpickled|not a file of tensors)", [good, tmp_path / "evil.bin"],
            out)  # fmt: skip


def test_the_command_line_says_one_sentence(expert, out, capsys):
    with pytest.raises(InputError, match="--experts is missing"):
        main(["--method", "linear", "--output", str(out)])
    with pytest.raises(InputError, match="--output is missing"):
        main(["--method", "linear", "--experts", str(expert("bin", 1)), str(expert("bin", 2))])
    with pytest.raises(SystemExit):
        main(["--metod", "linear"])
    assert "unrecognized arguments" in capsys.readouterr().err
