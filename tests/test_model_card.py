"""The README.md of an exported pipeline folder."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from support.pipelines import DIGITS_VAE, make_config, write_checkpoint

from sampling.pipelines.folder import check_output
from sampling.pipelines.model_card import escaped
from tools.convert_dit_to_ppdiffusers import main as convert_dit
from tools.convert_sit_to_ppdiffusers import main as convert_sit

NAMES = {0: "\u7b11\u8138", 1: "<b> | `x`", 2: "[a](http://x.y)", 3: "# h\n\n---", 4: "1. _one_", 5: "www.x.y a@b.c"}
LABELS = {str(label): NAMES.get(label, f"digit {label}") for label in range(10)}


def export(convert, checkpoint, output, *flags):
    (checkpoint.parent / "labels.json").write_text(json.dumps({"id2label": LABELS}))
    words = ["--model_weights", checkpoint, "--checkpoint_path", output, "--vae_model", DIGITS_VAE]
    convert([*map(str, [*words, "--id2label", checkpoint.parent / "labels.json", *flags])])
    return (output / "README.md").read_text(encoding="utf-8")


def run_code(card, monkeypatch, folder):
    """Runs the program of a card as it says; returns the image."""
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, {})
    return np.asarray(Image.open(folder / "sample.png"))


def test_the_card_of_a_dit(tmp_path, monkeypatch):
    config = make_config("DiT", sample_size=4)
    config["training"]["learning_rate"] = 0.0123
    write_checkpoint(tmp_path / "checkpoint", config)
    (tmp_path / "checkpoint/trainer_state.json").write_text(json.dumps({"global_step": 5432}))
    card = export(convert_dit, tmp_path / "checkpoint", tmp_path / "my `pipe`", "--card_samples", 2)
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: ppdiffusers" in head and "\nlicense" not in head
    for words in (
        r"| steps | 5,432 |",
        r"| learning\_rate | 0.0123 |",
        "| num\\_layers | 2 |",
        "32x32",
        "digits\\_vae",
    ):
        assert words in body
    assert "](samples.png)" in card and Image.open(tmp_path / "my `pipe`/samples.png").height == 10 * 36 + 4
    assert "| 0 | \u7b11\u8138 |" in body
    assert "http://" not in body and "<b>" not in body and "\n# h" not in body and str(tmp_path) not in card
    assert run_code(card, monkeypatch, tmp_path).shape == (32, 32, 3)
    # Its own card is replaced with the folder, somebody else's is not.
    check_output(tmp_path / "my `pipe`", overwrite=True)
    (tmp_path / "my `pipe`/samples.png").unlink()
    (tmp_path / "my `pipe`/README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds README.md, which is no part of a pipeline"):
        check_output(tmp_path / "my `pipe`", overwrite=True)


def test_the_card_of_a_sit_without_a_null_class(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint", make_config("SiT", class_dropout_prob=0))
    card = export(convert_sit, tmp_path / "checkpoint", tmp_path / "pipe")
    assert "guidance_scale=1," in card and "`guidance_scale` must be 1" in card and "as a `SiTPipeline` folder" in card
    assert "samples.png" not in card
    assert run_code(card, monkeypatch, tmp_path).shape == (32, 32, 3)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a|b\n", r"a\|b\\n"),
        ("- 1", r"\- 1"),
        ("12. x", r"12\. x"),
        ("0.5-x", "0.5-x"),
        ("![a](b)", r"!\[a\](b)"),
        ("x" * 300, "x" * 200 + "..."),
    ],
)
def test_escapes(text, expected):
    assert escaped(text) == expected
