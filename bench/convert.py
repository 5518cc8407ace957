"""Ten million events through reading, 5-core, order and split: this package and pandas, each in a process of its own.

    python bench/convert.py [EVENTS]           both, as one JSON line
    python bench/convert.py run imecd|pandas FILE OUT
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from memory import peak


def generate(path, events, seed=0):
    "A csv of long-tailed events: Amazon's columns, whole days, 1 % of the rows doubled."
    import polars as pl
    g = np.random.default_rng(seed); users, items = events//8, max(events//100, 100)
    tail = lambda n: np.minimum((n*g.random(events)**2.5).astype(np.int64), n-1)
    frame = pl.DataFrame({'reviewerID': tail(users), 'asin': tail(items), 'overall': g.integers(1, 6, events), 'unixReviewTime': 1_100_000_000+86_400*g.integers(0, 5_000, events)})
    frame = pl.concat([frame.head(events-events//100), frame.head(events//100)])
    frame.with_columns(pl.format('A{}', pl.col('reviewerID').cast(pl.String).str.zfill(13)).alias('reviewerID'),
                       pl.format('B0{}', pl.col('asin').cast(pl.String).str.zfill(8)).alias('asin')).write_csv(path)


def by_imecd(source, out):
    from imecd.histories import leave_one_out, load_interactions
    from imecd.prepare import convert
    report = convert(source, out, k=5); split = leave_one_out(load_interactions(out))
    return {'events': report['events'], 'users': report['users'], 'items': report['items'], 'test_targets': int((split.test >= 0).sum())}


def by_pandas(source, out):
    "The same steps as pandas users write them."
    import pandas as pd
    t = pd.read_csv(source, usecols=['reviewerID', 'asin', 'unixReviewTime', 'overall'], dtype={'reviewerID': str, 'asin': str})
    t = t.dropna(subset=['reviewerID', 'asin']).drop_duplicates(['reviewerID', 'asin', 'unixReviewTime'])
    while True:
        keep = (t.groupby('reviewerID')['asin'].transform('size') >= 5) & (t.groupby('asin')['reviewerID'].transform('size') >= 5)
        if keep.all(): break
        t = t[keep]
    t['tie'] = pd.util.hash_pandas_object(t['reviewerID']+'|'+t['asin'], index=False)
    t = t.sort_values(['reviewerID', 'unixReviewTime', 'tie'])
    t['order'] = t.groupby('reviewerID').cumcount()
    Path(out).mkdir(); t.drop(columns='tie').to_parquet(Path(out)/'interactions.parquet')
    items = pd.DataFrame({'item': sorted(t['asin'].unique())}); items.to_parquet(Path(out)/'items.parquet')
    last = t.groupby('reviewerID').tail(1)
    return {'events': len(t), 'users': t['reviewerID'].nunique(), 'items': len(items), 'test_targets': len(last)}


def measure(who, source, out):
    "Run one of them in this process; seconds and peak memory."
    start = time.perf_counter(); found = {'imecd': by_imecd, 'pandas': by_pandas}[who](source, out)
    return {**found, 'seconds': time.perf_counter()-start, 'peak_mb': peak()}


def main(events):
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp)/'reviews.csv'; generate(source, events)
        result = {'input_events': events, 'input_mb': source.stat().st_size/2**20}
        for who in ('imecd', 'pandas'):
            call = [sys.executable, __file__, 'run', who, str(source), str(Path(tmp)/who)]
            result[who] = json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    for key in ('events', 'users', 'items', 'test_targets'): assert result['imecd'][key] == result['pandas'][key], f'{key} differ: {result}'
    return {**result, 'pandas_over_imecd_seconds': result['pandas']['seconds']/result['imecd']['seconds'], 'pandas_over_imecd_memory': result['pandas']['peak_mb']/result['imecd']['peak_mb']}


if __name__ == '__main__':
    if sys.argv[1:2] == ['run']: print(json.dumps(measure(*sys.argv[2:5])))
    else: print(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)))
