"""Run notebooks in a real kernel and store their outputs, clean.

    python .ci/refresh.py [--all] [NOTEBOOK ...]

Without names: every notebook below nbs/. A cell flagged `slow`, `cuda` or `live` keeps its stored output; `--all` runs `slow` ones too,
and `cuda` ones where there is a GPU.
"""
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import oxipng
import torch
from nbclient import NotebookClient
from nbdev.clean import clean_nb, process_write
from nbdev.config import get_config
from nbdev.process import extract_directives
from PIL import Image


DESCRIBED = """
def describe():
    from IPython import get_ipython
    from IPython.core.pylabtools import print_figure
    from matplotlib.figure import Figure
    def words(fig):
        parts = [[ax.get_title(loc='left') or ax.get_title(), ax.get_xlabel(), ax.get_ylabel()] for ax in fig.axes if ax.axison and ax.get_label() != '<colorbar>' or ax.get_title(loc='left')]
        return '; '.join(dict.fromkeys(' '.join(', '.join(filter(None, p)).split()) for p in parts if any(p)))
    get_ipython().run_line_magic('matplotlib', 'inline')
    get_ipython().display_formatter.formatters['image/png'].for_type(Figure, lambda fig: (print_figure(fig, 'png', base64=True), {'alt': words(fig)}))
describe(); del describe
"""  # a stored figure says in words what it shows: title and axes


def skipped(cell, flags):
    "Whether a cell keeps its stored output."
    if cell.cell_type != 'code': return True
    told = extract_directives(cell, remove=False, lang='python')
    return 'nbdev_export(' in cell.source or told.get('eval:', [''])[:1] == ['false'] or bool(flags & told.keys())


def smaller(png):
    "A stored figure in as few colours as leave every inked pixel within 4 of 255 (root mean square): a quarter of the size, and the same to the eye."
    out = io.BytesIO(); picture = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGB'); true = np.asarray(picture, float); ink = true.min(-1) < 250
    for colours in (16, 32, 64, 128, 256):
        few = picture.quantize(colours, dither=Image.Dither.NONE)
        if not ink.any() or ((np.asarray(few.convert('RGB'))-true)[ink]**2).mean() < 16: break
    few.save(out, 'png'); return base64.b64encode(oxipng.optimize_from_memory(out.getvalue(), level=4)).decode()


def refresh(path, flags):
    "Run one notebook from its own folder; a failing cell leaves the file as it was."
    start, nb = time.time(), nbformat.read(path, 4)
    todo = [cell for cell in nb.cells if not skipped(cell, flags)]
    client = NotebookClient(nb, timeout=3600, resources={'metadata': {'path': str(path.parent)}})
    with client.setup_kernel():
        nb.cells.append(nbformat.v4.new_code_cell(DESCRIBED)); client.execute_cell(nb.cells[-1], len(nb.cells)-1); nb.cells.pop()
        for i, cell in enumerate(nb.cells):
            if cell in todo: client.execute_cell(cell, i)
    for data in (out.data for cell in todo for out in cell.outputs if 'data' in out and 'image/png' in out.data):
        data['image/png'] = min(data['image/png'], smaller(data['image/png']), key=len)
    nbformat.write(nb, path)
    process_write(warn_msg='', proc_nb=clean_nb, f_in=path)
    print(f'{path}: {len(todo)} cells, {time.time()-start:.1f} s', flush=True)


def main(args):
    "Refresh the notebooks named, or all of them."
    flags = set(get_config().tst_flags.split()); os.environ['IMECD_PROGRESS'] = 'off'  # progress is for whoever waits, not for the file
    if '--all' in args: flags -= {'slow'} | ({'cuda'} if torch.cuda.is_available() else set())
    names = [Path(a).resolve() for a in args if a != '--all']
    for path in names or sorted(p for p in Path('nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts): refresh(path, flags)


if __name__ == '__main__': main(sys.argv[1:])
