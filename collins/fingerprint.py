"""The encoding of a parameter's tables as one integer, which is saved in the parameter's state.

Tables are useless without their hash: decoded with other signs or other buckets they are noise. So the state of a
parameter holds a fingerprint of the encoding beside the tables. It is an int because every way of saving keeps ints:
`torch.save` with `weights_only=True`, pickle, and the flattened form of `torch.distributed.checkpoint`, which supports
tensors, ints and floats, but would move or shard a tensor. It depends on the whole parameter only, so it is the same on
all ranks and for every number of ranks.

Dense moments do not depend on a hash. They have a fingerprint where they or their parameter are rounded stochastically:
the random bits derive from the parameter's key, which a resumed run continues to use.
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
    """The values that determine the encoding of a parameter's tables; 0 for fields that its kind of hash does not use.

    The decode is not one of them: M and V do not depend on it.
    """

    hash: int  # 0 for "block", 1 for "universal", 2 for dense moments
    numel: int  # N
    rows: int  # the parameter's first dimension
    buckets: int  # K; N for dense moments
    load: int  # c, of hash="block"
    period: int  # T, of hash="block"; 0 for signs that never change
    signs: int  # the derived key of the signs of hash="block", or of the random bits for dense moments
    a: int  # to d: the coefficients of hash="universal"
    b: int
    c: int
    d: int
    seed: int  # modulo 2**64; signs and coefficients derive from it and the key
    place: int  # the parameter's key

    def packed(self) -> int:
        """All fields in one integer of 64-bit words; `unpacked` is the inverse."""
        return sum(word << _WORD * i for i, word in enumerate((_VERSION, *self)))

    def _is_consistent(self) -> bool:
        """Whether some parameter and hash can have this fingerprint."""
        if self.hash >= len(_KINDS) or 0 in (self.numel, self.rows, self.buckets) or self.numel % self.rows:
            return False
        if self.hash == 2:
            return self.buckets == self.numel and not self.load
        return self.hash == 1 or (self.load > 0 and self.buckets == -(-self.numel // self.load))

    def difference(self, own: Fingerprint) -> str | None:
        """Describes how this saved fingerprint differs from the optimizer's `own`; None if the encodings agree."""
        if self._replace(seed=0, place=0) == own._replace(seed=0, place=0):
            return None
        pairs = zip(self._fields, self, own, strict=True)
        differ = {name: (_shown(name, saved), _shown(name, mine)) for name, saved, mine in pairs if saved != mine}
        if self.hash != own.hash:
            differ = {"hash": differ["hash"]}
        elif len(differ) > 1:
            differ.pop("signs", None)  # the other differences are the cause
        return ", ".join(
            f"{_LABELS.get(n, n)} {saved} where this optimizer has {my}" for n, (saved, my) in differ.items()
        )

    def key_under(self, own: Fingerprint, seed: int) -> int | None:
        """The key with which an optimizer of this seed has the encoding of this saved fingerprint; None if no key has.

        It differs from the key in `own` if a parameter has no name, or another name than when it was saved.
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
    """The fingerprint of a parameter of this key whose first dimension is `rows`, in an optimizer of this seed."""
    if isinstance(hash, BlockHash):
        kind, signs = 0, derive(hash.seed, hash.key, "sign") & _MASK
        own = (hash.block, hash.period or 0, signs, 0, 0, 0, 0)
    else:
        kind, own = 1, (0, 0, 0, hash.a, hash.b, hash.c, hash.d)
    return Fingerprint(kind, hash.numel, rows, hash.buckets, *own, seed & _MASK, key)


def dense_fingerprint(numel: int, rows: int, seed: int, key: int) -> Fingerprint:
    """The fingerprint of a parameter of this key with dense moments, in an optimizer of this seed."""
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
