"""The transition kNN on the largest data set: fitting, and ranking every test user against every item.

    python bench/knn.py [DATA]                 default $IMECD_DATA/amazon18_games; one JSON line
"""
import json
import os
import sys
import time

from imecd.baselines import TransitionKNN
from imecd.batch import sequence_data
from imecd.histories import leave_one_out, load_interactions
from imecd.metrics import evaluate


def main(folder):
    data = sequence_data(leave_one_out(load_interactions(folder)))
    start = time.perf_counter(); model = TransitionKNN().fit(data); fitted = time.perf_counter()
    found = evaluate(model, data, data.cases('test')); end = time.perf_counter()
    return {'data': os.path.basename(os.path.normpath(folder)), 'users': len(found.rank), 'items': data.n_items, 'fit_seconds': fitted-start, 'rank_seconds': end-fitted,
            'seconds': end-start, 'users_per_second': len(found.rank)/(end-fitted)}


if __name__ == '__main__': print(json.dumps(main(sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.environ.get('IMECD_DATA', 'data'), 'amazon18_games'))))
