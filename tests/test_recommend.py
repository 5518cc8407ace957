"Recommendations as users ask for them, and everything hostile or broken that they may hand over."
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imecd.arrivals import check_new, grow_shelf, new_rows, picture_files, read_new
from imecd.asking import ask, find_title, history_keys, holds, read_rows, table_histories
from imecd.baselines import fit_baseline
from imecd.batch import block_sizes
from imecd.content import light_image
from imecd.core import ImecdError
from imecd.explain import clean, explain_history, page, plot_trusts, safe, thumbnail
from imecd.features import join_features
from imecd.fitting import load_split
from imecd.handover import file_hash
from imecd.recommend import Recommender
from imecd.running import train_run
from imecd.towers import Histories, pack_histories


@pytest.fixture(scope='module')
def run(shop, tmp_path_factory):
    "A small IMECD, trained by the command's own function."
    return train_run(shop, tmp_path_factory.mktemp('runs')/'imecd', 'imecd', {'dim': 16, 'codes': 4, 'train.epochs': 3, 'train.warmup': 1}).folder


@pytest.fixture(scope='module')
def r(run): return Recommender.load(run)


@pytest.fixture(scope='module')
def kept(r, tmp_path_factory): r.save_pretrained(folder := tmp_path_factory.mktemp('kept')/'imecd'); return folder


# answers

def test_answers_are_those_of_the_evaluator(r, run, shop):
    "The list after a user's whole history but the last event, against the rank that the run recorded for it."
    data = load_split(shop, 'leave_one_out', 50); d = data.split.data; ranks = pl.read_parquet(run/'ranks.parquet').filter(split='test'); ids = r.shelf.ids
    for u in range(0, d.n_users, 37):
        events = d.events[d.offsets[u]:d.offsets[u+1]].tolist(); found = r.recommend([ids[i-1] for i in events[:-1]], len(ids))
        told = ranks.filter(user=d.users[u])['rank'][0]; assert abs(found.filter(item=ids[events[-1]-1])['rank'][0]-told) <= .5


def test_alone_or_in_company_a_history_gets_one_answer(r, shop):
    events = pl.read_parquet(shop/'interactions.parquet'); many = r.recommend_table(events, 5)
    for user in events['user'].unique(maintain_order=True)[:20]:
        own = events.filter(user=user).sort('timestamp', maintain_order=True); alone = r.recommend_table(own, 5)
        assert alone['item'].to_list() == many.filter(user=user)['item'].to_list(); np.testing.assert_allclose(alone['score'], many.filter(user=user)['score'], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=7), max_size=6), length=st.integers(1, 4), data=st.data())
def test_histories_laid_end_to_end_are_lists(rows, length, data):
    h = Histories.of(rows, 9); at = data.draw(st.lists(st.integers(0, len(rows)-1), max_size=5)) if rows else []
    assert [*h] == rows and len(h) == len(rows) and h.lengths.tolist() == [*map(len, rows)] and Histories.of(h, 9) is h
    assert [*h[torch.tensor(at, dtype=torch.long)]] == [rows[k] for k in at] and [*h[1:3]] == rows[1:3] and [*h[h.lengths > 1]] == [x for x in rows if len(x) > 1]
    assert [*h.last(length)] == [x[-length:] for x in rows]
    pairs = [(k, i) for k in range(len(rows)) for i in range(1, 10)]; row, item = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    assert holds(h, row, item).tolist() == [i in rows[k] for k, i in pairs]
    if rows and all(rows): b = pack_histories(h, length, 9); assert b.items.tolist() == [i for x in rows for i in x[-length:]] and b.positions.tolist() == [p for x in rows for p in range(min(length, len(x)))]


@pytest.mark.parametrize('laid', [False, True])
@pytest.mark.parametrize('exclude', [False, True])
def test_lists_are_the_best_of_the_scores(laid, exclude, r):
    n = len(r.shelf); rows = [[3, 1, 3, 2], [], [5], [*range(1, n+1)], [7, 7]]; lists = ask(r.model, r.shelf, Histories.of(rows, n) if laid else rows, 5, exclude, users=[*'abcde'])   # of d, everything was seen
    for user, row in zip('abcde', rows):
        own = lists.filter(user=user); told = [r.shelf.places[i] for i in own['item']]
        scores = r.model.score(r.model.query(read_rows(r.model, r.shelf, [row])))[0] if row else r.shelf.counts.float()
        order = [i for i in scores[1:].argsort(descending=True, stable=True).add(1).tolist() if not (exclude and i in row)]
        assert told == order[:5] and own['seen'].to_list() == [i in row for i in told] and set(own['by']) <= {'model' if row else 'popularity'}


@pytest.mark.parametrize('rows, told', [([[1], {2, 3}], 'history 1 is {2, 3}'), ([{1: 2}], 'history 0 is'), ([b'12'], 'history 0 is'), ([[1], [2, 99]], 'history 1: 99 is no item'), (Histories(torch.tensor([1, 0, 2]), torch.tensor([0, 1, 3])), 'history 1: 0 is no item')])
def test_what_is_no_history_is_named(rows, told):
    with pytest.raises(ImecdError, match=told): pack_histories(rows, 5, 9)


def test_times_may_be_dates_in_words(r, tmp_path):
    table = pl.DataFrame({'user': ['u']*3, 'item': r.shelf.ids[:3], 'timestamp': ['2024-01-03', '2024-01-01 10:00', '2024-01-02T09:00:00']}); table.write_csv(tmp_path/'t.csv')
    for t in (table, tmp_path/'t.csv', table.with_columns(timestamp=pl.Series([3., 1., 2.])), table.rename({'timestamp': 'day_group'})): assert [*table_histories(r.shelf, t)[1]] == [[2, 3, 1]]
    pl.DataFrame({'Kunde': ['u'], 'ArtNr': ['a']}).write_csv(tmp_path/'f.csv')
    with pytest.raises(ImecdError, match='it has Kunde, ArtNr; rename the one that holds it$'): r.recommend_table(tmp_path/'f.csv')


@pytest.mark.parametrize('user, told', [(None, 'missing'), (' NaN ', "' NaN '")])
def test_a_row_of_nobody_is_named_where_the_table_has_it(user, told, r):
    "Before what else is wrong with items and times, and by its row in the table that was given, not in the order of time."
    table = pl.DataFrame({'user': ['u', user, 'u'], 'item': [r.shelf.ids[0], r.shelf.ids[1], 'no such item'], 'timestamp': [2, 3, 1]})
    for unknown in ('refuse', 'skip'):
        with pytest.raises(ImecdError, match=f'^the table, row 2: user is {told}; every row needs a user$'): table_histories(r.shelf, table, unknown)
        with pytest.raises(ImecdError, match=f'^the table, row 2: user is {told}'): table_histories(r.shelf, table.with_columns(timestamp=pl.Series([None, 3, 1])), unknown)


@pytest.mark.parametrize('numbers', [[10**17+3, 10**17+1, 10**17+2], [100_000_000_002, 99_999_999_999, 100_000_000_001], [3, 1, 2]])
def test_numbers_order_alike_as_numbers_and_as_text(numbers, r):
    table = pl.DataFrame({'user': ['u']*3, 'item': r.shelf.ids[:3], 'timestamp': numbers})
    for t in (table, table.with_columns(pl.col('timestamp').cast(pl.String))): assert [*table_histories(r.shelf, t)[1]] == [[2, 3, 1]]


@pytest.mark.parametrize('title', [' (a)'*20_000+' x', ' (1999)'*20_000, 'a, the'*50_000, ' ('*100_000])
def test_a_hostile_title_costs_the_search_nothing(title, r):
    "Brackets by the thousand took more than ten seconds a title when a pattern tried them from every place."
    shelf = replace(r.shelf, items=r.shelf.items.with_columns(title=pl.Series([title, 'Cup, The (red)', *['pan']*(len(r.shelf)-2)])))
    assert find_title(shelf, 'the cup') == shelf.ids[1]


def test_an_explanation_is_short_on_paper_and_whole_in_a_file(r, tmp_path):
    e = r.explain(r.shelf.ids[:3]); e.save(tmp_path/'why.html')
    assert len(repr(e)) < 120 and page(e) in (tmp_path/'why.html').read_text(encoding='utf-8')


@pytest.mark.parametrize('n', [1, 3])
def test_answers_do_not_depend_on_blocks_and_threads(r, shop, monkeypatch, threads, n):
    events, met = pl.read_parquet(shop/'interactions.parquet'), []; whole = [r.recommend_table(events, 5, hide) for hide in (False, True)]; threads(n)
    def small(lengths, most): met.append(block_sizes(lengths, most, 40)); return met[-1]
    def same(a, b): return a['user'].equals(b['user']) and np.allclose(a['score'], b['score'], atol=1e-5) and (a['item'] == b['item']).mean() > .98  # scores nearer than rounding may change places
    monkeypatch.setattr('imecd.asking.block_sizes', small); assert all(same(a, r.recommend_table(events, 5, hide)) for a, hide in zip(whole, (False, True))) and len(met[0]) > 10 and max(met[0]) > 6
    monkeypatch.setattr('imecd.asking.block_rows', lambda *_: 2); assert all(same(a, r.recommend_table(events, 5, hide)) for a, hide in zip(whole, (False, True)))  # scores of two histories at one time


def test_only_what_is_read_matters(r):
    ids = r.shelf.ids; rest = [ids[k % len(ids)] for k in range(50)]
    assert r.recommend([*ids[60:70], *rest]).drop('seen').equals(r.recommend(rest).drop('seen'))


def test_seen_items_are_kept_or_left_out(r):
    history = r.shelf.ids[:6]; all_ = r.recommend(history, 1000); rest = r.recommend(history, 1000, exclude_seen=True)
    assert len(all_) == len(r.shelf) and len(rest) == len(r.shelf)-6 and set(all_.filter(pl.col('seen'))['item']) == set(history) and not set(rest['item']) & set(history)
    assert rest['item'].to_list() == all_.filter(~pl.col('seen'))['item'].to_list() and rest['rank'].to_list() == list(range(1, len(rest)+1))


def test_keys_are_of_raw_ids_and_their_order(r):
    key = lambda marks, rows: history_keys(pack_histories(rows, 50, len(r.shelf)), marks).tolist()
    a = key(r.shelf.marks, [[1, 2, 3], [3, 2, 1], [1, 2], [1, 2, 3]]); assert a[0] == a[3] and len(set(a)) == 3 and min(a) >= 0
    turned = torch.cat([r.shelf.marks[:1], r.shelf.marks[1:].flip(0)]); n = len(r.shelf); assert key(turned, [[n, n-1, n-2]]) == a[:1]


def test_an_answer_is_that_of_another_process(run, r):
    history = r.shelf.ids[3:9]; code = f'from imecd.recommend import Recommender; print(Recommender.load({str(run)!r}).recommend({history!r}, 5).drop("title").write_json())'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONHASHSEED': '7'}).stdout
    assert [x['item'] for x in json.loads(said)] == r.recommend(history, 5)['item'].to_list()


@pytest.mark.parametrize('name', ['popularity', 'transition_knn'])
def test_models_that_count_recommend_too(name, shop, tmp_path):
    run = train_run(shop, tmp_path/name, name, {}); r = Recommender.load(run.folder); found = r.recommend(r.shelf.ids[:3], 4); assert found['by'].unique().to_list() == [name] and len(found) == 4
    r.save_pretrained(tmp_path/'kept'); assert Recommender.from_pretrained(tmp_path/'kept').recommend(r.shelf.ids[:3], 4).equals(found)
    with pytest.raises(ImecdError, match='open it by Recommender.from_pretrained'): Recommender.load(tmp_path/'kept')
    with pytest.raises(ImecdError, match='counts'): r.explain(r.shelf.ids[:3])
    with pytest.raises(ImecdError, match='neither text nor image|counts'): r.add_items(pl.DataFrame({'item': ['new']}))


def test_a_moved_run_loads_and_moved_data_is_named(run, shop, tmp_path):
    moved = shutil.copytree(run, tmp_path/'elsewhere'); history = Recommender.load(run).shelf.ids[:3]; assert Recommender.load(moved).recommend(history).equals(Recommender.load(run).recommend(history))
    origin = json.loads((moved/'provenance.json').read_text()); origin['data']['folder'] = str(tmp_path/'gone'); (moved/'provenance.json').write_text(json.dumps(origin))
    with pytest.raises(ImecdError, match='is not there; name the place'): Recommender.load(moved)
    assert len(Recommender.load(moved, data=shop).recommend(history, 3)) == 3


def test_ids_that_are_numbers_come_back_as_numbers(shop, made):
    data = load_split(shop, 'leave_one_out', 50); knn, _ = fit_baseline('transition_knn', data, {}, False, None); r = Recommender.of(knn, data, name='kNN')
    numbered = Recommender(knn, replace(r.shelf, items=pl.DataFrame({'item': list(range(1000, 1000+len(r.shelf)))})), 'kNN')
    found = numbered.recommend([1003, '1004', np.int64(1005)], 3); assert found['item'].dtype == pl.Int64 and found['title'].is_null().all()


# what people and strangers hand over: what, and what they are told

HISTORIES = {
    'an id that is not there': (lambda r: r.recommend(['nothing like it']), 'is no item of this model'),
    'an id mistyped': (lambda r: r.recommend([r.shelf.ids[0][:-1]]), 'did you mean'),
    'an empty id': (lambda r: r.recommend(['']), r"'' is no item of this model \(unknown"),
    'an id like no other': (lambda r: r.recommend(['qq']), r"'qq' is no item of this model \(unknown"),
    'a title for an id': (lambda r: r.recommend([r.shelf.titles[1]]), 'it is a title: ask by_title, or --by title'),
    'a text, not a list': (lambda r: r.recommend(r.shelf.ids[0]), 'give a list of item ids'),
    'bytes': (lambda r: r.recommend(b'abc'), 'give a list of item ids'),
    'nothing at all': (lambda r: r.recommend(None), 'give a list of item ids'),
    'a number': (lambda r: r.recommend(7), 'give a list of item ids'),
    'a dict': (lambda r: r.recommend({'a': 1}), 'give a list of item ids'),
    'a list in a list': (lambda r: r.recommend([[r.shelf.ids[0]]]), 'is no item of this model'),
    'an id that is None': (lambda r: r.recommend([None]), 'is no item of this model'),
    'an id of a million letters': (lambda r: r.recommend(['x'*10**6]), r'\(1,000,000 characters\)'),
    'an id with control characters': (lambda r: r.recommend(['\x1b[2J\x00']), r'\\x1b'),
    'an id that is a script': (lambda r: r.recommend(['<script>alert(1)</script>']), 'is no item of this model'),
    'k of zero': (lambda r: r.recommend([], 0), 'a whole number from 1'),
    'k below zero': (lambda r: r.recommend([], -3), 'a whole number from 1'),
    'k of one and a half': (lambda r: r.recommend([], 1.5), 'a whole number from 1'),
    'k that is True': (lambda r: r.recommend([], True), 'a whole number from 1'),
    'another way to treat unknown ids': (lambda r: r.recommend([], unknown='ignore'), 'use refuse or skip'),
    'a title that fits many': (lambda r: find_title(r.shelf, 'e'), 'give more of the title'),
    'a title that fits none': (lambda r: find_title(r.shelf, 'Qqq Zzz'), 'no title holds'),
    'an empty title': (lambda r: find_title(r.shelf, ' \n'), 'a title is empty'),
    'a table without users': (lambda r: r.recommend_table(pl.DataFrame({'item': ['a']})), "no column 'user'"),
    'a table with an unknown id': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u'], 'item': ['a']})), "user 'u': 'a' is no item"),
    'a list for a table': (lambda r: r.recommend_table([1, 2]), 'a polars DataFrame or a file'),
    'a file that is not there': (lambda r: r.recommend_table('no/such.csv'), 'such.csv'),
    'a table of pandas': (lambda r: r.recommend_table(pd.DataFrame({'user': ['u'], 'item': [1]})), 'not a pandas DataFrame; polars.from_pandas makes one'),
    'a table with a row of nobody': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u', None], 'item': r.shelf.ids[:2]})), 'row 2: user is missing'),
    'a table with a user of no letters': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u', ' '], 'item': r.shelf.ids[:2]})), 'row 2: user is'),
    'a table with a user that is no number': (lambda r: r.recommend_table(pl.DataFrame({'user': [1., float('nan')], 'item': r.shelf.ids[:2]})), 'row 2: user is'),
    'a table with a time missing': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u', 'u'], 'item': r.shelf.ids[:2], 'timestamp': [None, 2]})), 'row 1: timestamp is missing; give every row its time'),
    'a table with a time that is none': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u'], 'item': r.shelf.ids[:1], 'timestamp': ['13.09.2020']})), "row 1: timestamp is '13.09.2020'"),
    'a table with an order that is none': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u'], 'item': r.shelf.ids[:1], 'order': [float('nan')]})), "row 1: order is 'nan'; give every row a number"),
    'a table with an order in words': (lambda r: r.recommend_table(pl.DataFrame({'user': ['u'], 'item': r.shelf.ids[:1], 'order': ['2024-05-31']})), 'give every row a number'),
    'a title, not a list': (lambda r: r.by_title('Toy Story'), "a history is 'Toy Story'; give a list of titles"),
    'new items without content': (lambda r: r.add_items(pl.DataFrame({'item': ['new']})), 'neither text nor image'),
    'a new item that is there already': (lambda r: r.add_items(pl.DataFrame({'item': [r.shelf.ids[0]]}), text=r.shelf.features.text[1:2]), 'in the catalogue already'),
    'new items twice': (lambda r: r.add_items(pl.DataFrame({'item': ['n', 'n']}), text=r.shelf.features.text[1:3]), 'twice in the table'),
    'new features of another width': (lambda r: r.add_items(pl.DataFrame({'item': ['n']}), text=np.ones((1, 3))), 'encode them as those'),
    'new features with a NaN': (lambda r: r.add_items(pl.DataFrame({'item': ['n']}), text=np.full((1, r.shelf.features.text.shape[1]), np.nan)), 'not a finite number'),
    'new items with titles, of a saved recommender': (lambda r: Recommender(r.model, replace(r.shelf, folder=None)).add_items(pl.DataFrame({'item': ['n'], 'title': ['Lamp']})), 'load the run, or give text'),
    'new items without a name': (lambda r: r.add_items(pl.DataFrame({'sku': ['n']})), "column 'item'"),
    'no new items': (lambda r: r.add_items(pl.DataFrame({'item': []}, schema={'item': pl.String})), 'no new items'),
}


@pytest.mark.parametrize('what', HISTORIES)
def test_what_cannot_be_asked_is_said(what, r):
    ask, told = HISTORIES[what]
    with pytest.raises(ImecdError, match=told): ask(r)


def config(**kw):
    def change(d, write=None): c = json.loads((d/'config.json').read_text()); (d/'config.json').write_text(json.dumps({**c, **(kw if write is None else write(c))}))
    return change


def cut(name): return lambda d: (d/name).write_bytes((d/name).read_bytes()[:64])


def rewritten(name, make):
    "A file of a stranger who wrote its hash too."
    def change(d): make(d/name); config()(d, lambda c: {'files': {**c['files'], name: file_hash(d/name)}})
    return change


def linked(d): outside = d.parent/'outside'; shutil.move(d/'items.parquet', outside); (d/'items.parquet').symlink_to(outside)
def pickled(path): torch.save({'a': torch.ones(2)}, path)
def fewer(path): pl.read_parquet(path).head(5).write_parquet(path)
def twice(path): pl.read_parquet(path).with_columns(item=pl.lit('a')).write_parquet(path)
def unfinite(path):
    from safetensors.torch import load_file, save_file
    x = load_file(path); x['text'][3, 0] = float('nan'); save_file(x, path)


FOLDERS = {
    'an empty folder': (lambda d: [p.unlink() for p in d.iterdir()], 'has no config.json'),
    'a configuration that is not JSON': (cut('config.json'), 'is not JSON'),
    'a list for a configuration': (lambda d: (d/'config.json').write_text('[]'), 'is not a folder of'),
    'a model of another library': (config(kind='bert'), 'is not a folder of'),
    'a configuration without settings': (config(settings=None), "without a usable 'settings'"),
    'settings that do not exist': (config(settings={'dims': 3}), 'has no field'),
    'a model that does not exist': (config(model='os.system'), 'no model'),
    'weights cut off': (cut('model.safetensors'), 'its hash differs'),
    'a catalogue cut off': (cut('items.parquet'), 'its hash differs'),
    'features missing': (lambda d: (d/'catalogue.safetensors').unlink(), 'has no catalogue.safetensors'),
    'a link out of the folder': (linked, 'leads out of it'),
    'a path out of the folder': (lambda d: config()(d, lambda c: {'files': {**c['files'], '../secret': 'x'}}), 'names other files'),
    'a pickle in place of weights': (rewritten('model.safetensors', pickled), 'missing or broken'),
    'a pickle in place of features': (rewritten('catalogue.safetensors', pickled), 'cannot be read'),
    'a catalogue of fewer items': (rewritten('items.parquet', fewer), 'distinct ids'),
    'one id for all items': (rewritten('items.parquet', twice), 'distinct ids'),
    'features that are no numbers': (rewritten('catalogue.safetensors', unfinite), 'does not fit'),
    'weights of another width': (lambda d: config()(d, lambda c: {'settings': {**c['settings'], 'dim': 32}}), 'this model needs'),
}


@pytest.mark.parametrize('what', FOLDERS)
def test_folders_of_strangers_are_refused(what, kept, tmp_path):
    change, told = FOLDERS[what]; folder = shutil.copytree(kept, tmp_path/'bad'); change(folder)
    with pytest.raises(ImecdError, match=told): Recommender.from_pretrained(folder)


TITLES = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", '</td></tr></table>', '&lt;b&gt;', 'a\x00b\x1b[31m\x07', '\u202egnp.exe', '\u05e9\u05dc\u05d5\u05dd '*200, 'x'*10**5, '$\\frac{1}', '', '\n\n', '\ud7ff\ue000', '\u200b'*50]


class Reader(HTMLParser):
    "Which tags and attributes a page has."
    def __init__(self): super().__init__(); self.tags, self.attributes, self.depth = set(), set(), 0
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attributes |= {k for k, _ in attrs}; self.depth += tag not in ('img', 'br')
    def handle_endtag(self, tag): self.depth -= 1


def test_titles_are_text_and_nothing_else(r):
    "Every bad title in the history, in the list, on the path and in what is nearest."
    n, bad = len(r.shelf), len(TITLES); rows = r.shelf.items.with_columns(title=pl.Series([TITLES[k % bad] for k in range(n)])); nasty = Recommender(r.model, replace(r.shelf, items=rows))
    e = nasty.explain(nasty.shelf.ids[:bad], k=n); text = page(e, bad); reader = Reader(); reader.feed(text)
    assert reader.tags <= {'div', 'p', 'bdi', 'span', 'img', 'table', 'tr', 'td', 'th'} and reader.attributes <= {'style', 'src', 'alt'} and reader.depth == 0 and len(e.history) == bad
    assert len(text) < 200_000 and not any(ord(c) < 32 and c != '\n' or 0x202a <= ord(c) <= 0x202e for c in text) and max(len(clean(t)) for t in TITLES) <= 90
    nasty.explain(nasty.shelf.ids[:bad]).plot().figure.canvas.draw()


def test_broken_pictures_are_no_pictures(tmp_path):
    for name, content in (('a.jpg', b''), ('b.png', b'\x89PNG\r\n'), ('c.svg', b'<svg onload="alert(1)"/>'), ('d.gif', b'GIF89a'+b'\xff'*40)): (tmp_path/name).write_bytes(content); assert thumbnail(tmp_path/name) == ''
    (tmp_path/'folder.jpg').mkdir(); assert thumbnail(tmp_path/'folder.jpg') == '' and safe('"') == '<bdi>&quot;</bdi>'


# skipping, saving, growing

def test_unknown_ids_are_skipped_aloud(r):
    ids = r.shelf.ids[:3]
    with pytest.warns(UserWarning, match="left out 1 of 4.*'nope'"): found = r.recommend([*ids, 'nope'], 3, unknown='skip')
    assert found.equals(r.recommend(ids, 3))
    with pytest.warns(UserWarning, match='left out 2 of 2'): assert r.recommend(['a', 'b'], 2, unknown='skip')['by'].to_list() == ['popularity']*2
    with pytest.warns(UserWarning, match='left out 1 of 2 rows'): assert [*table_histories(r.shelf, pl.DataFrame({'user': [1, 1], 'item': ['a', ids[0]]}), 'skip')[1]] == [[1]]


def test_a_handed_over_model_answers_and_explains_the_same(r, kept):
    again = Recommender.from_pretrained(kept); history = r.shelf.ids[5:12]
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert again.recommend(history).equals(r.recommend(history))
    a, b = again.explain(history), r.explain(history); assert a.history.equals(b.history) and a.answers.equals(b.answers) and a.codes == b.codes and all(torch.equal(x.x0, y.x0) for x, y in zip(a.path, b.path))
    r.save_pretrained(kept); assert Recommender.from_pretrained(kept).recommend(history).equals(r.recommend(history))


def test_a_folder_of_others_is_not_written_into(r, tmp_path):
    (tmp_path/'thesis.tex').write_text('mine'); (tmp_path/'config.json').write_text('mine too')
    with pytest.raises(ImecdError, match='no recommender'): r.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'thesis.tex'] and (tmp_path/'config.json').read_text() == 'mine too'
    with pytest.raises(ImecdError, match='is a file'): r.save_pretrained(tmp_path/'thesis.tex')


def test_new_items_leave_the_old_ones_alone(r):
    text = r.shelf.features.text; more = r.add_items(pl.DataFrame({'item': ['n1', 'n2'], 'title': ['One', None]}), text=text[4:6]); history = r.shelf.ids[:5]
    found = more.recommend(history, 1000); assert {'n1', 'n2'} <= set(found['item']) and len(found) == len(r.shelf)+2
    assert found.filter(~pl.col('item').is_in(['n1', 'n2']))['item'].to_list() == r.recommend(history, 1000)['item'].to_list()
    assert more.recommend(['n1'], 3)['by'].to_list() == ['imecd']*3 and more.shelf.titles[-1] == 'n2' and len(r.shelf) == len(more.shelf)-2
    assert explain_history(more.model, more.shelf, [len(more.shelf)]).history['item'].to_list() == ['n2']


def test_new_items_are_read_by_what_read_the_old(r, shop, tmp_path):
    new = pl.read_parquet(shop/'items.parquet')[4:6].with_columns(item=pl.Series(['n1', 'n2'])); text = r.add_items(new).shelf.features.text; assert np.allclose(text[-2:], text[5:7], atol=.02) and not np.allclose(text[-1], text[-2], atol=.1)
    grown = r.add_items(new); again = grown.add_items(new.with_columns(item=pl.Series(['m1', 'm2']))).shelf.features.text; assert np.array_equal(again[-2:], text[-2:])
    with pytest.raises(ImecdError, match='neither text nor image'): r.add_items(new.select('item'))
    with pytest.raises(ImecdError, match='qwx'): r.add_items(pl.DataFrame({'item': ['qwx'], 'title': ['Zyqx']}))   # no word of it is known
    other = shutil.copytree(shop, tmp_path/'other'); pl.read_parquet(shop/'items.parquet').with_columns(pl.col('title').reverse()).write_parquet(other/'items.parquet')
    with pytest.raises(ImecdError, match='does not hold the texts that this model was trained on'): Recommender(r.model, replace(r.shelf, folder=other)).add_items(new)
    manifest = r.shelf.features.manifest; strange = r.shelf.features._replace(manifest={**manifest, 'text': {**manifest['text'], 'encoder': 'unknown', 'file': 'text_features.npy'}})
    with pytest.raises(ImecdError, match='text_features.npy, which does not say what made it; give text of the new items'): read_new(replace(r.shelf, features=strange), new, {})
    of = lambda about: replace(r.shelf, features=r.shelf.features._replace(manifest={**manifest, 'text': {**manifest['text'], **about}}))
    assert np.array_equal(read_new(of({'fields': []}), new, {})['text'], text[-2:])
    with pytest.raises(ImecdError, match=r'read by /no/encoder, which is not at hand .*give text \(K, F\)'): read_new(of({'encoder': '/no/encoder', 'revision': 'ab'*32}), new, {})
    (tmp_path/'enc').mkdir(); (tmp_path/'enc'/'config.json').write_text('{}'); (tmp_path/'enc'/'model.safetensors').write_bytes(b'x')
    with pytest.raises(ImecdError, match=r'enc at abababababab, and what is at hand is .*give text \(K, F\)'): read_new(of({'encoder': str(tmp_path/'enc'), 'revision': 'ab'*32}), new, {})
    with pytest.raises(ImecdError, match='prepared cache and holds no texts'): read_new(replace(r.shelf, folder=tmp_path), new, {})
    with pytest.raises(ImecdError, match='this model reads no pictures'): r.add_items(new, {'n1': 'n1.png'})



def test_new_tables_of_other_types(r):
    numbered = replace(r.shelf, items=pl.DataFrame({'item': [1, 2], 'title': ['a', 'b']}))
    with pytest.raises(ImecdError, match='ids of this catalogue are of type Int64'): check_new(numbered, pl.DataFrame({'item': ['n1']}))
    for title, wanted in ((['One', 'two'], 'One, two'), (5, '5')): rows = check_new(numbered, pl.DataFrame({'item': ['7'], 'title': [title]})); assert rows['item'].to_list() == [7] and rows['title'].to_list() == [wanted]
    with pytest.raises(ImecdError, match='not a finite number in float16'): new_rows(np.ones((3, 2), np.float16), np.full((1, 2), 1e5), 1, 'text')


def test_new_pictures_come_from_a_folder_or_by_name(r, tmp_path):
    for name, colour in (('a', 'red'), ('b', 'blue'), ('c', 'red')): image = Image.new('RGB', (64, 64), colour); image.paste('white', (8, 8, 40, 24)); image.save(tmp_path/f'{name}.png')
    shelf = replace(r.shelf, items=pl.DataFrame({'item': ['a', 'b']}), features=join_features(['a', 'b'], None, light_image([tmp_path/'a.png', tmp_path/'b.png']))); new = pl.DataFrame({'item': ['c', 'd']})
    for images in (tmp_path, str(tmp_path), {'c': tmp_path/'c.png'}): found = read_new(shelf, new, picture_files(images))['image']; assert np.allclose(found[0], shelf.features.image[1], atol=1e-3) and not found[1].any()
    assert read_new(shelf, new, {}) == {} == read_new(shelf, new, picture_files(tmp_path), ('image',))
    with pytest.raises(ImecdError, match="none is of a new item; .* is named 'C', the first new item 'c'"): read_new(shelf, new, {'C': tmp_path/'c.png'})
    assert grow_shelf(shelf, new[:1], image=shelf.features.image[1:2], pictures={'c': 'c.png'}).pictures['c'] == 'c.png'
    (tmp_path/'d.png').write_bytes(b'no picture')
    with pytest.raises(ImecdError, match=r'd\.png: .*mend these pictures'): read_new(shelf, new, picture_files(tmp_path))
    for wrong in (tmp_path/'nowhere', np.ones((2, 251))):
        with pytest.raises(ImecdError, match='give a folder of pictures, or a dict'): picture_files(wrong)


def test_figures_say_what_is_missing(r):
    empty = r.explain([]); ax = empty.plot(); assert ax.get_title(loc='left').startswith('Nothing is known') and ax.get_xlabel() == 'training events' and [b.get_width() for b in ax.patches] == empty.answers['score'].to_list(); plt.close('all')
    history = r.explain(r.shelf.ids[:2]).history.with_columns(**{'trust image': pl.Series([.4, None], dtype=pl.Float64)}); ax = plot_trusts(history); assert [t.get_text() for t in ax.texts if t.get_text()] == ['no image']; plt.close('all')


# the command

def test_command_recommends_by_id_and_by_title(imecd, run, r):
    ids = r.shelf.ids[:3]; code, said, err = imecd('recommend', run, '--history', ','.join(ids[:2]), '--history', ids[2], '-k', 4, '--json'); assert code == 0, err
    assert [x['item'] for x in json.loads(said)['items']] == r.recommend(ids, 4)['item'].to_list()
    title = max(r.shelf.titles[1:], key=len); code, said, err = imecd('recommend', run, '--history', title, '--by', 'title', '-k', 2); assert code == 0 and len(said.splitlines()) == 2, err
    code, said, err = imecd('recommend', run, '-k', 2); assert code == 0 and 'bought most' in said and len(said.splitlines()) == 3


@pytest.mark.parametrize(('args', 'told'), [(['--history', 'nope'], 'is no item of this model'), (['--history', 'a', '--by', 'name'], 'use id or title'), (['-k', '0'], 'greater than or equal to 1'), (['--data', 'nowhere'], 'is not there')])
def test_command_says_in_one_line_what_is_wrong(args, told, imecd, run):
    code, said, err = imecd('recommend', run, *args); assert code == 2 and told in err and len(err.strip().splitlines()) == 1 and not said


def test_command_skips_aloud_and_reads_a_kept_folder(imecd, kept, r):
    code, said, err = imecd('recommend', kept, '--history', f'{r.shelf.ids[0]},nope', '--unknown', 'skip', '-k', 1); assert code == 0 and 'left out 1 of 2' in err and len(said.splitlines()) == 1


def test_hub_files_may_be_links_into_its_cache_and_nowhere_else(kept, r, tmp_path, monkeypatch):
    "The layout of the hub's cache: a snapshot of links to blobs beside it."
    import huggingface_hub
    home = tmp_path/'models--someone--imecd'; snapshot = home/'snapshots'/'abc'; snapshot.mkdir(parents=True); (home/'blobs').mkdir()
    for p in kept.iterdir(): shutil.copy(p, home/'blobs'/p.name); (snapshot/p.name).symlink_to(home/'blobs'/p.name)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *_, **__: str(snapshot)); monkeypatch.setattr(huggingface_hub.hub_mixin, 'hf_hub_download', lambda **_: str(snapshot/'config.json'))
    from imecd.recommend import hub_class
    hub_class.cache_clear(); history = r.shelf.ids[:4]; assert Recommender.from_pretrained('someone/imecd').recommend(history).equals(r.recommend(history))
    (snapshot/'items.parquet').unlink(); shutil.copy(kept/'items.parquet', tmp_path/'elsewhere.parquet'); (snapshot/'items.parquet').symlink_to(tmp_path/'elsewhere.parquet')
    with pytest.raises(ImecdError, match='leads out of it'): Recommender.from_pretrained('someone/imecd')
    hub_class.cache_clear()


@pytest.mark.parametrize('name', ['kept', 'a/b', '-no name-'])
def test_a_folder_that_has_moved_is_said_not_to_be_there(name, monkeypatch):
    "Without a folder the name is one of the hub, which has nothing, or cannot be asked."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ImecdError, match=f'^there is no folder {name}, and no recommender came from the hub under this name'): Recommender.from_pretrained(name)


@pytest.mark.parametrize('name', ['why.png', 'why', 'why.html.txt'])
def test_an_explanation_is_no_picture(name, r, tmp_path):
    with pytest.raises(ImecdError, match='ends in .html'): r.explain(r.shelf.ids[:2]).save(tmp_path/name)
    assert not list(tmp_path.iterdir())


def test_a_row_without_an_item_and_an_id_in_other_letters(r):
    first = r.shelf.ids[0]; table = pl.DataFrame({'user': ['u', 'u'], 'item': [first, None]})
    with pytest.raises(ImecdError, match='^the table, row 2: item is missing; every row needs an item$'): r.recommend_table(table)
    with pytest.warns(UserWarning, match='left out 1 of 2 rows'): r.recommend_table(table, unknown='skip')
    with pytest.raises(ImecdError, match=f"did you mean '{first}'"): r.recommend([first.lower()])
