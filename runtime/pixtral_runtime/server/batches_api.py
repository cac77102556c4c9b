"""The routes of files and batches, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from pixtral_runtime.batch.openai_input import ENDPOINT
from pixtral_runtime.inputs.openai_messages import shown
from pixtral_runtime.server.batch_store import OPEN, Batch
from pixtral_runtime.server.batches import FOLDER, BatchApi
from pixtral_runtime.server.file_store import INPUT, StoredFile
from pixtral_runtime.server.problems import Problem
from pixtral_runtime.server.service import Service
from pixtral_runtime.server.upload import read_form

MOST_FILES_A_PAGE, MOST_BATCHES_A_PAGE, BATCHES_A_PAGE = 10_000, 100, 20
MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512


class Listed(Protocol):
    """What a list shows."""

    @property
    def id(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


Item = TypeVar("Item", bound=Listed)


def batch_routes(service: Service) -> list[Route]:
    routes = _BatchRoutes(service)
    return [
        Route("/v1/files", routes.upload, methods=["POST"]),
        Route("/v1/files", routes.list_files),
        Route("/v1/files/{id}", routes.file),
        Route("/v1/files/{id}", routes.delete, methods=["DELETE"]),
        Route("/v1/files/{id}/content", routes.content),
        Route("/v1/batches", routes.create, methods=["POST"]),
        Route("/v1/batches", routes.list_batches),
        Route("/v1/batches/{id}", routes.batch),
        Route("/v1/batches/{id}/cancel", routes.cancel, methods=["POST"]),
    ]


class _BatchRoutes:
    def __init__(self, service: Service) -> None:
        self._service = service

    @property
    def _api(self) -> BatchApi:
        if self._service.batches is None:
            raise Problem(404, f"this server has no Batch API; whoever runs it can give it a folder, {FOLDER}")
        return self._service.batches

    # Files

    async def upload(self, request: Request) -> Response:
        api = self._api
        if len(api.files) >= api.options.files:
            message = f"{api.options.files} files are kept here, and no more; delete some"
            raise Problem(400, message, code="too_many_files")
        path = api.files.new_upload()
        try:
            form = await read_form(request, path, api.options.file_bytes)
            try:
                if unknown := sorted(set(form.fields) - {"purpose"}):
                    raise Problem(400, f"{unknown[0]}: this server does not know the field", field=unknown[0])
                if form.filename is None:
                    raise Problem(400, "file: it is missing", field="file")
                if form.fields.get("purpose") != INPUT:
                    found = shown(form.fields.get("purpose"))
                    raise Problem(400, f'purpose: expected "{INPUT}", found {found}', field="purpose")
                file = await run_in_threadpool(api.files.adopt, path, form.filename)
            finally:
                form.drop()
        except OSError as error:
            raise Problem(507, f"the file cannot be kept: {error.strerror}") from error
        return JSONResponse(file.to_dict())

    async def list_files(self, request: Request) -> Response:
        files: Sequence[StoredFile] = self._api.files.all()
        query = request.query_params
        if query.get("order", "desc") not in ("asc", "desc"):
            raise Problem(400, f"order: expected asc or desc, found {shown(query['order'])}", field="order")
        if query.get("order") != "asc":
            files = files[::-1]
        if "purpose" in query:
            files = [file for file in files if file.purpose == query["purpose"]]
        return _page(files, query, MOST_FILES_A_PAGE, MOST_FILES_A_PAGE)

    async def file(self, request: Request) -> Response:
        return JSONResponse(self._file(request).to_dict())

    async def content(self, request: Request) -> Response:
        path = self._api.files.path(self._file(request).id)
        return FileResponse(path, media_type="application/octet-stream")

    async def delete(self, request: Request) -> Response:
        file, api = self._file(request), self._api
        user = next((one for one in api.batches.all() if one.input_file_id == file.id and one.status in OPEN), None)
        if user is not None:
            raise Problem(400, f"{file.id} is the input of {user.id}, which is not done", code="file_in_use")
        await run_in_threadpool(api.files.delete, file.id)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})

    def _file(self, request: Request) -> StoredFile:
        file = self._api.files.get(request.path_params["id"])
        if file is None:
            raise Problem(404, f"there is no file {shown(request.path_params['id'])}", field="id")
        return file

    # Batches

    async def create(self, request: Request) -> Response:
        api, service = self._api, self._service
        body = await service.body(request)
        asked = _asked(body)
        file = api.files.get(asked["input_file_id"])
        if file is None or file.purpose != INPUT:
            problem = f"input_file_id: there is no file {shown(asked['input_file_id'])} of the purpose {INPUT}"
            raise Problem(400, problem, field="input_file_id")
        try:
            batch = await run_in_threadpool(
                api.batches.create, file.id, ENDPOINT, service.name, asked.get("metadata"), api.options.batches
            )
        except OSError as error:
            raise Problem(507, f"the batch cannot be kept: {error.strerror}") from error
        api.worker.check(batch)
        return JSONResponse(batch.to_dict())

    async def list_batches(self, request: Request) -> Response:
        batches = self._api.batches.all()[::-1]
        return _page(batches, request.query_params, BATCHES_A_PAGE, MOST_BATCHES_A_PAGE)

    async def batch(self, request: Request) -> Response:
        return JSONResponse(self._batch(request).to_dict())

    async def cancel(self, request: Request) -> Response:
        batch, api = self._batch(request), self._api
        if batch.status not in ("validating", "in_progress", "cancelling"):
            raise Problem(400, f"{batch.id} is {batch.status}, and cannot be cancelled", code="invalid_status")
        others = ("cancelling", "finalizing", "completed", "failed", "expired", "cancelled")
        batch = await run_in_threadpool(lambda: api.batches.change(batch.id, "cancelling", unless=others))
        api.worker.wake()
        return JSONResponse(batch.to_dict())

    def _batch(self, request: Request) -> Batch:
        batch = self._api.batches.get(request.path_params["id"])
        if batch is None:
            raise Problem(404, f"there is no batch {shown(request.path_params['id'])}", field="id")
        return batch


def _asked(body: object) -> dict[str, Any]:
    """A body that creates a batch. Raises Problem."""
    if not isinstance(body, dict):
        raise Problem(400, f"expected an object, found {shown(body)}")
    asked = {name: value for name, value in body.items() if value is not None}
    for name, value in (("endpoint", ENDPOINT), ("completion_window", "24h")):
        if asked.get(name) != value:
            raise Problem(400, f'{name}: expected "{value}", found {shown(asked.get(name))}', field=name)
    if not isinstance(asked.get("input_file_id"), str):
        found = shown(asked.get("input_file_id"))
        raise Problem(400, f"input_file_id: expected a string, found {found}", field="input_file_id")
    metadata = asked.get("metadata", {})
    is_known = isinstance(metadata, dict) and len(metadata) <= MOST_METADATA
    if not is_known or not all(
        isinstance(value, str) and len(key) <= LONGEST_KEY and len(value) <= LONGEST_VALUE
        for key, value in metadata.items()
    ):
        kind = f"{MOST_METADATA} strings of {LONGEST_VALUE} characters at most, under names of {LONGEST_KEY}"
        raise Problem(400, f"metadata: expected {kind}", field="metadata")
    if unknown := sorted(set(asked) - {"endpoint", "completion_window", "input_file_id", "metadata"}):
        raise Problem(400, f"{unknown[0]}: this server does not know the field", field=unknown[0])
    return asked


def _page(items: Sequence[Item], query: Mapping[str, str], usual: int, most: int) -> Response:
    """Some of a list, from behind the one that `after` names. Raises Problem."""
    text = query.get("limit", str(usual))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise Problem(400, f"limit: expected a whole number from 1 to {most}, found {shown(text)}", field="limit")
    start = 0
    if "after" in query:
        ids = [item.id for item in items]
        if query["after"] not in ids:
            raise Problem(400, f"after: there is no {shown(query['after'])}", field="after")
        start = ids.index(query["after"]) + 1
    page = items[start : start + int(text)]
    return JSONResponse({
        "object": "list",
        "data": [item.to_dict() for item in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": start + len(page) < len(items),
    })  # fmt: skip
