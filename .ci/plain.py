"""Plain pages of the processed notebooks: what the site shows where Quarto is not installed. No script, no font, nothing from another machine.

Names of pages, anchors and the sidebar are those that Quarto makes of the same files, so a link that works here works there.
"""
import html
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from jinja2 import Template
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.config import get_config
from pygments.formatters import HtmlFormatter

HERE = Path(__file__).parent


def slug(text):
    "The anchor that Pandoc gives a heading."
    text = html.unescape(re.sub(r'<[^>]*>', '', text)).lower(); text = re.sub(r'[^\w\-. ]', '', text)
    return re.sub(r'^[\W\d_]+', '', re.sub(r' +', '-', text.strip())) or 'section'


class Renderer(IPythonRenderer):
    "Markdown with Pandoc's anchors, and equations as MathML."
    def __init__(self): super().__init__(escape=False); self.used = {}

    def heading(self, text, level, **attrs):
        name = slug(text); n = self.used[name] = self.used.get(name, -1)+1; name += f'-{n}' if n else ''
        return f'<h{level} id="{name}">{text} <a class="anchor" href="#{name}" aria-label="link to this heading">#</a></h{level}>\n'

    def block_math(self, body): return f'<div class="equation">{convert(body.strip(), display="block")}</div>'
    def inline_math(self, body): return convert(body)
    def latex_environment(self, name, body): return convert(f'\\begin{{{name}}}{body}\\end{{{name}}}', display='block')


class Page(NamedTuple):
    "One notebook and where it goes."
    source: Path  # processed notebook, below the folder of them
    target: str   # html file, below the site
    title: str
    about: str    # its subtitle


def front_matter(nb): return yaml.safe_load(re.sub(r'\A---\n|\n---\s*\Z', '', nb.cells[0].source.strip()+'\n')) if nb.cells[0].cell_type == 'raw' else {}


def pages(proc, names):
    "The pages of a site, by the names that notebooks have in links."
    found = {}
    for name in names:
        told = front_matter(nbformat.read(proc/name, 4)); place = Path(name)
        found[name] = Page(proc/name, str(place.with_name(told.get('output-file', place.with_suffix('.html').name))), told.get('title', place.stem), told.get('description', ''))
    return found


def relative(target, page): return os.path.relpath(target, Path(page).parent)


def follow(body, page, known, anchors):
    "Links to notebooks and to the published site become links to these pages. A link of nbdev's to a name that has no heading leads to what holds it, or to the page; one that an author wrote stays as it is, for tests to find."
    host = (get_config().doc_host+get_config().doc_baseurl).rstrip('/')+'/'; inside = {p.target for p in known.values()}
    def one(m):
        link, anchor = html.unescape(m[1]), (m[2] or '')[1:]; to = link[len(host):] if link.startswith(host) else os.path.normpath(Path(page.target).parent/link) if '://' not in link else ''
        to = known[name].target if (name := re.sub(r'\.html$', '.ipynb', to)) in known else to
        if to not in inside: return m[0]
        if link.startswith(host): anchor = next((x for x in (anchor, anchor.split('.')[0]) if x in anchors[to]), '')
        return f'href="{relative(to, page.target)}{anchor and "#"+anchor}"'
    return re.sub(r'href="([^"#]+)(#[^"]*)?"', one, body)


def body_of(nb):
    "The notebook as HTML, without prompts."
    markdown = MarkdownWithMath(renderer=Renderer()); out = HTMLExporter(template_name='basic', exclude_input_prompt=True, exclude_output_prompt=True)
    out.register_filter('markdown2html', lambda source: markdown.render(source))
    return re.sub(r'<(style|script)\b.*?</\1>\s*', '', out.from_notebook_node(nb)[0], flags=re.S)  # styles of tables, page.css has its own; states of widgets, which nobody moves here


def write(proc, out, sidebar, ready):
    "Write the site; `ready(nb)` is what a notebook is shown as. Returns the pages."
    shutil.rmtree(out, ignore_errors=True); out.mkdir(parents=True)
    sections = yaml.safe_load(sidebar.read_text(encoding='utf-8'))['website']['sidebar']['contents']; order = [name for s in sections for name in s['contents']]; known = pages(proc, order)
    page_of = Template((HERE/'page.html').read_text(encoding='utf-8'), autoescape=True)
    day, night = (HtmlFormatter(style=s).get_style_defs('.highlight') for s in ('default', 'github-dark'))
    (out/'page.css').write_text((HERE/'page.css').read_text(encoding='utf-8')+day+'\n@media (prefers-color-scheme: dark) {\n'+night+'\n}\n', encoding='utf-8')
    bodies = {}
    for name in order: nb = ready(nbformat.read(known[name].source, 4)); nb.cells = nb.cells[1:]; bodies[name] = body_of(nb)
    anchors = {known[name].target: set(re.findall(r' id="([^"]+)"', body)) for name, body in bodies.items()}
    for k, name in enumerate(order):
        page = known[name]; target = out/page.target; target.parent.mkdir(parents=True, exist_ok=True)
        near = [known[order[i]] if 0 <= i < len(order) else None for i in (k-1, k+1)]
        target.write_text(page_of.render(page=page, body=follow(bodies[name], page, known, anchors), sections=[(s['section'], [known[n] for n in s['contents']]) for s in sections], before=near[0], after=near[1], to=lambda t, p=page: relative(t, p.target)), encoding='utf-8')
    return known
