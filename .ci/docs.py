"""Build README.md and the site from the notebooks.

    python .ci/docs.py readme    README.md from nbs/index.ipynb
    python .ci/docs.py site      _docs: by quarto where it is installed, else plain pages of the same notebooks
"""
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter, MarkdownExporter
from nbdev.config import get_config
from nbdev.quarto import nbdev_docs
from nbdev.serve import proc_nbs

PROC = Path('_proc')


def processed():
    "nbdev's own half of the site: front matter, signatures, directives."
    proc_nbs(n_workers=0, force=True)
    return sorted(p for p in PROC.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def without_front_matter(text): return re.sub(r'\A---\n.*?\n---\n', '', text, flags=re.S).strip()+'\n'


def readme_text():
    "README.md as it should be."
    nb = nbformat.read(PROC/'index.ipynb', 4)
    title = re.search(r'^title: (.*)$', nb.cells[0].source, flags=re.M)[1].strip('"')
    text = MarkdownExporter().from_notebook_node(nb)[0]
    link = f"{get_config().doc_host}{get_config().doc_baseurl}"
    body = re.sub(r'\]\(((?:\w+/)?\d\d\w*)\.html\)', rf']({link}/\1.html)', without_front_matter(text))
    return '<!-- made from nbs/index.ipynb by `make readme`; change that -->\n\n# ' + title + '\n\n' + body.replace('](images/', '](nbs/images/')


def site():
    "The published site, or plain pages that read the same."
    if shutil.which('quarto'): return nbdev_docs()
    out = Path('_docs'); shutil.rmtree(out, ignore_errors=True)
    exporter = HTMLExporter(mathjax_url='', require_js_url='')
    for path in processed():
        nb = nbformat.read(path, 4); front = nb.cells[0]
        title = re.search(r'^title: (.*)$', front.source, flags=re.M)
        if title: front.cell_type, front.source = 'markdown', '# ' + title[1].strip('"')
        target = out/path.relative_to(PROC).with_suffix('.html'); target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(exporter.from_notebook_node(nb)[0], encoding='utf-8')
    if Path('nbs/images').exists(): shutil.copytree('nbs/images', out/'images')
    print(f'quarto is not installed: plain pages in {out}/, open {out}/index.html')


def main(what):
    "Make what was asked for."
    if what == 'readme': processed(); Path('README.md').write_text(readme_text(), encoding='utf-8')
    elif what == 'site': site()
    else: raise SystemExit(__doc__)


if __name__ == '__main__': main(sys.argv[1] if len(sys.argv) > 1 else '')
