from llava.train.train import train
import json


def test_a_private_run(flags, tiny, tmp_path, capsys):
    train(argv=flags(data_path=tiny / "a.json", fed_dp_epsilon=8, fed_dp_delta=1e-6, fed_dp_clip=1.0))
    print(capsys.readouterr().out)
    print((tmp_path / "out/README.md").read_text())
    print((tmp_path / "out/privacy.json").read_text())
