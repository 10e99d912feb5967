"""
Real data and weights.
"""
import email.utils
import random
import time

import requests


class NetError(Exception):
    """A request that failed for good: what was asked for, how often, and the last reason."""


def retry_after(response):
    """Seconds a server asks to wait (a number, or a date), at most 300; None where it does not say."""
    said = response.headers.get("Retry-After", "").strip()
    if said.isdigit():
        return min(int(said), 300)
    try:
        return min(max(email.utils.parsedate_to_datetime(said).timestamp() - time.time(), 0), 300)
    except ValueError:
        return None


def patiently(send, what, tries=5, pause=1.0):
    """send() -> requests.Response, sent again with exponential back-off and jitter after transport errors, 408, 429
    and 5xx; honours Retry-After (seconds or a date, at most 300 s). Returns the first response with any other
    status; raises NetError naming `what`, the number of tries and the last reason."""
    for n in range(tries):
        wait = pause * 2 ** n * random.uniform(0.5, 1.0)
        try:
            response = send()
        except requests.RequestException as e:
            if isinstance(e, (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema,
                              requests.exceptions.InvalidSchema)):
                raise NetError(f"{what}: {e}") from None  # asking again will not help
            reason = f"{type(e).__name__}: {e}"
        else:
            if response.status_code not in (408, 429) and response.status_code < 500:
                return response
            reason, told = f"status {response.status_code} {response.reason}", retry_after(response)
            wait = wait if told is None else told
            response.close()
        if n + 1 < tries:
            time.sleep(wait)
    raise NetError(f"{what}: gave up after {tries} tries, the last: {reason}")
