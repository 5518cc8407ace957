"What a user of the wheel gets: the library and the command, without the workshop."
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {'torch', 'numpy', 'scipy', 'scikit-learn', 'threadpoolctl', 'polars', 'safetensors', 'huggingface_hub', 'accelerate', 'matplotlib', 'pillow', 'typer', 'tqdm'}
WORKSHOP = ('nbdev', 'execnb', 'fastcore', 'jupyterlab', 'notebook', 'IPython', 'ipywidgets', 'umap', 'pandas', 'pyarrow', 'torchmetrics', 'ir_measures', 'transformers',
            'sentence_transformers', 'pytest', 'nbformat', 'nbconvert', 'nbclient')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy as a publisher would."
    import shutil
    src, out = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('dist')
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md'): shutil.copy(ROOT/name, src)
    shutil.copytree(ROOT/'imecd', src/'imecd', ignore=shutil.ignore_patterns('__pycache__'))
    built = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(out), str(src)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-1500:]+built.stderr[-1500:]
    assert list(out.glob('*.tar.gz'))
    return next(out.glob('*.whl'))


def facts(wheel):
    with zipfile.ZipFile(wheel) as z: return Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith('METADATA'))).decode()), z.namelist()


def test_wheel_asks_for_the_core_alone(wheel):
    meta, names = facts(wheel)
    asked = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert {r.split(' ')[0].split('>')[0].split('<')[0].split('=')[0] for r in asked} == CORE
    assert set(meta.get_all('Provides-Extra')) == {'encode', 'viz', 'ann', 'tune', 'onnx', 'app', 'dev'}
    assert {n.split('/')[0] for n in names} == {'imecd', next(n for n in names if n.endswith('METADATA')).split('/')[0]}
    assert any(n.endswith('licenses/LICENSE') or n.endswith('LICENSE') for n in names) and 'Apache-2.0' in (meta['License-Expression'] or meta['License'] or '')


def test_wheel_works_without_the_workshop(wheel, tmp_path):
    "From the wheel alone, with every package of the workshop hidden: the shop, both baselines, a run, its evaluation."
    script = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None): return None if name.split('.')[0] in {WORKSHOP!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if f is PathFinder else f for f in sys.meta_path]; sys.path[:] = [{str(wheel)!r}]+[p for p in sys.path if p != {str(ROOT)!r}]
import imecd; assert {wheel.name!r} in imecd.__file__, imecd.__file__
from imecd.cli import main
for args in (['data', 'shop', 'shop', '--users', '200', '--items', '60'], ['data', 'check', 'shop'], ['features', 'shop', '--out', 'features'],
             ['train', 'shop', '--model', 'popularity', '--out', 'pop'], ['train', 'shop', '--model', 'transition_knn', '--out', 'knn'], ['eval', 'knn']):
    try: main(args)
    except SystemExit as e: assert not e.code, (args, e.code)
"""
    run = subprocess.run([sys.executable, '-P', '-c', script], cwd=tmp_path, capture_output=True, text=True, env={'MPLBACKEND': 'Agg', 'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)})
    assert run.returncode == 0, run.stdout[-1500:]+run.stderr[-2500:]
    assert (tmp_path/'knn/metrics.json').exists() and (tmp_path/'features/text_features.npy').exists()


def test_ten_lines_of_the_front_page_work_from_the_wheel(wheel, tmp_path):
    "Pasted into an empty folder, with the wheel and the core alone."
    import re
    ten = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8').split('## Ten lines')[1].split('\nExperts of every item')[0], flags=re.S); code = '\n'.join(ten)
    assert len(ten) == 3 and sum(bool(line.strip()) for line in code.splitlines()) == 10 and '.recommend(' in code and '.explain(' in code
    hidden = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None): return None if name.split('.')[0] in {WORKSHOP!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Without if f is PathFinder else f for f in sys.meta_path]; sys.path[:] = [{str(wheel)!r}]+[p for p in sys.path if p != {str(ROOT)!r}]
"""
    run = subprocess.run([sys.executable, '-P', '-c', hidden+code], cwd=tmp_path, capture_output=True, text=True, env={'MPLBACKEND': 'Agg', 'OMP_NUM_THREADS': '1', 'PATH': '/usr/bin:/bin', 'HOME': str(tmp_path)})
    assert run.returncode == 0, run.stdout[-1500:]+run.stderr[-2500:]; assert {p.name for p in tmp_path.iterdir()} >= {'shop', 'runs'}
