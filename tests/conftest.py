"What tests share: where real data lies, a small shop, the command line."
import contextlib
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from imecd.cli import main
from imecd.histories import Interactions
from imecd.shop import make_shop

DATA = Path(os.environ.get('IMECD_DATA', 'data'))


@pytest.fixture
def real():
    "A real data set by name, or a skip that says what is absent."
    def find(name):
        if not (DATA/name/'items.parquet').exists(): pytest.skip(f'no data set {name} below IMECD_DATA={DATA}')
        return DATA/name
    return find


@pytest.fixture(scope='session')
def shop(tmp_path_factory):
    "A small shop without pictures."
    return make_shop(tmp_path_factory.mktemp('shop')/'shop', n_users=400, n_items=100, pictures=False)


@pytest.fixture
def threads():
    "Torch with so many threads, and as it was afterwards."
    before = torch.get_num_threads(); yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def made():
    "A data set of random histories with the given lengths."
    def make(lengths, n_items=40, seed=0, ties=None):
        g = np.random.default_rng(seed); lengths = np.asarray(lengths)
        return Interactions(np.array([f'u{i:04}' for i in range(len(lengths))], object), pl.DataFrame({'item': [f'i{k}' for k in range(n_items)]}),
                            g.integers(1, n_items+1, lengths.sum()).astype(np.int32), np.r_[0, np.cumsum(lengths)].astype(np.int64), ties, ties)
    return make


@pytest.fixture(scope='session')
def shell():
    "Run the command as a user does, in a process of its own, which costs seconds: exit code, standard output, standard error."
    def run(*args, **kw):
        command = Path(sys.executable).with_name('imecd')
        p = subprocess.run([str(command), *map(str, args)], capture_output=True, text=True, timeout=300, env={**os.environ, 'MPLBACKEND': 'Agg'}, **kw)
        return p.returncode, p.stdout, p.stderr
    return run


@pytest.fixture(scope='session')
def imecd():
    "The same in this process: its entry point, with warnings shown as they are to a user."
    def run(*args, cwd='.'):
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd), warnings.catch_warnings():
            warnings.simplefilter('default')
            try: main([str(a) for a in args])
            except SystemExit as e: code = e.code or 0
        return code, out.getvalue(), err.getvalue()
    return run


@pytest.fixture(scope='session')
def browser():
    "Debian's Chromium, else Playwright's own."
    from playwright.sync_api import Error, sync_playwright
    quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
    with sync_playwright() as p:
        try: b = p.chromium.launch(executable_path=shutil.which('chromium'), args=quiet)
        except Error as e: pytest.fail(f'no browser ({str(e).splitlines()[0]}); `apt-get install chromium`, or `playwright install chromium`, cures it')
        yield b; b.close()
