"""The oracle: Collins for one parameter in float64, written from the formulas, without regard to speed.

It uses no code of the library: Python integers for the hashes, NumPy for the means."""

from __future__ import annotations

import hashlib
import math

import numpy as np

MASK = 0xFFFFFFFF
P = 2**31 - 1


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & MASK
    x ^= x >> 15
    x = x * 0x735A2D97 & MASK
    return x ^ (x >> 15)


def constants(seed: int, key: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"collins/{purpose}/{seed}/{key}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


class Block:
    """hash="block" for N elements in buckets of c."""

    def __init__(self, N, c, seed=0, key=0, T=400):
        self.N, self.c, self.T = N, c, T
        self.K = math.ceil(N / c)
        bits = constants(seed, key, "sign")
        self.low, self.high = bits & MASK, bits >> 32 & MASK

    def members(self, b):
        return range(b * self.c, min((b + 1) * self.c, self.N))

    def age(self, b, t):
        """t + phi_b, or None for a bucket whose signs never change."""
        if self.T is None or len(self.members(b)) == 1:
            return None
        return ((b + self.low & MASK) * 0x61C88647 % 2**32 * self.T >> 32) + t

    def fresh(self, b, t):
        age = self.age(b, t)
        return age is not None and age % self.T == 0

    def h(self, i):
        return i // self.c

    def s(self, i, t):
        b = self.h(i)
        age = self.age(b, t)
        epoch = 0 if age is None else age // self.T
        word = b if self.c <= 32 else i // 32
        mixed = mix((word + self.low & MASK) ^ (epoch * 0x1E3779B9 + self.high & MASK))
        return 1 - 2 * (mixed >> i % 32 & 1)

    def load(self, b):
        return len(self.members(b))


class Universal:
    """hash="universal" for N elements in K buckets with coefficients a, b, c, d."""

    def __init__(self, N, K, a, b, c, d):
        self.N, self.K, self.coefficients = N, K, (a, b, c, d)

    def fresh(self, b, t):
        return False

    def h(self, i):
        a, b, _, _ = self.coefficients
        return (a * i + b) % P % self.K

    def s(self, i, t):
        _, _, c, d = self.coefficients
        return 2 * ((c * i + d) % P % 2) - 1

    def load(self, b):
        return self.N / self.K


def quantised(bits, block=64):
    """A function that rounds M as a table of `bits`-bit integers with one scale per block of `block` entries does."""
    limit = 2 ** (bits - 1) - 1

    def kept(M):
        result = np.zeros_like(M)
        for first in range(0, M.size, block):
            entries = M[first : first + block]
            scale = np.abs(entries).max() / limit
            if scale:
                result[first : first + block] = np.rint(entries / scale) * scale
        return result

    return kept


# The powers of the load c in m_hat and in v_hat, whether there is a residual, and its default weight, which is the
# ratio of the noises of an EMA and of its input if None.
DECODES = {"least_squares": (0, 0, True, 0.3), "residual": (0.5, 0, True, None), "sketch": (1, 1, False, None)}


class Reference:
    """One parameter. With `hash=None` it is AdamW. `v_hash` hashes the second moment if it differs from `hash`.

    `decode` is a key of `DECODES`, or a tuple like its values. `kept` maps M to the values that its table stores."""

    def __init__(self, p, hash=None, decode="least_squares", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                 residual_weight=None, residual_square=2.0, v_hash=None, kept=None):  # fmt: skip
        self.p = np.array(p, dtype=np.float64).reshape(-1)
        *self.decode, rho = DECODES.get(decode, decode)
        self.kept = kept
        self.hash, self.lr, self.betas, self.eps, self.wd = hash, lr, betas, eps, weight_decay
        rho = rho if residual_weight is None else residual_weight
        self.rho = math.sqrt((1 - betas[0]) / (1 + betas[0])) if rho is None else rho
        self.kappa = residual_square
        if hash is None:
            self.M, self.V, self.t = np.zeros(self.p.size), np.zeros(self.p.size), 0
            return
        v_hash = hash if v_hash is None else v_hash
        self.M, self.V, self.t = np.zeros(hash.K), np.zeros(v_hash.K), 0
        self.h, self.h_v = (np.array([f.h(i) for i in range(self.p.size)], dtype=int) for f in (hash, v_hash))
        self.c, self.c_v = (np.array([f.load(b) for b in range(f.K)]) for f in (hash, v_hash))

    def accumulate(self, gs, parts=None):
        """One step of `len(gs)` partial steps, where `parts` were expected."""
        for part, g in enumerate(gs):
            self.step(g, part=part, parts=len(gs) if parts is None else parts)

    def step(self, g, grad_scale=1.0, part=0, parts=1):
        g = np.array(g, dtype=np.float64).reshape(-1) * grad_scale
        self.t += part == 0
        t, (beta1, beta2), hash, decay = self.t, self.betas, self.hash, self.wd
        correct1, correct2 = 1 - beta1**t, 1 - beta2**t - (1 - beta2) * (parts - 1 - part) / parts
        new1, new2 = 1 - beta1, 1 - beta2
        if part > 0:
            beta1, beta2, decay = 1, 1, 0
        if hash is None:
            self.M = beta1 * self.M + new1 * g
            self.V = beta2 * self.V + new2 * g**2
            m, v, r = (self.M if part == 0 else new1 * g) / correct1, self.V / correct2, 0
        else:
            h, c, h_v, c_v = self.h, self.c, self.h_v, self.c_v
            s = np.array([hash.s(i, t) for i in range(g.size)])
            mu, q = np.zeros(self.M.size), np.zeros(self.V.size)
            np.add.at(mu, h, s * g / c[h])
            np.add.at(q, h_v, g**2 / c_v[h_v])
            for b in range(hash.K):
                if part == 0 and hash.fresh(b, t):
                    self.M[b] = 0
            self.M = beta1 * self.M + new1 * mu
            self.V = beta2 * self.V + new2 * q
            m_scale, v_scale, residual = self.decode
            m = s * (c**m_scale * (self.M if part == 0 else new1 * mu))[h] / correct1
            v = (c_v**v_scale * self.V)[h_v] / correct2
            r = g - s * mu[h] if residual else 0
        self.p = (1 - self.lr * decay) * self.p - self.lr * (m + self.rho * r) / (
            np.sqrt(v + self.kappa * parts * r**2) + self.eps
        )
        if self.kept is not None and hash is not None:
            self.M = self.kept(self.M)


def newton_schulz(X):
    """Newton-Schulz iteration of five steps for one matrix, transposed if it has more rows than columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / max(np.sqrt((X**2).sum()), 1e-7)
    if X.shape[0] > X.shape[1]:
        return newton_schulz_wide(X.T, a, b, c).T
    return newton_schulz_wide(X, a, b, c)


def newton_schulz_wide(X, a, b, c):
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


class OrthogonalReference(Reference):
    """A parameter with decode="orthogonal", which consists of the matrices that `cut` returns."""

    def __init__(self, p, hash=None, cut=lambda x: [x], **options):
        super().__init__(p, hash, **{"residual_weight": 0.6, **options})
        self.shape, self.cut = p.shape, cut

    def step(self, g, grad_scale=1.0):
        g = np.array(g, dtype=np.float64).reshape(-1) * grad_scale
        self.t += 1
        beta1, hash = self.betas[0], self.hash
        if hash is None:
            self.M = beta1 * self.M + (1 - beta1) * g
            X = self.M
        else:
            h, c = self.h, self.c
            s = np.array([hash.s(i, self.t) for i in range(g.size)])
            mu = np.zeros(self.M.size)
            np.add.at(mu, h, s * g / c[h])
            for b in range(hash.K):
                if hash.fresh(b, self.t):
                    self.M[b] = 0
            self.M = beta1 * self.M + (1 - beta1) * mu
            X = s * self.M[h] + self.rho * (g - s * mu[h])
        update = np.zeros(self.shape)
        for own, matrix in zip(self.cut(update), self.cut(X.reshape(self.shape)), strict=True):
            own[...] = 0.2 * np.sqrt(max(matrix.shape)) * newton_schulz(matrix)
        self.p = (1 - self.lr * self.wd) * self.p - self.lr * update.reshape(-1)
        if self.kept is not None and hash is not None:
            self.M = self.kept(self.M)
