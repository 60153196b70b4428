"""An S3 server on localhost that can be told to have bad days."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest


class S3Server:
    """moto's application. `spoil`: (method, path) -> HTTP status to answer with, or None to let the request through.

    One request at a time: moto looks for the key and then writes it, so that two conditional PUTs at once could both win.
    """

    def __init__(self, app: Callable) -> None:
        self.app = app
        self.lock = threading.Lock()
        self.spoil: Callable[[str, str], str | None] = lambda method, path: None

    def __call__(self, environ: dict, start_response: Callable) -> Iterator[bytes]:
        status = self.spoil(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if status is None:
            with self.lock:
                return self.app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = {"409": "ConditionalRequestConflict", "503": "SlowDown"}[status[:3]]
        start_response(status, [("Content-Type", "application/xml")])
        return iter([f"<Error><Code>{code}</Code><Message>{status}</Message></Error>".encode()])


def serve_s3() -> Iterator[S3Server]:
    """For a fixture: the server runs, with a bucket named `bucket`, and the environment leads s3fs to it. Skips without moto."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from werkzeug.serving import make_server

    app = S3Server(server.DomainDispatcherApplication(server.create_backend_app))
    httpd = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{httpd.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "made-up")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)      # moto's buckets outlive its server
        yield app
        s3fs.S3FileSystem.clear_instance_cache()
    httpd.shutdown()
    httpd.server_close()
    thread.join()
