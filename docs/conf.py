"Settings of the documentation site; `docs/build.py` writes its pages from the notebooks and calls Sphinx."

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import latex2mathml.converter
from lvlm_study import __version__

project, author, release, language = 'lvlm_study', 'The lvlm_study authors', __version__, 'en'
copyright = 'the lvlm_study authors. Apache-2.0'
extensions = ['myst_nb', 'sphinx_copybutton']
myst_enable_extensions = ['dollarmath', 'colon_fence', 'deflist', 'attrs_block']
myst_heading_anchors, myst_update_mathjax = 4, False
nb_execution_mode = 'off'  # outputs are those stored in the notebooks
nb_merge_streams, nb_render_markdown_format = True, 'myst'
nb_code_prompt_show = nb_code_prompt_hide = 'Imports and set-up'
add_module_names, python_maximum_signature_line_length, toc_object_entries_show_parents = False, 88, 'hide'
copybutton_exclude = '.linenos, .gp, .go'
html_theme, html_title = 'furo', 'lvlm_study'
html_css_files, html_js_files = ['site.css'], ['frames.js']
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = dict(
    navigation_with_keys=True,
    light_css_variables={'color-brand-primary': '#0072B2', 'color-brand-content': '#0072B2'},
    dark_css_variables={'color-brand-primary': '#6CB8E6', 'color-brand-content': '#6CB8E6'},
)
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
html_math_renderer = 'mathml'


def mathml(self, node, display='inline'):
    "A formula as MathML, which browsers draw themselves: no script, nothing fetched."
    self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise __import__('docutils.nodes', fromlist=['SkipNode']).SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (mathml, None), (lambda self, node: mathml(self, node, 'block'), None))
