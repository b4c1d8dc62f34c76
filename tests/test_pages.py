"""The pages: links lead somewhere, commands parse, Chinese pages are those of the English ones, the tutorial works."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from support.commands import ROOT

TWINS = ("README.md", "docs/tutorial.md", "docs/faq.md")  # these must have a Chinese page
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
PAGE_NAMES = sorted(str(path.relative_to(ROOT)) for path in PAGES)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def twin(name):
    return re.sub(r"\.md$", "_zh-CN.md", name)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def headings(name):
    """The headings of a page, `(level, words)`."""
    found = re.findall(r"^(#+) (.*)$", FENCE.sub("", text_of(name)), re.MULTILINE)
    return [(len(marks), words.strip()) for marks, words in found]


def anchors(name):
    """The names by which GitHub lets one link to the headings of a page."""
    found = []
    for _, words in headings(name):
        slug = "".join(c for c in words.lower() if c in " -_" or unicodedata.category(c)[0] in "LNM").replace(" ", "-")
        found.append(f"{slug}-{count}" if (count := found.count(slug)) else slug)
    return set(found)


def blocks(name, language):
    """The code blocks of a page in a language."""
    return [text for _, kind, text in FENCE.findall(text_of(name)) if kind == language]


def commands(text):
    """The commands of a shell script, each a list of words; variables that it sets itself are put in."""
    found, variables = [], {}
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if word.strip(";&|"):
                value = variables.get(word.removeprefix("$")) if word.startswith("$") else None
                words += shlex.split(value) if value else [word]
            elif words:
                if len(words) == 1 and "=" in words[0]:
                    variables.update([words[0].split("=", 1)])
                found.append(words)
                words = []
    return found


def commands_of(name):
    """The commands of a page: those in blocks, and those between backticks that begin with python or bash."""
    inline = re.findall(r"(?<!`)`((?:python|bash) [^`\n]+)`", FENCE.sub("", text_of(name)))
    return [words for text in (*blocks(name, "bash"), *inline) for words in commands(text)]


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_lead_somewhere(name):
    wrong = []
    for target in LINK.findall(FENCE.sub("", text_of(name))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not path.exists():
            wrong.append(target)
        elif anchor and anchor not in anchors(path.relative_to(ROOT)):
            wrong.append(target)
    assert not "\n".join(wrong)


class Parsed(BaseException):
    """A command line was parsed."""


def parse(script, words, monkeypatch):
    """Lets a command parse its words, and do nothing else; returns what is wrong with them, or None."""

    def parse_known_args(parser, args=None, namespace=None):
        _, unknown = original(parser, args, namespace)
        raise Parsed(unknown)

    original = argparse.ArgumentParser.parse_known_args
    command = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(sys, "argv", [script, *words])
        try:
            command.main()
        except Parsed as end:
            return f"{script}: unknown {end.args[0]}" if end.args[0] else None
        except (ValueError, SystemExit) as error:
            if getattr(error, "code", 1) == 0:  # --help
                return None
            return f"{script} {' '.join(words)}: {error}"
    return f"{script} parses nothing"


def problem_of(words, monkeypatch):
    """What is wrong with a command of a page; None for one that is not of this project."""
    variables = [word.split("=")[0] for word in words if re.match(r"\w+=", word)]
    if "#" in words:
        words = words[: words.index("#")]
    start = next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))
    kind, rest = words[start] if start < len(words) else "", words[start + 1 :]
    if kind not in ("python", "bash", ".venv/bin/python") or rest[:2] == ["-m", "pip"]:
        return None
    place = next((i for i, word in enumerate(rest) if word.endswith((".py", ".sh", ".ci/run"))), None)
    if place is None:
        return None if rest[:1] == ["-m"] else f"{' '.join(words)}: runs no script"
    script, flags = rest[place], [word for word in rest[place + 1 :] if word not in ("...", "&")]
    if not (ROOT / script).is_file():
        return f"{script}: no such file"
    named = [word for word in flags if re.match(r"(config|assets|tools|benchmarks)/\w", word)]
    missing = [word for word in named if not (ROOT / word).exists()]
    if missing:
        return f"{script}: no such file as {', '.join(missing)}"
    if script.endswith(".py"):
        return parse(script, flags, monkeypatch)
    code = text_of(script)
    if loop := re.search(r"tools/launch_(\w+)\.sh\"?$", code.strip()):
        code += text_of("tools/launch_common.sh") + text_of(f"tools/launch_{loop[1]}.sh")
        if flags and (problem := parse(f"train_image_generation_{loop[1]}.py", flags, monkeypatch)):
            return problem
        flags = []
    unknown = [w for w in (*variables, *flags) if re.match(r"-?\w|--\w", w) and w.startswith("--") and w not in code]
    unknown += [name for name in variables if not re.search(rf"\b{name}\b", code)]
    return f"{script}: does not know {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_commands_parse(name, monkeypatch):
    problems = [problem_of(words, monkeypatch) for words in commands_of(name)]
    assert not "\n".join(filter(None, problems))


def test_a_wrong_command_is_found(monkeypatch):
    """The check itself: each of these has one mistake."""
    wrong = {
        "python tools/plan_memory.py --word_size 8": "word_size",
        "python tools/no_such_tool.py --seed 1": "no such file",
        "python infer_demo_dit.py --num_inference_steps many": "many",
        "python infer_demo_dit.py --vae assets/no_vae": "assets/no_vae",
        "bash quickstart.sh --modle DiT": "--modle",
        "max_step=20 bash 0_run_train_dit_trainer.sh": "max_step",
        "bash 0_run_train_dit_trainer.sh --lr_endd 1": "lr_endd",
        "x=1 && python tools/options_table.py": "required",
    }
    for text, word in wrong.items():
        (problem,) = filter(None, (problem_of(words, monkeypatch) for words in commands(text)))
        assert word in problem or word == "required"


@pytest.mark.parametrize("name", TWINS)
def test_both_languages_have_the_same_headings_commands_and_pictures(name):
    theirs = twin(name)
    assert [level for level, _ in headings(name)] == [level for level, _ in headings(theirs)]
    for language in ("bash", "python"):
        ours, others = ([re.sub(r"#.*", "", text).split() for text in blocks(n, language)] for n in (name, theirs))
        assert ours == others
    pictures = re.compile(r"!\[[^\]]*\]\(([^)]+?)(?:_zh-CN)?\.\w+\)")  # the same, or the same in the page's language
    assert pictures.findall(text_of(name)) == pictures.findall(text_of(theirs))
    # In any order: the languages order the words of a sentence differently.
    links = ([re.sub(r"_zh-CN|(\.md)#.*", r"\1", link) for link in LINK.findall(text_of(n))] for n in (name, theirs))
    assert len({tuple(sorted(found)) for found in links}) == 1
    rows = [len(re.findall(r"^(?:\|.*\||- .*|\d+\. .*)$", text_of(n), re.MULTILINE)) for n in (name, theirs)]
    assert rows[0] == rows[1], "a row of a table, or an item of a list, is in one language alone"


@pytest.mark.parametrize("name", ["README.md", "README_zh-CN.md"])
def test_a_readme_is_no_reference_manual(name):
    assert 150 <= len(text_of(name).splitlines()) <= 200


def test_pictures_of_the_pages_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs/images").iterdir()}
    limits = {name: 300_000 if name.startswith("web_demo") else 150_000 for name in sizes}  # whole screens
    assert not [name for name, size in sizes.items() if size > limits[name]] and sum(sizes.values()) < 1_000_000


# What makes a command of the tutorial short; it is added to its words.
SHORTER = {
    "tools/prepare_symbols.py": "--images_per_class 6",
    "tools/train_vae.py": "--max_steps 2",
    "tools/make_config.py": "--max_steps 6 --size XS",
    "train_image_generation_trainer.py": "--image_logging_steps 3 --logging_steps 1 --num_inference_steps 2",
    "infer_demo_dit.py": "--num_inference_steps 2",
}
NOT_RUN = ("tools/setup_env.sh", "web_demo.py")  # installs packages; serves until it is stopped


@pytest.mark.walkthrough
def test_the_tutorial_works(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in ("data", "outputs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "TRACEBACK": "1"}

    def run(words):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    for _, language, text in FENCE.findall(text_of("docs/tutorial.md")):
        if language == "python":
            run([sys.executable, "-c", text])
        for words in commands(text) if language == "bash" else ():
            if words[0] != "." and not set(NOT_RUN) & set(words):
                run([*words, *(more for script in words for more in SHORTER.get(script, "").split())])
    names = json.loads((tmp_path / "outputs/symbols_pipeline/model_index.json").read_text())["id2label"].values()
    assert "笑脸" in names and len(names) == 10
    width, height = Image.open(tmp_path / "outputs/three.png").size
    assert width > 4 * 64 and height >= 3 * 64  # the names stand beside the rows
    assert Image.open(tmp_path / "outputs/smile.png").size == Image.open(tmp_path / "outputs/one.png").size == (64, 64)
    assert list((tmp_path / "outputs/symbols").glob("*.html"))
