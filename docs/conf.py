"""Sphinx: pages in MyST, the reference from the docstrings, the results from JSON records."""

import sys
from pathlib import Path

import pyro_vae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.append(str(HERE.parent / "examples"))  # where the examples import command_line from

from _autoencoder import autoencoder  # noqa: E402
from _choice import draw_choice  # noqa: E402
from _comparing import comparison  # noqa: E402
from _evidence import annealed, gaps  # noqa: E402
from _house import draw_house  # noqa: E402
from _iwae import draw_iwae, iwae  # noqa: E402
from _likelihoods import likelihoods  # noqa: E402
from _notebooks import write_notebook  # noqa: E402
from _records import clusters, completion, read_records, results_page, without  # noqa: E402
from _speed import SPEED, in_short, on_a_gpu, speed  # noqa: E402
from _tutorial import put_outputs  # noqa: E402

project = "pyro_vae"
author = "The pyro_vae authors"
project_copyright = author
version = release = pyro_vae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx_design",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "description.md"]
html_theme = "furo"
html_title = "pyro_vae"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
maximum_signature_line_length = 88

# A role in a docstring that names nothing of this package is an error; other packages' names are
# printed without a link, since a link would take their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|torchvision|pyro|matplotlib|collections|pathlib|typing|abc)\..*"),
    (r"py:.*", r"(Tensor|Figure|ELBO|PyroOptim|TorchDistribution|nn\.Module|Path|optional|Any)"),
    (r"py:.*", r"(pyro_vae\.)?(pairs\.Batch|pairs\.Program|comparison\.Loss|Batch|Program|Loss)"),
]

_found = read_records(HERE / "results")
myst_substitutions = {name: speed(name, _found) for name in SPEED if name in _found}
myst_substitutions["gpu"] = on_a_gpu(read_records(HERE / "results" / "gpu"))
myst_substitutions["speed_in_short"] = in_short(_found["steps"], _found["training"])
myst_substitutions |= comparison(HERE / "results" / "compare")
myst_substitutions |= annealed(_found["annealed"]) | gaps(HERE / "results" / "gaps")
myst_substitutions |= iwae(HERE / "results" / "iwae")
myst_substitutions["default_elbo"] = f"{_found['default-run']['test_elbo']:.2f}"
myst_substitutions["default_evidence"] = f"{_found['default-run']['test_log_evidence']:.2f}"
myst_substitutions |= likelihoods(_found["likelihoods"]) | autoencoder(_found["autoencoder"])
myst_substitutions["mixture"] = clusters(_found["mixture"])
myst_substitutions["missing"] = completion(_found["missing"])
myst_substitutions["results"] = results_page(
    without(_found, *SPEED, "annealed", "autoencoder", "likelihoods")
)


def setup(app):
    app.connect("source-read", put_outputs)
    app.connect("source-read", write_notebook, priority=600)  # after the figures of the tutorial


draw_choice()
draw_iwae(HERE / "results" / "iwae")
draw_house((HERE / "architecture.md").read_text())
