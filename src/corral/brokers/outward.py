"""Whom brokers trust outside."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from corral.errors import RequestError


def tls_context(environment: Mapping[str, str]) -> ssl.SSLContext:
    """The authorities of the system, or those that ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` name. Raises RequestError."""
    file, directory = environment.get("SSL_CERT_FILE") or None, environment.get("SSL_CERT_DIR") or None
    try:
        return ssl.create_default_context(cafile=file, capath=directory)
    except (OSError, ssl.SSLError, ValueError):
        raise RequestError(f"SSL_CERT_FILE ({file}) or SSL_CERT_DIR cannot be read") from None
