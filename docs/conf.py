"""Sphinx configuration; `bash scripts/docs.sh` builds the site into docs/_build."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simplernn_jax import __version__, array_types, models


def _named(default: Any) -> Any:
    """Show functions and types among default values by name."""
    if default is inspect.Parameter.empty or not callable(default):
        return default
    return type("Named", (), {"__repr__": lambda self: default.__name__})()


for _type in vars(array_types).values():
    if "jaxlib._jax." in getattr(_type, "__name__", ""):
        _type.__name__ = _type.__qualname__ = _type.__name__.replace("jaxlib._jax.", "")

for _module in (models.LanguageModel, models.SimpleRNN, models.SimpleRNNCell, models.Attention):
    # The metaclass of NNX hides the arguments.
    _self, *_arguments = inspect.signature(_module.__init__).parameters.values()
    _module.__signature__ = inspect.Signature(
        [argument.replace(default=_named(argument.default)) for argument in _arguments]
    )

project = "simplernn_jax"
author = "the simplernn_jax authors"
copyright = "the simplernn_jax authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = True
# Types of other packages, whose documentation is not part of this site.
nitpick_ignore_regex = [
    (
        "py:class",
        r"(Array|ArrayTree|jax|jaxlib|jaxtyping|numpy|collections|optax|os|flax)\b.*|'.*'",
    ),
    ("py:class", r"simplernn_jax\.(analysis|data)\..*"),  # parts of results, not public by name
]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "simplernn_jax"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _inline_math(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _keep_colons(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep Napoleon from reading the beginning of a field's docstring, up to a colon, as a type."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


class NotebookParser(MystParser):
    """Show a notebook as a page of text and code; its outputs are not stored.

    myst-nb and nbsphinx would need Jupyter, or pandoc.
    """

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the cells as Markdown."""
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        super().parse("\n\n".join(parts), document)


def setup(app: Sphinx) -> None:
    """Render math as MathML, which needs neither a network nor JavaScript, and notebooks."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)  # Napoleon's is 500
