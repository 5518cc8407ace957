"""Measure everything and write bench/results.json and bench/results.md.

    python bench/run.py [NAME ...]             names: convert batches knn ranking floor peers anchors processes growth asking gpu; all by default, the others keep their last result

Every measurement runs in a process of its own. Ratios compare two things measured in one run on one machine; seconds alone say little elsewhere.
"""
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
NAMES = ('convert', 'batches', 'knn', 'ranking', 'floor', 'peers', 'anchors', 'processes', 'growth', 'asking', 'gpu')
DATA_OF = {'batches': 'amazon14_toys', 'knn': 'amazon18_games', 'floor': 'amazon18_instruments', 'gpu': 'amazon18_instruments', 'peers': 'movielens_small', 'anchors': 'amazon18_instruments', 'processes': 'amazon18_instruments'}


def measure(name):
    "Run one script; its JSON with where and when it was measured."
    start = time.time(); call = [sys.executable, str(HERE/f'{name}.py')]
    found = json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    commit = subprocess.run(['git', 'rev-parse', '--short=12', 'HEAD'], cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {**found, 'command': f'python bench/{name}.py', 'threads': os.environ.get('OMP_NUM_THREADS', 'default'), 'date': time.strftime('%Y-%m-%d', time.gmtime(start)),
            'commit': commit or None, 'cores': os.cpu_count(), 'processor': processor(), 'versions': {p: version(p) for p in ('torch', 'numpy', 'polars', 'pandas', 'scipy')}}


def processor():
    "The processor's own name where the system tells it."
    info = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def goals(results):
    "What was aimed at, what was measured, and whether that is enough: name, value, bound, whether the value must lie below it."
    floor, peers = (results.get(name, {'tables': [{}]})['tables'][0] for name in ('floor', 'peers')); growth = results.get('growth', {'rows': {'items': []}})['rows']['items']
    for data in ('amazon18_instruments', 'amazon14_toys'):
        if data in floor: yield f'an epoch of IMECD on {data}, over its floor', floor[data]['epoch_over_floor'], 2.5, True; yield 'its evaluation, over the floor', floor[data]['evaluation_over_floor'], 2, True
    for data, sasrec, imecd in (('movielens_small', 20, 5), ('amazon14_toys', 7, 1)):
        if f'{data}, our SASRec' not in peers: continue
        ours, full, replay = (peers[f'{data}, {name}'] for name in ('our SASRec', 'our IMECD', "RePlay's SASRec"))
        yield f"training of our SASRec on {data}, over RecBole's", ours['training_over_RecBole'], sasrec, False; yield "the same, over RePlay's", ours['targets_per_second']/replay['targets_per_second'], 1, False
        yield f"training of IMECD on {data}, over RecBole's SASRec", full['training_over_RecBole'], imecd, False; yield f"ranking of our SASRec on {data}, over RecBole's", ours['ranking_over_RecBole'], 10, False; yield f"ranking of IMECD on {data}, over RecBole's SASRec", full['ranking_over_RecBole'], 10, False
    if asking := results.get('asking'):
        yield 'one history over 12,000 items, ms', asking['one_history_ms_median'], 10, True; yield 'histories a second, many at once', asking['histories_per_second'], 10_000, False; yield 'the slowest move of a widget, ms', max(v for k, v in asking.items() if k.startswith('move')), 150, True
    for name, row in results.get('gpu', {'tables': [{}]})['tables'][0].items():
        if row['training_s'] is not None: yield f'an epoch of {name} on a GPU, seconds', row['epoch_s'], .5, True; yield 'a training to early stop, seconds', row['training_s'], 60, True
    for row in growth:
        if row['items'] == 10**6: yield 'memory of a training over a million items, GB', row['peak_GB'], 6, True


def page(results):
    "results.md: what was aimed at, then a section a measurement."
    lines = ['# Measurements', '', 'Written by `make bench`; the numbers behind it are in `results.json`.', '', '| goal | bound | measured | |', '|---|---|---|---|']
    lines += [f"| {name} | {'at most' if below else 'at least'} {bound:g} | {value:.2f} | {'met' if (value <= bound) == below or value == bound else 'missed'} |" for name, value, bound, below in goals(results)]+['', *([] if 'gpu' in results else ['Nothing here was measured on a GPU.']), '']
    for name, r in results.items():
        origin = f"`{r['command']}`, {r['date']}, commit {r['commit']}, {r['processor']}, {r['cores']} cores, OMP_NUM_THREADS {r['threads']}, " + ', '.join(f'{k} {v}' for k, v in r['versions'].items())
        doc = (HERE/f'{name}.py').read_text().split('"""')[1].strip()
        lines += [f'## {name}', '', doc, '', *table(r), '', *([r['note'], ''] if 'note' in r else []), origin, '']
    return '\n'.join(lines)


def number(v): return '' if v is None else f'{v:,.4g}' if isinstance(v, float) and abs(v) < 1000 else f'{v:,.0f}' if isinstance(v, (int, float)) and not isinstance(v, bool) else str(v)


def table(result):
    "Nested results side by side, plain ones below each other; of `tables`, a row a name."
    if 'tables' in result: return [line for rows in result['tables'] for line in ['| | '+' | '.join(k.replace('_', ' ') for k in next(iter(rows.values())))+' |', '|---'*(len(next(iter(rows.values())))+1)+'|', *(f'| {name} | '+' | '.join(map(number, row.values()))+' |' for name, row in rows.items()), '']]
    skip = {'note', 'command', 'date', 'commit', 'cores', 'processor', 'versions', 'threads'}
    sides = {k: v for k, v in result.items() if isinstance(v, dict) and k not in skip}; plain = {k: v for k, v in result.items() if k not in sides and k not in skip}
    out = ['| | value |', '|---|---|', *(f'| {k.replace("_", " ")} | {number(v)} |' for k, v in plain.items())]
    if sides: out += ['', '| | '+' | '.join(sides)+' |', '|---'*(len(sides)+1)+'|', *(f'| {k.replace("_", " ")} | '+' | '.join(number(s[k]) for s in sides.values())+' |' for k in next(iter(sides.values())))]
    return out


def main(names):
    path = HERE/'results.json'; results = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        needed = Path(os.environ.get('IMECD_DATA', 'data'))/DATA_OF[name] if name in DATA_OF else None
        if name == 'gpu' and not torch.cuda.is_available(): print('gpu: left out, there is none', flush=True); continue
        if needed and not needed.exists(): print(f'{name}: left out, there is no {needed}', flush=True); continue
        print(f'{name} ...', flush=True); results[name] = measure(name)
    results = {k: results[k] for k in NAMES if k in results}
    path.write_text(json.dumps(results, indent=1)+'\n'); (HERE/'results.md').write_text(page(results))
    print(f'wrote {HERE}/results.md')


if __name__ == '__main__': main(sys.argv[1:] or NAMES)
