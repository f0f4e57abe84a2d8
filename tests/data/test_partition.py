"""Sharing: counted by hand, not by the code under test."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folklora.data.partition import partition
from folklora.data.partition_file import from_json, to_json
from folklora.data.sources import Table, fingerprint
from folklora.data.split import Split, histogram
from folklora.data.table import ONE_CLASS
from folklora.errors import DataError
from folklora.sections import DataSection


def make_table(sizes: list[int], groups: list[str] | None = None) -> Table:
    """Examples sorted by class, the worst order for a scheme that forgets to shuffle."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    classes = tuple(f"class {i:02d}" for i in range(len(sizes)))
    return Table([f"text {i}" for i in range(len(labels))], labels, classes, groups)


TABLE = make_table([100, 80, 120, 60, 140])


def everything(of: Split) -> list[int]:
    return [*of.train.tolist(), *of.validation.tolist(), *of.test.tolist()]


def shares(clients: dict[str, Split]) -> dict[str, list[int]]:
    return {client: sorted(everything(of)) for client, of in clients.items()}


def assert_disjoint(clients: dict[str, Split], count: int) -> None:
    rows = [row for of in clients.values() for row in everything(of)]
    assert len(rows) == len(set(rows)) == count


SCHEMES = {
    "iid": {"partition": "iid", "clients": 7},
    "dirichlet": {"partition": "dirichlet", "clients": 7, "alpha": 0.5},
    "pathological": {"partition": "pathological", "clients": 7, "classes_per_client": 3},
    "shards": {"partition": "shards", "clients": 10, "shards_per_client": 2},
    "natural": {"partition": "natural", "by": "who"},
}


@pytest.mark.parametrize("options", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme_is_disjoint_complete_and_deterministic(options: dict) -> None:
    table = make_table([100, 80, 120, 60, 140], [f"g{i % 7}" for i in range(500)])
    section = DataSection(min_examples=5, **options)
    first, again, other = (partition(table, section, seed) for seed in (3, 3, 4))
    assert_disjoint(first, 500)
    assert to_json(table, first) == to_json(table, again)
    assert to_json(table, first) != to_json(table, other)
    if options["partition"] != "natural":
        assert list(first) == [str(i) for i in range(options["clients"])]
        assert shares(first) != shares(other)
    for of in first.values():
        assert len(of) >= 5
        for part in (of.train, of.validation, of.test):
            assert part.dtype == np.int64
            assert len(part) > 0
            assert part.tolist() == sorted(part.tolist())


def test_iid_clients_are_equal_and_mixed() -> None:
    clients = partition(TABLE, DataSection(partition="iid", clients=4), 0)
    for client in clients.values():
        assert len(client) == 125
        # Hypergeometric: standard deviations of 3.6 to 4.4, so that 22 is five of them.
        np.testing.assert_allclose(histogram(TABLE, client), [25, 20, 30, 15, 35], atol=22)


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    def skew(alpha: float) -> float:
        of = partition(TABLE, DataSection(clients=5, alpha=alpha, min_examples=3), 1)
        counts = np.array([histogram(TABLE, client) for client in of.values()])
        return float((counts / counts.sum(1, keepdims=True)).max(1).mean())  # the largest class's share

    assert 0.25 < skew(1000.0) < 0.32  # the largest class of all has 0.28
    assert skew(0.1) > skew(1.0) + 0.1 > skew(1000.0) + 0.1


def test_dirichlet_shares_follow_the_distribution() -> None:
    # A client's share of a class is Beta(alpha, (N - 1) alpha) before conditioning on min_examples, which is idle here.
    table, alpha, count = make_table([1000] * 100), 2.0, 5
    clients = partition(table, DataSection(clients=count, alpha=alpha), 0)
    fractions = np.array([histogram(table, client) for client in clients.values()]) / 1000
    mean = 1 / count
    variance = mean * (1 - mean) / (count * alpha + 1)
    assert fractions.mean() == pytest.approx(mean)
    assert fractions.var() == pytest.approx(variance, rel=0.25)


def test_the_seed_draws_the_dirichlet_shares() -> None:
    # With classes of one size, clients' sizes depend on the shares alone, not on which class comes first.
    table = make_table([100] * 5)
    sizes = [sorted(len(of) for of in partition(table, DataSection(clients=5), seed).values()) for seed in (0, 1)]
    assert sizes[0] != sizes[1]


def test_pathological_clients_hold_their_number_of_classes(caplog: pytest.LogCaptureFixture) -> None:
    clients = partition(TABLE, DataSection(partition="pathological", clients=10, classes_per_client=2), 0)
    assert {np.count_nonzero(histogram(TABLE, client)) for client in clients.values()} == {2}
    assert not caplog.records  # ten clients leave none of five classes out

    section = DataSection(partition="pathological", clients=2, classes_per_client=1)
    chosen = set()
    for seed in range(6):
        caplog.clear()
        clients = partition(TABLE, section, seed)
        rows = sum(len(client) for client in clients.values())
        assert f"{500 - rows} of 500 examples unused" in caplog.text
        chosen.add(frozenset(int(histogram(TABLE, client).argmax()) for client in clients.values()))
    assert len(chosen) > 1  # the seed decides which classes are used, not the alphabet


def test_shards_are_equal_and_hold_few_classes(caplog: pytest.LogCaptureFixture) -> None:
    clients = partition(TABLE, DataSection(partition="shards", clients=10, shards_per_client=2), 0)
    for client in clients.values():
        assert len(client) == 50
        assert np.count_nonzero(histogram(TABLE, client)) <= 4  # a shard of 25 meets at most two classes of >= 60
    assert not caplog.records

    clients = partition(TABLE, DataSection(partition="shards", clients=12, shards_per_client=3), 0)
    assert {len(client) for client in clients.values()} == {39}  # 36 shards of 13
    assert_disjoint(clients, 468)
    assert "32 of 500 examples unused" in caplog.text
    unused = [100, 80, 120, 60, 140] - sum(histogram(TABLE, client) for client in clients.values())
    assert np.count_nonzero(unused) >= 4  # drawn from all classes, not the tail of the sorted list


def test_natural_clients_are_the_columns_values(caplog: pytest.LogCaptureFixture) -> None:
    groups = ["10"] * 4 + ["9"] * 7 + ["2"] * 3 + ["10"] * 2
    table = make_table([8, 8], groups)
    clients = partition(table, DataSection(partition="natural", by="w", min_examples=4, clients=99), 0)
    assert list(clients) == ["9", "10"]  # by value, all being numbers; "2" is too small
    assert shares(clients) == {"9": list(range(4, 11)), "10": [0, 1, 2, 3, 14, 15]}
    assert "dropped 1 of 3 clients" in caplog.text

    odd = ["é\0", "é", " x", "Ω/../"] * 4
    clients = partition(make_table([8, 8], odd), DataSection(partition="natural", by="w", min_examples=3), 0)
    assert list(clients) == sorted(set(odd))
    assert shares(clients)["é\0"] == [0, 4, 8, 12]


# Skew by a column


DOMAINS = [f"d{i}" for i in np.random.default_rng(0).permutation(np.repeat(np.arange(5), 100))]


def mixed_domains(labels: int = 4) -> Table:
    """Domains that have nothing to do with labels."""
    values = np.random.default_rng(1).integers(0, labels, 500)
    return Table([f"text {i}" for i in range(500)], values, tuple(f"c{i}" for i in range(labels)), DOMAINS)


def unlabelled(groups: list[str] | None = None, count: int = 500) -> Table:
    return Table([f"text {i}" for i in range(count)], np.zeros(count, dtype=np.int64), ONE_CLASS, groups)


def domains(table: Table, of: Split) -> set[str]:
    return {(table.groups or [])[i] for i in everything(of)}


SKEWED = {
    "dirichlet": {"partition": "dirichlet", "alpha": 0.05, "min_examples": 3},
    "pathological": {"partition": "pathological", "classes_per_client": 2},
    "shards": {"partition": "shards", "shards_per_client": 2},
}


@pytest.mark.parametrize("options", SKEWED.values(), ids=SKEWED)
def test_a_column_is_skewed_as_a_label_would_be(options: dict) -> None:
    # The same numbers as labels give the same clients: only who says them differs.
    table = mixed_domains()
    section = DataSection(clients=5, by="site", **options)
    found = partition(table, section, 0)
    as_labels = Table(table.inputs, np.array([int(d[1:]) for d in DOMAINS]), tuple(sorted(set(DOMAINS))), None)
    assert shares(found) == shares(partition(as_labels, section.model_copy(update={"by": None}), 0))
    assert shares(found) != shares(partition(table, section.model_copy(update={"by": None}), 0))
    assert shares(partition(unlabelled(DOMAINS), section, 0)) == shares(found)


def test_domains_differ_and_labels_do_not() -> None:
    table = mixed_domains()
    clients = partition(table, DataSection(clients=5, by="site", **SKEWED["pathological"]), 0)
    for of in clients.values():
        assert len(domains(table, of)) == 2
        counts = histogram(table, of)
        np.testing.assert_allclose(counts, len(of) / 4, atol=5 * np.sqrt(len(of) * 3 / 16))
        # Within a client the parts are stratified by label, whatever the domain.
        np.testing.assert_allclose(histogram(table, of.test), counts * len(of.test) / len(of), atol=1)


def test_iid_does_not_look_at_the_column() -> None:
    section = DataSection(partition="iid", clients=5, by="site")
    assert shares(partition(mixed_domains(), section, 0)) == shares(partition(unlabelled(), section, 0))


@pytest.mark.parametrize("options", SKEWED.values(), ids=SKEWED)
def test_without_labels_there_is_no_label_skew(options: dict) -> None:
    with pytest.raises(DataError) as caught:
        partition(unlabelled(), DataSection(clients=5, **options), 0)
    message = str(caught.value)
    assert f'data.partition = "{options["partition"]}" skews labels, and the examples have none' in message
    assert 'allowed: data.by or data.label, a column of the source, or partition = "iid"' in message


def test_unlabelled_clients_by_a_column_and_by_chance() -> None:
    table = unlabelled(DOMAINS)
    clients = partition(table, DataSection(partition="natural", by="site"), 0)
    assert list(clients) == sorted(set(DOMAINS))
    assert all(domains(table, of) == {name} for name, of in clients.items())
    assert_disjoint(partition(table, DataSection(partition="iid", clients=4), 0), 500)
    found, classes, back, _ = from_json(to_json(table, clients), examples=500)
    assert (found, classes, shares(back)) == (fingerprint(table), ONE_CLASS, shares(clients))


def test_more_values_a_client_than_the_column_has() -> None:
    section = DataSection(partition="pathological", classes_per_client=6, by="site")
    with pytest.raises(DataError, match=r"classes_per_client = 6; allowed: <= 5, the number of values of 'site'"):
        partition(unlabelled(DOMAINS), section, 0)


# Impossible settings


@pytest.mark.parametrize(
    ("options", "problem", "allowed"),
    [
        ({"clients": 51}, "clients = 51 with data.min_examples = 10 needs 510", "clients <= 50"),
        ({"partition": "iid", "clients": 1_000_000}, "the source has 500", "clients <= 50"),
        ({"partition": "pathological", "classes_per_client": 6}, "classes_per_client = 6", "<= 5"),
        ({"partition": "pathological", "clients": 160, "min_examples": 3}, "more|fewer examples|only", "fewer clients"),
        ({"partition": "pathological", "clients": 45, "classes_per_client": 1}, "only", "min_examples"),
        ({"partition": "shards", "shards_per_client": 60}, "600 shards of 0 examples", "fewer shards_per_client"),
        ({"partition": "shards", "clients": 40, "shards_per_client": 7}, "give a client 7", "fewer clients"),
        ({"alpha": 0.001}, "alpha = 0.001: no draw", "a larger alpha"),
        ({"alpha": 1e308}, "alpha = 1e+308: no draw", "min_examples"),
        ({"partition": "natural", "by": "w"}, 'needs `by = "column"`', "clients"),
    ],
)  # fmt: skip
def test_impossible_partition_is_one_line(
    options: dict, problem: str, allowed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        partition(TABLE, DataSection(**options), 0)
    message = str(caught.value)
    assert "\n" not in message
    assert any(part in message for part in problem.split("|"))
    assert allowed in message
    assert capfd.readouterr() == ("", "")


def test_class_with_fewer_examples_than_clients_is_one_line() -> None:
    section = DataSection(partition="pathological", clients=9, classes_per_client=2, min_examples=3)
    with pytest.raises(DataError, match="a class has fewer examples than clients"):
        partition(make_table([100, 2]), section, 0)


def test_natural_without_a_client_large_enough() -> None:
    section = DataSection(partition="natural", by="w", min_examples=10)
    with pytest.raises(DataError, match=r"none of the 5 clients .* allowed: min_examples <= 4"):
        partition(make_table([10, 10], [str(i % 5) for i in range(20)]), section, 0)


def test_a_column_of_single_examples_makes_no_clients() -> None:
    section = DataSection(partition="natural", by="w", min_examples=3)
    with pytest.raises(DataError, match=r"none of the 20 clients .* allowed: a column whose values occur 3 times"):
        partition(make_table([10, 10], [str(i) for i in range(20)]), section, 0)


def test_partitioners_are_silent_and_leave_no_files(tmp_path: Path) -> None:
    script = """
import numpy as np
from folklora.data.partition import partition
from folklora.data.sources import Table
from folklora.sections import DataSection
table = Table(["x"] * 200, np.arange(200) % 4, ("a", "b", "c", "d"), [str(i % 5) for i in range(200)])
for kind in ("iid", "dirichlet", "pathological", "shards", "natural"):
    partition(table, DataSection(partition=kind, by="w", alpha=5.0, clients=4), 0)
"""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "hf").mkdir()
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"),
        "HF_HOME": str(tmp_path / "hf"), "MPLCONFIGDIR": str(tmp_path / "matplotlib"), "MPLBACKEND": "agg",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "partition" not in done.stdout
    assert "it [" not in done.stderr  # tqdm's bar
    left = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*") if p.is_file()}
    assert left <= {"matplotlib"}


def test_warnings_come_through_logging_only(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    with caplog.at_level(logging.WARNING):
        partition(TABLE, DataSection(partition="pathological", clients=2, classes_per_client=1), 0)
    assert len(caplog.records) == 1
    assert not recwarn.list


# Captions


def captioned(counts: list[int], labels: list[int], groups: list[str] | None = None, *, mixed: int | None = 0) -> Table:
    """Picture i with ``counts[i]`` captions and one label, its captions strewn over the table."""
    which = np.repeat(np.arange(len(counts)), counts)
    if mixed is not None:
        which = np.random.default_rng(mixed).permutation(which)
    pictures = [np.full((2, 3, 3), i, dtype=np.uint8) for i in range(len(counts))]
    inputs = [(pictures[i].copy(), f"caption {row}") for row, i in enumerate(which)]
    classes = tuple(str(label) for label in range(max(labels) + 1))
    return Table(inputs, np.array(labels)[which], classes, groups and [groups[i] for i in which])


def picture(table: Table, rows: np.ndarray) -> set[int]:
    return {int(table.inputs[row][0][0, 0, 0]) for row in rows}


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=40, max_size=60),
    kind=st.sampled_from(["iid", "dirichlet", "shards", "natural"]),
    seed=st.integers(0, 99),
)
def test_captions_of_a_picture_are_never_parted(counts: list[int], kind: str, seed: int) -> None:
    labels = [i % 3 for i in range(len(counts))]
    table = captioned(counts, labels, [f"g{i % 4}" for i in range(len(counts))], mixed=seed)
    options = {"partition": kind, "clients": 4, "min_examples": 3, "alpha": 5.0, "shards_per_client": 2}
    clients = partition(table, DataSection(**options, **({"by": "who"} if kind == "natural" else {})), seed)
    parts = [picture(table, rows) for of in clients.values() for rows in (of.train, of.validation, of.test)]
    assert sum(map(len, parts)) == len(set().union(*parts))  # each picture is in one part of one client
    rows = [row for of in clients.values() for row in everything(of)]
    assert len(rows) == len(set(rows))
    if kind != "shards":  # which leaves a remainder
        assert len(rows) == sum(counts)
    assert all(len(part) for part in parts)


def test_one_caption_a_picture_is_split_as_examples_are() -> None:
    """Whatever the pictures: nothing changes for those who have no second caption."""
    labels = [i % 3 for i in range(60)]
    plain = Table([f"text {i}" for i in range(60)], np.array(labels), ("0", "1", "2"), None)
    section = DataSection(partition="dirichlet", clients=4, min_examples=5, alpha=5.0)
    one, other = partition(plain, section, 3), partition(captioned([1] * 60, labels, mixed=None), section, 3)
    assert all(np.array_equal(getattr(of, p), getattr(other[c], p)) for c, of in one.items() for p in vars(of))


def test_a_client_with_two_pictures_cannot_be_split() -> None:
    table = captioned([3] * 8, [0, 1] * 4, ["a", "a", *"bbbbbb"])
    with pytest.raises(DataError, match=r"client 'a' has 6 captions of 2 pictures; allowed: three pictures or more"):
        partition(table, DataSection(partition="natural", by="who", min_examples=3), 0)
