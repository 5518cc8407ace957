"The rules of the house: what CONTRIBUTING.md promises about notebooks, modules and files."
import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.export import nb_export
from nbdev.process import extract_directives

ROOT = Path(__file__).parents[1]
NBS, LIB = ROOT/'nbs', ROOT/'imecd'
FREE_OF_FIGURES = {'00_core', '15_cli'}  # words and arguments have no picture


def notebooks(folder, pattern='*.ipynb'): return sorted(p for p in folder.glob(pattern) if '.ipynb_checkpoints' not in p.parts)
def read(path): return nbformat.read(path, 4)
def code(nb): return [c for c in nb.cells if c.cell_type == 'code']
def directives(cell): return extract_directives(cell, remove=False, lang='python')
def exported(nb): return [c for c in code(nb) if 'export' in directives(c)]
def lines(cell): return [line for line in cell.source.splitlines() if line.strip() and not line.startswith('#|')]


CHAPTERS = [p for p in notebooks(NBS) if re.match(r'\d\d[a-z]?_', p.name)]
EVERY = notebooks(NBS, '**/*.ipynb')
NAMES = [p.stem for p in CHAPTERS]
chapters = pytest.mark.parametrize('path', CHAPTERS, ids=NAMES)
every = pytest.mark.parametrize('path', EVERY, ids=[str(p.relative_to(NBS)) for p in EVERY])


def module(path): return path.stem.split('_', 1)[1]
def number(path): return path.stem.split('_', 1)[0]


def tracked(): return [ROOT/f for f in subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()]


def test_one_notebook_a_module():
    modules = {p.stem for p in LIB.glob('*.py')} - {'__init__', '_modidx'}
    assert modules == {module(p) for p in CHAPTERS}
    for path in CHAPTERS:
        named = [c.source for c in code(read(path)) if 'default_exp' in directives(c)]
        assert named == [f'#| default_exp {module(path)}'], path.name


@chapters
def test_imports_go_down_the_numbers(path):
    numbers = {module(p): number(p) for p in CHAPTERS}
    for cell in exported(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import): assert not any(a.name.startswith('imecd') for a in node.names), f'{path.name}: write `from imecd.module import name`'
            if isinstance(node, ast.ImportFrom):
                assert not any(a.name == '*' for a in node.names), f'{path.name} imports *'
                assert node.module != 'imecd', f'{path.name}: write `from imecd.module import name`'
                if (node.module or '').startswith('imecd.'): assert numbers[node.module[6:]] < number(path), f'{path.name} imports {node.module}'


def test_rooms_do_not_know_each_other():
    for path in CHAPTERS:
        if not '04' <= number(path)[:2] <= '07' or number(path) == '07b': continue  # 07b is where they meet
        used = {n.module for c in exported(read(path)) for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('imecd.')}
        assert used <= {'imecd.core'}, path.name


@chapters
def test_chapter_has_its_size(path):
    nb = read(path); sizes = [len(lines(c)) for c in exported(nb)]
    assert len(nb.cells) <= 80
    assert sum(c.cell_type == 'markdown' for c in nb.cells) >= .3*len(nb.cells)
    assert statistics.median(sizes) <= 12 and max(sizes) <= 40
    assert sum(sizes) <= 260


@every
def test_notebook_is_light(path): assert path.stat().st_size < (300_000 if path in CHAPTERS or path.parent == NBS else 1_000_000)


def test_all_notebooks_are_light(): assert sum(p.stat().st_size for p in (ROOT/'nbs').rglob('*') if p.is_file() and '.ipynb_checkpoints' not in p.parts) < 6_000_000  # with results and pictures


@chapters
def test_chapter_has_figures(path):
    if path.stem in FREE_OF_FIGURES: return
    pictures = [o for c in code(read(path)) for o in c.outputs if 'image/png' in o.get('data', {})]
    assert len(pictures) >= 2


@every
def test_chapter_opens_with_title_and_subtitle(path):
    first = read(path).cells[0]
    assert first.cell_type == 'markdown' and re.fullmatch(r'# [^\n]+\n\n> [^\n]+', first.source)


@chapters
def test_imports_stand_alone(path):
    for cell in code(read(path)):
        body = ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', cell.source, flags=re.M)).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        if imports and 'nbdev_export()' not in cell.source and 'hide' not in directives(cell): assert len(imports) == len(body), cell.source


@every
def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        for link in re.findall(r'\]\(([\w/]+)\.ipynb\)', cell.source if cell.cell_type == 'markdown' else ''): assert (path.parent/f'{link}.ipynb').exists(), f'{path.name}: {link}.ipynb'


@every
def test_outputs_are_stored_and_clean(path):
    nb = read(path)
    assert 'widgets' not in nb.metadata
    for cell in code(nb):
        for out in cell.outputs:
            assert out.output_type != 'error', cell.source
            assert out.get('name') != 'stderr', cell.source
            data = out.get('data', {})
            assert 'application/vnd.jupyter.widget-view+json' not in data, cell.source
            assert not re.search(r'<(script|iframe)|src="?http', str(data.get('text/html', ''))), cell.source
        last = lines(cell)[-1] if lines(cell) else ''
        if re.match(r'plot_\w+\(.*\);$', last): assert any('image/png' in o.get('data', {}) for o in cell.outputs), f'no picture stored for {last}'


@every
def test_notebook_is_clean(path):
    nb = read_nb(path); clean_nb(nb)
    assert json.loads(nb2str(nb)) == json.loads(path.read_text()), 'run nbdev_clean'


def test_library_is_in_sync(tmp_path):
    for path in CHAPTERS:
        nb_export(path, tmp_path/'imecd')
        strip = lambda text: [re.sub(r'^# %% .*?(#\w+)$', r'\1', line) for line in text.splitlines() if not line.startswith('# AUTOGENERATED')]
        written, kept = (strip((folder/f'{module(path)}.py').read_text()) for folder in (tmp_path/'imecd', LIB))
        assert written == kept, f'{path.name} was changed and not exported: run nbdev_export'


def test_index_of_modules_is_in_sync():
    "Every function and class stands in _modidx.py, and nothing else does."
    found = {name for names in index()['syms'].values() for name in names if name.count('.') == 2}
    assert found == {f'imecd.{module(p)}.{n.name}' for p in CHAPTERS for n in names_of(p)}


def index():
    tree = ast.parse((LIB/'_modidx.py').read_text())
    return ast.literal_eval(next(n.value for n in tree.body if isinstance(n, ast.Assign)))


def names_of(path): return [n for c in exported(read(path)) for n in ast.parse(c.source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def test_nothing_forbidden_is_in_the_tree():
    "No machine path, no pickle, no eval, no leftover of a merge."
    here = str(ROOT)
    for path in tracked():
        if path.suffix in {'.png', '.npz', '.parquet'} or path == Path(__file__) or not path.exists(): continue
        text = path.read_text(encoding='utf-8')
        for word in (here, '/root/', '/home/', '<<<<<<<', '>>>>>>>'): assert word not in text, f'{path.name} holds {word}'
    for path in [*LIB.glob('*.py'), *(ROOT/'bench').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call): assert getattr(node.func, 'id', '') not in {'eval', 'exec'}, path.name
            if isinstance(node, (ast.Import, ast.ImportFrom)): assert 'pickle' not in {getattr(node, 'module', None), *(a.name for a in node.names)}, path.name
            if isinstance(node, ast.keyword): assert not (node.arg in {'allow_pickle', 'trust_remote_code'} and getattr(node.value, 'value', None) is True), path.name


def test_no_drawer_for_everything(): assert not [p for p in tracked() if p.stem in {'utils', 'util', 'helpers', 'misc', 'common'}]


def test_every_public_function_is_documented():
    for path in CHAPTERS:
        for cell in exported(read(path)):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'): assert ast.get_docstring(node), f'{path.name}: {node.name}'


def test_facts_stand_once():
    "Owner and address come from settings.ini; pyproject.toml only repeats what nbdev writes there."
    cfg = get_config(cfg_name='settings.ini', path=ROOT)
    assert f'name="{cfg.lib_name}"' in (ROOT/'pyproject.toml').read_text()
    assert (LIB/'__init__.py').read_text().strip() == f'__version__ = "{cfg.version}"'
    assert f'version: {cfg.version}' in (ROOT/'CITATION.cff').read_text()
    for path in tracked():
        if path.suffix in {'.py', '.toml', '.yml', '.yaml', '.cfg'} and path.name not in {'_modidx.py', Path(__file__).name}: assert cfg.author_email not in path.read_text() and f'github.com/{cfg.user}' not in path.read_text(), path.name


def test_workflow_runs_the_oldest_set():
    "The lower bounds of settings.ini are what the workflow installs as the oldest set."
    flow = yaml.safe_load((ROOT/'.github/workflows/test.yaml').read_text()); yaml.safe_load((ROOT/'.github/workflows/docs.yaml').read_text())
    oldest = next(r for r in flow['jobs']['bounds']['strategy']['matrix']['include'] if r['name'] == 'oldest'); cfg = get_config(cfg_name='settings.ini', path=ROOT)
    bounds = dict(re.match(r'([\w-]+)>=([\d.]+)', r).groups() for r in cfg.requirements.split())
    installed = dict(re.match(r'([\w-]+)==([\d.]+)\.\*', r).groups() for r in oldest['set'].split() if '==' in r)
    assert oldest['python'] == cfg.min_python and {'torch', 'numpy', 'polars'} <= set(installed)
    assert {name: v for name, v in installed.items() if name != 'pyparsing'} == {name: bounds[name] for name in installed if name != 'pyparsing'}


def test_imports_are_cheap():
    "Importing every module costs at most a fifth of what torch and polars cost; the best of three, in fresh processes."
    names = ', '.join(f'imecd.{module(p)}' for p in CHAPTERS)
    script = f'import time; import torch, polars; before = time.process_time(); import {names}; print(time.process_time()/before-1)'
    shares = [float(subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(shares) <= .2, shares


def test_heavy_libraries_wait():
    heavy = ['matplotlib', 'scipy', 'sklearn', 'PIL', 'transformers', 'sentence_transformers', 'umap', 'IPython', 'accelerate', 'pandas', 'playwright', 'optuna']
    names = ', '.join(f'imecd.{module(p)}' for p in CHAPTERS)
    script = f"import torch, sys; before = set(sys.modules); import {names}; print(*(set({heavy}) & set(sys.modules)-before))"
    assert subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.split() == []
