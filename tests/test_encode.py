"Trained encoders, really run on tiny random weights; the cache under kills; the choice of sources."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

os.environ['HF_HUB_OFFLINE'] = '1'
from imecd.content import item_text, light_text  # noqa: E402
from imecd.core import ImecdError, digest, rng  # noqa: E402
from imecd.encode import (cached, encode_folder, encode_images, encode_text, feature_cache, find_model, load_features, load_shards,  # noqa: E402
                          quietly, save_shard)
from imecd.features import join_features, save_features  # noqa: E402

DATA = Path(os.environ.get('IMECD_DATA', 'data'))
WORDS = 'red blue lamp oak table guitar steel string toy car'.split()


def tokeniser():
    "Ten words."
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab = {w: k for k, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', *WORDS])}
    t = Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]',
                                   eos_token='[SEP]', bos_token='[CLS]', model_max_length=16)


def make_models(folder):
    "A CLIP, a SigLIP, a BERT and a sentence-transformers model of random weights."
    import transformers as tr
    from sentence_transformers import SentenceTransformer
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    words = dict(vocab_size=14, max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0, **size)
    picture = dict(image_size=32, patch_size=8, **size)
    torch.manual_seed(0)
    tr.CLIPModel(tr.CLIPConfig(text_config=words, vision_config=picture, projection_dim=8)).save_pretrained(folder/'clip')
    tr.SiglipModel(tr.SiglipConfig(text_config=words, vision_config=picture)).save_pretrained(folder/'siglip')
    pil = lambda name: getattr(tr, f'{name}ImageProcessorPil', None) or getattr(tr, f'{name}ImageProcessor')
    pil('CLIP')(size={'shortest_edge': 32}, crop_size={'height': 32, 'width': 32}).save_pretrained(folder/'clip')
    pil('Siglip')(size={'height': 32, 'width': 32}).save_pretrained(folder/'siglip')
    tr.BertModel(tr.BertConfig(vocab_size=14, max_position_embeddings=32, **size)).save_pretrained(folder/'bert')
    for name in ('clip', 'siglip', 'bert'): tokeniser().save_pretrained(folder/name)
    SentenceTransformer(str(folder/'bert'), device='cpu').save(str(folder/'sentences'))
    return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    with quietly(): return make_models(tmp_path_factory.mktemp('models'))


@pytest.fixture
def pictures(tmp_path):
    "Eleven pictures, one of them broken, one twice."
    (tmp_path/'images').mkdir()
    for k in range(9): Image.fromarray(rng(0, k).integers(256, size=(30+k, 50, 3), dtype=np.uint8)).save(tmp_path/'images'/f'{k}.png')
    (tmp_path/'images'/'9.png').write_bytes(b'404')
    (tmp_path/'images'/'10.png').write_bytes((tmp_path/'images'/'3.png').read_bytes())
    return [tmp_path/'images'/f'{k}.png' for k in range(11)]


TEXTS = ['red lamp', 'oak table', '', 'steel string guitar', 'Red LAMP', 'toy car '*30, 'unheard of']


@pytest.mark.parametrize('name, width', [('clip', 8), ('siglip', 16), ('bert', 16), ('sentences', 16)])
def test_text(models, tmp_path, name, width):
    s = encode_text(TEXTS, str(models/name), cache=tmp_path, batch=2, device='cpu', fields=['title'])
    assert s.values.shape == (7, width) and s.present.tolist() == [True, True, False, True, True, True, True]
    assert np.allclose(np.linalg.norm(s.values[s.present], axis=1), 1, atol=1e-5)
    assert np.allclose(s.values[0], s.values[4], atol=1e-5) and np.abs(s.values[0] - s.values[1]).max() > 1e-3
    assert s.about['encoder'] == name and len(s.about['revision']) == 64 and s.about['fields'] == ['title']
    one = encode_text(TEXTS, str(models/name), cache=tmp_path/'other', batch=7, device='cpu')
    assert np.allclose(one.values, s.values, atol=1e-5)
    f = join_features([str(k) for k in range(7)], text=s)
    assert f.manifest['text']['missing'] == 1 and str(models) not in str(f.manifest)


def test_sentence_vectors_are_those_of_the_library(models, tmp_path):
    from sentence_transformers import SentenceTransformer
    with quietly(): model = SentenceTransformer(str(models/'sentences'), device='cpu')
    want = model.encode(TEXTS[:2], normalize_embeddings=True, show_progress_bar=False)
    assert np.allclose(encode_text(TEXTS[:2], str(models/'sentences'), cache=tmp_path, device='cpu').values, want, atol=1e-5)


@pytest.mark.parametrize('name, width', [('clip', 8), ('siglip', 16)])
def test_images(models, pictures, tmp_path, name, width):
    s = encode_images([None, *pictures], str(models/name), cache=tmp_path, batch=4, device='cpu')
    assert s.values.shape == (12, width) and s.present.tolist() == [False] + [True]*9 + [False, True]
    assert s.about['problems'] == {'images/9.png': 'not a jpg, png, webp, gif or bmp picture'} and np.array_equal(s.values[11], s.values[4])
    again = encode_images([None, *pictures], str(models/name), cache=tmp_path, batch=4, device='cpu')
    assert np.array_equal(again.values, s.values) and again.about == s.about


def test_clip_pictures_are_those_of_the_library(models, pictures, tmp_path):
    import transformers as tr
    with quietly():
        model = tr.CLIPModel.from_pretrained(models/'clip').eval()
        prepare = tr.AutoImageProcessor.from_pretrained(models/'clip', **({'backend': 'pil'} if int(tr.__version__[0]) >= 5 else {'use_fast': False}))
        with torch.inference_mode():
            want = model.get_image_features(**prepare(images=[Image.open(p) for p in pictures[:3]], return_tensors='pt'))
    want = getattr(want, 'pooler_output', want).numpy()
    want = want/np.linalg.norm(want, axis=1, keepdims=True)
    assert np.allclose(encode_images(pictures[:3], str(models/'clip'), cache=tmp_path, device='cpu').values, want, atol=1e-5)


def test_weights_are_loaded_only_if_needed(models, pictures, tmp_path, monkeypatch):
    first = encode_images(pictures, str(models/'clip'), cache=tmp_path, device='cpu')
    monkeypatch.setattr('imecd.encode.tower', lambda *a: pytest.fail('loaded'))
    assert np.array_equal(encode_images(pictures, str(models/'clip'), cache=tmp_path, device='cpu').values, first.values)
    with pytest.raises(pytest.fail.Exception): encode_images(pictures, str(models/'siglip'), cache=tmp_path, device='cpu')


def test_all_broken_or_none(models, pictures, tmp_path):
    s = encode_images([pictures[9]], str(models/'clip'), cache=tmp_path, device='cpu')
    assert not s.present.any() and len(s.about['problems']) == 1
    assert encode_images([None, None], str(models/'clip'), cache=tmp_path).values.shape == (2, 1)
    assert encode_text(['', ''], str(models/'clip'), cache=tmp_path).values.shape == (2, 1)


def test_models_that_cannot_be_had(models, tmp_path):
    for name in ('nobody/nothing', 'not a name!', str(tmp_path/'absent'), ''):
        with pytest.raises(ImecdError, match='neither a folder nor to be had|holds no model') as e: encode_text(['x'], name, cache=tmp_path)
        assert len(str(e.value)) < 300
    (tmp_path/'empty').mkdir()
    with pytest.raises(ImecdError, match='holds no model'): find_model(str(tmp_path/'empty'))
    (tmp_path/'empty'/'config.json').write_text('{}')
    with pytest.raises(ImecdError, match='lacks safetensors'): find_model(str(tmp_path/'empty'))
    with pytest.raises(ImecdError, match='no image tower'): encode_images([tmp_path/'a.png'], str(models/'bert'), cache=tmp_path)
    (tmp_path/'odd').mkdir()
    (tmp_path/'odd'/'config.json').write_text('{"model_type": "no such", "vision_config": {}}')
    save_shard(tmp_path/'odd', ['00'], np.ones((1, 2), np.float32))
    with pytest.raises(ImecdError, match='cannot be loaded'): encode_text(['x'], str(tmp_path/'odd'), cache=tmp_path)


def test_pickled_weights_are_refused(models, tmp_path):
    import shutil
    shutil.copytree(models/'clip', tmp_path/'m'); (tmp_path/'m'/'model.safetensors').unlink()
    torch.save({}, tmp_path/'m'/'pytorch_model.bin')
    with pytest.raises(ImecdError, match='pickles are not loaded'): encode_text(['x'], str(tmp_path/'m'), cache=tmp_path)
    (tmp_path/'m'/'sub').mkdir(); shutil.copy(models/'clip'/'model.safetensors', tmp_path/'m'/'sub')
    with pytest.raises(ImecdError, match='pickles are not loaded'): encode_text(['x'], str(tmp_path/'m'), cache=tmp_path)


def test_other_weights_are_another_revision(models, tmp_path):
    import shutil
    shutil.copytree(models/'bert', tmp_path/'m'); before = find_model(str(tmp_path/'m'))[1]
    assert before == find_model(str(models/'bert'))[1]
    data = bytearray((tmp_path/'m'/'model.safetensors').read_bytes()); data[-1] ^= 1
    (tmp_path/'m'/'model.safetensors').write_bytes(data)
    assert find_model(str(tmp_path/'m'))[1] != before


def test_cache_place(monkeypatch, tmp_path):
    monkeypatch.setenv('IMECD_CACHE', str(tmp_path/'a')); assert feature_cache() == tmp_path/'a'
    assert feature_cache(tmp_path/'b') == tmp_path/'b'
    monkeypatch.delenv('IMECD_CACHE'); monkeypatch.setenv('HOME', str(tmp_path)); assert feature_cache() == tmp_path/'.cache'/'imecd'


@pytest.mark.parametrize('after', [0, 1, 3, 9])
def test_an_encoder_that_dies_loses_one_chunk_at_most(tmp_path, after):
    keys, calls = [digest(str(k % 90)) for k in range(100)], []
    def encode(rows, limit):
        if len(calls) == limit: raise RuntimeError('out of memory')
        calls.append(rows)
        return np.array([[k % 90, 1] for k in rows], np.float32)
    with pytest.raises(RuntimeError) if after < 9 else __import__('contextlib').nullcontext(): cached(keys, lambda r: encode(r, after), tmp_path/'c', chunk=10)
    assert len(load_shards(tmp_path/'c')) == 10*after
    calls.clear()
    x = cached(keys, lambda r: encode(r, 99), tmp_path/'c', chunk=10)
    assert sum(map(len, calls)) == 90 - 10*after and x[:, 0].tolist() == [k % 90 for k in range(100)]


CHILD = '''
import sys, time, numpy as np
from imecd.core import digest
from imecd.encode import cached
def encode(rows): time.sleep(.03); return np.array([[r, 1] for r in rows], np.float32)
print('ready', flush=True)
cached([digest(str(k)) for k in range(2000)], encode, sys.argv[1], chunk=10)
'''


def test_sigkill_in_the_middle(tmp_path):
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path/'c')], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b'ready\n'
    while len(list(tmp_path.glob('c/*.safetensors'))) < 12: time.sleep(.005)
    child.send_signal(signal.SIGKILL); child.wait(); child.stdout.close()
    kept = load_shards(tmp_path/'c')
    assert 120 <= len(kept) < 2000 and len(kept) % 10 == 0
    calls = []
    x = cached([digest(str(k)) for k in range(2000)], lambda rows: calls.append(rows) or np.array([[r, 1] for r in rows], np.float32), tmp_path/'c')
    assert sum(map(len, calls)) == 2000 - len(kept) and x[:, 0].tolist() == list(range(2000))


def test_broken_shards_are_made_again(tmp_path):
    keys, calls = [digest(str(k)) for k in range(50)], []
    encode = lambda rows: calls.append(rows) or np.array([[r] for r in rows], np.float32)
    first = cached(keys, encode, tmp_path, chunk=10)
    shards = sorted(tmp_path.iterdir())
    shards[0].write_bytes(b''); shards[1].write_bytes(shards[1].read_bytes()[:-4]); shards[2].write_bytes(b'{"not": "safe"}')
    calls.clear()
    assert np.array_equal(cached(keys, encode, tmp_path, chunk=10), first) and sum(map(len, calls)) == 30
    assert len(load_shards(tmp_path)) == 50


def shop(folder, pictures=True):
    "Six items, some without words, some without pictures."
    (folder/'images').mkdir(parents=True)
    pl.DataFrame({'item': list('abcdef'), 'title': ['red lamp', 'red oak table', '', None, 'blue lamp', 'oak table'], 'description': ['red']*2 + [None]*4}).write_parquet(folder/'items.parquet')
    if pictures:
        for k, i in enumerate('abcd'): Image.fromarray(rng(0, i).integers(256, size=(40, 40+k, 3), dtype=np.uint8)).save(folder/'images'/f'{i}.png')
        (folder/'images'/'e.jpg').write_bytes(b'broken')
    return folder


def test_auto_takes_the_first_that_is_there(tmp_path):
    d = shop(tmp_path/'d')
    f = load_features(d)
    assert f.manifest['text']['encoder'] == 'light-text' and f.manifest['image']['encoder'] == 'light-image'
    assert f.present[1:].tolist() == [[True, True], [True, True], [False, True], [False, True], [True, False], [True, False]]
    assert list(f.manifest['image']['problems']) == ['images/e.jpg'] and f.manifest['text']['fields'] == ['title', 'description']
    np.save(d/'text_codes.npy', np.arange(24).reshape(6, 4) % 5)
    np.save(d/'image_codes.npy', np.arange(24).reshape(6, 4) % 7)
    f = load_features(d)
    assert [f.manifest[m]['encoder'] for m in ('text', 'image')] == ['codes', 'codes']
    np.save(d/'text_features.npy', np.ones((6, 3), np.float16)); np.save(d/'image_features.npy', np.ones((6, 2)))
    f = load_features(d)
    assert (f.text.shape, f.image.shape) == ((7, 3), (7, 2))
    f = load_features(d, text='light', image='codes')
    assert [f.manifest[m]['encoder'] for m in ('text', 'image')] == ['light-text', 'codes']
    f = load_features(d, text='none', image='none')
    assert f.text is None and f.image is None and not f.present.any()
    np.save(d/'text_features.npy', np.ones((5, 3)))
    with pytest.raises(ImecdError, match='text_features.npy has 5 rows, items.parquet has 6'): load_features(d)


def test_nothing_there(tmp_path):
    d = shop(tmp_path/'d', pictures=False)
    assert load_features(d).image is None
    for how, said in (('light', 'no pictures'), ('npy', 'is not there'), ('codes', 'is not there'), ('a/b', 'no pictures')):
        with pytest.raises(ImecdError, match=said): load_features(d, image=how, cache=tmp_path)
    pl.DataFrame({'item': ['a', 'b']}).write_parquet(d/'items.parquet')
    assert load_features(d).text is None
    with pytest.raises(ImecdError, match='no words'): load_features(d, text='light')


def test_models_through_load_features_leave_the_folder_alone(models, tmp_path):
    d = shop(tmp_path/'d')
    for p in (d, d/'images'): p.chmod(0o555)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (d, *d.rglob('*'))}
    f = load_features(d, text=str(models/'sentences'), image=str(models/'siglip'), cache=tmp_path/'cache', device='cpu')
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (d, *d.rglob('*'))} == before
    assert f.text.shape == (7, 16) and f.image.shape == (7, 16) and f.manifest['image']['missing'] == 2
    for p in (d, d/'images'): p.chmod(0o755)


def test_encode_folder(models, tmp_path, capsys):
    d = shop(tmp_path/'d')
    f = encode_folder(d, tmp_path/'out', text=str(models/'clip'), image=str(models/'clip'), device='cpu', cache=tmp_path/'cache', progress=False)
    g = load_features(d, text=str(tmp_path/'out'), image=str(tmp_path/'out'))
    assert g.hash == f.hash and g.manifest['image']['problems'] == f.manifest['image']['problems'] and capsys.readouterr().out == ''
    encode_folder(d, progress=False)
    assert load_features(d).manifest['text']['encoder'] == 'light-text' and (d/'features.json').exists()
    encode_folder(d, text='none', progress=False)
    assert not (d/'text_features.npy').exists() and load_features(d).image is not None
    save_features(f, tmp_path/'more')
    np.save(d/'text_features.npy', np.ones((6, 3)))
    with pytest.raises(ImecdError, match='would be overwritten'): encode_folder(d, progress=False)


def test_light_text_equals_its_parts(tmp_path):
    from imecd.content import load_items
    d = shop(tmp_path/'d', pictures=False)
    assert np.array_equal(load_features(d).text[1:], light_text(item_text(load_items(d))).values)


@pytest.mark.real
@pytest.mark.parametrize('name, text, image', [('amazon14_toys', 384, None), ('amazon18_instruments', 256, 256), ('amazon18_games', 256, None),
                                               ('amazon18_office', 384, None), ('ml1m', 384, 1280), ('movielens_small', 384, 1280)])
def test_real_folders(name, text, image):
    if not (DATA/name).exists(): pytest.skip(f'$IMECD_DATA/{name} is not here')
    f = load_features(DATA/name)
    assert (f.text.shape[1], None if f.image is None else f.image.shape[1]) == (text, image)
    assert f.present[1:, 0].all() and f.present[1:, 1].all() == (image is not None) and not f.present[0].any()
