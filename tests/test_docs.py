"The site: its sidebar, links, anchors, pictures and what they say; its plain pages in a real browser, by day and by night, on a phone and on a desk."
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).parents[1]
NBS = ROOT/'nbs'
EVERY = sorted(p.relative_to(NBS) for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
BUILD = """if __name__ == '__main__':
    import sys; sys.path.insert(0, '.ci'); import docs; from pathlib import Path
    docs.processed(); out = Path(sys.argv[1]); docs.plain_site(out/'site'); (out/'README.md').write_text(docs.readme_text(), encoding='utf-8')"""


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Plain pages and the README, made from the notebooks as they are."
    out = tmp_path_factory.mktemp('docs')
    run = subprocess.run([sys.executable, '-c', BUILD, str(out)], cwd=ROOT, capture_output=True, text=True); assert run.returncode == 0, run.stderr[-2000:]
    return out


@pytest.fixture(scope='module')
def soup(built): return {p.relative_to(built/'site').as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in (built/'site').rglob('*.html')}


def test_readme_is_in_sync(built):
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert (built/'README.md').read_text(encoding='utf-8') == text, 'run `make readme`'
    assert '\n| data | model |' in text and 'output: asis' not in text
    for name in re.findall(r'\]\(([^)#\s]+)', text): assert '://' in name or (ROOT/name).is_file(), name


def test_sidebar_holds_every_notebook_once():
    sections = yaml.safe_load((NBS/'sidebar.yml').read_text())['website']['sidebar']['contents']
    assert [s['section'] for s in sections] == ['Start', 'Data', 'Model', 'Training', 'Using', 'Experiments']
    assert sorted(n for s in sections for n in s['contents']) == sorted(p.as_posix() for p in EVERY)


def test_a_page_for_every_notebook(soup): assert len(soup) == len(EVERY) and 'index.html' in soup


def test_links_and_anchors_lead_somewhere(soup, built):
    ids, wrong = {name: {x['id'] for x in page.select('[id]')} for name, page in soup.items()}, []
    for name, page in soup.items():
        assert len(page.select('[id]')) == len(ids[name]), f'{name}: an id twice'
        for a in page.select('a[href], link[href]'):
            link, _, anchor = a['href'].partition('#')
            if '://' in link: assert a.name == 'a', f'{name} takes {link} from another machine'; continue
            to = os.path.normpath(Path(name).parent/link) if link else name
            if not (built/'site'/to).is_file() or anchor and anchor not in ids[to]: wrong.append((name, a['href']))
    assert not wrong


def test_pictures_say_what_they_show(soup, built):
    silent = {name for name, page in soup.items() for i in page.select('main img') if len(i.get('alt', '')) < 15 or 'No description' in i['alt']}
    assert not silent, f'make refresh stores what a figure shows: {silent}'
    for name, page in soup.items():
        for i in page.select('img'): assert i['src'].startswith('data:image/') or (built/'site'/Path(name).parent/i['src']).resolve().is_file(), i['src'][:80]


def test_pages_run_nothing_and_read_as_text(soup):
    for name, page in soup.items():
        assert not page.select('script, iframe, object, embed, style'), name
        prose = copy.copy(page)
        assert not (left := re.findall(r'\\[A-Za-z]+', ' '.join(x.get_text() for x in prose.find_all('math')))), f'{name}: an equation keeps {left[0]}, which the converter does not know'
        for x in prose.select('pre, code, math, table.dataframe'): x.extract()
        assert not re.search(r'\\(frac|mathrm|sum|text|bar|hat)\b|\$\$', prose.get_text()), f'{name}: an equation is shown as it is written'


def test_pages_show_the_code_that_they_should(soup):
    "A cell that asks not to be echoed shows what it drew alone, and no page shows what is meant for Quarto."
    quiet = [c.source for c in nbformat.read(NBS/'index.ipynb', 4).cells if '#| echo: false' in c.source]; assert len(quiet) >= 4
    shown = {name: '\n'.join(pre.get_text() for pre in page.select('main pre')) for name, page in soup.items()}
    for source in quiet: assert re.sub(r'^#\| .*\n', '', source, flags=re.M).strip() not in shown['index.html'], source
    assert not [name for name, text in shown.items() if re.search(r'^#\| ', text, flags=re.M) or '`](' in text] and len(soup['index.html'].select('main img')) >= 4


def test_api_says_its_shapes_and_its_source(soup):
    "Parameters with what they are, and a link to the line."
    page = soup['train.html']; told = page.find(id='fit').find_next('pre').get_text(); assert page.select('a[href*="/blob/"][href*="imecd/train.py#L"]')
    assert 'model' in told and 'TrainConfig' in told and '#' in told


def test_figures_of_quarto_say_it_too(built):
    "What is stored with a picture is written where Quarto looks for it."
    code = "import sys; sys.path.insert(0, '.ci'); import docs, shutil; from pathlib import Path; shutil.copytree('_proc', sys.argv[1]); docs.PROC = Path(sys.argv[1]); docs.say_alt()"
    subprocess.run([sys.executable, '-c', code, str(built/'proc')], cwd=ROOT, check=True, capture_output=True)
    for path in (built/'proc').rglob('*.ipynb'):
        for cell in nbformat.read(path, 4).cells:
            if any('image/png' in o.get('data', {}) for o in cell.get('outputs', ())): assert re.search(r'^#\| fig-alt: ".{15,}"$', cell.source, flags=re.M), path.name


def luminance(rgb):
    c = [(x/255)/12.92 if x <= 10 else ((x/255+.055)/1.055)**2.4 for x in rgb]; return .2126*c[0]+.7152*c[1]+.0722*c[2]


def contrast(page, css):
    "Of the text of an element against the ground of the page (WCAG)."
    ink, ground = (luminance([int(x) for x in re.findall(r'\d+', page.evaluate(f'getComputedStyle(document.querySelector("{where}")).{what}'))[:3]]) for where, what in ((css, 'color'), ('body', 'backgroundColor')))
    return (max(ink, ground)+.05)/(min(ink, ground)+.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [390, 1280])
def test_pages_in_a_browser(built, browser, width, scheme):
    "Nothing is wider than the screen, nothing is asked of another machine, text stands out, the sidebar leads on."
    asked = []; page = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme).new_page(); page.on('request', lambda r: asked.append(r.url))
    for name in ('index', 'core', 'moe', 'diffusion', 'experiments/main', 'pages/change_a_room', 'train'):
        page.goto((built/'site'/f'{name}.html').as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') <= width, name
        for css in ('main p', 'main h1', '#chapters a', 'main a'): assert contrast(page, css) >= 4.5, (name, css)
        if folder := os.environ.get('IMECD_SHOTS'): page.screenshot(path=f'{folder}/docs_{name.replace("/", "_")}_{width}_{scheme}.png')
    page.goto((built/'site'/'index.html').as_uri())
    if width < 900: page.get_by_role('link', name='chapters', exact=True).click()
    page.get_by_role('navigation', name='chapters').get_by_role('link', name='Contrastive diffusion').click(); assert page.url.endswith('/diffusion.html')
    page.reload(); page.keyboard.press('Tab'); assert page.evaluate('document.activeElement.textContent') == 'to the text'
    assert [u for u in asked if not u.startswith(('file:', 'data:'))] == []; page.context.close()
