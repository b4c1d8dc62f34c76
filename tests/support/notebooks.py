"""Runs the cells of a notebook in this process, in IPython and without a kernel, as Jupyter would one after the other.

    python tests/support/notebooks.py NOTEBOOK [NAME=VALUE ...] [--store]

NAME=VALUE replaces a variable of the cell that is tagged "parameters". `--store` writes the outputs into the notebook:
of a progress bar its end, pictures in 64 colours, no paths of this machine.
"""

import ast
import base64
import io
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def output_of(shown):
    """Returns an output of a cell in the notebook's format; of several forms of a picture the PNG."""
    data = {kind: value for kind, value in shown.data.items() if kind in ("image/png", "text/plain")}
    if isinstance(data.get("image/png"), bytes):
        data["image/png"] = base64.b64encode(data["image/png"]).decode()
    return {"output_type": "display_data", "metadata": {}, "data": data}


def run(notebook, **variables):
    """Runs a notebook, given as read from its JSON, and puts the outputs into it; SystemExit at a cell that fails."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell.instance()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        source = "".join(cell["source"])
        with capture_output() as said:
            result = shell.run_cell(source, store_history=True)
            if "parameters" in cell["metadata"].get("tags", ()):
                shell.push(variables)
        text = "".join(said.stdout + said.stderr)
        # `!command` has no error of its own.
        if not result.success or shell.user_ns.get("_exit_code"):
            sys.exit(f"cell {number} failed:\n{source}\n{text}")
        stream = {"output_type": "stream", "name": "stdout", "text": text.splitlines(True)}
        cell["outputs"] = [*([stream] if text else []), *map(output_of, said.outputs)]
        cell["execution_count"] = number
    return notebook


def tidy(output):
    """Makes an output one that can be stored in a repository."""
    from PIL import Image

    if lines := output.get("text"):
        text = "".join(lines).replace("\r\n", "\n").replace(f"{ROOT}/", "")
        output["text"] = re.sub(r"[^\n]*\r", "", text).splitlines(True)
    if png := output.get("data", {}).get("image/png"):
        few, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64), io.BytesIO()
        few.save(file, "PNG", optimize=True)
        output["data"] = {"image/png": base64.b64encode(file.getvalue()).decode()}


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    found = json.loads(Path(path).read_text())
    given = dict(word.split("=", 1) for word in words if "=" in word)
    done = run(found, **{name: ast.literal_eval(value) for name, value in given.items()})
    if "--store" in words:
        for output in (output for cell in done["cells"] for output in cell.get("outputs", ())):
            tidy(output)
        Path(path).write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    shown = [output for cell in done["cells"] for output in cell.get("outputs", ())]
    print(f"{path}: all cells ran, {sum('image/png' in output.get('data', ()) for output in shown)} pictures")
