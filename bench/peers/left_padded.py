"Histories as RePlay's models take them."
import numpy as np
import torch


def rows(d, stops, shift, length=50):  # (U, L), (U, L)
    "Of the events of `d` the last ones before each stop, padded at the left with the number of items; and those `shift` later."
    events, n = d['events'].astype(np.int64)-1, int(d['n_items']); x, y = np.full((len(stops), length), n), np.full((len(stops), length), n)
    for r, (a, b) in enumerate(zip(d['offsets'][:-1], stops)):
        h = events[max(a, b-length-shift):b]
        if shift: x[r, length-len(h)+1:], y[r, length-len(h)+1:] = h[:-1], h[1:]
        else: x[r, length-len(h):] = h
    return torch.as_tensor(x), torch.as_tensor(y)
