"""The commands that extraction, training and export end with: each can be pasted, and does what it says."""

import importlib
import json
import os
import shlex

import numpy as np
import pytest
from PIL import Image
from support.runs import ROOT, TINY

pytestmark = pytest.mark.walkthrough


@pytest.fixture
def paste(run_loop, capsys):
    """Runs a command line `python SCRIPT WORDS` in this process; returns the command lines that it ends with."""

    def paste(line):
        _, script, *words = shlex.split(line)
        script = os.path.relpath(script, ROOT)
        if script.startswith("train_image_generation_"):
            run_loop(script.removeprefix("train_image_generation_").removesuffix(".py"), words)
        else:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(words)
        said = capsys.readouterr().out.splitlines()
        return [said_line.removeprefix("next: ") for said_line in said if said_line.startswith("next: ")]

    return paste


def named(lines, script):
    (line,) = [line for line in lines if os.path.basename(shlex.split(line)[1]) == script]
    return line


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_every_next_command_works(kind, tmp_path, monkeypatch, paste):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "my pictures" / name).mkdir(parents=True)
        for index in range(4):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype="uint8"))
            image.save(tmp_path / "my pictures" / name / f"{index}.png")
    extract, vae = ROOT / "tools/extract_features.py", ROOT / "assets/digits_vae"
    command = ["python", extract, "--data_path", "my pictures", "--output", "my features", "--vae", vae]
    after_extraction = paste(shlex.join(map(str, [*command, "--image_size", 32, "--device", "cpu"])))
    paste(f"{named(after_extraction, 'check_features.py')} --device cpu")
    (train, *_) = paste(named(after_extraction, "make_config.py") + f" --model {kind} --size XS --max_steps 2")

    # A smaller network, so that it takes no minute.
    path = tmp_path / "my features/config.json"
    config = json.loads(path.read_text())
    config["model"].update({key: TINY[key] for key in ("num_layers", "num_attention_heads", "attention_head_dim")})
    path.write_text(json.dumps(config))
    after_training = paste(f"{train} --device cpu")
    demo = f"infer_demo_{kind.lower()}.py"
    paste(f"{named(after_training, demo)} --num_inference_steps 2 --device cpu")
    paste(named(after_training, "report.py"))
    after_export = paste(named(after_training, f"convert_{kind.lower()}_to_ppdiffusers.py"))
    paste(f"{named(after_export, demo)} --num_inference_steps 2 --device cpu")
    named(after_export, "web_demo.py")
    assert len(list((tmp_path / "outputs").glob(f"result_{kind}_*.png"))) == 2
