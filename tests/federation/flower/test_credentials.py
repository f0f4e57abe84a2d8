"""A federation's folder: real keys and certificates, checked by OpenSSL's, OpenSSH's and Flower's own readers."""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import ssl
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from flwr.cli.supernode.register import try_load_public_key
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from folklora.errors import FederationError
from folklora.federation.flower import certificates
from folklora.federation.flower.credentials import add, init, renew
from folklora.federation.flower.membership import Federation, Membership

OPENSSH = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init(tmp_path / "study", ["north", "south"], host="study.example.org")
    return tmp_path / "study"


def modes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}


def shakes_hands(certificate: Path, key: Path, ca: Path, host: str) -> bool:
    """Whether a client that trusts ``ca`` and asks for ``host`` accepts the server; both ends are OpenSSL's."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError:
        return False
    return ends[0].version() == "TLSv1.3"


# -- init --------------------------------------------------------------------------------------------------------------


def test_private_keys_are_the_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        init(tmp_path / "f", ["a"])
    finally:
        os.umask(before)
    found = modes(tmp_path / "f")
    assert {name: mode for name, mode in found.items() if mode in (0o600, 0o700)} == {
        **dict.fromkeys([".", "server", "members", "members/a"], 0o700),
        **dict.fromkeys(["ca.key", "server/server.key", "members/a/key"], 0o600),
    }
    assert set(found) - {name for name, mode in found.items() if mode in (0o600, 0o700)} == {
        "federation.toml",
        "ca.crt",
        "server/server.crt",
        "members/a/member.toml",
        "members/a/ca.crt",
        "members/a/key.pub",
    }


def test_private_keys_are_never_readable_by_others_not_even_while_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        written.append(os.fstat(descriptor).st_mode & 0o777)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    before = os.umask(0)
    try:
        init(tmp_path / "f", ["a", "b"])
    finally:
        os.umask(before)
    assert written.count(0o600) == 4  # of the authority, the server, a and b
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("host", ["study.example.org", "192.0.2.7", "2001:db8::7", "localhost"])
def test_openssl_accepts_the_server_as_host_and_on_loopback(tmp_path: Path, host: str) -> None:
    made = init(tmp_path / "f", ["a"], host=host)
    files = (made.server_certificate, made.server_key, made.ca)
    for name in (host, "localhost", "127.0.0.1", "::1"):
        assert shakes_hands(*files, name), name
    assert not shakes_hands(*files, "elsewhere.example.org")
    assert not shakes_hands(made.server_certificate, made.server_key, init(tmp_path / "g", ["a"]).ca, "localhost")


def test_flower_and_openssh_read_the_members_keys(folder: Path) -> None:
    member = Membership.read(folder, "north")
    keys = _try_setup_client_authentication(
        argparse.Namespace(auth_supernode_private_key=str(member.key), auth_supernode_public_key=None)
    )
    assert keys is not None
    assert isinstance(keys[0].curve, ec.SECP384R1)
    registered = try_load_public_key(folder / "members" / "north" / "key.pub")
    assert registered == certificates.member_spki(certificates.member_public_of(member.key.read_bytes()))
    if shutil.which("ssh-keygen"):
        shown = subprocess.run(["ssh-keygen", "-y", "-f", member.key], capture_output=True, check=True, timeout=60)
        assert shown.stdout == (folder / "members" / "north" / "key.pub").read_bytes()


def test_what_was_made_reads_back(folder: Path) -> None:
    found = Federation.read(folder)
    assert (found.name, found.host, found.port, found.members) == (
        "study",
        "study.example.org",
        9443,
        ["north", "south"],
    )
    assert found.address == "study.example.org:9443"
    assert set(found.public_keys()) == {"north", "south"}
    member = Membership.read(folder, "south")
    assert (member.name, member.federation, member.address) == ("south", "study", found.address)
    assert init(folder.parent / "v6", ["a"], host="::1", port=1).address == "[::1]:1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"members": []}, "members = \\[\\]"),
        ({"members": ["a", "b", "a"]}, "members: 'a' twice"),
        ({"members": ["a", "A"]}, "members: 'A' twice"),
        ({"members": [""]}, "members: ''; allowed: up to 64 letters"),
        ({"members": [".hidden"]}, "members: '.hidden'; allowed"),
        ({"members": ["../up"]}, "members: '../up'; allowed"),
        ({"members": ["a\n"]}, "members: 'a.n'; allowed"),
        ({"members": ["a" * 65]}, "allowed: up to 64 letters"),
        ({"host": "https://example.org"}, "host: 'https://example.org'; allowed: the DNS name or IP address"),
        ({"host": "example.org:9443"}, "host: 'example.org:9443'"),
        ({"host": "0.0.0.0"}, "host: '0.0.0.0'"),
        ({"host": "::"}, "host: '::'"),
        ({"host": "fe80::1%eth0"}, "host: 'fe80::1%eth0'"),
        ({"host": "1.2.3.0x4"}, "host: '1.2.3.0x4'"),
        ({"host": "300.1.1.1"}, "host: '300.1.1.1'"),
        ({"host": "a_b.org"}, "host: 'a_b.org'"),
        ({"host": ""}, "host: ''"),
        ({"port": 0}, "port = 0: input should be greater than or equal to 1"),
        ({"port": 65536}, "port = 65536: input should be less than or equal to 65535"),
        ({"days": 0}, "days = 0; allowed: 1 to 36500"),
    ],
)
def test_what_is_not_allowed_is_named_and_nothing_made(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(FederationError, match=message) as caught:
        init(tmp_path / "f", **{"members": ["a"], **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FederationError, match=f"{folder}/.* is there already; nothing is overwritten"):
        init(folder, ["other"])
    with pytest.raises(FederationError, match="'north' twice"):
        add(folder, "north")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FederationError, match="file is there already"):
        init(tmp_path / "file", ["a"])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FederationError, match="link is there already"):
        init(tmp_path / "link", ["a"])
    (folder / "members" / "west").mkdir()
    (folder / "members" / "west" / "notes.txt").write_text("mine")
    with pytest.raises(FederationError, match="west/notes.txt is there already"):
        add(folder, "west")
    shutil.rmtree(folder / "members" / "west")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir(mode=0o755)
    init(tmp_path / "empty", ["a"])
    assert modes(tmp_path / "empty")["."] == 0o700


def test_an_interrupted_init_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def interrupted() -> tuple[bytes, bytes]:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return b"private", b"public"

    monkeypatch.setattr(certificates, "member_keys", interrupted)
    with pytest.raises(KeyboardInterrupt):
        init(tmp_path / "f", ["a", "b"])
    assert made
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FederationError, match="file/f: cannot be written: "):
        init(tmp_path / "file" / "f", ["a"])


# -- add ---------------------------------------------------------------------------------------------------------------


def test_a_member_is_added_with_a_new_pair(folder: Path) -> None:
    before = (folder / "members" / "north" / "key").read_bytes()
    assert add(folder, "west").folder == folder / "members" / "west"
    assert Federation.read(folder).members == ["north", "south", "west"]
    assert Membership.read(folder, "west").address == "study.example.org:9443"
    assert modes(folder)["members/west/key"] == 0o600
    assert modes(folder)["members/west"] == 0o700
    assert (folder / "members" / "north" / "key").read_bytes() == before


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_member_may_make_its_own_key(folder: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    (tmp_path / "id.pub").write_bytes(key.public_key().public_bytes(*OPENSSH) + b" me@hospital\n")
    add(folder, "west", tmp_path / "id.pub")
    home = folder / "members" / "west"
    assert sorted(path.name for path in home.iterdir()) == ["ca.crt", "key.pub", "member.toml"]
    assert try_load_public_key(home / "key.pub") == key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    Federation.read(folder)
    with pytest.raises(FederationError, match="west/key: no such file; put the private key of .*key.pub there"):
        Membership.read(home)
    (home / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    (home / "key").chmod(0o600)
    assert Membership.read(home).name == "west"


def compressed(line: bytes) -> bytes:
    """A public line whose point is spelt in a way that OpenSSH does not know."""
    kind, data = line.split()
    blob = base64.b64decode(data).replace(b"\x00\x00\x00\x61\x04", b"\x00\x00\x00\x61\x02")
    return kind + b" " + base64.b64encode(blob)


def test_keys_that_flower_would_refuse_are_refused_and_nothing_added(folder: Path, tmp_path: Path) -> None:
    private, _ = certificates.member_keys()
    wrong = {
        "ed25519": (ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*OPENSSH), "that Flower takes"),
        "rsa": (rsa.generate_private_key(65537, 2048).public_key().public_bytes(*OPENSSH), "that Flower takes"),
        "private": (private, "that is a private key, which stays with its member"),
        "nonsense": (b"ecdsa-sha2-nistp384 AAAA", "ssh-keygen -t ecdsa -b 384"),
        "empty": (b"", "ssh-keygen -t ecdsa -b 384"),
        "compressed": (compressed(certificates.member_keys()[1]), "ssh-keygen -t ecdsa -b 384"),
        "large": (b"a" * (2**20 + 1), "larger than 1048576 bytes"),
        "another's": ((folder / "members/north/key.pub").read_bytes(), "is the key of member 'north'"),
    }
    before = (folder / "federation.toml").read_bytes()
    for name, (data, message) in wrong.items():
        (tmp_path / "id.pub").write_bytes(data)
        with pytest.raises(FederationError, match=message) as caught:
            add(folder, "west", tmp_path / "id.pub")
        assert str(tmp_path / "id.pub") in str(caught.value), name
    with pytest.raises(FederationError, match="none.pub: cannot be read: No such file"):
        add(folder, "west", tmp_path / "none.pub")
    assert (folder / "federation.toml").read_bytes() == before
    assert sorted(path.name for path in (folder / "members").iterdir()) == ["north", "south"]


def test_members_added_at_once_are_all_in_the_list(folder: Path) -> None:
    names = [f"m{i}" for i in range(6)]
    threads = [threading.Thread(target=add, args=(folder, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(Federation.read(folder).members) == sorted(["north", "south", *names])


def test_a_member_that_cannot_be_listed_is_not_left_behind(folder: Path) -> None:
    before = (folder / "federation.toml").read_bytes()
    (folder / ".federation.toml.part").mkdir()  # in the way of the list's next version
    with pytest.raises(FederationError, match=r"federation.toml: cannot be written"):
        add(folder, "west")
    assert (folder / "federation.toml").read_bytes() == before
    assert not (folder / "members" / "west").exists()


# -- reading back ------------------------------------------------------------------------------------------------------


def test_a_handed_over_folder_is_enough(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "members" / "south", tmp_path / "elsewhere")
    assert Membership.read(tmp_path / "elsewhere").name == "south"
    assert Membership.read(tmp_path / "elsewhere", "south").key == tmp_path / "elsewhere" / "key"
    with pytest.raises(FederationError, match="is the folder of member 'south', not of 'north'"):
        Membership.read(tmp_path / "elsewhere", "north")
    with pytest.raises(FederationError, match=r"not a federation's folder \(no federation.toml in it\)"):
        Federation.read(tmp_path / "elsewhere")


def test_the_member_must_be_one_of_the_federation(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="no member 'east'; allowed: north, south"):
        Membership.read(folder, "east")
    with pytest.raises(FederationError, match=r"which member\? allowed: north, south"):
        Membership.read(folder)
    assert Membership.read(init(tmp_path / "one", ["only"]).folder).name == "only"
    with pytest.raises(FederationError, match=r"not a federation's folder \(no federation.toml or member.toml in it\)"):
        Membership.read(tmp_path)


def test_a_private_key_that_others_can_read_is_refused(folder: Path) -> None:
    for key, read in (
        (folder / "members" / "north" / "key", lambda: Membership.read(folder, "north")),
        (folder / "server" / "server.key", lambda: Federation.read(folder)),
        (folder / "ca.key", lambda: Federation.read(folder)),
    ):
        read()
        key.chmod(0o640)
        with pytest.raises(FederationError, match=f"{key}: others on this computer can read it; run: chmod 600 {key}"):
            read()
        key.chmod(0o600)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not valid TOML"),
        ("name = 'x'\nhost = 'h'\nport = 1", "members = .*: field required"),
        ("name = 'x'\nhost = 'h'\nport = '1'\nmembers = ['a']", "port = '1': input should be a valid integer"),
        ("name = 'x'\nhost = 'h'\nport = 1\nmembers = ['a']\nhosts = 1", "unknown key `hosts`; did you mean `host`"),
        ("name = 'x'\nhost = 'h'\nport = 1\nmembers = ['../a']", "members: '../a'; allowed"),
        (b"\xff\xfe", "cannot be read as text"),
    ],
)
def test_a_broken_list_is_one_line(folder: Path, text: str | bytes, message: str) -> None:
    (folder / "federation.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (Federation.read, lambda where: Membership.read(where, "north"), lambda where: add(where, "west")):
        with pytest.raises(FederationError, match=f"{folder}/federation.toml: .*{message}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_a_key_that_is_not_the_one_in_key_pub_is_refused(folder: Path) -> None:
    shutil.copy(folder / "members/south/key", folder / "members/north/key")
    with pytest.raises(FederationError, match=r"north/key.pub: is not the public key of .*north/key"):
        Membership.read(folder, "north")
    (folder / "members/north/key").write_bytes(b"nonsense")
    with pytest.raises(FederationError, match="north/key: not a private key; allowed: what `ssh-keygen"):
        Membership.read(folder, "north")
    shutil.copy(folder / "members/south/key.pub", folder / "members/north/key.pub")
    with pytest.raises(FederationError, match="south/key.pub: is the key of member 'north' too"):
        Federation.read(folder)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_a_damaged_key_is_one_line(folder: Path) -> None:
    key = folder / "members/north/key"
    begin, *lines, end = key.read_bytes().split(b"\n")[:-1]
    blob = base64.b64decode(b"".join(lines)).replace(b"\x00\x00\x00\x61\x04", b"\x00\x00\x00\x61\x02")
    for damaged in (base64.b64encode(blob), base64.b64encode(blob[: len(blob) // 2]), b"", b"\xff\x00"):
        key.write_bytes(b"\n".join([begin, damaged, end, b""]))
        with pytest.raises(FederationError, match="members/north/key: not a private key; allowed: what `ssh-keygen"):
            Membership.read(folder, "north")


def test_a_key_with_a_passphrase_is_refused(folder: Path) -> None:
    key = folder / "members/north/key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True, timeout=60, capture_output=True)
    with pytest.raises(FederationError, match="north/key: the private key has a passphrase"):
        Membership.read(folder, "north")


def certify(folder: Path, host: str, days: int) -> None:
    """A server certificate as the federation's authority would have made it."""
    data = [(folder / name).read_bytes() for name in ("server/server.key", "ca.key", "ca.crt")]
    (folder / "server/server.crt").write_bytes(certificates.server_certificate(host, days, *data))


def test_a_certificate_that_does_not_hold_now_is_refused_with_its_dates(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify(folder, "study.example.org", 0)
    with pytest.raises(
        FederationError, match=r"server.crt: the certificate expired: it holds from \d{4}-\d\d-\d\d"
    ) as e:
        Federation.read(folder)
    assert f"`folklora federation renew {folder}`" in str(e.value)
    renew(folder)
    monkeypatch.setattr(certificates, "BACKDATED", timedelta(days=-1))
    certify(folder, "study.example.org", 9)
    with pytest.raises(FederationError, match="server.crt: the certificate does not hold yet"):
        Federation.read(folder)
    _, ca = certificates.authority("study", 9)
    (folder / "members/north/ca.crt").write_bytes(ca)
    with pytest.raises(FederationError, match="north/ca.crt: the certificate does not hold yet"):
        Membership.read(folder, "north")


def test_a_server_that_members_would_refuse_is_refused_here(folder: Path, tmp_path: Path) -> None:
    certify(folder, "old.example.org", 9)
    with pytest.raises(FederationError, match="not for host 'study.example.org'; it is for old.example.org, localhost"):
        Federation.read(folder)
    other = init(tmp_path / "other", ["a"], host="study.example.org")
    shutil.copy(other.server_certificate, folder / "server/server.crt")
    with pytest.raises(FederationError, match=r"server.crt: the certificate is not for server.key"):
        Federation.read(folder)
    shutil.copy(other.server_key, folder / "server/server.key")
    with pytest.raises(FederationError, match=r"server.crt: the certificate is not signed by ca.crt"):
        Federation.read(folder)
    (folder / "server/server.crt").write_bytes(b"nonsense")
    with pytest.raises(FederationError, match=r"server.crt: not a certificate in PEM"):
        Federation.read(folder)
    (folder / "server/server.crt").unlink()
    with pytest.raises(FederationError, match=r"server.crt: cannot be read: No such file"):
        Federation.read(folder)


# -- renew -------------------------------------------------------------------------------------------------------------


def test_renewal_follows_the_host_and_members_notice_nothing(folder: Path) -> None:
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "server.crt"}
    text = (folder / "federation.toml").read_text().replace("study.example.org", "new.example.org")
    (folder / "federation.toml").write_text(text)
    with pytest.raises(FederationError, match="not for host 'new.example.org'"):
        Federation.read(folder)
    found = renew(folder, 30)
    ca = folder / "members" / "north" / "ca.crt"
    assert shakes_hands(found.server_certificate, found.server_key, ca, "new.example.org")
    left = certificates.load_certificate(found.server_certificate.read_bytes())
    assert left.not_valid_after_utc - left.not_valid_before_utc < timedelta(days=31)
    kept[folder / "federation.toml"] = text.encode()
    assert {path: path.read_bytes() for path in kept} == kept


def test_renewal_needs_the_authoritys_key(folder: Path, tmp_path: Path) -> None:
    certificate = (folder / "server/server.crt").read_bytes()
    shutil.copy(init(tmp_path / "other", ["a"]).folder / "ca.key", folder / "ca.key")
    with pytest.raises(FederationError, match=r"ca.key: the certificate is not signed by ca.crt"):
        renew(folder)
    (folder / "ca.key").unlink()
    with pytest.raises(FederationError, match=r"ca.key: cannot be read: No such file"):
        renew(folder)
    assert (folder / "server/server.crt").read_bytes() == certificate
    Federation.read(folder)  # it may be kept elsewhere
    add(folder, "west")


# -- the command line and what it needs --------------------------------------------------------------------------------


def command(*arguments: object, code: str = "from folklora.cli import main; main()") -> tuple[int, str, str]:
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    return ran.returncode, ran.stdout, ran.stderr


def test_the_commands_make_and_extend_a_federation(tmp_path: Path) -> None:
    made = tmp_path / "f"
    code, out, err = command("federation", "init", made, "--members", "a, b", "--host", "h.example.org", "--port", 1234)
    assert (code, out) == (0, f"a: {made}/members/a\nb: {made}/members/b\n"), err
    code, out, err = command("federation", "add", made, "c")
    assert (code, out) == (0, f"c: {made}/members/c\n"), err
    found = Federation.read(made)
    assert (found.members, found.address) == (["a", "b", "c"], "h.example.org:1234")
    code, out, err = command("federation", "init", made, "--members", "a")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("is there already; nothing is overwritten\n")
    assert err.count("\n") == 1


def test_the_core_loads_nothing_of_flower() -> None:
    code = "import sys, folklora.federation.run, folklora.cli; print([m for m in sys.modules if m.startswith('flwr.')])"
    assert command(code=code)[:2] == (0, "[]\n")


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['cryptography'] = None; from folklora.cli import main; main()"
    found = command("federation", "init", tmp_path / "f", "--members", "a", code=code)
    assert found == (2, "", "error: a federation needs Flower: pip install 'folklora[flower]'\n")
