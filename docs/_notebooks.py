"""Pages as notebooks, executed when Sphinx reads the page."""

import base64
import inspect
import logging
import operator
import re
import subprocess
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import jupytext
from nbclient import NotebookClient

import pyro_vae

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
FOLDER = HERE / "_build" / "notebooks"
LOG = logging.getLogger(__name__)
LOG.setLevel(logging.WARNING)
PAGES = ["tutorial", "likelihoods", "exercises"]


def write_notebook(_: "Sphinx", name: str, __: list[str]) -> None:
    """Write a page as a notebook with the outputs of its code. A cell that fails ends the build."""
    if name not in PAGES:
        return
    notebook = read_page(HERE / f"{name}.md")
    FOLDER.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(notebook, log=LOG, resources={"metadata": {"path": FOLDER}})
    client.execute(stderr=subprocess.DEVNULL)  # what a kernel says of itself; errors of cells come back
    jupytext.write(notebook, FOLDER / f"{name}.ipynb", fmt="ipynb")


def read_page(page: Path) -> "NotebookNode":
    """Return a page of the documentation as a notebook, with its pictures inside."""
    notebook = jupytext.reads(page.read_text(), fmt={"extension": ".md", "format_name": "markdown"})
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain_markdown(cell.source)
            for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", cell.source):
                picture = base64.b64encode((page.parent / path).read_bytes()).decode()
                cell.setdefault("attachments", {})[Path(path).name] = {"image/png": picture}
                cell.source = cell.source.replace(f"({path})", f"(attachment:{Path(path).name})")
    return notebook


def plain_markdown(text: str) -> str:
    """Return the text without what Sphinx alone understands, and without links to other pages."""
    text = re.sub(r"^:::.*\n?", "", text, flags=re.MULTILINE)  # the frames of solutions
    text = re.sub(
        r"^```\{literalinclude\}[^`]*:pyobject: ([\w.]+)[^`]*```$", source, text, flags=re.MULTILINE
    )
    text = re.sub(r"^```\{.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)  # other directives
    text = re.sub(r"^\{\{.*\}\}\n*|^.*\{download\}.*\n*", "", text, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!http)[^)]*\)", r"\1", text)


def source(name: re.Match[str]) -> str:
    """Return the code of a method such as `Guide.forward`."""
    code = inspect.getsource(operator.attrgetter(name[1])(pyro_vae))
    return f"```python\n{textwrap.dedent(code)}```"
