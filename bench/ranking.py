"""Time and extra peak memory of ranking by dot product, in a process of its own; one line of JSON.

    OMP_NUM_THREADS=2 python bench/ranking.py [--users 20000] [--items 1000000] [--width 64] [--history 20] [--budget 67108864]
"""
import argparse
import json
import time

import torch

from imecd.ranking import rank_dot
from memory import held, peak


def main():
    "Rank, and say what it took."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {'users': 20_000, 'items': 1_000_000, 'width': 64, 'history': 20, 'budget': 2**26}.items(): parser.add_argument(f'--{name}', type=int, default=value)
    a = parser.parse_args()
    g = torch.Generator().manual_seed(0)
    items, queries = torch.randn(a.items+1, a.width, generator=g), torch.randn(a.users, a.width, generator=g)
    targets = torch.randint(1, a.items+1, (a.users,), generator=g)
    seen = torch.randint(1, a.items+1, (a.users*a.history,), generator=g), torch.arange(0, a.users*a.history+1, a.history)
    rank_dot(queries[:2], items[:100], targets[:2]%99+1)
    before, start, cpu = held(), time.perf_counter(), time.process_time()
    found = rank_dot(queries, items, targets, seen, a.budget)
    seconds, cpu = time.perf_counter()-start, time.process_time()-cpu
    assert found.kept.shape == (a.users,) and bool((found.masked <= found.kept).all())
    print(json.dumps({**vars(a), 'seconds': round(seconds, 1), 'cpu_seconds': round(cpu, 1), 'inputs_mb': round(before), 'extra_peak_mb': round(peak()-before),
                      'threads': torch.get_num_threads(), 'mean_rank': float(found.kept.double().mean())}))


if __name__ == '__main__': main()
