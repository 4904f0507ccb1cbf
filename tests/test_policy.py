"""Memory policies are read from all accepted forms; errors name what is wrong."""

import doctest
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import collins.offload.policy
from collins.offload import MemoryPolicy
from collins.offload.sizes import parse_size, size_text

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (12345, 12345),
        ("2", 2),
        ("25769803776", 24 * GIB),
        (" 007 ", 7),
        ("7B", 7),
        ("2GiB", 2 * GIB),
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("139.8GiB", int(Fraction("139.8") * GIB)),
        (" 3 kb ", 3000),
        ("0.5tib", 2**39),
    ],
)
def test_sizes_in_all_their_units(text, expected):
    assert parse_size("x", text).of(10**15) == expected


@given(st.integers(0, 2**50), st.integers(0, 10_000))
def test_a_share_is_of_the_total_without_rounding_up(total, hundredths):
    size = parse_size("x", f"{hundredths // 100}.{hundredths % 100:02}%")
    assert size.of(total) == total * hundredths // 10_000


@given(st.integers(0, 2**50))
def test_a_size_equals_its_text_within_the_displayed_precision(count):
    assert parse_size("x", size_text(count).replace(",", "")).of(0) == pytest.approx(count, rel=0.05, abs=0)


@pytest.mark.parametrize(
    "value",
    [
        "2 gigabytes",
        "2Gibs",
        "2.5",
        "",
        "GiB",
        "-1GiB",
        "1e9B",
        "1,5GB",
        "101%",
        "nan%",
        -1,
        1.5,
        True,
        None,
        [1],
        b"1B",
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["device_reserve", "host_reserve", "device_budget", "pin_limit", "transfer_size"])
def test_an_invalid_size_is_rejected_with_what_is_accepted(name, value):
    if value is None and name in ("device_budget", "pin_limit"):
        assert MemoryPolicy(**{name: None}) == MemoryPolicy()
        return
    with pytest.raises(ValueError, match=rf"^{name} must be .*GiB.*got {re.escape(repr(value))}$"):
        MemoryPolicy(**{name: value})


def test_a_transfer_has_a_positive_size():
    with pytest.raises(ValueError, match=r"transfer_size must be an int of bytes or .*, got '10%'"):
        MemoryPolicy(transfer_size="10%")
    with pytest.raises(ValueError, match="transfer_size must be at least one byte, got 0"):
        MemoryPolicy(transfer_size=0)


@pytest.mark.parametrize("slots", [1, 0, -3, 2.0, "3", True, None], ids=repr)
def test_a_ring_has_two_or_more_slots(slots):
    with pytest.raises(ValueError, match=f"staging_slots must be an int of at least 2, got {slots!r}"):
        MemoryPolicy(staging_slots=slots)


@pytest.mark.parametrize("tier", ["hosts", "gpu", "", None, 3, ["auto"]], ids=repr)
def test_a_tier_is_one_of_three(tier):
    with pytest.raises(ValueError, match=re.escape(f"tier must be one of auto, device, host, got {tier!r}")):
        MemoryPolicy(tier=tier)


def test_from_a_policy_a_tier_and_a_mapping():
    policy = MemoryPolicy("host", device_budget=5)
    assert MemoryPolicy.of(policy) is policy
    for tier in ("auto", "device", "host"):
        assert MemoryPolicy.of(tier) == MemoryPolicy(tier=tier)
    assert MemoryPolicy.of({"tier": "host", "device_budget": 5}) == policy
    assert MemoryPolicy.of({}) == MemoryPolicy()


@pytest.mark.parametrize("as_text", [True, False], ids=["str", "path"])
def test_from_a_toml_file_with_other_tables(tmp_path, as_text):
    path = tmp_path / "Run.TOML"
    keys = 'tier = "host"\npin_limit = "50%"\nstaging_slots = 2\n'
    path.write_text(f'title = "run 7"\n[collins]\n[collins.memory]\n{keys}[data]\nx = 1\n')
    assert MemoryPolicy.of(str(path) if as_text else path) == MemoryPolicy("host", pin_limit="50%", staging_slots=2)


@pytest.mark.parametrize("text", ["", "[collins.memory]\n"], ids=["empty", "empty table"])
def test_a_file_must_contain_the_table(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    if text:
        assert MemoryPolicy.of(path) == MemoryPolicy()
    else:
        with pytest.raises(
            ValueError, match=r"policy.toml: a policy's keys must stand in the table \[collins.memory\]$"
        ):
            MemoryPolicy.of(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[collins.memory\n", "not TOML: "),
        ("\udc80", "not TOML: "),
        ('tier = "host"\n', r"must stand in the table \[collins.memory\]"),
        ('[colins.memory]\ntier = "host"\n', r"table \[collins.memory\]; is 'colins' meant for 'collins'"),
        ('[collins.memroy]\ntier = "host"\n', r"table \[collins.memory\]; is 'memroy' meant for 'memory'"),
        ("collins = 3\n", r"must stand in the table \[collins.memory\]; is 'collins' meant"),
        ("[collins.memory]\ndevice_reserv = 1\n", r"unknown key 'device_reserv' \(did you mean 'device_reserve'\?\);"),
        (
            "[collins.memory]\nx = 1\n",
            "unknown key 'x'; accepted are tier, device_reserve, host_reserve, device_budget",
        ),
        ("[collins.memory]\npin_limit = 1.5\n", "pin_limit must be an int of bytes or a string .*, got 1.5"),
        ("[collins.memory]\nhost_reserve = 2020-02-02\n", r"host_reserve must be .*, got datetime.date\(2020, 2, 2\)"),
        ('[collins.memory]\ntier = "hots"\n', r"one of auto, device, host, got 'hots' \(did you mean 'host'\?\)"),
    ],
)
def test_an_invalid_file_is_named_with_the_reason(tmp_path, text, message):
    path = tmp_path / "policy.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        MemoryPolicy.of(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_values_that_are_not_policies():
    with pytest.raises(FileNotFoundError, match=r"a path to a TOML file, got 'no/such.toml', which is not a file"):
        MemoryPolicy.of("no/such.toml")
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        MemoryPolicy.of(Path(__file__).parent)
    with pytest.raises(
        ValueError, match=r"memory must be .* path to a TOML file, got 'hots' \(did you mean 'host'\?\)"
    ):
        MemoryPolicy.of("hots")
    for value in (3, None, 1.5, ["auto"]):
        with pytest.raises(TypeError, match=f"memory must be a MemoryPolicy, one of .*, got {re.escape(repr(value))}"):
            MemoryPolicy.of(value)
    with pytest.raises(ValueError, match="unknown key 7; accepted are"):
        MemoryPolicy.of({7: 7})


def test_the_docstring_example():
    assert doctest.testmod(collins.offload.policy).failed == 0


@pytest.mark.parametrize(
    "size",
    [2**63, 10**400, 10**5000, "9" * 30, "99999999999 TiB"],
    ids=["2**63", "10**400", "10**5000", "digits", "unit"],
)
def test_a_size_larger_than_any_memory_is_rejected(size):
    with pytest.raises(ValueError, match=r"device_budget must be an int of bytes or .*, below 2\*\*63, got "):
        MemoryPolicy(device_budget=size)


@pytest.mark.parametrize("build", [lambda keys: MemoryPolicy(**keys), MemoryPolicy.of], ids=["arguments", "mapping"])
def test_the_former_name_of_transfer_size_is_accepted_with_a_warning(build):
    with pytest.warns(DeprecationWarning, match="bucket_size is deprecated: it is called transfer_size now"):
        policy = build({"bucket_size": "8KiB"})
    assert policy == MemoryPolicy(transfer_size="8KiB")
