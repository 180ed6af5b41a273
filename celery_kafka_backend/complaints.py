"""What librdkafka complains about, said in the user's words: which setting, its value, what to do.

librdkafka tells of a wrong password, authority or address only by a callback (``error_cb``), tries again
for ever, and lets records time out meanwhile: "timed out" would be all that a user learns. So each handle
has one `Complaints`, which hears, says each thing once per minute in the log, and remembers the last one
for the error of whoever waits. No secret is ever part of it: values of options that may hold one are left out.
"""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException
from kombu.utils.imports import symbol_by_name

from celery_kafka_backend.errors import NotAcknowledged, SettingsError
from celery_kafka_backend.settings import SETTING, is_secret, mask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from celery_kafka_backend.settings import Settings

logger = logging.getLogger(__name__)

SAY_EVERY_S: Final = 60.0
FRESH_S: Final = 90.0
"""How long a complaint explains what goes wrong: librdkafka repeats it every 30 s while it holds."""

CREDENTIALS: Final = "credentials"
"""Kafka answered, and does not let us in. The other kind:"""
NETWORK: Final = "network"

TOKEN_S: Final = 10.0
"""The driver's bound on the wait for a token, since confluent-kafka 2.13."""

_SELF_EXPLAINED: Final = (KafkaError._ALL_BROKERS_DOWN, KafkaError._FATAL)  # noqa: SLF001 - confluent-kafka's names
_BROKER: Final = re.compile(r"^\w+://[^ ]*: |\s*\(after \d+ms in state \w+.*\)$")


class Complaints:
    """Hears one handle's complaints; it is the ``error_cb``.

    Args:
        settings: The user's.
        quiet: Log nothing: the caller says it.
    """

    def __init__(self, settings: Settings, *, quiet: bool = False) -> None:
        self._settings = settings
        self._quiet = quiet
        self._theirs = named(settings.client, "error_cb")
        self._said: dict[str, float] = {}
        self._last = ("", "", -FRESH_S)
        self.token_error = ""
        """Why the user's ``oauth_cb`` gave no token, the last time."""

    def __call__(self, error: KafkaError) -> None:
        """Take a complaint of librdkafka's."""
        if self._theirs is not None:
            self._theirs(error)
        if error.code() in _SELF_EXPLAINED:
            return
        kind, text = self.explain(error)
        self._last = (kind, text, time.monotonic())
        self._say(text)

    def _say(self, text: str) -> None:
        what = text.rpartition("; ")[2]  # librdkafka has several words for one thing; the remedy is the same
        now = time.monotonic()
        if not self._quiet and now - self._said.get(what, -SAY_EVERY_S) >= SAY_EVERY_S:
            self._said[what] = now
            logger.error("%s", text)

    @property
    def kind(self) -> str:
        """`CREDENTIALS`, `NETWORK`, or "" if there was no complaint of late."""
        kind, _, at = self._last
        return kind if time.monotonic() - at < FRESH_S else ""

    @property
    def latest(self) -> str:
        """The last complaint, "" if there was none of late."""
        return self._last[1] if self.kind else ""

    def explain(self, error: KafkaError) -> tuple[str, str]:
        """Return the kind of a complaint, and what to say about it."""
        client, said = self._settings.client, _BROKER.sub("", str(error.str()))
        where = f"Kafka at {mask(self._settings.bootstrap_servers)}"
        code = error.code()
        if "mechanism handshake failed" in said and "Unsupported SASL mechanism" not in said:
            # Two renewals of one token met on one connection: the broker closes it, and nothing is wrong.
            return NETWORK, f"{where}: {said}; librdkafka connects again by itself"
        if code in (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED):  # noqa: SLF001
            return CREDENTIALS, f"{where} does not let us in: {said}; {self._about_sasl(said)}"
        if code == KafkaError._SSL:  # noqa: SLF001
            return CREDENTIALS, f"{where}: {said}; {_about_tls(client, said)}"
        if "SSL" in said or "security.protocol" in said or "ssl/tls" in said:
            return CREDENTIALS, f"{where}: {said}; {_about_tls(client, said)}"
        return NETWORK, f"{where}: {said}; check the address in result_backend and the network"

    def _about_sasl(self, said: str) -> str:
        client = self._settings.client
        mechanism = client.get("sasl.mechanism") or client.get("sasl.mechanisms") or "GSSAPI"
        if "mechanism handshake failed" in said:
            return f"correct {_option('sasl.mechanism', client)}"
        if mechanism == "OAUTHBEARER":
            why = f" ({self.token_error})" if self.token_error else ""
            return f"look into the token of {_option('oauth_cb', client)}{why}"
        return f"correct {_option('sasl.username', client)} or ['sasl.password']"

    def handle(self, make: Callable[[dict[str, Any]], Any], config: Mapping[str, Any]) -> Any:
        """Return a new handle that complains here.

        Args:
            make: ``Producer``, ``Consumer`` or ``AdminClient``.
            config: Its options.

        Raises:
            SettingsError: An option is unknown, or a file that it names cannot be used.
            NoToken: The user's ``oauth_cb`` gave none, within 10 s.
        """
        own = {**config, "error_cb": self}
        callback = own.get("oauth_cb")
        asked: list[str] = []  # no Event: the driver calls in a thread that gevent does not know
        if callback is not None:
            own["oauth_cb"] = self._tokens(callback, asked)
        try:
            made = make(own)
        except (KafkaException, TypeError, ValueError) as exc:
            found = exc.args[0] if exc.args else exc
            if isinstance(found, KafkaError) and found.code() == KafkaError.SASL_AUTHENTICATION_FAILED:
                raise self._no_token() from None
            why = found.str() if isinstance(found, KafkaError) else str(found)
            raise unusable(self._settings, why) from None
        if callback is not None:
            _wait_for_token(made, asked)
            if self.token_error or not asked:
                raise self._no_token()
        return made

    def _no_token(self) -> NoToken:
        text = f"{_option('oauth_cb', self._settings.client)} gave no token"
        return NoToken(f"{text}: {self.token_error}" if self.token_error else text)

    def _tokens(self, callback: Callable[[str], Any], asked: list[str]) -> Callable[[str], Any]:
        """Return a callback that notes why it fails: the driver drops the exception, and dies of another shape."""
        if not callable(callback):
            raise SettingsError(_option("oauth_cb", self._settings.client), "it is no callable", "give a function")

        def token(config: str) -> tuple[Any, ...]:
            try:
                found = _checked(callback(config))
            except Exception as exc:
                self.token_error = f"{type(exc).__name__}: {exc}"
                self._say(f"{_option('oauth_cb', self._settings.client)}: {self.token_error}")
                raise
            finally:
                asked.append(config)
            self.token_error = ""
            return found

        return token


class NoToken(NotAcknowledged):
    """Raised when the user's ``oauth_cb`` gives no token; it may give one later."""


def _wait_for_token(made: Any, asked: list[str]) -> None:
    """Let an older driver ask for the first token: before confluent-kafka 2.13 only ``poll`` does."""
    deadline = time.monotonic() + TOKEN_S
    while not asked and time.monotonic() < deadline:
        made.poll(0.05)


def _checked(found: Any) -> tuple[Any, ...]:
    """Return what an ``oauth_cb`` gave, if the driver can use it."""
    if not (isinstance(found, tuple) and 2 <= len(found) <= 4 and isinstance(found[0], str)):
        raise TypeError("it must return (token, expiry in seconds since 1970[, principal[, extensions]])")
    ago = time.time() - found[1]
    if ago >= 0:
        raise ValueError(f"its token expired {ago:.0f} s ago")
    return found


def named(options: Mapping[str, Any], name: str) -> Any:
    """Return what an option names by its dotted path, or is; None if it is not given.

    Raises:
        SettingsError: There is no such thing.
    """
    given = options.get(name)
    return imported(f"{SETTING}['client'][{name!r}]", given) if isinstance(given, str) else given


def imported(setting: str, path: str) -> Any:
    """Return what is at a dotted path.

    Args:
        setting: Whose value the path is.
        path: ``package.module.function``.

    Raises:
        SettingsError: There is no such thing.
    """
    try:
        return symbol_by_name(path)
    except Exception as exc:
        raise SettingsError(setting, f"{path!r} cannot be imported: {exc}", "give 'package.module.function'") from exc


def unusable(settings: Settings, why: str) -> SettingsError:
    """Return the error for options that librdkafka refuses."""
    for where in ("client", "producer", "consumer"):
        options: Mapping[str, Any] = getattr(settings, where)
        for value in options.values():  # of an option that may hold a secret none is shown, whoever quotes it
            if isinstance(value, str) and len(value) > 3 and value in why and _hides(options, value):
                why = why.replace(value, "**")
        for name in sorted(options, key=lambda name: (name in why, len(name)), reverse=True):
            value = options[name]
            quoted = isinstance(value, str) and len(value) > 2 and not is_secret(name) and value in why
            if name in why or quoted:
                return SettingsError(
                    f"{SETTING}[{where!r}][{name!r}]", f"{_shown(name, options[name])}: {why}", _remedy(name)
                )
    return SettingsError(f"{SETTING}['client'], ['producer'] or ['consumer']", why, _CONFIGURATION)


# Not all but the secret ones: a misspelt ``sasl.pasword`` is as secret.
_SHOWN: Final = re.compile(r"\.location$|\.protocol$|^sasl\.mechanisms?$|^sasl\.username$|_cb$|\.ms$|\.bytes$")
_CONFIGURATION: Final = "see librdkafka's CONFIGURATION.md for its options"


def _hides(options: Mapping[str, Any], value: str) -> bool:
    return any(is_secret(name) for name, one in options.items() if one == value)


def _remedy(name: str) -> str:
    return "give a file that this process can read" if name.endswith(".location") else _CONFIGURATION


def _shown(name: str, value: object) -> str:
    return repr(value) if _SHOWN.search(name) and isinstance(value, (str, int)) else "the value (not shown)"


def _option(name: str, options: Mapping[str, Any]) -> str:
    given = options.get(name)
    return f"{SETTING}['client'][{name!r}] " + (f"= {_shown(name, given)}" if given is not None else "(not set)")


def _about_tls(client: Mapping[str, Any], said: str) -> str:
    if "certificate verify failed" in said or "could not be verified" in said:
        return f"correct {_option('ssl.ca.location', client)}: it must hold the authority of the brokers' certificates"
    if "bad certificate" in said or "certificate required" in said:
        return f"the broker wants another client's certificate than {_option('ssl.certificate.location', client)}"
    return f"does this listener speak {_option('security.protocol', client)}?"
