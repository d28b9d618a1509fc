"""Settings of Sphinx, which 'make docs' builds the site with."""

from mdeq_mm import __version__

project = 'mdeq_mm'
author = 'The mdeq_mm authors'
copyright = f'2026, {author}'
release = version = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
source_suffix = {'.md': 'markdown'}
# The source is the whole repository, so that pages link to the README, to configs and
# to code as they do where Markdown is shown as it is.
root_doc = 'docs/index'
include_patterns = [
    *('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'),
    *('docs/**', 'configs/*/README.md'),
]
html_extra_path = ['site']
html_theme = 'furo'
html_title = f'mdeq_mm {version}'
html_copy_source = False

# Headings are link targets, as on the sites that render Markdown by themselves.
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
# Signatures with whole configs as defaults are read more easily as they are written.
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
