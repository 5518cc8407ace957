"JupyterLab as a person uses it: a real server on loopback, a real browser, every cell run, every widget moved by keyboard and by mouse."
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import expect

ROOT = Path(__file__).parents[1]
SETTINGS = {'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False, 'doNotDisturbMode': True}, 'notebook-extension/tracker': {'windowingMode': 'none'}}
PATIENCE = 240_000  # ms, for a kernel on a busy machine

CONTRAST = """box => {
    const rgb = s => s.match(/[\\d.]+/g).map(Number), light = c => c.slice(0, 3).map(x => x/255).map(x => x <= .04045 ? x/12.92 : ((x+.055)/1.055)**2.4).reduce((s, x, i) => s+x*[.2126, .7152, .0722][i], 0);
    const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length == 3 || c[3] > 0) return c; } return [255, 255, 255]; };
    const words = [], walk = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
        if (text && e.offsetParent && !e.closest('[disabled]')) { const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))]; words.push([text, (Math.max(a, b)+.05)/(Math.min(a, b)+.05)]); }
    }
    return words; }"""  # of every word that is shown against what lies under it (WCAG)


def without_export(path, out):
    "A notebook without the cell that writes the library, which a reader's copy must not do."
    nb = nbformat.read(path, 4); nb.cells = [c for c in nb.cells if 'nbdev_export()' not in c.source]; nbformat.write(nb, out)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab over a copy of the notebooks, with settings of its own: address and token."
    home, nbs = tmp_path_factory.mktemp('home'), tmp_path_factory.mktemp('lab'); shutil.copytree(ROOT/'nbs'/'results', nbs/'results')
    if (ROOT/'nbs'/'images').exists(): shutil.copytree(ROOT/'nbs'/'images', nbs/'images')
    for path in (ROOT/'nbs').glob('*.ipynb'): without_export(path, nbs/path.name)
    for name, value in SETTINGS.items(): file = home/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'; file.parent.mkdir(parents=True, exist_ok=True); file.write_text(json.dumps(value))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    token, url = secrets.token_hex(16), f'http://127.0.0.1:{port}'
    env = {**{k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}, 'JUPYTER_CONFIG_DIR': str(home/'config'), 'JUPYTER_DATA_DIR': str(home/'data'), 'JUPYTER_RUNTIME_DIR': str(home/'run'), 'JUPYTERLAB_SETTINGS_DIR': str(home/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(home/'workspaces'), 'PYDEVD_DISABLE_FILE_VALIDATION': '1'}
    with open(home/'log', 'w') as log: server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={nbs}', '--allow-root', '--LabApp.expose_app_in_browser=True'], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(480):
            try: urllib.request.urlopen(f'{url}/api/status?token={token}', timeout=2).close(); break
            except OSError: assert server.poll() is None, (home/'log').read_text()[-3000:]; time.sleep(.25)
        else: raise AssertionError('JupyterLab did not answer')
        yield url, token
    finally:
        server.terminate()
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill(); server.wait()          # a kernel that does not let go is none of the tests' business


class Page:
    "A notebook that is open in the browser, and what was asked of other machines meanwhile."
    def __init__(self, browser, lab, name):
        self.page, self.asked, url = browser.new_page(viewport={'width': 1400, 'height': 1000}), set(), lab[0]; self.page.set_default_timeout(60_000)
        self.page.on('request', lambda r: None if r.url.startswith((url, url.replace('http', 'ws'), 'data:', 'blob:')) else self.asked.add(r.url))
        self.page.goto(f'{url}/lab/tree/{name}?token={lab[1]}&reset'); self.panel = self.page.locator('.jp-NotebookPanel:not(.lm-mod-hidden)'); self.panel.wait_for(); self.idle()

    def idle(self): expect(self.page.get_by_role('contentinfo').get_by_text(re.compile(r'\| Idle'))).to_be_visible(timeout=PATIENCE)

    def run(self):
        "Run all cells and wait for the last one."
        self.page.get_by_role('menuitem', name='Run', exact=True).click(); self.page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        last = self.panel.locator('.jp-CodeCell .jp-InputPrompt').last; expect(last).to_have_text(re.compile(r'\[\d+\]:'), timeout=PATIENCE); self.idle(); return self

    def fine(self):
        "No error in any cell, no widget without a model, nothing asked of another machine."
        for bad in ('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]', '.jp-OutputArea-output:has-text("Traceback")', ':text("model not found")', ':text("Error displaying widget")'): assert self.panel.locator(bad).count() == 0, self.panel.locator(bad).first.inner_text()
        assert not self.asked, self.asked

    def seen(self, box): return box.locator('img.widget-image').get_attribute('src'), box.locator('.widget-html').last.inner_html()

    def changes(self, box, move, both=True):
        "After a move the picture is another, and so is the text."
        before = self.seen(box); move(); deadline = time.time()+60
        while time.time() < deadline:
            now = self.seen(box)
            if now[0] != before[0] and (not both or now[1] != before[1]): return now
            self.page.wait_for_timeout(100)
        raise AssertionError(f'nothing changed: {before[1][:200]}')

    def box(self, text): return self.panel.locator('.jp-OutputArea-output .widget-vbox', has=self.page.locator(f'text="{text}"')).first
    def slide(self, box, name, key): handle = box.locator('.widget-hslider', has=self.page.locator(f'text="{name}"')).locator('.noUi-handle'); handle.scroll_into_view_if_needed(); handle.focus(); self.page.keyboard.press(key)

    def drag(self, box, name, to):
        "The handle of a slider to a share of its way, by mouse."
        slider = box.locator('.widget-hslider', has=self.page.locator(f'text="{name}"')); rail, handle = slider.locator('.noUi-target').bounding_box(), slider.locator('.noUi-handle').bounding_box()
        self.page.mouse.move(handle['x']+handle['width']/2, handle['y']+handle['height']/2); self.page.mouse.down(); self.page.mouse.move(rail['x']+to*rail['width'], rail['y']+rail['height']/2, steps=6); self.page.mouse.up()

    def dark(self): self.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"); expect(self.page.locator('body')).to_have_attribute('data-jp-theme-light', 'false')

    def faint(self, box): return [(text, round(c, 1)) for text, c in box.evaluate(CONTRAST) if c < 4.5]

    def shot(self, name):
        if folder := os.environ.get('IMECD_SHOTS'): Path(folder).mkdir(parents=True, exist_ok=True); self.page.screenshot(path=f'{folder}/{name}.png')


@pytest.mark.parametrize('name', ['index', '07e_votes'])
def test_a_notebook_runs_from_top_to_bottom(name, lab, browser):
    page = Page(browser, lab, f'{name}.ipynb').run(); page.fine(); assert page.panel.locator('.jp-RenderedImage img').count() >= 1; page.shot(name)


def test_widgets_move_by_keyboard_and_by_mouse(lab, browser):
    page = Page(browser, lab, '13_widgets.ipynb').run(); page.fine()

    gates = page.box('remove last'); gates.scroll_into_view_if_needed(); page.shot('gates_before')
    page.changes(gates, lambda: gates.get_by_role('button', name='remove last').click(), both=True)                       # by mouse
    words = lambda name: gates.get_by_placeholder(name)
    page.changes(gates, lambda: (words('none: nobody').focus(), page.page.keyboard.type('leather'), page.page.keyboard.press('Enter'))); page.shot('gates_after')  # by keyboard
    page.changes(gates, lambda: page.slide(gates, 'item', 'ArrowLeft')); page.changes(gates, lambda: (words('title, Enter').focus(), page.page.keyboard.type('whisk'), page.page.keyboard.press('Enter')))

    codes = page.box('code'); codes.scroll_into_view_if_needed(); page.shot('codebook_before')
    page.changes(codes, lambda: page.slide(codes, 'code', 'ArrowRight')); page.changes(codes, lambda: page.drag(codes, 'code', .6))
    page.changes(codes, lambda: codes.get_by_role('button', name='image').click(), both=False); page.shot('codebook_after')

    path = page.box('step'); path.scroll_into_view_if_needed(); page.shot('trajectory_before')
    page.changes(path, lambda: page.slide(path, 'step', 'ArrowLeft')); page.changes(path, lambda: page.drag(path, 'step', .1)); page.changes(path, lambda: page.drag(path, 'guidance', .9), both=False)
    page.changes(path, lambda: path.get_by_role('button', name='without contrast').click(), both=False); page.shot('trajectory_after'); page.fine()

    boxes = {'gates': gates, 'codebook': codes, 'trajectory': path}; by_day = {name: page.faint(box) for name, box in boxes.items()}
    page.dark(); page.changes(codes, lambda: page.slide(codes, 'code', 'ArrowLeft'), both=False)
    for name, box in boxes.items(): box.scroll_into_view_if_needed(); page.shot(f'{name}_dark')
    by_night = {name: page.faint(box) for name, box in boxes.items()}; assert sum(len(box.evaluate(CONTRAST)) for box in boxes.values()) > 40 and not any(by_day.values()) and not any(by_night.values()), (by_day, by_night); page.fine()


def test_hostile_titles_run_nothing_in_a_browser(browser, tmp_path):
    "The page of an explanation whose titles are markup: nothing runs, nothing is asked for, nothing leaves its place."
    import polars as pl

    from imecd.explain import page as as_page
    from imecd.recommend import Recommender
    from imecd.running import train_run
    from imecd.shop import make_shop
    make_shop(tmp_path/'shop', n_users=200, n_items=60, seed=0, pictures=False); r = Recommender.load(train_run(tmp_path/'shop', tmp_path/'run', 'imecd', {'dim': 16, 'codes': 4, 'train.epochs': 1, 'train.warmup': 0}).folder)
    bad = ['<script>window.hit=1</script>', '"><img src=x onerror="window.hit=1">', "' onmouseover='window.hit=1", '</table></div><iframe src="https://example.org">', '\u202egnp.exe', '\u05e9\u05dc\u05d5\u05dd '*200, 'x'*5000]
    r.shelf.__dict__['titles'] = ['', *(bad[k % len(bad)] for k in range(len(r.shelf)))]; object.__setattr__(r.shelf, 'items', r.shelf.items.with_columns(title=pl.Series(r.shelf.titles[1:])))
    file = tmp_path/'page.html'; file.write_text(f'<!doctype html><meta charset="utf-8"><body>{as_page(r.explain(r.shelf.ids[:7], k=7))}<p id="end">end</p>', encoding='utf-8')
    page, asked = browser.new_page(viewport={'width': 700, 'height': 900}), []; page.on('request', lambda q: asked.append(q.url)); page.goto(file.as_uri())
    for cell in page.locator('bdi').all(): cell.hover()
    assert page.evaluate('window.hit') is None and [u for u in asked if not u.startswith(('file:', 'data:'))] == [] and page.locator('script, iframe').count() == 0
    assert page.evaluate('document.documentElement.scrollWidth') <= 720 and page.locator('table').count() == 1 and page.locator('#end').is_visible()
    if folder := os.environ.get('IMECD_SHOTS'): page.screenshot(path=f'{folder}/hostile.png', full_page=True)
