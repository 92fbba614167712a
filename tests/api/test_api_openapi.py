"""The OpenAPI description: complete, closed in itself, and true to what the API does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from taskd import errors
from taskd.api.routes import ROUTES, openapi_document
from tests.api.fakes import FakeService

SCHEMA_WORDS = {
    "$ref", "additionalProperties", "anyOf", "contentEncoding", "default", "description", "enum", "examples", "items",
    "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength", "minimum", "pattern", "properties",
    "propertyNames", "required", "title", "type",
}  # fmt: skip


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(openapi_document())
    return decoded


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from walk(part)
    elif isinstance(value, list):
        for part in value:
            yield from walk(part)


def schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Every schema below one, itself included."""
    yield value
    for part in (*value.get("properties", {}).values(), *value.get("anyOf", ())):
        yield from schemas(part)
    for word in ("items", "additionalProperties", "propertyNames"):
        if isinstance(value.get(word), dict):
            yield from schemas(value[word])


async def test_it_is_served(service: FakeService, document: dict[str, Any]) -> None:
    assert await service.ask("GET", "/openapi.json") == (200, document)


def test_the_frame(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert document.keys() <= {"openapi", "info", "servers", "paths", "components"}
    assert {"title", "version"} <= document["info"].keys()


def test_every_route_is_described_once(document: dict[str, Any]) -> None:
    described = {(method.upper(), path) for path, method, _ in operations(document)}
    assert described == {(route.method, route.path) for route in ROUTES}
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    references = [value["$ref"] for value in walk(document) if "$ref" in value]
    assert references
    for reference in references:
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_no_component_is_left_over(document: dict[str, Any]) -> None:
    used = {value["$ref"] for value in walk(document) if "$ref" in value}
    for group, components in document["components"].items():
        assert {f"#/components/{group}/{name}" for name in components} <= used


def test_operations_are_whole(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        assert operation["summary"]
        in_path = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] == "path"]
        assert [parameter["name"] for parameter in in_path] == (["id"] if "{id}" in path else [])
        assert all(parameter["required"] is True for parameter in in_path)
        names = [(parameter["in"], parameter["name"]) for parameter in operation.get("parameters", ())]
        assert len(set(names)) == len(names)
        assert all(parameter["description"] and parameter["schema"] for parameter in operation.get("parameters", ()))
        if "requestBody" in operation:
            assert method == "post"
            assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert "200" in operation["responses"]
        for response in operation["responses"].values():
            assert response.keys() == {"$ref"} or response["description"]


def test_schemas_use_words_of_json_schema(document: dict[str, Any]) -> None:
    roots = list(document["components"]["schemas"].values())
    for _, _, operation in operations(document):
        contents = [operation.get("requestBody", {}), *operation["responses"].values()]
        roots += [media["schema"] for content in contents for media in content.get("content", {}).values()]
        roots += [parameter["schema"] for parameter in operation.get("parameters", ())]
    for root in roots:
        for schema in schemas(root):
            assert schema.keys() <= SCHEMA_WORDS, schema
            assert set(schema.get("required", ())) <= schema.get("properties", {}).keys()


def test_every_error_that_users_can_get_is_described(document: dict[str, Any]) -> None:
    statuses = {int(name.removeprefix("Error")) for name in document["components"]["responses"]}
    described = {status for _, _, operation in operations(document) for status in map(int, operation["responses"])}
    assert statuses <= described
    may_be_answered = {
        error.status
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.TaskdError)
    }
    # Those that belong to the connection and not to a route.
    assert may_be_answered - statuses <= {405, 408}


def test_submissions_are_one_or_many(document: dict[str, Any]) -> None:
    schema = document["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    reference = {"$ref": "#/components/schemas/Submission"}
    assert schema.keys() == {"anyOf"}
    assert sorted(schema["anyOf"], key=len) == [reference, {"type": "array", "items": reference}]
    assert document["components"]["schemas"]["Submission"]["properties"]["params"] == {}
