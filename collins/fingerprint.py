"""What a parameter's saved state means, as one integer that travels with it.

Tables mean nothing without their hash: read under other signs or other buckets they are noise. So a parameter's state
carries, beside its tables, a fingerprint of what they were encoded with. It is an int because that is what every way of
saving keeps: `torch.save` with `weights_only=True`, pickle, and the flattened form of `torch.distributed.checkpoint`,
which takes tensors, ints and floats and would move or shard a tensor. It depends on the whole parameter alone, so that
all ranks agree on it and none of it changes with their number.

Dense moments mean the same under any hash. They have a fingerprint where their parameter or they are rounded
stochastically: the random bits derive from the parameter's key, which a resumed run goes on with.
"""

from __future__ import annotations

from typing import NamedTuple

from collins.hashing import BlockHash, UniversalHash, derive
from collins.options import shown

LAYOUT = "layout"  # the fingerprint's name in a parameter's state

_VERSION = 1
_WORD = 64
_MASK = 2**_WORD - 1
_KINDS = ("block", "universal", "dense")


class Fingerprint(NamedTuple):
    """What decides the meaning of a parameter's tables; 0 for what does not matter to its hash, or to dense moments.

    The decode is not among it: M and V are the same under both.
    """

    hash: int  # 0 for "block", 1 for "universal", 2 for dense moments
    numel: int  # N
    rows: int  # the parameter's first dimension
    buckets: int  # K; N for dense moments
    load: int  # c, of hash="block"
    period: int  # T, of hash="block"; 0 for signs that never change
    signs: int  # what the signs of hash="block" derive from, or the random bits of dense moments
    a: int  # to d: the coefficients of hash="universal"
    b: int
    c: int
    d: int
    seed: int  # modulo 2**64; this and the key explain signs and coefficients
    place: int  # the parameter's key

    def packed(self) -> int:
        """All of it in one integer of 64-bit words; `unpacked` is the inverse."""
        return sum(word << _WORD * i for i, word in enumerate((_VERSION, *self)))

    def _is_consistent(self) -> bool:
        """Whether there is a parameter and a hash that this can be of."""
        if self.hash >= len(_KINDS) or 0 in (self.numel, self.rows, self.buckets) or self.numel % self.rows:
            return False
        if self.hash == 2:
            return self.buckets == self.numel and not self.load
        return self.hash == 1 or (self.load > 0 and self.buckets == -(-self.numel // self.load))

    def difference(self, own: Fingerprint) -> str | None:
        """How this, of a saved state, differs from the one it is to be loaded under; None if it means the same."""
        if self._replace(seed=0, place=0) == own._replace(seed=0, place=0):
            return None
        pairs = zip(self._fields, self, own, strict=True)
        differ = {name: (_shown(name, saved), _shown(name, mine)) for name, saved, mine in pairs if saved != mine}
        if self.hash != own.hash:
            differ = {"hash": differ["hash"]}
        elif len(differ) > 1:
            differ.pop("signs", None)  # the others say why
        return ", ".join(
            f"{_LABELS.get(n, n)} {saved} where this optimizer has {my}" for n, (saved, my) in differ.items()
        )

    def key_under(self, own: Fingerprint, seed: int) -> int | None:
        """The key under which this, of a saved state, means the same in an optimizer of this seed; None for no key.

        Parameters that are built without names, or under other names than they were saved with, have other keys.
        """
        if own.hash != 1:
            signs = derive(seed, self.place, "round" if own.hash else "sign") & _MASK
            same = self._replace(place=own.place, signs=own.signs) == own and self.signs == signs
        else:
            hash = UniversalHash(own.numel, own.buckets, seed=seed, key=self.place)
            same = self._replace(place=own.place, a=own.a, b=own.b, c=own.c, d=own.d) == own
            same = same and (self.a, self.b, self.c, self.d) == hash.coefficients
        return self.place if same else None


def fingerprint(rows: int, hash: BlockHash | UniversalHash, seed: int, key: int) -> Fingerprint:
    """Of a parameter of this key whose first dimension is `rows`, in an optimizer of this seed."""
    if isinstance(hash, BlockHash):
        kind, signs = 0, derive(hash.seed, hash.key, "sign") & _MASK
        own = (hash.block, hash.period or 0, signs, 0, 0, 0, 0)
    else:
        kind, own = 1, (0, 0, 0, hash.a, hash.b, hash.c, hash.d)
    return Fingerprint(kind, hash.numel, rows, hash.buckets, *own, seed & _MASK, key)


def dense_fingerprint(numel: int, rows: int, seed: int, key: int) -> Fingerprint:
    """Of a parameter of this key with dense moments, in an optimizer of this seed."""
    rounding = derive(seed, key, "round") & _MASK
    return Fingerprint(2, numel, rows, numel, 0, 0, rounding, 0, 0, 0, 0, seed & _MASK, key)


def unpacked(value: object) -> Fingerprint:
    """The inverse of `Fingerprint.packed`.

    Raises:
        ValueError: for anything that no version of this package has packed.
    """
    if isinstance(value, int) and value >= 0 and value & _MASK == _VERSION:
        words = tuple(value >> _WORD * (i + 1) & _MASK for i in range(len(Fingerprint._fields)))
        found = Fingerprint(*words)
        if found.packed() == value and found._is_consistent():
            return found
    raise ValueError(f"{LAYOUT} must be a fingerprint of version {_VERSION}, got {shown(value)}")


_LABELS = {
    "rows": "first dimension",
    "buckets": "buckets K",
    "load": "bucket load c",
    "period": "rehash_period",
    "signs": "signs",
}


def _shown(name: str, value: int) -> str:
    if name == "hash":
        return repr(_KINDS[value])
    if name == "period":
        return str(value or None)
    return str(value - 2**_WORD if name == "seed" and value >> _WORD - 1 else value)
