"""What an answer costs over 12,000 items: one history, many, an explanation, and a move of each widget. One line of JSON.

    OMP_NUM_THREADS=2 python bench/asking.py [--users 10000] [--items 12000]

IMECD with its default size and codes placed, over a generated shop without pictures; it is not trained, because what it has learnt does not change what it costs. One history is asked for 200 times
after a first time; many are a table of events, from the table to the table of answers, the median of eleven after a first time; beside them stands what one thread answers and what their bare matrix products would reach alone, timed as in `floor.py`, before and after, the faster of both, on all threads and on one: where the second core of a machine is not wholly its own, that shows there.
A move is from the change of a control to the new picture and text; the first of its kind is left out, so is what a browser does with it.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import polars as pl
import torch
from floor import bare, recorded

from imecd.encode import load_features
from imecd.fitting import load_split
from imecd.model import IMECD, ModelConfig
from imecd.recommend import Recommender
from imecd.shop import make_shop
from imecd.widgets import explore_codebook, explore_gates, explore_trajectory


def ms(f):
    start = time.perf_counter(); f(); return 1000*(time.perf_counter()-start)


def move(control, values):
    "Milliseconds of a move, median over these values; the first is not counted."
    return statistics.median([ms(lambda v=v: setattr(control, 'value', v)) for v in values][1:])


def floors(products, threads):
    "Seconds of the products alone: by all threads, and by one."
    torch.set_num_threads(1); single = bare(products)[0]; torch.set_num_threads(threads); return bare(products, apart=True)[0], single


def main():
    "Ask, and say what it took."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {'users': 10_000, 'items': 12_000}.items(): parser.add_argument(f'--{name}', type=int, default=value)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        shop = make_shop(Path(d)/'shop', n_users=a.users, n_items=a.items, pictures=False); data, features = load_split(shop, 'leave_one_out', 50), load_features(shop, 'auto', 'none')
        model = IMECD.of(ModelConfig(streams='id+text'), data, features); model.place_codes(data); r = Recommender.of(model, data, shop, features=features); events = pl.read_parquet(shop/'interactions.parquet'); ids = r.shelf.ids
        histories = [ids[k:k+8] for k in range(0, 1600, 8)]; r.recommend(histories[0]); one = sorted(ms(lambda h=h: r.recommend(h)) for h in histories)
        threads = torch.get_num_threads(); took, alone = [], []; products = recorded(lambda: r.recommend_table(events)); before = floors(products, threads)
        for _ in range(11):                                                        # in turns, so that both meet the same moments of the machine
            torch.set_num_threads(threads); took.append(ms(lambda: r.recommend_table(events))); torch.set_num_threads(1); alone.append(ms(lambda: r.recommend_table(events)))
        together, single = map(min, before, floors(products, threads)); took, rates, alone = statistics.median(took), sorted(a.users/t*1000 for t in took), statistics.median(alone)
        explained = statistics.median(ms(lambda h=h: r.explain(h).plot()) for h in histories[:6])
        gates, codes, path = explore_gates(r, histories[0]), explore_codebook(r, events), explore_trajectory(r, histories[0], truth=ids[20])
        titles = r.shelf.titles; added, removed = move(gates.controls['add'], titles[200:208]), statistics.median([ms(gates.controls['remove'].click) for _ in range(8)][1:])
        moves = {'gates: an item added': added, 'gates: the last one removed': removed, 'gates: another item': move(gates.controls['place'], [7, 6, 5, 4, 3, 2, 1, 2, 3]), 'gates: a content exchanged': move(gates.controls['other'], titles[100:109]),
                 'codebook: another code': move(codes.controls['code'], range(1, 12)), 'trajectory: another step': move(path.controls['step'], range(15, 5, -1)), 'trajectory: other guidance': move(path.controls['guidance'], [.5*k for k in range(1, 9)])}
    print(json.dumps({'users': a.users, 'items': len(ids), 'one_history_ms_median': one[len(one)//2], 'one_history_ms_95th': one[int(.95*len(one))], 'histories_per_second': a.users/took*1000, 'histories_per_second_of_the_slowest_call': rates[0], 'histories_per_second_of_the_fastest_call': rates[-1], 'histories_per_second_of_one_thread': a.users/alone*1000, 'histories_per_second_of_products': a.users/together, 'histories_per_second_of_products_of_one_thread': a.users/single, 'explanation_with_figure_ms': explained,
                      **{f'move, {k}, ms': v for k, v in moves.items()}, 'threads_of_torch': torch.get_num_threads()}))


if __name__ == '__main__': main()
