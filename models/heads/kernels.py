"""Kernels of a block of classes in Triton: what torch.compile makes several passes over memory of is one here.

A margin softmax over millions of classes is bound by memory, not by products. Here products never leave the chip
before they are what is needed of them: forward a log sum exp, backward their gradients; and the gradient of the
centres goes into the optimizer's step where it is computed. Centres are read once forward and twice backward, and
written once, as is their momentum.

What they share: `unit`, [faces, D] in the dtype of products, embeddings of length 1; `centres`, float32 [n, D]; both as
descriptors, of tiles [FACES, K] and [CLASSES, K]. `place`: int64 [faces], where among the classes of the step each
face's own one is, -1 for none; `start`: int64 scalar, the place of the first of these n; `scale`: float32, one or
[faces].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _cosines(
    unit, centres, factors, first_face, first_class, keep, KEEP: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    FACES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Cosines [FACES, CLASSES], and one over the centres' lengths [CLASSES].

    KEEP, and `keep` too: the centres, rounded as they are multiplied, go to the descriptor `factors` [n, D].
    """
    products = tl.zeros((FACES, CLASSES), tl.float32)
    squares = tl.zeros((CLASSES,), tl.float32)
    for k in range(0, D, K):
        centre = centres.load([first_class, k])
        squares += tl.sum(centre * centre, 1)
        face = unit.load([first_face, k])
        factor = centre.to(face.dtype)
        if KEEP:  # noqa: SIM102 - known when it is compiled
            if keep:
                factors.store([first_class, k], factor)
        products = tl.dot(face, tl.trans(factor), products)
    inverse = 1 / tl.maximum(tl.sqrt(squares), 1e-12)
    return products * inverse[None, :], inverse


@triton.jit(do_not_specialize=["n", "tiles"])
def log_sum_exp(
    unit, centres, place, start, scale, sums, bests, tops, n, faces, tiles, filter_above, SCALE_STRIDE: tl.constexpr,
    FILTER: tl.constexpr, D: tl.constexpr, K: tl.constexpr, FACES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Of `tiles` tiles of classes, the own class of a face left out: the largest cosine (`bests`), with FILTER also the
    largest after it (`tops`), and the sum of the exponentials of what logits have less than that times the scale:
    float32 [parts, faces] each.

    Grid: (tiles of faces, parts).
    """
    first_face, part = tl.program_id(0) * FACES, tl.program_id(1)
    f = first_face + tl.arange(0, FACES)
    own = (tl.load(place + f, f < faces, -1) - tl.load(start)).to(tl.int32)
    factor = tl.load(scale + f * SCALE_STRIDE, f < faces, 0.0)
    best = tl.full((FACES,), float("-inf"), tl.float32)
    top = tl.full((FACES,), float("-inf"), tl.float32)
    subtracted = tl.full((FACES,), float("-inf"), tl.float32)
    total = tl.zeros((FACES,), tl.float32)
    for tile in range(part * tiles, min((part + 1) * tiles, tl.cdiv(n, CLASSES))):
        c = tile * CLASSES + tl.arange(0, CLASSES)
        cosine, _ = _cosines(
            unit, centres, centres, first_face, tile * CLASSES, False, False, D, K, FACES, CLASSES
        )  # fmt: skip
        other = (c < n)[None, :] & (c[None, :] != own[:, None])
        best = tl.maximum(best, tl.max(tl.where(other, cosine, float("-inf")), 1))
        if FILTER:
            cosine = tl.where(cosine <= filter_above, cosine, 0.0)
            top = tl.maximum(top, tl.max(tl.where(other, cosine, float("-inf")), 1))
        else:
            top = best
        higher = tl.where(top == float("-inf"), 0.0, top) * factor
        logits = tl.where(other, cosine * factor[:, None], float("-inf"))
        total = total * tl.exp(subtracted - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        subtracted = higher
    at = part.to(tl.int64) * faces + f
    tl.store(sums + at, total, f < faces)
    tl.store(bests + at, best, f < faces)
    if FILTER:
        tl.store(tops + at, top, f < faces)


@triton.jit(do_not_specialize=["n"])
def gradients_of_products(
    unit, centres, place, start, scale, log_others, d_own, d_others, d_products, factors, along, d_scale, n, faces,
    filter_above, SCALE_STRIDE: tl.constexpr, FILTER: tl.constexpr, LEARNS: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr, FACES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Of the products with the centres as they are: `d_products`, descriptor of [faces, n] in the dtype of products;
    and what goes with them.

    `factors`: descriptor of [n, D], the centres in that dtype. `along`: float32 [tiles of faces, n], the sum of which
    tells how much of a centre its gradient holds. `d_scale`: float32 [tiles of classes, faces], if the scale LEARNS.
    Grid: (tiles of faces, tiles of classes).
    """
    first_face, first_class = tl.program_id(0) * FACES, tl.program_id(1) * CLASSES
    f, c = first_face + tl.arange(0, FACES), first_class + tl.arange(0, CLASSES)
    cosine, inverse = _cosines(
        unit, centres, factors, first_face, first_class, tl.program_id(0) == 0, True, D, K, FACES, CLASSES
    )
    own = (tl.load(place + f, f < faces, -1) - tl.load(start)).to(tl.int32)
    factor = tl.load(scale + f * SCALE_STRIDE, f < faces, 0.0)
    less = tl.load(log_others + f, f < faces, float("inf"))
    value = cosine
    if FILTER:
        value = tl.where(cosine <= filter_above, cosine, 0.0)
    d_logits = tl.exp(value * factor[:, None] - less[:, None]) * tl.load(d_others + f, f < faces, 0.0)[:, None]
    is_own = c[None, :] == own[:, None]
    if LEARNS:
        counted = tl.where(is_own | (c >= n)[None, :], 0.0, d_logits * value)
        tl.store(d_scale + tl.program_id(1).to(tl.int64) * faces + f, tl.sum(counted, 1), f < faces)
    d_cosine = d_logits * factor[:, None]
    if FILTER:
        d_cosine = tl.where(cosine <= filter_above, d_cosine, 0.0)
    d_cosine = tl.where(is_own, tl.load(d_own + f, f < faces, 0.0)[:, None], d_cosine)
    rounded = (d_cosine * inverse[None, :]).to(d_products.dtype)
    d_products.store([first_face, first_class], rounded)
    part = tl.sum(rounded.to(tl.float32) * cosine, 0) * inverse
    tl.store(along + tl.program_id(0).to(tl.int64) * n + c, part, c < n)


@triton.jit(do_not_specialize=["n", "parts"])
def sgd_step(
    d_products, unit, along, centres, momentum, lr, n, faces, parts, decay, keep, D: tl.constexpr, K: tl.constexpr,
    CLASSES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the centres from that of the products, and a step of SGD with it: `centres` and `momentum`,
    float32 [n, D], in place. `keep`: share of the momentum; `lr`: float32 scalar tensor; `parts`: tiles of faces.

    Descriptors: `d_products`, of tiles [K, CLASSES]; `unit`, [K, WIDTH]; `centres` and `momentum`, [CLASSES, WIDTH].
    Grid: (tiles of dimensions, tiles of classes).
    """
    first, first_class = tl.program_id(0) * WIDTH, tl.program_id(1) * CLASSES
    gradient = tl.zeros((CLASSES, WIDTH), tl.float32)
    for f in range(0, faces, K):
        gradient = tl.dot(tl.trans(d_products.load([f, first_class])), unit.load([f, first]), gradient)
    c = first_class + tl.arange(0, CLASSES)
    held = tl.zeros((CLASSES,), tl.float32)
    for part in range(parts):
        held += tl.load(along + part * n + c, c < n, 0.0)
    # c = u.w / |w|, so dc/dw = u / |w| - (u / |w|).w w / |w|^2: the part along w goes.
    centre = centres.load([first_class, first])
    moved = momentum.load([first_class, first]) * keep + gradient + (decay - held)[:, None] * centre
    momentum.store([first_class, first], moved)
    centres.store([first_class, first], centre - tl.load(lr) * moved)
