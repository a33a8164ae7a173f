"""Makes README.md from nbs/index.ipynb: markdown and shown code, without hidden cells and directive lines. `--print`
writes to standard output.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
nb.metadata["language_info"] = {"name": "python"}  # names the language of code blocks
nb.cells = [c for c in nb.cells if not re.match(r"\s*#\s*\|\s*hide\b", c.source)]
for cell in nb.cells:
    if cell.cell_type == "code":
        cell.source = re.sub(r"^#\s*\|.*\n?", "", cell.source, flags=re.M).strip("\n")
text, resources = MarkdownExporter().from_notebook_node(nb)
assert not resources.get("outputs"), "index.ipynb has pictures in its outputs: keep them as files"
text = text.replace("](images/", "](nbs/images/")
text = (
    "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"
    + re.sub(r"\n{3,}", "\n\n", text).strip()
    + "\n"
)
if "--print" in sys.argv:
    sys.stdout.write(text)
else:
    (root / "README.md").write_text(text, encoding="utf-8")
