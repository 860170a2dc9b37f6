"""An object store on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import fsspec
import pytest


@contextmanager
def bucket(name: str) -> Iterator[str]:
    """The URL of a bucket of a server in this process, which other processes find by their environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", address)
            for key, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
                patch.setenv(f"AWS_{key}", value)
            fsspec.filesystem("s3").mkdir(name)
            yield f"s3://{name}"
            fsspec.filesystem("s3").clear_instance_cache()
    finally:
        # What it holds is the process's, and would be there in the next server
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()
        server.stop()
