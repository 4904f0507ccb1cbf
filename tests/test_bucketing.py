"""Which tensors are compressed, and into how many buckets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from collins.bucketing import bucketing_of


@given(
    numel=st.integers(0, 2**36),
    ratio=st.one_of(st.integers(1, 4096), st.floats(1, 4096)),
    min_K=st.integers(1, 2**16),
    hash=st.sampled_from(["block", "universal"]),
)
@settings(deadline=None, derandomize=True, max_examples=500)
def test_layout_follows_its_rules(numel, ratio, min_K, hash):
    layout = bucketing_of(numel, compress_ratio=ratio, min_K=min_K, hash=hash)
    if numel <= min_K or ratio == 1:
        assert layout.hash is None
    if layout.hash is None:
        assert layout.buckets == numel
        if hash == "block" and numel > min_K and ratio >= 2:  # two to a bucket would leave too few
            assert -(-numel // 2) < min_K
        return
    assert layout.buckets >= min_K
    assert layout.buckets <= numel
    if hash == "universal":
        assert layout.buckets == max(int(numel // ratio), min_K)
        assert layout.load == numel / layout.buckets
    else:
        load = int(layout.load)
        assert load & (load - 1) == 0
        assert 2 <= load <= ratio
        assert layout.buckets == -(-numel // load)
        # None larger would do.
        assert 2 * load > ratio or -(-numel // (2 * load)) < min_K or layout.buckets == 1


def test_examples_by_hand():
    def of(numel, ratio=32, min_K=1024, hash="block"):
        return bucketing_of(numel, compress_ratio=ratio, min_K=min_K, hash=hash)

    assert of(1024).hash is None
    assert of(1025).hash is None  # two to a bucket would leave 513 buckets
    assert of(2047)[2:] == (1024, 2)
    assert of(4096 * 4096)[2:] == (2**19, 32)
    assert of(4096 * 4096, ratio=100)[2:] == (2**18, 64)
    assert of(4096 * 4096, ratio=1).hash is None
    assert of(3072, ratio=2**70, min_K=1)[2:] == (1, 4096)
    assert of(1025, hash="universal")[2:] == (1024, 1025 / 1024)
    assert of(10**6, ratio=128, hash="universal")[2:] == (7812, 10**6 / 7812)
