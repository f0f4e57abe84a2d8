"""Sums of encrypted numbers against sums of numbers, and SEAL's own decryption against ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from folklora.errors import FederationError, MessageError
from folklora.privacy import ciphertexts, ckks
from folklora.privacy.ciphertexts import Mixed, Sealed, mix, whole_weights
from folklora.privacy.ckks import Key

seal = pytest.importorskip("tenseal.sealapi")

KEY = Key(bytes(range(64)))


def rows(random: np.random.Generator, count: int, of: int) -> np.ndarray:
    weights = random.exponential(size=(count, of)) ** 3  # some near one, many near zero
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("clients", "count"), [(1, 1), (2, 2047), (3, 2048), (10, 768), (100, 5000)])
def test_what_is_decrypted_is_the_weighted_sum(clients: int, count: int) -> None:
    random = np.random.default_rng(clients)
    numbers = random.normal(size=(clients, count)) * 3
    weights = rows(random, clients, clients)
    mixed = mix([KEY.encrypt(each) for each in numbers], weights)
    wanted = weights @ numbers
    for i in {0, clients // 2, clients - 1}:
        assert np.abs(KEY.decrypt(mixed.row(i)) - wanted[i]).max() < 1e-4


@given(st.lists(st.floats(-ckks.MOST, ckks.MOST), min_size=0, max_size=40), st.integers(0, 2**32))
def test_any_numbers_that_fit_come_back(numbers: list[float], seed: int) -> None:
    other = np.full(len(numbers), -ckks.MOST)
    (weights,) = rows(np.random.default_rng(seed), 1, 2)
    found = KEY.decrypt(mix([KEY.encrypt(numbers), KEY.encrypt(other)], [weights]))
    # Weights are whole multiples of 2^-22, and 63 of those is what they may lose.
    np.testing.assert_allclose(found, weights[0] * np.asarray(numbers) + weights[1] * other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan, 63.01, -1e9])
def test_what_does_not_fit_is_refused(number: float) -> None:
    with pytest.raises(MessageError, match="allowed: finite, -63 to 63"):
        KEY.encrypt([0.0, number])


@pytest.mark.parametrize(("count", "many"), [(1, 1), (768, 1), (2047, 1), (2048, 2), (9000, 5)])
def test_six_bytes_a_number_up_and_four_down(count: int, many: int) -> None:
    sealed = KEY.encrypt(np.zeros(count))
    assert sealed.seeds.nbytes + sealed.body.nbytes == 6 * count + many * (32 + 6)
    mixed = mix([sealed], [[1.0]])
    assert mixed.masks.nbytes + mixed.body.nbytes == 4 * count + many * 4 * (2048 + 1)


# -- against SEAL ------------------------------------------------------------------------------------------------------


def in_seal(sealed: Sealed) -> tuple[list[int], list[int]]:
    """The two polynomials of a ciphertext that is not cut, as whole numbers: nothing of ours but the wire's layout."""
    body = [int.from_bytes(bytes(six), "little") << 5 for six in sealed.body]
    mask = ciphertexts.expanded(sealed.seeds[0]).tolist()
    assert len(body) == len(mask) == ciphertexts.DEGREE
    return body, mask


def test_seal_finds_the_same_numbers_in_a_ciphertext() -> None:
    """Schoolbook ``c0 + c1 s`` with the secret that SEAL holds, read from what SEAL encrypts with it."""
    numbers = np.random.default_rng(5).normal(size=ciphertexts.NUMBERS)
    c0, c1 = in_seal(KEY.encrypt(numbers))
    secret = [int(t) for t in KEY.trits]
    phase = list(c0)
    for i, s in enumerate(secret):
        if s:
            for j, c in enumerate(c1):
                at, sign = ((i + j) % ciphertexts.DEGREE), (-1 if i + j >= ciphertexts.DEGREE else 1)
                phase[at] += sign * s * c
    q = ciphertexts.MODULUS
    centred = [(p + q // 2) % q - q // 2 for p in phase]
    found = np.array(centred) / 2.0**24
    assert abs(found[0] - 1) < 1e-5
    assert np.abs(found[1:] - numbers).max() < 1e-5


def test_the_secret_is_seals() -> None:
    """SEAL decrypts what it encrypted with the same seed; a product with our secret is SEAL's product with it."""
    context = ckks._context(seal)
    words = np.frombuffer(KEY.seed, dtype="<u8").tolist()
    secret = seal.KeyGenerator(ckks._context(seal, words)).secret_key()
    encryptor, evaluator = seal.Encryptor(context, secret), seal.Evaluator(context)
    zero, product = seal.Ciphertext(), seal.Ciphertext()
    encryptor.encrypt_zero_symmetric(zero)
    evaluator.multiply_plain(zero, secret.data(), product)
    for each in (zero, product):
        evaluator.transform_from_ntt_inplace(each)
    c1 = np.array([zero[ciphertexts.DEGREE + i] for i in range(ciphertexts.DEGREE)], dtype=np.int64)
    wanted = [product[ciphertexts.DEGREE + i] for i in range(ciphertexts.DEGREE)]
    assert KEY._times_secret(c1).tolist() == wanted


def test_the_parameters_are_at_128_bits() -> None:
    assert ciphertexts.MODULUS.bit_length() < seal.CoeffModulus.MaxBitCount(2048, seal.SEC_LEVEL_TYPE.TC128)
    assert pow(3, ciphertexts.MODULUS - 1, ciphertexts.MODULUS) == 1
    assert set(KEY.trits.tolist()) == {-1, 0, 1}
    assert all(abs(int((KEY.trits == t).sum()) - ciphertexts.DEGREE / 3) < 150 for t in (-1, 0, 1))


def test_the_error_is_gaussian_of_the_standards_width_and_new_each_time() -> None:
    drawn = []
    for _ in range(20):
        c0, c1 = KEY._encrypted_zero()
        e = (c0 + KEY._times_secret(c1)) % ciphertexts.MODULUS
        drawn.append(np.where(e > ciphertexts.MODULUS // 2, e - ciphertexts.MODULUS, e))
    assert 3.0 < float(np.concatenate(drawn).std()) < 3.5
    assert len({each.tobytes() for each in drawn}) == 20


def test_two_encryptions_have_nothing_in_common() -> None:
    one, two = KEY.encrypt(np.ones(500)), KEY.encrypt(np.ones(500))
    assert not np.array_equal(one.seeds, two.seeds)
    assert float((one.body == two.body).mean()) < 0.02
    # To whoever has no key the numbers look drawn.
    assert abs(float(one.body.astype(float).mean()) - 127.5) < 10


# -- keys --------------------------------------------------------------------------------------------------------------


def test_a_key_is_a_line_of_text_and_back() -> None:
    key = Key.new()
    again = Key.parse(key.line())
    assert again.id == key.id != KEY.id
    mixed = mix([key.encrypt([0.5, -2.0])], [[1.0]])
    np.testing.assert_allclose(again.decrypt(mixed), [0.5, -2.0], atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "folklora-ckks-1",
        "folklora-ckks-2 " + "00" * 64,
        "folklora-ckks-1 xyz",
        "folklora-ckks-1 " + "00" * 63,
        "\0",
    ],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(FederationError, match="not a key"):
        Key.parse(text)


def test_a_damaged_key_is_told_from_a_whole_one() -> None:
    line = KEY.line()
    where = len("folklora-ckks-1 ") + 7
    with pytest.raises(FederationError, match="a damaged key"):
        Key.parse(line[:where] + ("0" if line[where] != "0" else "1") + line[where + 1 :])


def test_another_key_and_noise_are_noticed() -> None:
    random = np.random.default_rng(2)
    uploads = [KEY.encrypt(random.normal(size=3000)) for _ in range(3)]
    with pytest.raises(MessageError, match="not encrypted with this member's key alone"):
        Key.new().decrypt(mix(uploads, [[0.2, 0.3, 0.5]]))
    noise = Sealed(uploads[1].seeds, random.integers(0, 256, uploads[1].body.shape, dtype=np.uint8))
    with pytest.raises(MessageError, match="not encrypted with this member's key alone"):
        KEY.decrypt(mix([uploads[0], noise, uploads[2]], [[0.2, 0.3, 0.5]]))


def test_a_mix_of_other_sizes_is_refused() -> None:
    mixed = mix([KEY.encrypt(np.zeros(3000))], [[1.0]])
    with pytest.raises(MessageError, match="2 ciphertexts of 1000 numbers"):
        KEY.decrypt(Mixed(mixed.masks, mixed.body[:, :1002]))


# -- weights -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 2**32))
def test_whole_weights_sum_to_one_and_are_near(count: int, seed: int) -> None:
    weights = rows(np.random.default_rng(seed), 3, count)
    whole = whole_weights(weights)
    assert (whole.sum(1) == 2.0**22).all()
    assert (whole == np.rint(whole)).all()
    assert np.abs(whole / 2.0**22 - weights).max() <= 2.0**-22
    assert (whole >= 0).all()


@pytest.mark.parametrize("weights", [[[0.5, 0.4]], [[1.5, -0.5]], [[2.0]]])
def test_rows_that_are_no_weights_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="do not sum to one"):
        whole_weights(np.array(weights))


def test_sums_are_exact_at_the_edges_of_the_limbs() -> None:
    """Against Python's own whole numbers, values up to the largest there are."""
    random = np.random.default_rng(3)
    values = random.integers(0, 2**53, size=(40, 9))
    values[:, 0], values[:, 1] = 2**53 - 1, 2**27
    weights = whole_weights(rows(random, 4, 40))
    found = ciphertexts._mixed(weights, values)
    for i in range(4):
        for j in range(9):
            exact = sum(int(w) * int(v) for w, v in zip(weights[i], values[:, j], strict=True)) % ciphertexts.MODULUS
            wanted = round(exact * 2**32 / ciphertexts.MODULUS) % 2**32
            assert (int(found[i, j]) - wanted) % 2**32 in (0, 1, 2**32 - 1)
