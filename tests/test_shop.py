"The generated shop: what it promises to science, and that its truth stays where it is."
import ast
import shutil
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from imecd import shop as module
from imecd.core import ImecdError
from imecd.goods import THEMES, draw, picture_table, random_ids
from imecd.shop import ShopConfig, Truth, item_truth, load_truth, make_catalogue, make_shop, plot_needs, plot_shop

LIB = Path(module.__file__).parent
PUBLIC = 'interactions.parquet', 'items.parquet'
SMALL = dict(n_users=120, n_items=80, n_themes=6)


def tables(folder): return [pl.read_parquet(folder/name) for name in PUBLIC]
def content(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def default(tmp_path_factory): return make_shop(tmp_path_factory.mktemp('shop')/'default')


@pytest.fixture(scope='module')
def small(tmp_path_factory): return make_shop(tmp_path_factory.mktemp('shop')/'small', **SMALL)


def numbers(folder):
    events, items = tables(folder)
    rows = {item: k for k, item in enumerate(items['item'])}
    return events['item'].replace_strict(rows).to_numpy(), events['user'].rank('dense').to_numpy().astype(int)-1


# the folder

def test_folder_is_canonical(default):
    events, items = tables(default)
    assert dict(events.schema) == {'user': pl.String, 'item': pl.String, 'timestamp': pl.Int64}
    assert dict(items.schema) == dict.fromkeys(['item', 'title', 'description', 'brand', 'categories'], pl.String)
    assert not items['item'].is_duplicated().any() and items.null_count().sum_horizontal()[0] == 0
    assert set(events['item']) <= set(items['item']) and events['user'].n_unique() == 2000
    assert (events['timestamp'] % 86400 == 0).all() and events['timestamp'].min() > 1_300_000_000
    assert {p.name for p in default.iterdir()} == {*PUBLIC, 'truth.parquet', 'truth_events.parquet', 'images_small', 'README.md'}


def test_pictures_are_where_they_should_be(default):
    truth = load_truth(default).items
    there = {p.stem for p in (default/'images_small').iterdir()}
    assert there == set(truth.filter(~pl.col('no_image'))['item'])
    with Image.open(default/'images_small'/f'{min(there)}.jpg') as picture: assert picture.size == (64, 64) and picture.mode == 'RGB'


def test_readme_counts(small):
    text = (small/'README.md').read_text()
    assert '120 users, 80 items' in text and f'{len(tables(small)[0])} events' in text and '"seed": 0' in text


def test_text_reads_like_a_shop(default):
    items, truth = tables(default)[1], load_truth(default).items
    assert items['title'].str.split(' ').list.len().is_between(4, 9).all()
    sentences = items['description'].str.count_matches(r'\.').to_numpy()
    assert set(sentences) == {1, 2, 3}
    words = {w for text in items['title']+' '+items['description'] for w in text.lower().replace(',', '').replace('.', '').split()}
    assert 200 < len(words) < 500
    assert items['title'].n_unique() > 550 and truth['text_theme'].n_unique() == 12


# one seed, one shop

def test_same_seed_same_bytes(small, tmp_path):
    assert content(make_shop(tmp_path/'again', **SMALL)) == content(small)


def test_numpy_numbers_are_numbers(small, tmp_path):
    config = ShopConfig(seed=np.int64(0), accidental=np.float64(.08), **{k: np.int32(v) for k, v in SMALL.items()})
    assert content(make_shop(tmp_path/'again', config)) == content(small)


def test_other_seed_other_shop(small, tmp_path):
    other = tables(make_shop(tmp_path/'other', seed=1, pictures=False, **SMALL))
    assert not set(other[1]['item']) & set(tables(small)[1]['item']) and not set(other[1]['title']) <= set(tables(small)[1]['title'])


def test_pictures_change_nothing_else(small, tmp_path):
    plain = content(make_shop(tmp_path/'plain', pictures=False, **SMALL))
    assert all(plain[p] == b for p, b in content(small).items() if p.suffix == '.parquet')
    assert not (tmp_path/'plain/images_small').exists()


@pytest.mark.parametrize('change', [
    dict(lying_text=0.), dict(lying_image=.5), dict(noise_text=.3), dict(no_image=.4), dict(lie_strength=.3)], ids=str)
def test_lies_change_no_event(small, tmp_path, change):
    lied = make_shop(tmp_path/'lied', pictures=False, **SMALL, **change)
    assert tables(lied)[0].equals(tables(small)[0]) and load_truth(lied).items['theme'].equals(load_truth(small).items['theme'])


def test_more_users_leave_the_goods(small, tmp_path):
    more = make_shop(tmp_path/'more', **SMALL | dict(n_users=200))
    kept = lambda folder: {p: b for p, b in content(folder).items() if p.suffix == '.jpg' or p.name in ('items.parquet', 'truth.parquet')}
    assert kept(more) == kept(small)


# behaviour

def test_histories(default):
    events, truth = tables(default)[0], load_truth(default)
    lengths = events.group_by('user').len()['len']
    assert lengths.min() == 5 and lengths.max() <= 60 and 8 <= lengths.median() <= 10 and 10 <= lengths.mean() <= 12
    assert not events.select('user', 'item').is_duplicated().any()
    assert abs(truth.events['accidental'].mean()-.08) < .01
    tied = events.group_by('user').agg(pl.col('timestamp').sort().tail(2).n_unique() == 1)['timestamp'].mean()
    assert .13 < tied < .2
    bought = events.group_by('item').len()['len']
    assert len(bought) == 600 and bought.min() >= 3


def test_time_follows_the_steps(default):
    told = load_truth(default).events.sort('user', 'step')
    later = told.with_columns(gap=pl.col('timestamp').diff().over('user'))['gap'].drop_nulls()
    assert (later >= 0).all() and (told.group_by('user').agg(pl.col('step').sort() == pl.int_range(pl.len()))['step'].list.all()).all()


def test_accidents_are_uniform_and_the_rest_is_not(default):
    truth = load_truth(default)
    joined = truth.events.join(truth.items.select('item', 'theme'), on='item')
    same = joined.group_by('accidental').agg((pl.col('theme') == pl.col('need')).mean()).sort('accidental')['theme']
    assert same[0] == 1 and same[1] < .25


def test_companions_are_of_the_next_kind():
    shop = make_catalogue(ShopConfig())
    assert (shop.kind[shop.companions] == (shop.kind[:, None]+1) % 3).mean() > .9
    assert .65 < (shop.theme[shop.companions] == shop.theme[:, None]).mean() < .85


# lies

def test_faults_exclude_each_other(default):
    truth = load_truth(default).items
    faults = truth.select('text_lies', 'image_lies', 'no_image', 'noise_text')
    assert faults.sum().row(0) == (120, 120, 30, 30) and faults.sum_horizontal().max() == 1
    assert (truth['text_lies'] == (truth['text_theme'] != truth['theme'])).all()
    assert (truth['image_lies'] == (truth['image_theme'] != truth['theme'])).all()


def test_who_lies_is_independent_of_popularity():
    ranks = []
    for seed in range(12):
        config = ShopConfig(seed=seed); shop = make_catalogue(config); place = np.arange(600)-shop.start[shop.theme]
        ranks.append([place[item_truth(config, shop)[c].to_numpy()].mean()/place.mean() for c in ('text_lies', 'image_lies')])
    assert np.abs(np.mean(ranks, 0)-1).max() < .1


def test_lying_texts_speak_of_the_other_theme(default):
    items, truth, words = tables(default)[1], load_truth(default).items, [set(line) for line in THEMES.values()]
    said = [set((t+' '+d).replace(',', '').replace('.', '').split()) for t, d in items.select('title', 'description').rows()]
    share = lambda rows, theme: np.mean([len(said[i] & words[truth[theme][int(i)]]) for i in rows])
    liars = np.flatnonzero(truth['text_lies'].to_numpy())
    assert share(liars, 'text_theme') > 2.5 and share(liars, 'theme') < .6


def test_themes_look_different_and_items_vary():
    n, themes = 40, 12
    goods = pl.DataFrame(dict(theme=np.repeat(np.arange(themes), n), image_look=np.tile(np.arange(n) % 3, themes))).with_columns(image_theme='theme')
    pictures = draw(picture_table(goods, 0))
    assert len({p.tobytes() for p in pictures}) == n*themes
    hue = np.stack([np.asarray(Image.fromarray(p).convert('HSV')) for p in pictures]).reshape(len(pictures), -1, 3)
    X = np.stack([np.histogram(h[:, 0], 16, (0, 256), weights=(h[:, 1] > 60)*1.)[0] for h in hue]); X = np.sqrt(X/(X.sum(1, keepdims=True)+1))
    even = np.arange(len(X)) % 2 == 0; theme = goods['theme'].to_numpy()
    centres = np.stack([X[even & (theme == k)].mean(0) for k in range(themes)])
    right = (((X[~even][:, None]-centres)**2).sum(-1).argmin(1) == theme[~even]).mean()
    assert .6 < right < 1


def test_strength_of_a_lie():
    shop = make_catalogue(ShopConfig(n_items=5000)); shares = []
    for strength in (0., .5, 1.):
        truth = item_truth(ShopConfig(n_items=5000, lie_strength=strength), shop); liars = truth['image_lies'].to_numpy()
        shares.append((picture_table(truth, 0, strength)['colour'] != shop.theme)[liars].mean())
    assert shares[0] == 0 and abs(shares[1]-.5) < .06 and shares[2] == 1


# the truth stays where it is

def test_no_public_column_tells_the_theme(default):
    events, items = tables(default); truth = load_truth(default)
    theme = truth.items['theme'].to_numpy()
    for column in ('brand', 'categories'):
        codes = items[column].rank('dense').to_numpy().astype(int)-1
        table = np.zeros((codes.max()+1, 12)); np.add.at(table, (codes, theme), 1)
        assert table.max(1).sum()/600 < .5, column                                # the best guess from the column
    place = np.arange(600)                                                        # nor the order of the rows, nor the id
    assert abs(np.corrcoef(place, theme)[0, 1]) < .12
    step = events.with_columns(truth.events['step']).filter(pl.len().over('user', 'timestamp') > 1)
    first = step.group_by('user', 'timestamp').agg(right=pl.col('step').first() == pl.col('step').min(), n=pl.len()).filter(pl.col('n') == 2)
    assert abs(first['right'].mean()-.5) < .06                                    # the order within a day says nothing


def test_removing_or_permuting_the_truth_changes_nothing_public(small, tmp_path):
    histories = pytest.importorskip('imecd.histories')
    folder = tmp_path/'shop'; shutil.copytree(small, folder)
    before = {p: b for p, b in content(folder).items() if 'truth' not in p.name}; loaded = histories.load_interactions(folder)
    truth = pl.read_parquet(folder/'truth.parquet'); truth.sample(fraction=1., shuffle=True, seed=0).write_parquet(folder/'truth.parquet')
    permuted = histories.load_interactions(folder)
    for name in ('truth.parquet', 'truth_events.parquet'): (folder/name).unlink()
    gone = histories.load_interactions(folder)
    assert {p: b for p, b in content(folder).items() if 'truth' not in p.name} == before
    for other in (permuted, gone): assert np.array_equal(other.events, loaded.events) and other.items.equals(loaded.items)


def names_in(tree):
    "Names used or imported, and strings, in a piece of code."
    return ({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
            | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)})


def test_nobody_else_reads_the_truth():
    for path in LIB.glob('*.py'):
        if path.stem in ('shop', '_modidx', 'widgets', 'cli'): continue
        names = names_in(ast.parse(path.read_text()))
        assert 'load_truth' not in names and not any('truth.parquet' in t or 'truth_events' in t for t in names), path.name


def test_the_command_line_draws_with_the_truth_and_does_nothing_else_with_it():
    trees = [ast.parse((LIB/name).read_text()) for name in ('cli.py', 'running.py')]; functions = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert {name for name, f in functions.items() if 'load_truth' in names_in(f)} == {'demo'} and not any('truth.parquet' in t or 'truth_events' in t for tree in trees for t in names_in(tree))
    for f in (functions['train_run'], functions['demo']):  # what was read goes to the figures, or is handed on to `train_run` for its figures
        given = [c for c in ast.walk(f) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name) and c.func.id in ('room_figures', 'train_run')]
        allowed = sum(isinstance(n, ast.Name) and n.id == 'lies' for c in given for a in (*c.args, *(k.value for k in c.keywords)) for n in ast.walk(a))
        assert sum(isinstance(n, ast.Name) and n.id == 'lies' and isinstance(n.ctx, ast.Load) for n in ast.walk(f)) == allowed > 0, f.name


# science, in small

def company(features, x, u, window=3):
    near = np.zeros((len(features),)*2)
    for d in range(1, window+1): same = u[d:] == u[:-d]; np.add.at(near, (x[:-d][same], x[d:][same]), 1)
    have = features.any(1); centred = np.where(have[:, None], features-features[have].mean(0), 0); mean = (near+near.T) @ centred
    return -(centred*mean).sum(1)/np.maximum(np.linalg.norm(centred, axis=1)*np.linalg.norm(mean, axis=1), 1e-9)


def auc(score, lies):
    below = score[lies][:, None] > score[~lies]
    return below.mean()


def hue_features(folder, items):
    out = np.zeros((len(items), 20))
    for row, name in zip(out, items['item']):
        if not (path := folder/'images_small'/f'{name}.jpg').exists(): continue
        hsv = np.asarray(Image.open(path).convert('HSV')).reshape(-1, 3); gray = np.asarray(Image.open(path).convert('L'), float)
        edge = np.histogram(np.hypot(*np.gradient(gray)), 8, (0, 128))[0]; hue = np.histogram(hsv[hsv[:, 1] > 60, 0], 12, (0, 256))[0]
        row[:] = np.r_[np.sqrt(hue/(hue.sum()+1)), .5*np.sqrt(edge/edge.sum())]
    return out


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_lies_can_be_found_and_order_matters(tmp_path, seed):
    from sklearn.feature_extraction.text import TfidfVectorizer
    folder = make_shop(tmp_path/'shop', seed=seed, n_users=1200, n_items=360)
    items, truth, (x, u) = tables(folder)[1], load_truth(folder).items, numbers(folder)
    often = np.bincount(x, minlength=len(items)) >= 10
    text = TfidfVectorizer(max_df=.1).fit_transform((items['title']+' '+items['description']).to_list()).toarray()
    for features, lies, gone in ((text, 'text_lies', 'noise_text'), (hue_features(folder, items), 'image_lies', 'no_image')):
        keep = often & ~truth[gone].to_numpy()
        assert auc(company(features, x, u)[keep], truth[lies].to_numpy()[keep]) > .88
    perfect = np.eye(12)[truth['text_theme'].to_numpy()]
    assert auc(company(perfect, x, u)[often], truth['text_lies'].to_numpy()[often]) > .98
    last = np.flatnonzero(np.r_[u[1:] != u[:-1], True]); train = np.ones(len(x), bool); train[last] = train[last-1] = False
    def hit(xs):
        follow, step, us = np.zeros((len(items),)*2), u[train][1:] == u[train][:-1], np.bincount(xs, minlength=len(items))
        np.add.at(follow, (xs[:-1][step], xs[1:][step]), 1); score = follow[x[last-1]]+1e-4*us
        return (score > score[np.arange(len(last)), x[last]][:, None]).sum(1) < 10, np.tile(us, (len(last), 1))
    knn, popular = hit(x[train]); popular = (popular > popular[np.arange(len(last)), x[last]][:, None]).sum(1) < 10
    shuffled = hit(x[train][np.lexsort((np.random.default_rng(seed).random(train.sum()), u[train]))])[0]
    assert knn.mean() > 1.8*popular.mean() and popular.mean() < .15 and shuffled.mean() < .9*knn.mean()


# sizes and extremes

def test_default_is_fast(tmp_path):
    began = time.process_time(); make_shop(tmp_path/'shop'); assert time.process_time()-began < 5


def test_large(tmp_path):
    began = time.process_time(); folder = make_shop(tmp_path/'shop', n_items=100_000, n_users=20_000, pictures=False)
    assert time.process_time()-began < 20 and pl.read_parquet(folder/'items.parquet')['item'].n_unique() == 100_000


@pytest.mark.parametrize('change', [
    dict(n_users=1), dict(n_items=50, n_themes=16), dict(n_themes=2), dict(accidental=1.), dict(accidental=0), dict(stay=1.), dict(stay=0.),
    dict(follow=1.), dict(loyal=1.), dict(same_day=1.), dict(same_day=0.), dict(zipf=0.), dict(zipf=3.),
    dict(lying_text=1., lying_image=0, no_image=0, noise_text=0),
    dict(lying_text=0, lying_image=1., no_image=0, noise_text=0), dict(lying_text=0, lying_image=0, no_image=1., noise_text=0),
    dict(lying_text=0, lying_image=0, no_image=0, noise_text=1.), dict(lying_text=0, lying_image=0, no_image=0, noise_text=0),
    dict(seed=2**63-1)], ids=str)
def test_extremes(tmp_path, change):
    folder = make_shop(tmp_path/'shop', **SMALL | change)
    events, items = tables(folder)
    assert events.group_by('user').len()['len'].min() >= 5 and not events.select('user', 'item').is_duplicated().any()
    assert (items['title'].str.len_chars() > 5).all() and (items['description'].str.len_chars() > 5).all()
    assert isinstance(load_truth(folder), Truth)


@pytest.mark.parametrize('n', [1, 2, 1000, 36**3])
def test_ids_are_distinct(n): assert len(set(random_ids('B', n, 0))) == n


# errors

@pytest.mark.parametrize('name', [f.name for f in fields(ShopConfig)])
@pytest.mark.parametrize('value', [-1, float('nan'), float('inf'), 'many', None, 10**30, [1]], ids=str)
def test_bad_values_name_the_field(name, value):
    with pytest.raises(ImecdError, match=f'ShopConfig, {name}: .* give '): ShopConfig(**{name: value})


@pytest.mark.parametrize('change', [
    dict(n_users=True), dict(n_items=2.5), dict(pictures=1), dict(lying_text=True),
    dict(n_themes=17), dict(n_items=49), dict(n_items=1_000_001)], ids=str)
def test_near_misses(change):
    with pytest.raises(ImecdError, match=next(iter(change))): ShopConfig(**change)


def test_faults_must_fit():
    with pytest.raises(ImecdError, match='lower one'): ShopConfig(lying_text=.9)


def test_unknown_field_names_the_close_one(tmp_path):
    with pytest.raises(ImecdError, match="'lying_text'"): make_shop(tmp_path/'shop', lying_texts=.3)
    assert not list(tmp_path.iterdir())


def test_full_folder_is_refused(small):
    before = content(small)
    with pytest.raises(ImecdError, match='not empty'): make_shop(small)
    assert content(small) == before


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def cut(*a): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'save_pictures', cut)
    with pytest.raises(KeyboardInterrupt): make_shop(tmp_path/'shop', **SMALL)
    assert not list(tmp_path.iterdir())


def test_load_truth_says_what_is_wrong(small, tmp_path):
    with pytest.raises(ImecdError, match='only folders written by make_shop'): load_truth(tmp_path)
    folder = tmp_path/'shop'; shutil.copytree(small, folder)
    truth = pl.read_parquet(folder/'truth.parquet'); truth.reverse().write_parquet(folder/'truth.parquet')
    with pytest.raises(ImecdError, match='row by row'): load_truth(folder)
    truth.drop('item').write_parquet(folder/'truth.parquet')
    with pytest.raises(ImecdError, match='row by row'): load_truth(folder)
    (folder/'truth.parquet').write_bytes(b'PAR1 cut off')
    with pytest.raises(ImecdError, match='make the shop again'): load_truth(folder)


# pictures of the chapter

def test_plots_take_an_axis(small, tmp_path):
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    axes = plt.subplots(1, 2)[1]; truth = load_truth(small)
    assert plot_shop(small, axes[0]) is axes[0] and plot_needs(truth, truth.events['user'][0], axes[1]) is axes[1]
    bare = make_shop(tmp_path/'bare', pictures=False, n_users=1, n_items=50, n_themes=2)
    assert plot_shop(bare).get_title('left'); plt.close('all')
    with pytest.raises(ImecdError, match='not in this shop'): plot_needs(truth, 'x'*1000)
