"""The same model trained as its anchors train theirs: a padded row for every prefix, items made anew at every position, the history read again in every step of the sampler.

    python bench/anchors.py [DATA]             default $IMECD_DATA/amazon18_instruments; one JSON line

Every way answers the same questions, and gives the same loss where nothing is drawn (checked). Training: seconds for 1,024 questions, forward, backward and optimiser; evaluation: for 256 histories.
The catalogue for the scores is made once a step in all of them. Medians in which the ways take turns.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch

from imecd.batch import Batch
from imecd.catalogue import mean_catalogue_loss
from imecd.diffusion import keyed_noise, sphere
from imecd.fitting import configure_preset, cut_streams, load_split, stream_features
from imecd.model import IMECD
from imecd.towers import seen_items

DATA, STEPS = Path(os.environ.get('IMECD_DATA', 'data')), 8


def prefixes(batch, length, pad):
    "A row for every question of a batch, which asks at its last item; padded on the right to `length`."
    rows = []
    for r in range(len(batch.users)):
        a, b = batch.offsets[r:r+2].tolist()
        for j in range(a, b):
            if batch.targets[j]: rows.append((batch.users[r], batch.items[a:j+1], batch.targets[j]))
    n = [length if pad else len(items) for _, items, _ in rows]; items, targets = torch.zeros(sum(n), dtype=torch.long), torch.zeros(sum(n), dtype=torch.long); offsets = torch.tensor([0, *n]).cumsum(0)
    for k, (_, history, target) in enumerate(rows): items[offsets[k]:offsets[k]+len(history)] = history; targets[offsets[k]+len(history)-1] = target
    return Batch(torch.stack([u for u, _, _ in rows]), items, targets, torch.cat([torch.arange(k) for k in n]), offsets)


def per_position(model):
    "Read items that are made for each position by itself, instead of rows of the table."
    tower, reader = model.table, model.reader

    def states(items, batch, last=False): made = tower(None, torch.cat([batch.items.new_zeros(1), batch.items])); return reader.encoder(made.read[:, 1:], batch.offsets, last)
    return states


def step(model, batch, optimiser, states=None):
    "One training step; `states` replaces the way a history is read."
    plain = model.reader.states
    if states is not None: model.reader.states = states
    optimiser.zero_grad(); out = model.loss(batch); out.loss.backward(); optimiser.step(); model.reader.__dict__.pop('states', None); assert model.reader.states == plain; return out


def condition_loss(model, batch, states):
    "Loss of the condition, at rest."
    asked = batch.targets.nonzero()[:, 0]; items = model.table(); q = model.reader(states(items, batch), batch)[0][asked]
    return mean_catalogue_loss(model.ask(q), items.vectors, batch.targets[asked], model.bias, seen_items(batch, asked), model.repeat)


def once(model, batch):
    "Read the histories once, then walk the steps of the sampler."
    with torch.no_grad(): model.cdg.generate(model.condition(batch)[0], batch.users, 0, STEPS)


def again(model, batch):
    "Read the histories anew in every step."
    with torch.no_grad():
        schedule, x = model.cdg.schedule, keyed_noise(batch.users, model.reader.width); path = [*schedule.trailing(STEPS), 0]
        for t, after in zip(path, path[1:]):
            c = sphere(model.condition(batch)[0].float()); now, then = schedule.alpha_bar[t], schedule.alpha_bar[after]; x0 = model.cdg.guess(x, t, c)
            x = then.sqrt()*x0+(1-then).sqrt()*(x-now.sqrt()*x0)/(1-now).sqrt()


def clock(ways, n):
    "Median seconds of each; they take turns, once unmeasured."
    times = {name: [] for name in ways}
    for k in range(n+1):
        for name, f in ways.items():
            start = time.perf_counter(); f(); took = time.perf_counter()-start
            if k: times[name].append(took)
    return {name: sorted(t)[len(t)//2] for name, t in times.items()}


def main(folder):
    torch.manual_seed(0); data = load_split(folder, 'leave_one_out', 50); config = configure_preset('imecd', {'ties': False}, 50)[0]
    features = stream_features(folder, config.streams); config = cut_streams(config, False, features)[0]; model = IMECD.of(config, data, features); model.place_codes(data); optimiser = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    packed = next(data.epoch(0, 0, 1024)); short, padded = prefixes(packed, data.length, False), prefixes(packed, data.length, True); fresh = per_position(model)
    model.eval()
    with torch.no_grad(): losses = [float(condition_loss(model, batch, states)) for batch, states in ((packed, model.reader.states), (short, model.reader.states), (padded, model.reader.states), (padded, fresh))]
    assert max(losses)-min(losses) < 1e-3*losses[0], losses
    model.train(); train = clock({'packed rows, items once (ours)': lambda: step(model, packed, optimiser), 'a row for every prefix': lambda: step(model, short, optimiser),
                                  'padded to 50': lambda: step(model, padded, optimiser), 'items made at every position': lambda: step(model, padded, optimiser, fresh)}, 3)
    model.eval(); cases = data.cases('valid'); batch = data.history(cases, slice(256)); model.items(); rank = clock({'history read once (ours)': lambda: once(model, batch), 'history read in every step': lambda: again(model, batch)}, 5)
    rows = {'packed rows, items once (ours)': len(packed.items), 'a row for every prefix': len(short.items), 'padded to 50': len(padded.items), 'items made at every position': len(padded.items)}; first = train['packed rows, items once (ours)']
    tables = [{name: {'positions': rows[name], 'seconds': s, 'factor': s/first} for name, s in train.items()}, {name: {'sampler_steps': STEPS, 'seconds': s, 'factor': s/rank['history read once (ours)']} for name, s in rank.items()}]
    print(json.dumps({'data': folder.name, 'questions': int((packed.targets != 0).sum()), 'tables': tables}))


if __name__ == '__main__': main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA/'amazon18_instruments')
