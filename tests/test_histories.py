"k-core, ties, splits, hashes and the errors of a data folder."
import json

import numpy as np
import polars as pl
import pytest

from imecd.core import ImecdError
from imecd.histories import (Interactions, arrange, content_hash, encode_ids, k_core, last_tie_sizes, leave_one_out, load_interactions, statistics,
                             time_split, tied_last)
from imecd.interactions import Events
from imecd.prepare import convert


def events(**columns): return Events(pl.DataFrame(columns), {}, pl.DataFrame(), [])


def brute_k_core(pairs, k):
    "One removal at a time, the least fair order there is."
    pairs = list(pairs)
    while True:
        for x in pairs:
            if sum(p[0] == x[0] for p in pairs) < k or sum(p[1] == x[1] for p in pairs) < k: pairs.remove(x); break
        else: return sorted(pairs)


@pytest.mark.parametrize('seed', range(20))
def test_k_core_is_that_of_one_removal_at_a_time(seed):
    g = np.random.default_rng(seed); u, i = g.integers(0, 12, 60), g.integers(0, 15, 60)
    keep = k_core(u, i, 3).keep
    assert sorted(zip(u[keep], i[keep])) == brute_k_core(zip(u, i), 3)


def test_k_core_of_nothing(): assert len(k_core(np.array([], int), np.array([], int), 5).keep) == 0


def test_codes_follow_the_ids():
    names, codes = encode_ids(pl.Series(['ü', 'b', 'a', 'b', '日本']))
    assert names.to_list() == sorted(['ü', 'b', 'a', '日本']) and [names[int(c)] for c in codes] == ['ü', 'b', 'a', 'b', '日本']


def test_tie_order_is_the_same_forever():
    "A changed key would change every published split."
    a = arrange(pl.DataFrame({'user': ['u']*8, 'item': list('abcdefgh'), 'timestamp': [0]*8}))
    assert ''.join(a.items[int(i)] for i in a.item) == FROZEN_ORDER


FROZEN_ORDER = 'hgafbcde'


@pytest.mark.parametrize('seed', range(5))
def test_file_order_never_matters(seed, tmp_path):
    g = np.random.default_rng(seed); n = 400
    t = pl.DataFrame({'user': [f'u{x}' for x in g.integers(0, 20, n)], 'item': [f'i{x}' for x in g.integers(0, 15, n)], 'timestamp': g.integers(0, 10, n)}).unique()
    found = []
    for k, table in enumerate((t.sort('item', 'user'), t.sample(fraction=1, shuffle=True, seed=seed), t.sort('timestamp', descending=True))):
        convert(Events(table, {}, pl.DataFrame(), []), tmp_path/str(k), k=3); found.append(load_interactions(tmp_path/str(k)))
    assert len({content_hash(f) for f in found}) == 1
    assert all((np.diff(f.times[s:e]) >= 0).all() for f in found for s, e in zip(f.offsets[:-1], f.offsets[1:]))
    for split in (leave_one_out, time_split): assert len({split(f).test.tobytes() for f in found}) == 1


def test_order_wins_over_timestamp(tmp_path):
    pl.DataFrame({'user': ['u']*3, 'item': list('abc'), 'timestamp': [3, 2, 1], 'order': [0, 1, 2]}).write_parquet(tmp_path/'interactions.parquet')
    pl.DataFrame({'item': list('abc')}).write_parquet(tmp_path/'items.parquet')
    data = load_interactions(tmp_path); assert data.events.tolist() == [1, 2, 3]
    with pytest.raises(ImecdError, match="order and timestamp disagree for user 'u'"): time_split(data)


def test_dense_id_is_the_row_of_the_catalogue(tmp_path):
    pl.DataFrame({'user': ['u']*3, 'item': list('cab'), 'order': [0, 1, 2]}).write_parquet(tmp_path/'interactions.parquet')
    pl.DataFrame({'item': list('bxca')}).write_parquet(tmp_path/'items.parquet')
    data = load_interactions(tmp_path)
    assert data.events.tolist() == [3, 4, 1] and data.n_items == 4 and statistics(data)['items_never'] == 1


BAD_FOLDERS = {
    'no interactions': (None, {'item': ['a']}, 'interactions.parquet is not there'),
    'no items': ({'user': ['u']*3, 'item': ['a']*3, 'order': [0, 1, 2]}, None, 'items.parquet is not there'),
    'no user column': ({'customer': ['u'], 'item': ['a'], 'order': [0]}, {'item': ['a']}, "no column 'user', only customer, item, order"),
    'no time': ({'user': ['u'], 'item': ['a']}, {'item': ['a']}, "neither 'order' nor 'timestamp'"),
    'null user': ({'user': ['u', None], 'item': ['a', 'a'], 'order': [0, 1]}, {'item': ['a']}, 'row 1: user is empty'),
    'null time': ({'user': ['u', 'u'], 'item': ['a', 'a'], 'timestamp': [0, None]}, {'item': ['a']}, 'row 1: timestamp is empty'),
    'unknown item': ({'user': ['u']*3, 'item': ['a', 'b', 'b'], 'order': [0, 1, 2]}, {'item': ['a']}, r"row 1: item 'b' is not in items.parquet \(2 such rows\)"),
    'item twice': ({'user': ['u']*3, 'item': ['a']*3, 'order': [0, 1, 2]}, {'item': ['a', 'b', 'a']}, 'items.parquet, row 0: its id is empty or stands twice'),
    'item null': ({'user': ['u']*3, 'item': ['a']*3, 'order': [0, 1, 2]}, {'item': ['a', None]}, 'items.parquet, row 1'),
    'short user': ({'user': ['u']*3+['v'], 'item': ['a']*4, 'order': [0, 1, 2, 3]}, {'item': ['a']}, r"user 'v' has 1 events and 1 users have fewer than 3; use --k-core 3"),
    'no rows': ({'user': pl.Series([], dtype=pl.String), 'item': pl.Series([], dtype=pl.String), 'order': pl.Series([], dtype=pl.Int64)}, {'item': ['a']}, 'no event is left'),
}


@pytest.mark.parametrize('name', BAD_FOLDERS)
def test_what_is_wrong_with_a_folder_is_named(name, tmp_path):
    interactions, items, message = BAD_FOLDERS[name]
    if interactions is not None: pl.DataFrame(interactions).write_parquet(tmp_path/'interactions.parquet')
    if items is not None: pl.DataFrame(items).write_parquet(tmp_path/'items.parquet')
    with pytest.raises(ImecdError, match=message): load_interactions(tmp_path)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path/'interactions.parquet').write_text('user,item\n'); pl.DataFrame({'item': ['a']}).write_parquet(tmp_path/'items.parquet')
    with pytest.raises(ImecdError, match='not readable as parquet'): load_interactions(tmp_path)


def test_convert_leaves_nothing_half_done(tmp_path):
    few = events(user=['u', 'v'], item=['a', 'b'], timestamp=[1, 2])
    with pytest.raises(ImecdError, match='the 5-core leaves nothing of 2 events: 2 > 0'): convert(few, tmp_path/'out')
    assert not list(tmp_path.iterdir())
    convert(few, tmp_path/'out', k=1); before = (tmp_path/'out/interactions.parquet').read_bytes()
    with pytest.raises(ImecdError, match='is not empty'): convert(few, tmp_path/'out', k=1)
    assert (tmp_path/'out/interactions.parquet').read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_convert_knows_items_and_counts_unknown_ones(tmp_path):
    t = events(user=['u', 'u', 'v'], item=['b', 'a', 'a'], timestamp=[1, 2, 3])
    report = convert(t, tmp_path/'out', pl.DataFrame({'item': ['z', 'a', 'a'], 'title': ['never', 'an apple', 'again']}), k=1)
    assert report['items_unknown'] == 1 and report['items_without_text'] == 1 and report['items'] == 2 and report['users_below_3_events'] == 2
    assert pl.read_parquet(tmp_path/'out/items.parquet').to_dict(as_series=False) == {'item': ['a', 'b'], 'title': ['an apple', None]}


def test_convert_names_a_table_that_tells_nothing(tmp_path):
    t = events(user=['u', 'u'], item=['3.0', '4.0'], timestamp=[1, 2])
    with pytest.raises(ImecdError, match="no item of the table of items is in the events: it begins with '3', the items of the events with '3.0'"): convert(t, tmp_path/'out', pl.DataFrame({'item': ['3', '4']}), k=1)
    with pytest.raises(ImecdError, match="no column 'item'; it has sku"): convert(t, tmp_path/'out', pl.DataFrame({'sku': ['3']}), k=1)
    assert not list(tmp_path.iterdir())
    whole = convert(events(user=['u', 'u'], item=['3', '4'], timestamp=[1, 2]), tmp_path/'numbers', pl.DataFrame({'item': [3, 5], 'title': ['cup', 'pan']}), k=1); assert whole['items_unknown'] == 1
    report = convert(t, tmp_path/'out', pl.DataFrame({'item': ['3.0'], 'Bezeichnung': ['cup'], 'price': [2.]}), k=1)
    assert any('it has Bezeichnung, price (a title is named by --item-column title=NAME' in n for n in report['notes'])
    assert not any('title' in n for n in convert(t, tmp_path/'bare', k=1)['notes'])


def test_convert_keeps_matrices_in_step(tmp_path):
    src = tmp_path/'src'; src.mkdir()
    pl.DataFrame({'user': list('uuuvvvwww'), 'item': list('abcabcabd'), 'order': list(range(9))}).write_parquet(src/'interactions.parquet')
    pl.DataFrame({'item': list('dcba')}).write_parquet(src/'items.parquet'); np.save(src/'text_features.npy', np.arange(4.)[:, None])
    convert(src, tmp_path/'out', k=2)
    kept = pl.read_parquet(tmp_path/'out/items.parquet')['item'].to_list(); assert kept == ['a', 'b', 'c']
    assert np.load(tmp_path/'out/text_features.npy')[:, 0].tolist() == [3, 2, 1]
    np.save(src/'text_features.npy', np.arange(3.)[:, None])
    with pytest.raises(ImecdError, match='has 3 rows, .* has 4'): convert(src, tmp_path/'again', k=2)
    assert not (tmp_path/'again').exists()


def test_convert_marks_items_that_the_source_does_not_know(tmp_path):
    src = tmp_path/'src'; (src/'images_small').mkdir(parents=True)
    pl.DataFrame({'user': list('uuuvvv'), 'item': list('abxabx'), 'order': list(range(6))}).write_parquet(src/'interactions.parquet')
    pl.DataFrame({'item': list('cba')}).write_parquet(src/'items.parquet'); np.save(src/'text_features.npy', np.arange(1, 4.)[:, None]); np.save(src/'image_codes.npy', np.arange(12).reshape(3, 4))
    for name in 'abc': (src/f'images_small/{name}.jpg').write_bytes(name.encode())
    convert(src, tmp_path/'out', k=2)
    assert pl.read_parquet(tmp_path/'out/items.parquet')['item'].to_list() == ['a', 'b', 'x']
    assert np.load(tmp_path/'out/text_features.npy')[:, 0].tolist() == [3, 2, 0] and np.load(tmp_path/'out/text_present.npy').tolist() == [True, True, False]
    assert np.load(tmp_path/'out/image_codes.npy')[:, 0].tolist() == [8, 4, -1]
    assert sorted(p.name for p in (tmp_path/'out/images_small').iterdir()) == ['a.jpg', 'b.jpg']


def test_a_converted_folder_converts_to_itself(tmp_path, shop):
    convert(shop, tmp_path/'one', k=0); convert(tmp_path/'one', tmp_path/'two', k=0)
    a, b = load_interactions(tmp_path/'one'), load_interactions(tmp_path/'two')
    assert content_hash(a) == content_hash(b) and (a.events == b.events).all()


def test_leave_one_out_hides_the_last_two(made):
    data = made([3, 5, 9]); s = leave_one_out(data)
    for u in range(3):
        lo, hi = data.offsets[u:u+2]
        assert (s.train[u], s.valid[u], s.test[u]) == (hi-2, hi-2, hi-1) and s.train[u] > lo


@pytest.mark.parametrize('seed', range(10))
def test_time_split_never_looks_ahead(seed, made):
    g = np.random.default_rng(seed); lengths = g.integers(3, 12, 50)
    times = np.concatenate([np.sort(g.integers(0, 1000, n)) for n in lengths]); data = made(lengths, ties=times)
    s = time_split(data)
    trained = np.concatenate([times[a:b] for a, b in zip(data.offsets[:-1], s.train)])
    valid, test = times[s.valid[s.valid >= 0]], times[s.test[s.test >= 0]]
    assert trained.max() < valid.min() and valid.max() < test.min()
    for u in range(50):
        for t in (s.valid[u], s.test[u]): assert t == -1 or data.offsets[u] < t < data.offsets[u+1]
        if s.test[u] > 0: assert times[s.test[u]-1] < test.min() or s.test[u] == data.offsets[u]


def test_time_split_says_what_it_needs(made):
    with pytest.raises(ImecdError, match='needs timestamps'): time_split(made([5, 5]))
    with pytest.raises(ImecdError, match='0 < valid < test < 1'): time_split(made([5, 5], ties=np.arange(10)), 0, 1)


def test_statistics_are_json(made):
    data = made([3, 4, 5], ties=np.zeros(12, int)); found = json.loads(json.dumps(statistics(data)))
    assert found['users'] == 3 and found['events'] == 12 and found['tied_last'] == 1 and found['first'] == '1970-01-01'


def test_hash_sees_every_change(made):
    data = made([3, 4, 5], ties=np.arange(12)); base = content_hash(data)
    moved = data.events.copy(); moved[0] = moved[0] % 40+1
    for change in ({'events': moved}, {'offsets': np.array([0, 4, 7, 12])}, {'times': data.times+1}, {'ties': data.ties*0}, {'users': np.array(list('abc'), object)}): assert content_hash(data._replace(**change)) != base


def test_tie_sizes(made):
    data = made([3, 4, 5], ties=np.array([0, 1, 1, 2, 2, 2, 2, 1, 2, 3, 4, 5]))
    assert last_tie_sizes(data).tolist() == [2, 4, 1] and tied_last(data) == pytest.approx(2/3)
    assert tied_last(made([3])) is None


KNOWN = {'movielens_small': (597, 1849, 56166), 'ml1m': (6040, 3412, 999545), 'amazon18_instruments': (17112, 6250, 136226), 'amazon14_toys': (19412, 11924, 167597),
         'amazon18_office': (3200, 2350, 19586), 'amazon18_games': (50546, 16859, 452989)}


@pytest.mark.real
@pytest.mark.parametrize('name', KNOWN)
def test_real_folders_are_taken_as_they_are(name, real):
    data = load_interactions(real(name))
    assert (data.n_users, data.n_items, len(data.events)) == KNOWN[name]
    assert isinstance(data, Interactions) and (data.lengths >= 3).all()


GOOD = {'user': ['u']*4, 'item': ['a']*4, 'order': [0, 1, 2, 3], 'timestamp': [5, 6, 7, 8], 'day_group': [0, 0, 1, 1]}
SPOILT = {
    'order as text': ({'order': ['8', '9', '10', '11']}, 'order holds String, whole numbers are needed'),
    'milliseconds': ({'timestamp': [1_500_000_000_000]*4}, 'row 0: timestamp is no second between 1970 and 2100'),
    'before 1970': ({'timestamp': [5, 6, -7, 8]}, 'row 2: timestamp is no second'),
    'NaN': ({'timestamp': [5., float('nan'), 7., 8.]}, 'row 1: timestamp is no whole number'),
    'parts of a second': ({'timestamp': [5., 6.5, 7., 8.]}, 'row 1: timestamp is no whole number'),
    'ISO': ({'timestamp': ['2020-01-01']*4}, 'timestamp holds String'),
    'null day': ({'day_group': [0, None, 1, 1]}, 'row 1: day_group is empty'),
    'day as text': ({'day_group': list('aabb')}, 'day_group holds String'),
    'list of items': ({'item': [['a']]*4}, r'item holds List\(String\), not text'),
    'float user': ({'user': [1., 1., 1., 1.]}, 'user holds Float64, not text'),
    'blank user': ({'user': ['u', ' ', 'u', 'u']}, 'row 1: user is empty'),
}


@pytest.mark.parametrize('name', SPOILT)
def test_columns_of_another_kind_are_refused(name, tmp_path):
    change, message = SPOILT[name]
    pl.DataFrame({**GOOD, **change}).write_parquet(tmp_path/'interactions.parquet'); pl.DataFrame({'item': ['a']}).write_parquet(tmp_path/'items.parquet')
    with pytest.raises(ImecdError, match=message): load_interactions(tmp_path)


def test_dates_and_whole_floats_are_numbers(tmp_path):
    pl.DataFrame({'item': [7]}).write_parquet(tmp_path/'items.parquet')
    when = pl.datetime_range(pl.datetime(2020, 1, 1), pl.datetime(2020, 1, 4), '1d', eager=True)
    pl.DataFrame({'user': [1]*4, 'item': [7]*4, 'timestamp': when, 'order': [0., 1., 2., 3.]}).write_parquet(tmp_path/'interactions.parquet')
    assert load_interactions(tmp_path).times.tolist() == [1577836800+86400*k for k in range(4)]
