"""Kits and members: who is let in, and why others are not."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gossamer.errors import AuthenticationError, ConfigError, GossamerWarning
from gossamer.transport import authentication, certificates
from gossamer.transport.authentication import Kit, MemberList, load_kit
from gossamer.transport.provisioning import provision


def again(directory: Path, **changes: list[str]) -> None:
    provision(directory.parent / "FEDERATION.yaml", directory, **changes)


class TestKits:
    def test_of_another_kind(self, directory: Path) -> None:
        assert load_kit(directory / "kits" / "server", "server").kind == "server"
        with pytest.raises(ConfigError, match=r"is that of server 'server': give the kit of a client"):
            load_kit(directory / "kits" / "server", "client")

    def test_what_is_read(self, directory: Path) -> None:
        kit = load_kit(directory / "kits" / "ucsf")
        assert (kit.federation, kit.node, kit.kind, kit.number, kit.server) == (
            "hospitals",
            "ucsf",
            "client",
            1,
            "fl.example.org:8443",
        )
        assert kit.key.startswith(b"-----BEGIN PRIVATE KEY-----")

    def test_what_is_shown_has_no_secret(self, directory: Path) -> None:
        kit = load_kit(directory / "kits" / "server")
        assert kit.token not in repr(kit)
        assert "PRIVATE" not in repr(kit)

    @pytest.mark.parametrize("name", ["node.key", "token"])
    def test_secrets_that_others_may_read(self, directory: Path, name: str) -> None:
        kit = directory / "kits" / "ucsf"
        (kit / name).chmod(0o640)
        with pytest.raises(AuthenticationError, match=rf"others may read .*{name}', which is secret: chmod 600 /"):
            load_kit(kit)

    @pytest.mark.parametrize("name", ["kit.json", "ca.crt", "node.crt", "node.key", "token"])
    def test_a_file_is_missing(self, directory: Path, name: str) -> None:
        (directory / "kits" / "ucsf" / name).unlink()
        with pytest.raises(ConfigError, match=name):
            load_kit(directory / "kits" / "ucsf")

    @pytest.mark.parametrize("name", ["kit.json", "ca.crt", "node.crt", "node.key"])
    def test_a_file_is_damaged(self, directory: Path, name: str) -> None:
        path = directory / "kits" / "ucsf" / name
        secret = path.read_text()
        path.write_text(secret[: len(secret) // 2])
        with pytest.raises(ConfigError, match=r"damaged|is no JSON") as caught:
            load_kit(path.parent)
        assert not set(secret.split("\n")[1:3]) & set(str(caught.value).split())

    @pytest.mark.parametrize("name", ["ca.crt", "node.crt", "node.key"])
    def test_files_of_different_kits(self, directory: Path, name: str) -> None:
        other = directory.parent / "stranger" / "kits" / "charite"
        shutil.copy(other / name, directory / "kits" / "charite" / name)
        with pytest.raises(ConfigError, match="has files of different kits"):
            load_kit(directory / "kits" / "charite")

    @pytest.mark.parametrize(
        ("made_days_ago", "days", "sentence"),
        [
            (40, 30, r"certificate of node 'ucsf' expired on .*--renew ucsf"),
            (4000, 3650, r"authority of federation 'hospitals' expired on"),
            (-2, 30, r"certificate of node 'ucsf' holds from .*: set the clock"),
        ],
    )
    def test_out_of_date(self, made: Path, tmp_path: Path, made_days_ago: int, days: int, sentence: str) -> None:
        file = tmp_path / "FEDERATION.yaml"
        file.write_text((made / "FEDERATION.yaml").read_text() + f"days: {days}\n")
        now = datetime.now(UTC) - timedelta(days=made_days_ago)
        told = provision(file, tmp_path / "federation", now=now) if days > 30 else warned(file, tmp_path, now)
        assert told
        with pytest.raises(AuthenticationError, match=sentence):
            load_kit(tmp_path / "federation" / "kits" / "ucsf")

    def test_a_warning_before(self, made: Path, tmp_path: Path) -> None:
        file = tmp_path / "FEDERATION.yaml"
        file.write_text((made / "FEDERATION.yaml").read_text() + "days: 20\n")
        assert warned(file, tmp_path, datetime.now(UTC))
        with pytest.warns(GossamerWarning, match=r"certificate of node 'ucsf' expires on .*--renew ucsf"):
            load_kit(tmp_path / "federation" / "kits" / "ucsf")


def warned(file: Path, tmp_path: Path, now: datetime) -> bool:
    with pytest.warns(GossamerWarning, match="expires on"):
        provision(file, tmp_path / "federation", now=now)
    return True


class TestMembers:
    def verify(self, directory: Path, kit: Kit, node: str = "", token: str | None = None, days: int = 0) -> None:
        path = directory / "kits" / "server" / "members.json"
        members = MemberList(path, "hospitals", lambda: datetime.now(UTC) + timedelta(days=days))
        members.verify(kit.certificate, node or kit.node, kit.token if token is None else token)

    def test_let_in(self, directory: Path) -> None:
        for node in ("ucsf", "charite", "server"):
            self.verify(directory, load_kit(directory / "kits" / node))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"node": "charite"}, r"calls itself 'charite', but its certificate is that of 'ucsf'"),
            ({"node": "x" * 1000}, r"calls itself 'x{100}', but"),
            ({"token": ""}, r"node 'ucsf' gave another token than that of its kit"),
            ({"token": "x" * 1_000_000}, r"node 'ucsf' gave another token"),
            ({"token": "\ud800"}, r"node 'ucsf' gave another token"),
            ({"days": 400}, r"certificate of node 'ucsf' holds from .* only: renew it"),
        ],
    )
    def test_refused(self, directory: Path, changes: dict[str, str], sentence: str) -> None:
        with pytest.raises(AuthenticationError, match=sentence) as caught:
            self.verify(directory, load_kit(directory / "kits" / "ucsf"), **changes)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 500

    def test_the_token_of_another_node(self, directory: Path) -> None:
        other = load_kit(directory / "kits" / "charite")
        with pytest.raises(AuthenticationError, match="gave another token") as caught:
            self.verify(directory, load_kit(directory / "kits" / "ucsf"), token=other.token)
        assert other.token not in str(caught.value)

    def test_the_same_name_in_another_federation_of_that_name(self, directory: Path) -> None:
        """TLS refuses it before, because another authority signed it; but its number is unknown, too."""
        with pytest.raises(AuthenticationError, match="was revoked or replaced"):
            self.verify(directory, load_kit(directory.parent / "stranger" / "kits" / "ucsf"))

    def test_no_certificate(self, directory: Path) -> None:
        members = MemberList(directory / "members.json", "hospitals")
        for shown in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
            with pytest.raises(AuthenticationError, match="showed no certificate"):
                members.verify(shown, "ucsf", "")

    @pytest.mark.parametrize(
        ("change", "is_out"), [({"revoke": ["ucsf"]}, True), ({"renew": ["ucsf"]}, True), ({}, False)]
    )
    def test_the_list_is_read_again(self, directory: Path, change: dict[str, list[str]], is_out: bool) -> None:
        kit = load_kit(directory / "kits" / "ucsf")
        members = MemberList(directory / "kits" / "server" / "members.json", "hospitals")
        members.verify(kit.certificate, "ucsf", kit.token)
        again(directory, **change)
        if is_out:
            with pytest.raises(AuthenticationError, match="was revoked or replaced"):
                members.verify(kit.certificate, "ucsf", kit.token)
        else:
            members.verify(kit.certificate, "ucsf", kit.token)

    def test_a_renewed_kit_is_let_in(self, directory: Path) -> None:
        again(directory, revoke=["ucsf"])
        again(directory, renew=["ucsf"])
        self.verify(directory, load_kit(directory / "kits" / "ucsf"))

    def test_a_node_that_was_never_added(self, directory: Path) -> None:
        authority = certificates.Pair(
            (directory / "authority/ca.crt").read_bytes(), (directory / "authority/ca.key").read_bytes()
        )
        pair = certificates.issue(authority, "hospitals", "new", [], 30, datetime.now(UTC))
        members = MemberList(directory / "members.json", "hospitals")
        with pytest.raises(AuthenticationError, match=r"node 'new' is no member of federation 'hospitals'"):
            members.verify(pair.certificate, "new", "")

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"federation": "banks"}', None])
    def test_without_a_list_nobody_is_let_in(self, directory: Path, text: str | None) -> None:
        kit, path = load_kit(directory / "kits" / "ucsf"), directory / "kits" / "server" / "members.json"
        times, before = [datetime.now(UTC)], path.read_text()
        members = MemberList(path, "hospitals", lambda: times[-1])
        path.unlink()
        if text is not None:
            path.write_text(text)
        for _ in range(2):  # while it is being replaced, the old one holds
            members.verify(kit.certificate, "ucsf", kit.token)
            times.append(times[-1] + timedelta(seconds=9))
        for _ in range(2):
            with pytest.raises(ConfigError):
                members.verify(kit.certificate, "ucsf", kit.token)
        path.write_text(before)
        members.verify(kit.certificate, "ucsf", kit.token)

    @pytest.mark.parametrize("text", ["", "{}", '{"federation": "banks"}', None])
    def test_a_list_that_never_was_one(self, directory: Path, text: str | None) -> None:
        path = directory / "kits" / "server" / "members.json"
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError):
            load_kit(path.parent).credentials()

    def test_tokens_are_compared_in_constant_time(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compared: list[tuple[str, str]] = []
        monkeypatch.setattr(authentication.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
        kit = load_kit(directory / "kits" / "ucsf")
        self.verify(directory, kit)
        assert compared == [(authentication.hash_of(kit.token),) * 2]
