"""Imports go down only, and what is light stays light."""

import ast

import pytest
from support.runs import ROOT

OURS = {
    *("runtime", "config", "diffusion", "transport", "models", "objectives", "weights", "features", "sampling"),
    *("training", "evaluation", "tools", "benchmarks", "tests"),
}
# What a package may import of ours, beside itself and `runtime`, and of the heavy frameworks, at any depth of its code.
ALLOWED = {
    "runtime": set(),
    "config": set(),
    "diffusion": set(),
    "transport": set(),
    "models": set(),
    "objectives": {"diffusion", "transport", "models.hooks"},
    "weights": {"models", "config", "ppdiffusers"},
    "features": {"weights", "config", "objectives.base", "PIL", "ppdiffusers"},
    "sampling": {
        *("models", "diffusion", "transport", "objectives", "weights", "features", "config", "PIL", "ppdiffusers"),
    },
    "training": {"models", "objectives", "weights", "features", "sampling", "config", "visualdl", "PIL"},
    "evaluation": {"models", "objectives", "weights", "features", "sampling", "config", "PIL", "sklearn"},
}
FRAMEWORKS = {"paddlenlp", "ppdiffusers", "visualdl", "sklearn", "PIL"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


FILES = sorted(path for package in ALLOWED for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_imports_go_down_only(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | {package, "runtime"}
    if package == "training" and path.name.startswith("trainer"):
        allowed |= {"paddlenlp"}
    refused = {
        name
        for name in imports(path)
        if name.split(".")[0] in OURS | FRAMEWORKS and not any((name + ".").startswith(f"{ok}.") for ok in allowed)
    }
    assert not refused


@pytest.mark.parametrize("script", ["train_image_generation_trainer.py", "train_image_generation_notrainer.py"])
def test_loops_do_not_ask_which_model_they_train(script):
    source = (ROOT / script).read_text() + (ROOT / "training/trainer.py").read_text()
    for name in ("DiT", "SiT", "LargeDiT", "diffusion", "transport"):
        code = "\n".join(line for line in source.splitlines() if '"""' not in line and "#" not in line)
        assert f'"{name}"' not in code and f"import {name}" not in code
