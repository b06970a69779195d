"""Sphinx's configuration of the documentation site, which `make docs` builds.

The pages are the Markdown files of this folder, as GitHub shows them. What a page takes from the
code (commands, settings, the API) replaces a comment such as `<!-- site: commands -->` while the
page is read; `_site` has the functions that write it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_site"), str(HERE.parent)]

import pyloss  # noqa: E402

project = "pyloss"
author = copyright = "The pyloss developers"
version = release = pyloss.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "site_pages",
]
root_doc = "index"
source_suffix = {".md": "markdown"}
exclude_patterns = ["_site"]
highlight_language = "text"
smartquotes = False  # -- begins a flag

# Links to headings as GitHub names them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["torch"]
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_numpy_docstring = False
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = "pyloss"
html_static_path = ["_site/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = True
html_show_sourcelink = False
