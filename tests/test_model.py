"The model: what is refused, what works however small, one score for training and ranking, nothing leaks, everything learns."
import copy
from dataclasses import asdict, replace
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from imecd.batch import Batch, sequence_data
from imecd.core import MODALITIES, PAD, STREAMS, ImecdError, configure
from imecd.diffusion import contrastive_loss
from imecd.features import Features
from imecd.histories import Interactions, Split, leave_one_out
from imecd.metrics import evaluate
from imecd.model import CHOICES, IMECD, LEAST, PRESETS, ModelConfig, Query
from imecd.rooms import plot_rooms, room_table
from imecd.ranking import best, ranks
from imecd.towers import any_tied, feature_table, mean_so_far, seen_items, unit

N = 30
SMALL = dict(dim=8, experts=3, layers=1, heads=2, inner=16, length=10, codes=4, commitment=.25, steps=6)
REST = dict(dropout=0., feature_dropout=0., denoiser_dropout=0., id_dropout=0.)  # training computes what ranking computes
FEW = settings(deadline=None, max_examples=10)
presets = pytest.mark.parametrize('name', PRESETS)


def config(**kw): return configure(ModelConfig, SMALL | kw)


def features(n=N, missing=(3, 7, 8), modalities=MODALITIES, seed=0):
    "Random features; the items `missing` have no picture, item 5 no text."
    g = np.random.default_rng(seed); present = np.zeros((n+1, 2), bool); tables = dict.fromkeys(MODALITIES)
    for m, name in enumerate(MODALITIES):
        if name not in modalities: continue
        present[1:, m] = True; present[[i for i in (missing if name == 'image' else (5,)) if i <= n], m] = False
        tables[name] = (g.standard_normal((n+1, 7-m))*present[:, [m]]).astype(np.float32)
    return Features(**tables, present=present, manifest={})


@pytest.fixture(scope='module')
def data():
    "Random histories of 3 to 25 events."
    g = np.random.default_rng(0); lengths = g.integers(3, 26, 260)
    return sequence_data(leave_one_out(Interactions(np.array([f'u{i:04}' for i in range(260)], object), pl.DataFrame({'item': [f'i{k}' for k in range(N)]}),
                                                    g.integers(1, N+1, lengths.sum()).astype(np.int32), np.r_[0, np.cumsum(lengths)].astype(np.int64), None, None)), 10)


def stir(model, seed=0, size=.2):
    "Move every parameter away from where it starts, where much is zero, and place the codes on random states."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.add_(size*torch.randn(p.shape, generator=g))
        model.table.ids[PAD] = 0
    if model.reader.vq is not None: model.reader.vq.initialise(torch.randn(model.reader.vq.streams, 50, model.config.dim, generator=g))
    return model.eval()


def model_of(c, counts=None, n=N, stirred=True, x=None):
    with torch.random.fork_rng(): torch.manual_seed(0); m = IMECD(c, n, features(n) if x is None else x, counts)
    return stir(m) if stirred else m.eval()


def rows(histories, targets=None, users=None):
    "Packed histories; `targets` ask after every position, else nothing is asked."
    offsets = torch.tensor([0, *(len(h) for h in histories)]).cumsum(0); items = torch.tensor([i for h in histories for i in h])
    return Batch(torch.arange(len(histories)) if users is None else torch.as_tensor(users), items, torch.full_like(items, PAD) if targets is None else torch.tensor([i for t in targets for i in t]),
                 torch.cat([torch.arange(len(h)) for h in histories]), offsets)


def asked(histories): return rows([h[:-1] for h in histories], [h[1:] for h in histories])


WALKS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 7, 10, 11, 2], [12, 12, 1, 3, 5]]


# what is refused

@pytest.mark.parametrize('name', CHOICES)
def test_a_choice_that_does_not_exist_names_those_that_do(name):
    with pytest.raises(ImecdError) as e: ModelConfig(**{name: 'nonsense'})
    assert name in str(e.value) and all(str(x) in str(e.value) for x in CHOICES[name])


@pytest.mark.parametrize('name', LEAST)
def test_a_number_that_is_too_small_names_the_least(name):
    with pytest.raises(ImecdError, match=f'{name}={LEAST[name]-1}: must be at least {LEAST[name]}'): ModelConfig(**{name: LEAST[name]-1})


@pytest.mark.parametrize('value', [-.01, 1.01, float('nan')])
@pytest.mark.parametrize('name', ['feature_dropout', 'dropout', 'denoiser_dropout', 'pure', 'drop', 'id_dropout', 'guidance'])
def test_a_share_lies_between_0_and_1(name, value):
    with pytest.raises(ImecdError, match='between 0 and 1'): ModelConfig(**{name: value})


IMPOSSIBLE = [
    (dict(streams='text+id'), 'in this order'), (dict(streams='id+sound'), 'id, text, image'), (dict(streams=''), 'join some of'), (dict(streams='id+id'), 'join some of'),
    (dict(dim=10, heads=4), 'make dim a multiple of heads'), (dict(experts=2, top_k=3), 'at most as many experts as there are'), (dict(noisy=True, top_k=0), 'set top_k or leave noisy off'),
    (dict(steps=4, sample_steps=5), 'at most as many steps as there are'), (dict(head='direct', scale=1.), "use head='diffusion'"), (dict(head='direct', samples=2), "use head='diffusion'"),
    (dict(head='diffusion', w_generated=0., w_mse=0.), 'set one'), (dict(revive=0), 'revive=0: must be at least 1'), (dict(commitment=-.1), 'at least 0'), (dict(w_mse=-1.), 'w_mse=-1.0: must be'),
    (dict(w_generated=float('nan')), 'finite'), (dict(scale=-3.), 'at least 0'), (dict(decay=1.), 'between 0 and 1, without'), (dict(gate='uniform', top_k=2), 'nobody chooses'), (dict(gate='none', top_k=1), 'leave top_k at 0'),
    (dict(learn='gradient'), 'set commitment'), (dict(scale=1., drop=0.), 'set drop to'), (dict(temperature=0.), 'must be at least .01'),
    (dict(temperature=float('nan')), 'must be at least .01'), (dict(temperature=.009), 'must be at least .01'), (dict(contrast_temperature=-1.), 'contrast_temperature above 0'),
    (dict(guidance=0.), 'set replace=True'), (dict(guidance=1.), 'set replace=True'), (dict(drop=1.), 'set it below 1'),
]


@pytest.mark.parametrize('changes, cure', IMPOSSIBLE, ids=[' '.join(f'{k}={v}' for k, v in c.items()) for c, _ in IMPOSSIBLE])
def test_impossible_pairs_are_refused_with_the_cure(changes, cure):
    with pytest.raises(ImecdError) as e: ModelConfig(**changes)
    assert cure in str(e.value) and 'ModelConfig' in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize('changes, cure', [(dict(schedule='linear', steps=12), 'take more steps or the cosine schedule')])
def test_what_a_room_cannot_do_is_refused_when_it_is_built(changes, cure):
    with pytest.raises(ImecdError, match=cure): model_of(config(**changes), stirred=False)


@pytest.mark.parametrize('name', [n for n, changes in PRESETS.items() if 'streams' in changes or not changes])
def test_features_that_are_not_there_are_asked_for(name):
    c = configure(ModelConfig, SMALL | PRESETS[name]); needed = [m for m in MODALITIES if m in c.streams]
    for m in needed:
        with pytest.raises(ImecdError, match=f'needs features of {m}'): model_of(c, x=features(modalities=[k for k in MODALITIES if k != m]), stirred=False)
        with pytest.raises(ImecdError, match='needs features of'), torch.random.fork_rng(): IMECD(c, N)
    if not needed: assert IMECD(c, N).n_items == N


def test_unknown_settings_name_the_closest():
    with pytest.raises(ImecdError, match="did you mean 'temperature'"): config(temprature=.1)
    with pytest.raises(ImecdError, match="did you mean 'experts'"): config(expert=2)
    with pytest.raises(ImecdError, match='must be int'): config(dim=8.)
    with pytest.raises(ImecdError, match='must be bool'): config(seen=1)


def test_a_configuration_is_frozen_and_compares_by_value():
    with pytest.raises(AttributeError): config().dim = 3
    assert config() == config() != config(seed=1) and ModelConfig(**asdict(config())) == config()


# presets

@presets
def test_presets_learn_and_rank(name, data):
    c = configure(ModelConfig, SMALL | PRESETS[name]); m = model_of(c, data.counts()); m.train(); batch = next(data.epoch(0, 0, 256))
    out = m.loss(batch); out.loss.backward()
    assert out.loss.isfinite() and all(x.isfinite() for x in out.parts.values())
    found = [p.grad for p in m.parameters() if p.grad is not None]
    assert found and all(g.isfinite().all() for g in found) and sum(g.abs().sum() for g in found) > 0
    answers = evaluate(m, data, data.cases('test'))
    assert ((answers.rank >= 1) & (answers.rank <= N)).all() and (answers.top != PAD).all()


def test_presets_change_what_they_must():
    "Every preset is a possible configuration, differs from `imecd`, and no two of them are the same."
    made = {name: ModelConfig(**changes) for name, changes in PRESETS.items()}
    assert PRESETS['imecd'] == {} and len(set(made.values())) == len(made)
    for name, changes in PRESETS.items(): assert all(getattr(made[name], k) == v for k, v in changes.items())
    assert {'wo_idmoe', 'self_gate', 'uniform_gate', 'shuffled_gate', 'shared_gate', 'topk_gate', 'wo_msvq', 'shared_vq', 'vq_replace', 'vq_sequence', 'wo_cdg', 'wo_contrast', 'cdm_only', 'wo_mse',
            'wo_aux', 'wo_cfg', 'id_only', 'text_only', 'image_only', 'id+text', 'id+image', 'wo_id_stream_keep_gate', 'three_streams', 'sasrec'} <= set(PRESETS)  # model.md B.8 and its baselines


@torch.no_grad()
def gates_follow(m, ids=None, swap=False):
    "How far gates move when IDs, or features, are other ones."
    before = m.table().moe.gates
    if ids is not None: m.table.ids.copy_(ids)
    for n in m.table.modalities if swap else []: f = getattr(m.table, f'features_{n}'); f.copy_(f.roll(1, 0))
    return float((m.table().moe.gates-before).abs().max())


OTHER = torch.randn(N+1, 8, generator=torch.Generator().manual_seed(9))
SAYS = {  # preset -> what its name says of (model, output of a step, configuration)
    'wo_idmoe': lambda m, o, c: (o.items.moe.trust[1:] == m.table.present[1:]).all() and all(torch.allclose(o.items.moe.content[k], F.normalize(x, dim=-1)*m.table.present[:, [k]], atol=1e-6)
                                 for k, x in enumerate(m.table.moe.project([m.table.features_text, m.table.features_image]))),
    'self_gate': lambda m, o, c: gates_follow(m, OTHER) == 0 < gates_follow(m, swap=True),
    'uniform_gate': lambda m, o, c: torch.allclose(o.items.moe.gates, torch.tensor(1/c.experts)),
    'shuffled_gate': lambda m, o, c: sorted(m.table.moe.order.tolist()) == list(range(N+1)) != m.table.moe.order.tolist(),
    'shared_gate': lambda m, o, c: m.table.moe.gates[0] is m.table.moe.gates[1],
    'id_gate': lambda m, o, c: gates_follow(m, swap=True) == 0 < gates_follow(m, OTHER),
    'id_self_gate': lambda m, o, c: gates_follow(m, swap=True) > 0 < gates_follow(m, OTHER),
    'topk_gate': lambda m, o, c: ((o.items.moe.gates > 0).sum(-1) == c.top_k).all() and 'balance' in o.parts,
    'wo_msvq': lambda m, o, c: m.reader.vq is None and o.vq is None and 'vq' not in o.parts,
    'shared_vq': lambda m, o, c: len(m.reader.vq.levels[0].codes) == 1,
    'vq_replace': lambda m, o, c: (m.reader.vq.guidance == 1).all(),
    'vq_sequence': lambda m, o, c: m.reader.pooled,
    'wo_cdg': lambda m, o, c: m.cdg is None and o.cdg is None and not {'generated', 'mse', 'contrast'} & set(o.parts),
    'wo_contrast': lambda m, o, c: 'contrast' not in o.parts and 'generated' in o.parts,
    'cdm_only': lambda m, o, c: torch.allclose(o.parts['contrast'], contrastive_loss(o.cdg.x0, o.items.vectors[o.y], o.y, c.contrast_temperature, 'generated', o.users).mean(), rtol=1e-4),
    'wo_mse': lambda m, o, c: c.w_mse == 0, 'wo_aux': lambda m, o, c: c.w_condition == 0, 'wo_cfg': lambda m, o, c: m.cdg.drop == 0, 'wo_ties': lambda m, o, c: not c.ties,
    'id_only': lambda m, o, c: o.items.moe is None and m.table.has_id and o.vq is not None and o.cdg is not None,
    'text_only': lambda m, o, c: m.table.modalities == ['text'] and not m.table.has_id, 'image_only': lambda m, o, c: m.table.modalities == ['image'] and not m.table.has_id,
    'id+text': lambda m, o, c: m.table.modalities == ['text'] and m.table.has_id, 'id+image': lambda m, o, c: m.table.modalities == ['image'] and m.table.has_id,
    'wo_id_stream_keep_gate': lambda m, o, c: not m.table.has_id and len(o.items.read) == 2 and gates_follow(m, OTHER) > 0,
    'three_streams': lambda m, o, c: len(o.items.read) == 3 and o.vq is None and o.cdg is None and (o.items.moe.trust[1:] == m.table.present[1:]).all(),
    'sasrec': lambda m, o, c: len(o.items.read) == 1 and o.items.moe is None and o.vq is None and o.cdg is None and set(o.parts) == {'condition'},
}


@presets
def test_presets_do_what_their_name_says(name):
    if name == 'imecd': return
    c = configure(ModelConfig, SMALL | REST | PRESETS[name]); m = model_of(c); batch = asked(WALKS); out = m.loss(batch)
    class Seen: items, parts, vq, cdg, y, users = out.items, out.parts, out.vq, out.cdg, batch.targets, batch.users.repeat_interleave(batch.lengths)
    assert SAYS[name](m, Seen, c)


@presets
def test_the_loss_is_the_sum_of_its_weighted_terms(name):
    "Loss terms are weighed here and nowhere else; where nothing is generated the condition answers alone, with weight 1."
    c = configure(ModelConfig, SMALL | dict(w_generated=1.3, w_condition=.7, w_mse=.2, w_contrast=.3, w_vq=.4, w_balance=.05, w_pseudo=.06) | PRESETS[name])
    m = model_of(c); weights = {k: getattr(c, f'w_{k}') for k in ('generated', 'condition', 'mse', 'contrast', 'vq', 'balance', 'pseudo')}
    for warmup in (True, False):
        out = m.loss(asked(WALKS), warmup); w = weights | ({} if out.cdg is not None else {'condition': 1.})
        assert (out.cdg is None) == (warmup or c.head == 'direct') and ('generated' in out.parts) == (out.cdg is not None)
        assert torch.allclose(out.loss, sum(w[k]*x for k, x in out.parts.items()), rtol=1e-5)


# however small

def works(m, histories=WALKS, n=N):
    "Loss, gradients and scores are finite, and the scores rank."
    m.train(); out = m.loss(asked(histories)); out.loss.backward()
    assert out.loss.isfinite() and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    for h in histories: assert m.scores([h]).shape == (1, n+1) and m.scores([h])[:, 1:].isfinite().all()
    s = m.scores(histories); r = ranks(s, torch.tensor([h[-1] for h in histories])).kept
    assert s[:, 1:].isfinite().all() and ((r >= 1) & (r <= n)).all()


TINY = {'one expert': dict(experts=1), 'one expert kept': dict(top_k=1, noisy=True), 'one code': dict(codes=1), 'one diffusion step': dict(steps=1), 'one head': dict(heads=1),
        'one code and level': dict(codes=1, levels=2), 'dots': dict(score='dot'), 'sum': dict(item='sum'), 'all at their least': {k: v for k, v in LEAST.items() if v}}


@pytest.mark.parametrize('name', TINY)
def test_everything_may_be_one(name):
    works(model_of(config(**TINY[name])), WALKS if name != 'all at their least' else [h[:3] for h in WALKS])


@pytest.mark.parametrize('histories', [[[4, 9]], [[4, 4]], [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]], [[3, 7]]*2], ids=['one item', 'twice the same', 'full length', 'nothing but missing pictures'])
def test_short_histories_and_batches_of_one(histories):
    for name in ('imecd', 'vq_sequence', 'three_streams', 'sasrec'): works(model_of(configure(ModelConfig, SMALL | PRESETS[name])), histories)


@pytest.mark.parametrize('name', ['imecd', 'id_gate', 'self_gate', 'wo_idmoe', 'topk_gate'])
def test_all_pictures_may_be_missing(name):
    c = configure(ModelConfig, SMALL | PRESETS[name]); x = features(missing=range(1, N+1)); assert not x.present[:, 1].any()
    m = model_of(c, x=x); works(m); items = m.items()
    assert (items.moe.trust[:, 1] == 0).all() and (items.moe.content[1] == 0).all() and (items.read[2, 1:] == items.read[2, 1]).all() and items.read[2, 1].norm() > .99


@pytest.mark.parametrize('streams', ['id+text', 'id+image', 'text', 'image'])
def test_a_modality_may_be_absent_altogether(streams):
    works(model_of(config(streams=streams), x=features(modalities=[m for m in MODALITIES if m in streams])))


def test_an_item_may_have_neither_text_nor_picture():
    x = features(missing=range(1, N+1)); m = model_of(config(), torch.tensor([0]+[1]*4+[0]+[1]*(N-5)), x=x)   # item 5: nothing at all, and never trained
    works(m, [[1, 2, 3], [5, 6, 7]]); assert m.items().vectors[5].norm() > .99


@pytest.mark.parametrize('name', ['imecd', 'sasrec', 'topk_gate', 'text_only'])
def test_two_items_are_a_catalogue(name):
    works(model_of(configure(ModelConfig, SMALL | PRESETS[name]), n=2), [[1, 2], [2, 2, 1], [2, 1]], n=2)


def test_a_batch_that_asks_nothing_is_refused():
    with pytest.raises(ImecdError, match='asks nothing'): model_of(config()).loss(rows(WALKS))


def test_histories_that_cannot_be_read_are_named():
    m = model_of(config())
    with pytest.raises(ImecdError, match='history 1 is empty'): m.scores([[1], []])
    for bad in (0, -1, N+1, 'i1', 1.):
        with pytest.raises(ImecdError, match=f'history 0: {bad!r} is no item'): m.scores([[1, bad]])
    for bad in ([1, 2], ['12']):
        with pytest.raises(ImecdError, match='history 0 is .*; give a list of histories'): m.scores(bad)
    with pytest.raises(ImecdError, match='no histories'): m.scores([])
    assert torch.equal(m.scores([[1, 2]]), m.scores([np.array([1, 2])]))


def test_scores_read_the_last_items():
    m = model_of(config(seen=False)); long = (torch.arange(40) % N+1).tolist()
    assert torch.equal(m.scores([long]), m.scores([long[-10:]])) and not torch.equal(m.scores([long]), m.scores([long[-9:]]))


# items

def test_every_block_holds_a_third_at_the_start():
    "Before trust exactly; with the trust that a gate starts from, ID and content hold between .25 and .45 of |z|^2 each."
    for item in ('concat', 'sum'):
        full = features(missing=()); full.present[1:] = True; full.text[5] = 1.
        m = model_of(config(gate='none', item=item), x=full, stirred=False); content = m.table().moe.content[:, 1:]; blocks = [unit(m.table.ids[1:]), *content]
        for b in blocks: assert torch.allclose(b.norm(dim=-1), torch.ones(N), atol=1e-6)
        z = m.table().vectors[1:]; assert torch.allclose(z.norm(dim=-1), torch.ones(N), atol=1e-6)
        if item == 'concat':
            for b in z.split(8, -1): assert torch.allclose(b.square().sum(-1), torch.full((N,), 1/3), atol=1e-6)
    free = model_of(config(gate='none', score='dot', dim=64), n=300, stirred=False).table().vectors[1:]  # under `dot` IDs have the length that they learn
    assert [float(b.detach().square().sum(-1).mean()) for b in free.split(64, -1)] == pytest.approx([1, 1, 1], abs=.05)
    for name, changes in PRESETS.items():
        c = configure(ModelConfig, SMALL | changes); n = len(c.streams.split('+'))
        m = model_of(c, x=full, stirred=False); z = m.table().vectors[1:]
        for b in z.split(8, -1): assert ((b.square().sum(-1)-1/n).abs() < .12).all(), name


def test_a_missing_block_takes_no_part():
    m = model_of(config()); z = m.items().vectors
    assert (z[[3, 7, 8], 16:] == 0).all() and (z[5, 8:16] == 0).all() and torch.allclose(z[1:].norm(dim=-1), torch.ones(N), atol=1e-6)


@pytest.mark.parametrize('item', ['sum', 'concat'])
@pytest.mark.parametrize('score', ['dot', 'cosine'])
def test_items_and_scores_by_the_formula(item, score):
    m = model_of(config(item=item, score=score, seen=False, head='direct')); ids, content = m.table.ids.clone(), m.table().moe.content; ids[PAD] = 0
    blocks = [F.normalize(ids, dim=-1) if score == 'cosine' else ids, *content]; z = sum(blocks) if item == 'sum' else torch.cat(blocks, -1)
    q = m.condition(rows(WALKS))[0]; dots = q@z.T
    wanted = dots if score == 'dot' else F.cosine_similarity(q[:, None], z, dim=-1)*m.log_scale.exp()
    assert torch.allclose(m.scores(WALKS)[:, 1:], wanted[:, 1:], atol=1e-4) and z.shape[1] == (8 if item == 'sum' else 24)


@pytest.mark.parametrize('name', ['imecd', 'sasrec'])
def test_equal_vectors_tie_exactly(name, monkeypatch):
    "Whatever the product rounds to and wherever the equal items stand."
    m = model_of(configure(ModelConfig, SMALL | PRESETS[name] | {'seen': False}), n=200); items, pairs = m.items(), torch.randperm(200, generator=torch.Generator().manual_seed(0)).view(2, 100)+1
    z = items.vectors.clone(); z[pairs[0]] = z[pairs[1]]; monkeypatch.setattr(m.table, 'forward', lambda: items._replace(vectors=z)); m.cache = None
    for histories in (WALKS, WALKS*9+[[3]]):
        s = m.score(m.query(rows(histories))); assert torch.equal(s[:, pairs[0]], s[:, pairs[1]]) and len(s[0].unique()) == 101
        assert torch.allclose(s[:, 1:], m.query(rows(histories)).vectors@z[1:].T, atol=1e-5)



@pytest.mark.parametrize('score', ['dot', 'cosine'])
@pytest.mark.parametrize('seen', [False, True])
def test_scores_have_a_slope_also_where_items_tie(score, seen):
    m = model_of(config(streams='id', score=score, seen=seen, head='direct'))
    with torch.no_grad(): m.table.ids[3] = m.table.ids[7]
    m.cache = None; s = m.score(m.query(rows(WALKS))); assert seen or torch.equal(s[:, 3], s[:, 7]); s[:, 1:].logsumexp(1).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.reader.parameters())


# one score for training and ranking

def cross_entropy(m, histories):
    "By hand: the scores of every prefix, as ranking gives them, and the log-softmax over the items that may be negatives."
    found = [(h[:k], h[k]) for h in histories for k in range(1, len(h))]
    s = (torch.cat([m.scores([h]) for h, _ in found])+m.bias)[:, 1:]
    return -s.log_softmax(-1)[torch.arange(len(found)), torch.tensor([y for _, y in found])-1].mean()


@pytest.mark.parametrize('chunk', [0, 3])
@pytest.mark.parametrize('changes', [{}, dict(score='dot'), dict(item='sum'), dict(seen=False), dict(mask_cold=False), dict(vq='none'), dict(vq_on='sequence'), dict(streams='id')], ids=str)
def test_training_scores_are_ranking_scores(changes, chunk):
    "E.21, E.22 and one score: the cross-entropy of ranking's scores of every prefix is the term that training reports."
    counts = torch.ones(N+1, dtype=torch.long); counts[[0, 25, 26]] = 0
    m = model_of(config(head='direct', chunk=chunk, **REST, **changes), counts)
    assert torch.allclose(m.loss(asked(WALKS)).parts['condition'], cross_entropy(m, WALKS), rtol=1e-5)


@pytest.mark.parametrize('score', ['dot', 'cosine'])
def test_generated_vectors_are_scored_as_in_ranking(score):
    m = model_of(config(score=score, **REST)); batch = asked(WALKS); out = m.loss(batch); q = m.reader(m.reader.states(out.items, batch), batch)[0]
    s = m.score(Query(m.ask(m.lengthen(out.cdg.x0, q)), seen_items(batch, torch.arange(len(batch.items))), None))[:, 1:]
    assert torch.allclose(out.parts['generated'], F.cross_entropy(s, batch.targets-1), rtol=1e-5)


@pytest.mark.parametrize('name', ['imecd', 'sasrec'])
def test_chunks_change_neither_loss_nor_gradients(name):
    found = []
    for chunk in (0, 1, 5):
        m = model_of(configure(ModelConfig, SMALL | REST | PRESETS[name] | {'chunk': chunk})); torch.manual_seed(0); out = m.loss(asked(WALKS)); out.loss.backward()
        found.append((out.loss, [p.grad for p in m.parameters() if p.grad is not None]))
    for loss, grads in found[1:]:
        assert torch.allclose(loss, found[0][0], rtol=1e-5) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, found[0][1], strict=True))


def test_generated_vectors_have_a_length():
    "Under `dot` that of their condition, in training and ranking; under `cosine` that of the temperature."
    for score in ('dot', 'cosine'):
        m = model_of(config(score=score)); q, c = m.query(rows(WALKS)).vectors, m.condition(rows(WALKS))[0]
        assert torch.allclose(q.norm(dim=-1), c.norm(dim=-1) if score == 'dot' else m.log_scale.exp().expand(len(q)), rtol=1e-5)


def test_guided_sampling_still_scores_like_training():
    "However a vector is generated, equal vectors get equal scores: the query is what `ask` makes of it."
    m = model_of(config(sample_steps=3, samples=2, scale=1.)); q = m.query(rows(WALKS)); found = []
    m.query(rows(WALKS), callback=found.append)
    assert len(found) == 6 and torch.allclose(q.vectors.norm(dim=-1), m.log_scale.exp(), rtol=1e-5) and len(q[1:3]) == 2


# what a user has

def test_seen_items_by_brute_force():
    batch = asked(WALKS); places = torch.arange(len(batch.items)); table = seen_items(batch, places); k = 0
    for h in WALKS:
        for j in range(len(h)-1): assert sorted(table[k][table[k] != PAD].tolist()) == sorted(set(h[:j+1])); k += 1


@FEW
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=9), min_size=1, max_size=5), st.data())
def test_seen_items_are_sets(histories, draw):
    batch = rows(histories); total = len(batch.items); places = torch.tensor(draw.draw(st.lists(st.integers(0, total-1), min_size=1, max_size=8)))
    flat = [set(h[:j+1]) for h in histories for j in range(len(h))]
    for row, p in zip(seen_items(batch, places), places): assert sorted(row[row != PAD].tolist()) == sorted(flat[p])


# what might as well have come next

@FEW
@given(st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=9), min_size=1, max_size=5), st.integers(2, 4), st.data())
def test_any_tied_draws_from_the_rest_of_the_group(histories, size, draw):
    "Days of any sizes: the drawn target is of the same user and day, is trained on, and is not before the next one."
    days = [sorted(draw.draw(st.lists(st.integers(1, 4), min_size=len(h), max_size=len(h)))) for h in histories]
    table = Interactions(np.array([f'u{i}' for i in range(len(histories))], object), pl.DataFrame({'item': [f'i{i}' for i in range(9)]}), np.concatenate(histories).astype(np.int32),
                         np.cumsum([0, *map(len, histories)]), None, np.concatenate(days).astype(np.int64))
    data = sequence_data(Split(table, np.cumsum([*map(len, histories)]), np.full(len(histories), -1), np.full(len(histories), -1), 'time'), 2*size)
    for batch in data.epoch(0, 0, 5):
        places = torch.arange(len(batch.items))[batch.targets != PAD]; found = any_tied(batch, places); row = torch.searchsorted(batch.offsets, places, right=True)-1
        assert (found >= places).all() and torch.equal(torch.searchsorted(batch.offsets, found, right=True)-1, row) and (batch.targets[found] != PAD).all()
        for r, a, b in zip(row, places, found):
            h, d = histories[batch.users[r]], days[batch.users[r]]; own = batch.items[batch.offsets[r]:batch.offsets[r+1]].tolist()
            starts = [k for k in range(len(h)-len(own)) if h[k:k+len(own)] == own]; step, at = int(b-a), int(a-batch.offsets[r])
            assert any(d[k+at+1] == d[k+at+1+step] and h[k+at+1+step] == batch.targets[b] for k in starts)


def test_without_ties_nothing_is_drawn():
    batch = asked(WALKS); places = torch.arange(len(batch.items))
    assert torch.equal(any_tied(batch, places), places) and torch.equal(any_tied(batch._replace(tied=torch.zeros_like(batch.items)), places), places)
    torch.manual_seed(0); drawn = any_tied(batch._replace(tied=batch.lengths.repeat_interleave(batch.lengths)-1-batch.positions), places)
    assert len(set((drawn-places).tolist())) > 2


@pytest.mark.parametrize('ties', [True, False])
def test_where_the_order_is_an_accident_any_of_the_day_is_asked_for(ties):
    "Condition and generated vector are asked for the same item, which is the next one where ties are not used."
    m, batch = model_of(config(ties=ties, **REST)), asked(WALKS); batch = batch._replace(tied=batch.lengths.repeat_interleave(batch.lengths)-1-batch.positions)
    torch.manual_seed(3); places = any_tied(batch, torch.arange(len(batch.items))); torch.manual_seed(3); out = m.loss(batch); y = batch.targets[places] if ties else batch.targets
    q = m.reader(m.reader.states(out.items, batch), batch)[0]; seen = seen_items(batch, torch.arange(len(batch.items))); assert torch.equal(y, batch.targets) != ties
    for name, x in (('generated', out.cdg.x0), ('condition', q)):
        assert torch.allclose(out.parts[name], F.cross_entropy(m.score(Query(m.ask(x), seen, None))[:, 1:], y-1), rtol=1e-5)
    assert torch.allclose(out.parts['mse'], (2-2*F.cosine_similarity(out.cdg.x0, out.items.vectors[y], dim=-1)).mean(), rtol=1e-5)


def test_having_an_item_is_one_learned_number():
    "Each item of the history once, even if it stands there twice; in training and ranking alike; `seen=False` is the plain product."
    kw = dict(head='direct', **REST); m, plain = model_of(config(**kw)), model_of(config(seen=False, **kw))
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if k != 'again'}); assert m.repeat.shape == () and plain.repeat is None
    with torch.no_grad(): m.again.fill_(.03)
    added = m.scores(WALKS)-plain.scores(WALKS); wanted = torch.zeros(len(WALKS), N+1)
    for r, h in enumerate(WALKS): wanted[r, h] = m.repeat.item()
    assert torch.allclose(added[:, 1:], wanted[:, 1:], atol=1e-4)
    assert torch.allclose(plain.scores(WALKS)[:, 1:], plain.query(rows(WALKS)).vectors@plain.items().vectors[1:].T, atol=1e-5)
    for some in (m, plain): assert torch.allclose(some.loss(asked(WALKS)).parts['condition'], cross_entropy(some, WALKS), rtol=1e-5)
    walk = [1, 2, 3, 1, 2]; m.loss(asked([walk])).parts['condition'].backward(); wanted = 0.                # returning teaches it to rise, going elsewhere to fall
    for k in range(1, 5):
        p = (m.scores([walk[:k]])+m.bias)[0, 1:].softmax(-1); wanted += float(p[[i-1 for i in set(walk[:k])]].sum())-(walk[k] in walk[:k])
    assert torch.allclose(m.again.grad, torch.tensor(100*wanted/4), rtol=1e-3)


# nothing leaks

NAMES = pytest.mark.parametrize('name', ['imecd', 'vq_sequence', 'vq_replace', 'shared_vq', 'wo_msvq', 'sasrec', 'topk_gate'])


def every(m, batch):  # (P, D_x)
    "What every position asks for."
    items = m.items(); return m.reader(m.reader.states(items, batch), batch)[0].detach()


@NAMES
def test_one_pass_is_every_prefix(name):
    "E.21: what position t asks for, and what is generated from it, is what the prefix of length t asks for."
    m = model_of(configure(ModelConfig, SMALL | PRESETS[name])); batch = rows(WALKS, users=[3, 1, 4, 2]); q = every(m, batch)
    prefixes = [(u, h[:k+1]) for u, h in zip([3, 1, 4, 2], WALKS) for k in range(len(h))]; users = torch.tensor([u for u, _ in prefixes])
    for k, (_, h) in enumerate(prefixes): assert torch.allclose(m.condition(rows([h]))[0][0], q[k], atol=1e-5)
    if m.cdg is None: return
    made = m.ask(m.lengthen(m.cdg.generate(q, users, m.config.seed, m.config.sample_steps, m.config.samples, m.config.scale), q))
    for k, (u, h) in enumerate(prefixes): assert torch.allclose(m.query(rows([h], users=[u])).vectors[0], made[k], atol=1e-4)


@NAMES
def test_nothing_before_a_changed_item_moves(name):
    "E.8: another item at t changes no query before t, and changes the one at t."
    m = model_of(configure(ModelConfig, SMALL | PRESETS[name] | {'guidance': .3})); h = [1, 2, 3, 4, 5, 6, 9]; before = every(m, rows([h, [2, 4]]))
    for t in range(len(h)):
        other = every(m, rows([h[:t]+[11]+h[t+1:], [2, 4]]))
        assert torch.equal(other[:t], before[:t]) and torch.equal(other[len(h):], before[len(h):])
        if name not in ('vq_replace', 'vq_sequence'): assert not torch.allclose(other[t], before[t], atol=1e-4)   # a code may well stay the same


def test_the_answer_is_not_shown(data):
    "E.8: another target changes neither query nor score, and the loss sees targets in the target column only."
    m = model_of(config(), data.counts()); batch = rows([[1, 2, 3], [4, 5]]); other = batch._replace(targets=torch.randint_like(batch.targets, 1, N+1))
    one, two = (m.query(b) for b in (batch, other)); assert torch.equal(one.vectors, two.vectors) and torch.equal(m.score(one), m.score(two))
    cases = data.cases('test'); assert (data.history(cases, slice(0, 50)).targets == PAD).all()


@FEW
@given(st.lists(st.lists(st.integers(1, N), min_size=1, max_size=9), min_size=2, max_size=6), st.randoms(use_true_random=False), st.sampled_from(['imecd', 'vq_sequence', 'topk_gate', 'three_streams']))
def test_company_changes_nothing(histories, random, name):
    "E.12, E.13: alone, beside others in any order, or beside a row that pads it to full length, a history gets the same scores."
    m = model_of(configure(ModelConfig, SMALL | PRESETS[name])); users = torch.arange(len(histories)); alone = torch.cat([m.scores([h], users[[u]]) for u, h in enumerate(histories)])
    order = list(range(len(histories))); random.shuffle(order)
    together = m.scores([histories[u] for u in order], users[order]); long = m.scores([*histories, [1]*10], torch.arange(len(histories)+1))[:-1]
    scale = alone[:, 1:].abs().max()
    assert alone[:, 1:].isfinite().all() and torch.allclose(together, alone[order], atol=1e-5*float(scale)) and torch.allclose(long, alone, atol=1e-5*float(scale))


def test_a_history_of_nobody_gets_one_answer():
    m = model_of(config(sample_steps=4)); alone = m.scores([[3, 4]])[0]; beside = m.scores([[1, 2], [3, 4]])[1]
    assert torch.allclose(alone, beside, atol=1e-5*float(alone[1:].abs().max()))


@pytest.mark.parametrize('name', ['imecd', 'wo_cdg', 'sasrec'])
def test_batches_change_no_rank(name, data):
    "E.13: batches of 1, 7 and 256, and another order: scores within 1e-5, ranks equal unless scores are closer than that."
    m = model_of(configure(ModelConfig, SMALL | PRESETS[name]), data.counts()); cases = data.cases('test'); order = torch.randperm(len(cases.users), generator=torch.Generator().manual_seed(0))
    whole = m.score(m.query(data.history(cases))); scale = whole[:, 1:].abs().max(); reference = whole/scale
    own = reference.gather(1, cases.targets[:, None]); close = ((reference-own).abs() < 1e-5)[:, 1:].sum(1)-1
    for size, use in ((1, torch.arange(60)), (7, torch.arange(len(order))), (256, order)):
        parts = [m.score(m.query(data.history(cases, use[a:a+size]))) for a in range(0, len(use), size)]; s = torch.cat(parts)/scale
        assert (s-reference[use])[:, 1:].abs().max() < 1e-5
        moved = (ranks(s, cases.targets[use]).kept-ranks(reference, cases.targets).kept[use]).abs(); assert (moved <= close[use]).all() and (moved > 0).float().mean() < .05


def test_pad_is_no_item(data):
    "E.12: PAD is never ranked, and its rows are zero after steps with weight decay."
    m = model_of(config(), data.counts(), stirred=False); m.place_codes(data); m.train(); optimiser = torch.optim.AdamW(m.parameters(), .05, weight_decay=.1)
    for batch in data.epoch(0, 0, 256): optimiser.zero_grad(); m.loss(batch).loss.backward(); optimiser.step()
    m.eval(); items = m.items()
    assert (items.vectors[PAD] == 0).all() and (items.read[:, PAD] == 0).all() and (m.table.ids[PAD] == 0).all() and (items.moe.trust[PAD] == 0).all()
    s = m.score(m.query(data.history(data.cases('test')))); assert (s[:, PAD] == -torch.inf).all(); s[:, PAD] = 1e9
    assert (best(s, N) != PAD).all() and (best(s, N).sort(1).values == torch.arange(1, N+1)).all()
    with torch.no_grad(): m.table.ids[PAD] = 7.
    assert (m.items().vectors[PAD] == 0).all() and torch.equal(m.items().read[:, 1:], items.read[:, 1:])


def test_only_items_are_counted_by_the_codes():
    "E.5: the statistics of the codes take in every position once; rows of very different length bring no padding with them."
    m = model_of(config()); m.train(); vq = m.reader.vq.levels[0]; vq.revive = 0; before = vq.counts.clone(); batch = asked([[1, 2], [3, 4], list(range(1, 11))])
    m.loss(batch); assert torch.allclose(vq.counts.sum(1), vq.decay*before.sum(1)+(1-vq.decay)*len(batch.items), rtol=1e-5)
    found = []
    for histories in (WALKS, WALKS[::-1], [[9, 9]]+WALKS):
        m = model_of(config(**REST)); m.train(); vq = m.reader.vq.levels[0]; vq.revive = 0; m.loss(asked(histories)); found.append(vq.counts.clone())
    assert torch.allclose(found[0], found[1], atol=1e-5) and not torch.allclose(found[0], found[2], atol=1e-5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
@FEW
def test_the_mean_so_far_is_a_mean(lengths, seed):
    batch = rows([[1]*n for n in lengths]); h = torch.randn(2, sum(lengths), 5, generator=torch.Generator().manual_seed(seed)); got = mean_so_far(h, batch)
    for a, b in pairwise(batch.offsets.tolist()):
        for k in range(a, b): assert torch.allclose(got[:, k], h[:, a:k+1].mean(1), atol=1e-5)


# everything learns, and stays

@torch.no_grad()
def content_speaks(m):
    "Start IDs from what features say, as after some training: where IDs and features know nothing of each other, there is no evidence that a gate could weigh."
    g = torch.Generator().manual_seed(0); found = [getattr(m.table, f'features_{n}') for n in m.table.modalities]; order = getattr(m.table.moe, 'order', None)
    if found: m.table.ids[torch.arange(N+1) if order is None else order] = .02*sum(f@torch.randn(f.shape[1], 8, generator=g) for f in found)


@pytest.mark.parametrize('low', [False, True], ids=['float32', 'bfloat16'])
@presets
def test_every_parameter_learns(name, low, data):
    "E.17: after three steps with missing modalities, dropped conditions and ID-dropout every parameter has had a gradient; features never."
    c = configure(ModelConfig, SMALL | dict(drop=.3, id_dropout=.3) | PRESETS[name]); counts = data.counts(); m = model_of(c, counts, stirred=False)
    content_speaks(m); m.place_codes(data); m.train(); optimiser, taught = torch.optim.Adam(m.parameters(), 1e-2), set()
    for batch in list(data.epoch(0, 0, 256))[:3]:
        with torch.autocast('cpu', torch.bfloat16, enabled=low): loss = m.loss(batch).loss
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        taught |= {n for n, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n, p in m.named_parameters() if p.requires_grad} - taught - ({'cdg.nothing'} if not c.drop else set()) == set()
    for n in m.table.modalities: assert not getattr(m.table, f'features_{n}').requires_grad
    assert not any('features' in n for n in [*m.state_dict(), *(n for n, _ in m.named_parameters())])
    assert all(torch.equal(getattr(m.table, f'features_{n}'), feature_table(features(), n, c.streams)) for n in m.table.modalities for c in [m.config])


def test_rooms_cover_all_parameters():
    for name, changes in PRESETS.items():
        m = model_of(configure(ModelConfig, SMALL | changes), stirred=False); table = room_table(m)
        assert sum(r['parameters'] for r in table) == sum(p.numel() for p in m.parameters()) and all(r['gradient'] is None for r in table), name
    m = model_of(config()); m.train(); m.loss(asked(WALKS)).loss.backward(); table = room_table(m); assert all(r['gradient'] > 0 for r in table)
    for what in ('parameters', 'gradient'): assert plot_rooms(table, what).get_title(loc='left')
    plt.close('all')


@pytest.mark.parametrize('name', ['imecd', 'shuffled_gate', 'shared_gate', 'shared_vq', 'vq_sequence', 'wo_cdg', 'sasrec'])
def test_saved_and_loaded_to_the_bit(name, data, tmp_path):
    "E.4: scores, codes and the next step of training are those of the model that was saved."
    c = configure(ModelConfig, SMALL | PRESETS[name]); m = model_of(c, data.counts()); m.train()
    for batch in list(data.epoch(0, 0, 256))[:2]: m.loss(batch)                     # moves the statistics of the codes
    save_file({k: v.clone() for k, v in m.tensors().items()}, tmp_path/'m.safetensors')
    torch.manual_seed(5); other = stir(IMECD(c, N, features(), data.counts()), 3); before = other.scores(WALKS)
    assert other.set_tensors(load_file(tmp_path/'m.safetensors')) is other and torch.equal(other.scores(WALKS), m.scores(WALKS)) and not torch.equal(other.scores(WALKS), before)
    for a, b in zip(m.state_dict().values(), other.state_dict().values(), strict=True): assert torch.equal(a, b)
    losses = []
    for x in (m, other): x.train(); torch.manual_seed(1); losses.append([x.loss(batch).loss.detach() for batch in list(data.epoch(0, 1, 256))[:2]])
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1])) and all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), other.state_dict().values(), strict=True))


def test_tensors_that_do_not_fit_are_named():
    m = model_of(config()); own = {k: v.clone() for k, v in m.tensors().items()}; before = m.scores(WALKS); name = 'reader.fuse.weight'
    for tensors, words in (({k: v for k, v in own.items() if k != name}, f"{name}' is missing"), (own | {'foreign.thing': torch.zeros(1)}, "foreign.thing' is not part of this model"),
                           (own | {name: torch.zeros(2, 2)}, r"shape \(2, 2\), this model needs")):
        with pytest.raises(ImecdError, match=words): m.set_tensors(tensors)
    assert torch.equal(m.scores(WALKS), before)
    with pytest.raises(ImecdError, match='another data set'): m.set_tensors({k: v.clone() for k, v in model_of(config(), n=12).tensors().items()})


def test_the_table_at_rest_is_at_rest():
    "It is computed once, anew when a parameter has changed, and never under dropout, whoever asks first."
    m = model_of(config(feature_dropout=.5, id_dropout=.5)); fresh = m.table().vectors; first = m.items()
    assert m.items() is first and torch.equal(first.vectors, fresh)
    with torch.no_grad(): m.table.ids[1:] += .1
    assert m.items() is not first and torch.equal(m.items().vectors, m.table().vectors)
    n = model_of(config(feature_dropout=.5, id_dropout=.5)); n.train(); n.items(); n.eval()
    assert torch.equal(n.items().vectors, fresh)
    with torch.autocast('cpu', torch.bfloat16): low = m.items()
    assert m.items() is not low and torch.equal(m.items().vectors, m.table().vectors)
    before = m.scores(WALKS); m.table.features_text.neg_(); assert not torch.equal(m.scores(WALKS), before)


def test_a_copy_has_a_table_of_its_own():
    "A copy that is trained as many steps as its original had been is not scored with the table of the original."
    def step(m, times):
        optimiser = torch.optim.SGD(m.parameters(), .1); m.train()
        for _ in range(times): optimiser.zero_grad(); m.loss(asked(WALKS)).loss.backward(); optimiser.step()
        return m.eval()
    m = step(model_of(config(streams='id', head='direct', vq='none'), stirred=False), 2); m.items()
    for times in range(5): other = step(copy.deepcopy(m), times); assert torch.equal(other.items().vectors, other.table().vectors), times


# items without a history

def cold_model(**kw):
    counts = torch.ones(N+1, dtype=torch.long)*5; counts[[0, 9, 10, 11]] = 0; counts[12] = 1
    return model_of(config(**kw), counts)


def test_items_that_were_never_trained_are_no_negatives():
    m, free = cold_model(head='direct', **REST), cold_model(head='direct', mask_cold=False, **REST); walks = [[1, 2, 3, 4], [6, 7, 8, 1]]
    assert m.bias.isinf().nonzero()[:, 0].tolist() == [0, 9, 10, 11] and (free.bias == 0).all()
    for some in (m, free): assert torch.allclose(some.loss(asked(walks)).parts['condition'], cross_entropy(some, walks), rtol=1e-5)
    assert m.loss(asked(walks)).parts['condition'] < free.loss(asked(walks)).parts['condition']
    with torch.no_grad(): s = m.scores(walks)
    assert s[:, 9:12].isfinite().all() and torch.equal(best(s, N).sort(1).values, torch.arange(1, N+1).expand(2, -1))         # and they can be ranked


def test_items_that_were_never_trained_are_what_their_content_says():
    m = cold_model(); z = m.items().vectors.clone()
    with torch.no_grad(): m.table.ids[[9, 10, 11]] = m.table.ids[[1, 2, 3]]*7
    assert torch.equal(m.items().vectors[[9, 10, 11]].isfinite(), torch.ones(3, 24, dtype=torch.bool))
    moved = (m.items().vectors[:, :8]-z[:, :8]).abs().amax(1); assert (moved < 1e-5).all()                                     # their own IDs count for nothing
    with torch.no_grad(): m.table.ids[13] += 1.
    assert (m.items().vectors[13, :8]-z[13, :8]).abs().max() > 1e-2
    assert (cold_model(cold_below=3).table.warm == torch.tensor([False]+[True]*8+[False]*4+[True]*(N-12))).all() and cold_model(cold_below=0).table.warm.all()


def test_a_cold_item_can_come_first():
    m = cold_model(head='direct', vq='none', seen=False); q = m.items().vectors[10]
    assert ranks(m.score(Query(m.ask(q[None]), torch.zeros(1, 1, dtype=torch.long), None)), torch.tensor([10])).kept == 1


def test_ids_are_dropped_in_training_only():
    "In training a share of the items reads its pseudo-ID; at rest none that was trained does."
    m = model_of(config(id_dropout=.5), stirred=True); rest = unit(m.table.ids); m.train(); torch.manual_seed(0)
    swapped = torch.stack([(m.table().read[0, 1:]-rest[1:]).abs().amax(1) > 1e-6 for _ in range(20)]).float(); m.eval()
    assert .4 < swapped.mean() < .6 and (swapped.mean(0) < 1).all() and torch.allclose(m.table().read[0, 1:], rest[1:])


# seeds

def test_one_seed_one_model(data):
    c, x = config(), features(); torch.manual_seed(11); state = torch.get_rng_state(); one = IMECD.of(c, data, x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12); two, three = IMECD.of(c, data, x), IMECD.of(replace(c, seed=1), data, x)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert not torch.equal(one.table.ids, three.table.ids)


def test_asked_twice_it_says_the_same(data):
    m = model_of(config(sample_steps=3, samples=2), data.counts()); cases = data.cases('test'); found = []
    for seed in (1, 2): torch.manual_seed(seed); found.append(evaluate(m, data, cases))
    for a, b in zip(*found, strict=True): assert torch.equal(a, b)


def test_noise_is_that_of_seed_and_user():
    m = model_of(config()); q = lambda m, users: m.query(rows(WALKS[:2], users=users)).vectors
    other = IMECD(replace(m.config, seed=1), N, features()); other.set_tensors(m.tensors()); other.eval()
    assert torch.equal(q(m, [1, 2]), q(m, [1, 2])) and torch.equal(q(m, [1, 2])[0], q(m, [1, 3])[0]) and not torch.equal(q(m, [1, 2])[1], q(m, [1, 3])[1])
    assert not torch.equal(q(m, [1, 2]), q(other, [1, 2])) and torch.equal(m.condition(rows(WALKS))[0], other.condition(rows(WALKS))[0])


def test_bfloat16_is_finite_and_near(data):
    "Losses finite and within 3 % of fp32; ranks within 3 % of the catalogue on average."
    for name in ('imecd', 'sasrec', 'topk_gate'):
        m = model_of(configure(ModelConfig, SMALL | REST | PRESETS[name] | dict(noisy=False)), data.counts()); batch = next(data.epoch(0, 0, 256)); cases = data.cases('test'); parts = []
        for low in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled=low): torch.manual_seed(0); out = m.loss(batch); r = evaluate(m, data, cases).rank
            out.loss.backward(); assert out.loss.isfinite() and out.loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
            parts.append((out.parts['condition'], r))
        assert (parts[1][0]/parts[0][0]-1).abs() < .03 and (parts[1][1]-parts[0][1]).abs().mean() < .03*N


def test_threads_and_bfloat16_leave_torch_as_it_was(data, threads):
    "Attention in bfloat16 is made without torch's switches between kernels, which are of the whole process."
    m = model_of(config(), data.counts()); cases = data.cases('test'); threads(2); switches = lambda: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(), torch.get_num_threads()); before = switches()
    with torch.autocast('cpu', torch.bfloat16): found = [evaluate(m, data, cases).rank for _ in range(4)]
    assert switches() == before and all(torch.equal(found[0], r) for r in found[1:])


# the textbook

@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_sasrec_is_the_textbook(norm):
    "Raw IDs plus positions, LayerNorm, blocks, dot product (Kang and McAuley 2018): torch's own layers, from ids to scores and loss."
    c = configure(ModelConfig, SMALL | REST | PRESETS['sasrec'] | dict(score='dot', seen=False, norm=norm, layers=2)); m = model_of(c, stirred=True); e = m.reader.encoder
    with torch.no_grad(): m.reader.fuse.weight.copy_(torch.eye(8)); m.reader.fuse.bias.zero_()
    layers = []
    for b in e.blocks:
        layer = nn.TransformerEncoderLayer(8, c.heads, c.inner, 0., F.gelu, batch_first=True, norm_first=norm == 'pre').eval(); layers.append(layer)
        with torch.no_grad():
            for ours, theirs in ((b.attention.qkv, (layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)), (b.attention.out, (layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias)),
                                 (b.up, (layer.linear1.weight, layer.linear1.bias)), (b.down, (layer.linear2.weight, layer.linear2.bias))):
                theirs[0].copy_(ours.weight[0].T); theirs[1].copy_(ours.bias[0, 0])
            for ours, theirs in ((b.norm1, layer.norm1), (b.norm2, layer.norm2)): theirs.weight.copy_(ours.weight[0, 0]); theirs.bias.copy_(ours.bias[0, 0])
    norm_of = lambda x, n: F.layer_norm(x, (8,), n.weight[0, 0], n.bias[0, 0])
    def states(history):  # (L, D)
        n = len(history); x = norm_of(m.table.ids[history]+e.positions[0, :n], e.enter)[None]
        for layer in layers: x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(n), is_causal=True)
        return norm_of(x[0], e.leave) if norm == 'pre' else x[0]
    for h in WALKS: assert torch.allclose(m.scores([h])[0, 1:], states(h)[-1]@m.table.ids[1:].T, atol=1e-5)
    wanted = torch.cat([F.cross_entropy(states(h[:-1])@m.table.ids[1:].T, torch.tensor(h[1:])-1, reduction='none') for h in WALKS]).mean()
    assert torch.allclose(m.loss(asked(WALKS)).loss, wanted, rtol=1e-5)


def test_streams_are_those_of_the_configuration():
    for streams in ('id', 'id+text', 'text+image', 'id+text+image'):
        m = model_of(config(streams=streams)); n = len(streams.split('+')); batch = rows(WALKS); items = m.items()
        assert items.read.shape == (n, N+1, 8) and items.vectors.shape == (N+1, n*8) and m.reader.states(items, batch).shape == (n, len(batch.items), 8)
        assert ['id']*m.table.has_id+m.table.modalities == [s for s in STREAMS if s in streams.split('+')]


def test_a_query_is_cut_by_rows():
    from dataclasses import replace
    q = Query(torch.arange(12.).view(6, 2), torch.ones(6, 3, dtype=torch.long), None); part = q[2:4]
    assert len(q) == 6 and len(part) == 2 and torch.equal(part.vectors, q.vectors[2:4]) and part.codes is None and len(replace(q, vectors=q.vectors+1)) == 6


@pytest.mark.parametrize('name', ['imecd', 'sasrec', 'vq_sequence', 'wo_msvq'])
def test_positions_that_vote_answer_as_their_prefixes_do(name):
    "Each vote is what the history up to that position asks for, with the noise of the same user; the mixture is that of their softmaxes, without what the whole history has."
    m = model_of(config(**{**PRESETS[name], 'votes': 3, 'vote_decay': .5})).eval(); one = model_of(config(**PRESETS[name])).eval(); one.load_state_dict(m.state_dict())
    if m.reader.vq is not None: m.reader.vq.initialise(torch.randn(m.reader.streams(m.config), 200, m.config.dim)); one.load_state_dict(m.state_dict())
    history = [3, 1, 4, 1]
    with torch.no_grad():
        q = m.query(rows([history, [2]])); prefixes = [one.query(rows([history[:4-r]])) for r in range(3)]
        for r, p in enumerate(prefixes): torch.testing.assert_close(q.vectors[0, r], p.vectors[0], atol=1e-4, rtol=1e-4)
        table = torch.stack([one.score(Query(p.vectors, q.seen[:1], None))[0] for p in prefixes]); mixed = (torch.tensor([4., 2, 1])[:, None]/7*table.softmax(-1)).sum(0)
        s = m.score(q); torch.testing.assert_close(s[0, 1:].exp(), mixed[1:], atol=1e-5, rtol=1e-3); assert (s[:, PAD] == -torch.inf).all()
        assert torch.equal(s[1, 1:].argsort(), one.score(one.query(rows([[5], [2]])))[1, 1:].argsort()) and torch.allclose(m.score(q[1:])[0, 1:], s[1, 1:], atol=1e-4)


def test_votes_are_checked():
    for bad in (dict(votes=0), dict(vote_decay=0.), dict(vote_decay=1.5)):
        with pytest.raises(ImecdError, match='vote'): config(**bad)
