"From a folder to a trained model: names, settings, features that are there, a model stored and made again."
import copy

import numpy as np
import polars as pl
import pytest
import torch

from imecd.core import ImecdError
from imecd.fitting import configure_preset, cut_streams, feature_space, fit_preset, history_figures, item_titles, load_split, restore, room_figures, split_settings, stored, stream_features
from imecd.metrics import evaluate
from imecd.model import PRESETS, ModelConfig
from imecd.train import TrainConfig

TINY = {'dim': 16, 'heads': 2, 'inner': 32, 'layers': 1, 'codes': 8, 'train.targets': 256, 'train.warmup': 1, 'train.epochs': 2, 'train.lr': 3e-3}


@pytest.fixture(scope='module')
def data(shop): return load_split(shop, 'leave_one_out', 20)


@pytest.fixture(scope='module')
def fitted(shop, data): return fit_preset('imecd', shop, data, TINY)


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_has_its_configuration(name):
    c, t = configure_preset(name, {}, 20, 7); assert c == ModelConfig(**{**PRESETS[name], 'length': 20, 'seed': 7}) and t == TrainConfig(seed=7)


def test_what_is_set_wins_over_preset_and_seed():
    c, t = configure_preset('wo_msvq', {'vq': 'shared', 'seed': 2, 'length': 30, 'train.seed': 3, 'train': {'epochs': 4}}, seed=9); assert (c.vq, c.seed, c.length, t.seed, t.epochs) == ('shared', 2, 30, 3, 4)
    assert configure_preset('imecd', {'length': 30}, 10)[0].length == 10 and configure_preset('imecd', {})[0].length == ModelConfig().length


def test_settings_are_not_changed():
    given = {'codes': 3, 'train.epochs': 2, 'train': {'lr': .1}}; kept = copy.deepcopy(given); assert split_settings(given) == ({'codes': 3}, {'epochs': 2, 'lr': .1}) and given == kept


@pytest.mark.parametrize('name, settings, words', [('imced', {}, "did you mean 'imecd'"), ('q', {}, 'there are imecd'), ('imecd', {'code': 1}, "did you mean 'codes'"), ('imecd', {'train.patiense': 1}, "did you mean 'patience'"),
                                                   ('imecd', {'train': 3}, 'name the field too'), ('imecd', {'train.lr': 'fast'}, 'must be float'), ('imecd', {'train.lr': -1.}, 'above 0'), ('imecd', {'steps': 0}, 'at least 1')])
def test_what_cannot_be_meant_is_named(name, settings, words):
    with pytest.raises(ImecdError, match=words): configure_preset(name, settings)


def test_only_default_streams_are_cut(shop):
    found = stream_features(shop, 'id+text+image'); assert found.image is None
    c, notes = cut_streams(ModelConfig(), False, found); assert c.streams == 'id+text' and notes == ['the data set offers no image; trained with streams=id+text']
    assert cut_streams(ModelConfig(), True, found) == (ModelConfig(), []) and cut_streams(ModelConfig(streams='id+text'), False, found)[1] == []
    assert cut_streams(ModelConfig(), False, stream_features(shop, 'id'))[1] == ['the data set offers no text and image; trained with streams=id']


def test_features_that_nobody_reads_are_not_computed(shop): assert stream_features(shop, 'id').text is None and stream_features(shop, 'id+image').text is None


def test_stored_features(shop, tmp_path):
    with pytest.raises(ImecdError, match='neither text_features.npy nor image_features.npy'): stored(tmp_path, ['text', 'image'])
    (tmp_path/'image_features.npy').touch(); assert stored(tmp_path, ['text', 'image']) == ['image'] and stored(tmp_path, []) == []


def test_without_any_text_there_is_no_space(shop, tmp_path):
    for name in ('interactions', 'items'):
        t = pl.read_parquet(shop/f'{name}.parquet'); t.select('item').write_parquet(tmp_path/'items.parquet') if name == 'items' else t.write_parquet(tmp_path/'interactions.parquet')
    assert feature_space(tmp_path)[0] is None; data = load_split(tmp_path, 'leave_one_out', 20); f = fit_preset('imecd', tmp_path, data, TINY | {'train.epochs': 1})
    assert f.model.config.streams == 'id' and f.notes and item_titles(data) == ['', *data.split.data.items['item']]


def test_one_seed_one_model(shop, data, fitted):
    torch.manual_seed(5); again = fit_preset('imecd', shop, data, TINY); other = fit_preset('imecd', shop, data, TINY | {'train.seed': 1})
    assert all(torch.equal(x, again.model.tensors()[n]) for n, x in fitted.model.tensors().items()) and not torch.equal(fitted.model.table.ids, other.model.table.ids)


def test_a_stored_model_answers_as_before(data, fitted):
    m = restore(vars(fitted.model.config), data, {n: x.clone() for n, x in fitted.model.tensors().items()}, fitted.features, fitted.features.hash); assert not m.training
    a, b = (evaluate(x, data, data.cases('test')) for x in (fitted.model, m)); assert torch.equal(a.rank, b.rank) and torch.equal(a.top, b.top)
    with pytest.raises(ImecdError, match='not those of the training'): restore(vars(fitted.model.config), data, fitted.model.tensors(), fitted.features, 'f'*64)


def test_titles_that_are_missing_are_ids(data):
    items = data.split.data.items; gaps = items.with_columns(pl.when(pl.int_range(len(items)) == 2).then(None).otherwise(pl.col('title')).alias('title'))
    found = item_titles(type(data)(data.split._replace(data=data.split.data._replace(items=gaps)), data.length, data.events, data.offsets, data.windows))
    assert found[0] == '' and found[3] == items['item'][2] and found[1] == items['title'][0]


def test_figures_are_those_that_the_model_has(shop, data, fitted):
    import matplotlib.pyplot as plt
    names = item_titles(data); lies = np.zeros((data.n_items, 2), bool); lies[::4] = True
    assert set(room_figures(fitted.model, data, names)) == {'gates', 'codes', 'path'} and set(room_figures(fitted.model, data, names, lies)) == {'gates', 'lies', 'codes', 'path'}
    assert set(history_figures(fitted.history, fitted.train, 8)) == {'history', 'loss', 'trust', 'perplexity'}; plt.close('all')
    plain = fit_preset('sasrec', shop, data, TINY | {'train.epochs': 1}); assert room_figures(plain.model, data, names, lies) == {} and set(history_figures(plain.history, plain.train, 8)) == {'history', 'loss'}; plt.close('all')
    early = fit_preset('imecd', shop, data, TINY | {'train.epochs': 1}); assert set(room_figures(early.model, data, names)) == {'gates'}; plt.close('all')
