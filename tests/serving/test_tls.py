"""The certificate that is made here: whom it names, who may read it, when it is made anew."""

from __future__ import annotations

import datetime
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from labkit.errors import UserError
from labkit.serving import tls
from labkit.serving.tls import given_certificate, own_certificate


def test_it_names_this_machine_and_the_hosts_asked_for(tmp_path: Path) -> None:
    made = own_certificate(("lab.example", "10.1.2.3", "0.0.0.0"), tmp_path)
    certificate = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"localhost", "lab.example"}
    assert set(map(str, names.get_values_for_type(x509.IPAddress))) == {"127.0.0.1", "::1", "10.1.2.3"}
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(made.certificate, made.key)


def test_only_its_owner_may_read_the_key(tmp_path: Path) -> None:
    made = own_certificate((), tmp_path)
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.key.parent.stat().st_mode) == 0o700


def test_it_is_kept_until_it_nears_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = own_certificate((), tmp_path)
    was = first.certificate.read_bytes()
    assert own_certificate((), tmp_path) == first and first.certificate.read_bytes() == was
    ends = x509.load_pem_x509_certificate(was).not_valid_after_utc
    assert datetime.timedelta(300) < ends - datetime.datetime.now(datetime.UTC) < datetime.timedelta(366)
    monkeypatch.setattr(tls, "RENEW_DAYS", 400)
    assert own_certificate((), tmp_path) == first and first.certificate.read_bytes() != was


@pytest.mark.parametrize("harm", ["key gone", "key of another", "certificate cut"])
def test_a_damaged_one_is_made_anew(tmp_path: Path, harm: str) -> None:
    made = own_certificate((), tmp_path / "a")
    if harm == "key gone":
        made.key.unlink()
    elif harm == "key of another":
        made.key.write_bytes(own_certificate((), tmp_path / "b").key.read_bytes())
    else:
        made.certificate.write_bytes(made.certificate.read_bytes()[:100])
    again = own_certificate((), tmp_path / "a")
    assert given_certificate(again.certificate, again.key) == again


def test_several_processes_make_one(tmp_path: Path) -> None:
    code = f"from labkit.serving.tls import *; print(own_certificate((), Path({str(tmp_path)!r})).key.read_text())"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(3)]
    assert len({child.communicate()[0] for child in children}) == 1


def test_ones_own_must_fit(tmp_path: Path) -> None:
    one, other = own_certificate((), tmp_path / "a"), own_certificate((), tmp_path / "b")
    with pytest.raises(UserError, match="does not belong"):
        given_certificate(one.certificate, other.key)
    with pytest.raises(UserError, match="cannot read .*none.pem"):
        given_certificate(tmp_path / "none.pem", one.key)
    with pytest.raises(UserError, match="PEM"):
        given_certificate(one.key, one.key)
    with pytest.raises(UserError, match="no certificate can name"):
        own_certificate(("höst",), tmp_path)
