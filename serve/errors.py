"""The failure vocabulary: every code, its HTTP status and its words; and the one exception that carries it to a client.

posekit's errors and the stages' `Failure` already hold such a code, so no table translates them. An ApiError adds the
sentence, the field at fault and, where waiting helps, Retry-After.
"""

from __future__ import annotations

from typing import Final

from posekit.errors import PoseError
from workers.messages import Failure

#: code -> (status, what it means): the public list, shown in the OpenAPI document.
CODES: Final[dict[str, tuple[int, str]]] = {
    "bad_body": (400, "the body does not parse: not JSON, MessagePack or multipart, NaN in JSON, broken base64, empty"),
    "bad_data": (400, "an image, a mask or a mesh does not parse"),
    "key_missing": (401, "this server wants an API key"),
    "key_wrong": (403, "the API key is not known, or was revoked"),
    "not_found": (404, "no such route"),
    "unknown_object": (404, "no object is registered under this id or name"),
    "no_cad_file": (404, "no CAD file at this path under the CAD root"),
    "method_not_allowed": (405, "the route exists, the method does not"),
    "body_timeout": (408, "the body stopped coming"),
    "too_large": (413, "the body, or what it decodes to, is over a limit"),
    "unsupported_media_type": (415, "the content type or content encoding is not understood"),
    "invalid": (422, "well-formed but wrong; `field` says where"),
    "units": (422, "depth, masks and CAD only fit each other with another unit; the detail says which"),
    "deadline_too_short": (422, "the deadline could not be met even by an idle server"),
    "over_capacity": (429, "the queue is too long for the deadline; come back after Retry-After seconds"),
    "rate_limited": (429, "this API key is over its rate"),
    "internal": (500, "our bug; the log has it under this request id"),
    "ism_failed": (502, "the instance-segmentation server failed"),
    "not_ready": (503, "the server is loading or warming up"),
    "draining": (503, "the server is shutting down"),
    "onboarding": (503, "the CAD is still being onboarded; it goes on, come back after Retry-After seconds"),
    "onboarding_failed": (422, "the CAD could not be onboarded"),
    "worker_lost": (503, "the process that held this request died, and so did its retry"),
    "storage_full": (503, "no room left on the server's disk"),
    "no_ism": (503, "no instance-segmentation server is configured"),
    "deadline": (504, "the deadline passed before the answer was ready"),
}


class ApiError(Exception):
    """A refusal or failure as the client sees it."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = CODES[code][0]
        self.detail = detail
        self.field = field
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


def from_posekit(error: PoseError) -> ApiError:
    """Return the client's view of an error raised in posekit."""
    return ApiError(error.code, error.detail, field=error.field)


def from_failure(failure: Failure) -> ApiError:
    """Return the client's view of a failure that came out of the pipeline."""
    waits = failure.code in ("storage_full", "not_ready")
    return ApiError(failure.code, failure.detail, field=failure.field, retry_after_s=30 if waits else None)


def internal_error() -> ApiError:
    """Return the error for a bug of ours. The caller must have logged what happened."""
    return ApiError("internal", "an internal error happened; the server's log has it under this request's id")


def worker_lost() -> ApiError:
    """Return the error for a request whose process died, and died again on every retry."""
    detail = "the process that held this request died, and so did its retries"
    return ApiError("worker_lost", detail, retry_after_s=5)
