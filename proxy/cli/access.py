"""The flags with which `demo`, `measure` and `status` reach a server that demands TLS or a user; named as etcdctl's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from proxy.config.values import ENV_PREFIX
from proxy.errors import WRONG_REQUEST, Failed

if TYPE_CHECKING:
    from proxy.measuring.load.target import ConnectionFiles

PASSWORD_ENV = ENV_PREFIX + "PASSWORD"


def access_options(user_of: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the flags; the command gets one argument `access`. `user_of` says whose user --user is, for the help."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, cacert: str, cert: str, key: str, user: str, password: str, **rest: Any) -> Any:
            return function(*args, access=_access(cacert, cert, key, user, password), **rest)

        for option in (
            click.option(
                "--password",
                envvar=PASSWORD_ENV,
                metavar="TEXT",
                default="",
                help=f"Password of --user. Prefer {PASSWORD_ENV}: all users of the machine can read command lines.",
            ),
            click.option("--user", metavar="NAME[:PASSWORD]", default="", help=f"{user_of}; asks for a password."),
            click.option("--key", metavar="FILE", default="", help="Private key (PEM) of --cert."),
            click.option("--cert", metavar="FILE", default="", help="Client certificate (PEM)."),
            click.option("--cacert", metavar="FILE", default="", help="CA bundle (PEM) to verify the server with."),
        ):
            wrapped = option(wrapped)
        return wrapped

    return add


def _access(cacert: str, cert: str, key: str, user: str, password: str) -> ConnectionFiles:
    """Check the files and ask for a password that is missing. Raises Failed."""
    from proxy.measuring.load.target import ConnectionFiles
    from upstream.errors import BadTls

    if bool(cert) != bool(key):
        raise Failed("--cert: requires --key" if cert else "--key: requires --cert", WRONG_REQUEST)
    name, colon, after = user.partition(":")
    if user and not colon:
        after = password or click.prompt(f"Password of {name}", hide_input=True, err=True)
    access = ConnectionFiles(cacert=cacert, cert=cert, key=key, user=name, password=after)
    if cacert or cert:
        try:
            access.http_context()
        except BadTls as error:
            raise Failed(str(error), WRONG_REQUEST) from None
    return access
